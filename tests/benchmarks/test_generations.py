"""benchmarks/generations.py: both layouts are trained, a finished seed is not repeated, an interrupted one resumes."""

import json
from functools import partial

import pytest
import torch

from benchmarks import generations


@pytest.fixture
def call(compare, monkeypatch):
    monkeypatch.setattr(generations, "SIZES", {"26M": {"dim": 32, "n_layers": 1}})
    return partial(compare, generations, "--minutes", "0.004")


def test_a_table_of_both_grows_seed_by_seed(call, tmp_path):
    first = call()
    assert [line.split()[0] for line in first.splitlines()[-2:]] == ["2", "3"]
    assert "±" not in first
    again = call()
    assert "minutes on cpu" not in again, "nothing is trained twice"
    assert again.splitlines()[-3:] == first.splitlines()[-3:]
    both = call("--seed", "2")
    assert [line.split()[3] for line in both.splitlines()[-2:]] == ["2", "2"]
    assert both.count("±") == 2
    (folder,) = (tmp_path / "out").iterdir()
    results = [json.loads(path.read_text()) for path in folder.glob("generation_*.json")]
    assert sorted((r["generation"], r["seed"]) for r in results) == [(2, 1), (2, 2), (3, 1), (3, 2)]
    assert not list(folder.glob("*.state.pt"))


def test_a_call_that_was_stopped_goes_on(call, tmp_path, monkeypatch):
    def stop(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(generations, "evaluate", stop)
        with pytest.raises(KeyboardInterrupt):
            call()
    (state,) = (tmp_path / "out").glob("*/generation_2_seed_1.state.pt")
    steps = torch.load(state, weights_only=True)["steps"]
    said = call()
    assert f"{steps} steps" in said
    result = json.loads((state.parent / "generation_2_seed_1.json").read_text())
    assert result["steps"] == steps, "its minutes were over"
