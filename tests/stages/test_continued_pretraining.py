"""Continuing from weights with new data, and training on several files at once."""

import itertools

import pytest

from tests.conftest import write_jsonl
from tests.running import one_error_line
from tests.stages.every_script import SCRIPTS, World, make_world
from tests.stages.test_resume import assert_equal, state_of
from tests.stages.training import about, distance, losses, reports, weights

STAGES = {script.name: script for script in SCRIPTS}
MIXING = ("pretrain", "full_sft", "lora/tiny", "full_dist", "reason")
NO_STEP = ("--max_steps", "1", "--learning_rate", "1e-12")


@pytest.fixture(scope="module")
def world(tmp_path_factory, tiny_tokenizer, clip_dir) -> World:
    """A world in which each file of texts and chats is also split into two halves."""
    world = make_world(tmp_path_factory.mktemp("world"), tiny_tokenizer, clip_dir)
    for name in ("texts", "chats", "thoughts"):
        lines = (world.folder / f"{name}.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
        for half, some in (("a", lines[:12]), ("b", lines[12:])):
            (world.folder / f"{name}_{half}.jsonl").write_text("".join(some), encoding="utf-8")
    return world


def halves(world: World, data: str) -> list[str]:
    stem = (world.folder / data).with_suffix("")
    return ["--mix", f"{stem}_a.jsonl:3", f"{stem}_b.jsonl:1"]


def test_pretraining_goes_on_from_the_weights_named_or_begins_with_none(world, tmp_path):
    start = world.folder / "pretrain_32.pth"
    begun = {}
    for name, flags in (("on", ("--from_weight", start)), ("none", ()), ("said", ("--from_weight", "none"))):
        run = world.call(STAGES["pretrain"], tmp_path / name, *NO_STEP, *flags)
        begun[name] = weights(run.out)
        assert about(run.out).get("from_weight") == (str(start) if name == "on" else None)
    assert distance(begun["on"], weights(world.folder)) < 1e-9
    assert distance(begun["none"], begun["on"]) > 0.01
    assert distance(begun["none"], begun["said"]) == 0


def test_a_stage_says_in_its_json_what_it_began_with(world, tmp_path):
    run = world.call(STAGES["full_sft"], tmp_path, *NO_STEP)
    assert about(run.out, run.name)["from_weight"] == "pretrain"


def test_weights_of_another_size_are_refused(world, tmp_path, capsys):
    world.call(STAGES["pretrain"], tmp_path, "--from_weight", world.folder / "teacher.pth", exit_code=2)
    assert "dim 48" in capsys.readouterr().err


@pytest.mark.parametrize("name", MIXING)
def test_every_stage_of_texts_and_chats_learns_from_a_mixture(world, tmp_path, name, capsys):
    stage = STAGES[name]
    mix = halves(world, stage.data)
    run = world.call(stage, tmp_path, *mix)
    told = about(run.out, run.name)
    assert told["mix"] == [[mix[1].removesuffix(":3"), 3.0], [mix[2].removesuffix(":1"), 1.0]]
    assert told["data_path"] is None
    assert "mixed, by tokens: 7" in capsys.readouterr().out
    assert len(losses(run.out, run.name)) == 5


@pytest.fixture(scope="module")
def two_files(tiny_data, tmp_path_factory) -> list:
    """Two pretraining files, and the flag that mixes them."""
    folder = tmp_path_factory.mktemp("two")
    lines = (tiny_data / "pretrain_hq.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    for name, some in (("new", lines[:20]), ("old", lines[20:])):
        (folder / f"{name}.jsonl").write_text("".join(some), encoding="utf-8")
    return [folder, f"{folder}/new.jsonl:0.6", f"{folder}/old.jsonl:0.4"]


def test_a_run_that_replaces_what_it_began_with_and_is_stopped_goes_on_as_if_it_never_had(
    pretrain, tiny_out, two_files, tmp_path
):
    """--from_weight pretrain overwrites the file that it reads; afterwards the last saved state counts."""
    flags = ("--from_weight", "pretrain", "--mix", *two_files[1:], "--epochs", "3")
    outs = [tmp_path / "whole", tmp_path / "stopped"]
    for out, name in itertools.product(outs, ("pretrain_32.pth", "pretrain_32.json")):
        out.mkdir(exist_ok=True)
        (out / name).write_bytes((tiny_out / name).read_bytes())
    assert "already exists" in one_error_line(pretrain(outs[0], *flags, exit_code=2))
    pretrain(outs[0], *flags, "--overwrite")
    assert about(outs[0])["from_weight"] == "pretrain"
    pretrain.interrupted(outs[1], "SIGINT", "log", 3, *flags, "--overwrite", exit_code=130)
    assert distance(weights(outs[1]), weights(tiny_out)) > 1e-6
    done = pretrain(outs[1], *flags, "--resume")
    assert "resumed at step" in done.stdout
    assert_equal(state_of(outs[1]), state_of(outs[0]))
    assert_equal(weights(outs[1]), weights(outs[0]))
    assert reports(outs[1]) == reports(outs[0])


def test_a_mixture_that_has_changed_is_not_gone_on_with(pretrain, two_files, tmp_path):
    folder, *mix = two_files
    pretrain(tmp_path, "--mix", *mix, "--max_steps", "2")
    for other, told in (
        (["--mix", mix[0], f"{folder}/old.jsonl:0.5"], "the shares of --mix"),
        (["--mix", mix[0]], "the saved run used"),
        (["--mix", mix[1], mix[0]], "old.jsonl has changed since"),
        ([], "has changed since"),
    ):
        assert told in one_error_line(pretrain(tmp_path, *other, "--max_steps", "2", "--resume", exit_code=2))
    moved = folder / "moved.jsonl"
    moved.write_bytes((folder / "old.jsonl").read_bytes())
    pretrain(tmp_path, "--mix", mix[0], f"{moved}:0.4", "--max_steps", "2", "--resume")


def test_a_bad_line_is_told_with_the_file_of_the_mixture_that_has_it(world, tmp_path, capsys):
    bad = write_jsonl(tmp_path / "bad.jsonl", [{"text": "fine"}, {"txt": "typo"}])
    world.call(STAGES["pretrain"], tmp_path, *halves(world, "texts.jsonl"), f"{bad}:1", exit_code=2)
    assert "bad.jsonl, line 2: " in capsys.readouterr().err
