"""benchmarks/time_to_loss.py: every variant trains, an interrupted call resumes to the same weights, and the table
compares variants seed by seed."""

import json
from functools import partial

import pytest

from benchmarks import time_to_loss
from trainer.errors import UserError


@pytest.fixture
def call(compare, monkeypatch):
    monkeypatch.setattr(time_to_loss, "SIZES", {"7M": {"dim": 32, "n_layers": 1}})
    return partial(compare, time_to_loss, "--tokens", "640", "--batch_size", "2", "--warmup_iters", "1")


def results(tmp_path) -> dict:
    return {path.stem: json.loads(path.read_text()) for path in (tmp_path / "out").glob("*/*.json")}


def test_every_variant_learns_from_equally_many_tokens_in_a_way_of_its_own(call, tmp_path):
    plain = [name for name in time_to_loss.VARIANTS if not name.startswith(("normuon_", "all"))]
    for variant in plain:
        said = call("--variant", variant)
    found = results(tmp_path)
    assert len({(result["steps"], result["tokens"]) for result in found.values()}) == 1
    losses = {name: round(result["eval_loss"], 6) for name, result in found.items()}
    assert len(set(losses.values())) == len(plain), losses
    assert {line.split()[0] for line in said.splitlines()[-len(found) :]} == set(plain)
    assert "on cpu" not in call("--variant", "adamw"), "nothing is trained twice"
    assert "on cpu" not in call("--table", "--seed", "9")


def test_a_stopped_call_goes_on_to_the_same_numbers(call, tmp_path, monkeypatch):
    flags = ("--variant", "normuon_wsd", "--seed", "3")
    call(*flags)
    (whole,) = results(tmp_path).values()
    (file,) = (tmp_path / "out").glob("*/*.json")
    file.unlink()
    losses = iter([None] * 4)
    next_token_loss = time_to_loss.next_token_loss

    def stop(*given):
        if next(losses, "over") == "over":
            raise KeyboardInterrupt
        return next_token_loss(*given)

    with monkeypatch.context() as patched:
        patched.setattr(time_to_loss, "SAVE_EVERY", 0.0)  # after every step
        patched.setattr(time_to_loss, "next_token_loss", stop)
        with pytest.raises(KeyboardInterrupt):
            call(*flags)
    assert not results(tmp_path)
    assert "continuing after step 4" in call(*flags)
    (again,) = results(tmp_path).values()
    same = ("steps", "tokens", "eval_loss", "eval_bits_per_byte")
    assert {name: again[name] for name in same} == {name: whole[name] for name in same}
    assert not list((tmp_path / "out").glob("*/*.state.pt"))


def result(variant: str, seed: int, bits: float) -> dict:
    return {
        **{"variant": variant, "seed": seed, "eval_bits_per_byte": bits, "seconds": 100.0},
        **{"optimizer_seconds": 25.0 if variant == "muon" else 5.0},
    }


def test_the_table_compares_seed_by_seed_and_the_best_comes_first():
    seen = [("muon", 1, 2.0), ("muon", 2, 3.0), ("adamw", 1, 2.5), ("adamw", 2, 3.7), ("polar", 2, 2.4)]
    head, *rows = time_to_loss.table([result(*one) for one in seen]).splitlines()
    assert head.split()[:2] == ["variant", "seeds"]
    assert [row.split() for row in rows] == [
        ["polar", "1", "2.4000", "-0.6000", "100", "5.0%"],
        ["muon", "2", "2.5000", "±", "0.7071", "100", "25.0%"],
        ["adamw", "2", "3.1000", "±", "0.8485", "0.6000", "±", "0.1414", "100", "5.0%"],
    ]


def test_a_table_of_nothing_and_texts_that_are_not_there_are_told(call):
    with pytest.raises(UserError, match="holds no results yet"):
        call("--table")
    with pytest.raises(UserError, match="nowhere is missing"):
        call("--data_path", "nowhere")
