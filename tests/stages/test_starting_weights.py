"""The three forms of a WEIGHTS flag, in real runs: a stage or name in --out_dir, a .pth, a transformers folder."""

import dataclasses
import re

import pytest
import torch

from model import LMConfig, MiniMindLM
from model.images import image_token_id
from model.model_vlm import MiniMindVLM, VLMConfig
from scripts.formats.transformers_folder import write_folder
from tests.stages.every_script import SCRIPTS, STUDENT, World, make_world
from tests.stages.training import about, distance, weights
from trainer.weights import load_tokenizer

AFTER_ANOTHER = tuple(script for script in SCRIPTS if script.name != "pretrain")
ONE_STEP = ("--max_steps", "1")


@pytest.fixture(scope="module")
def world(tmp_path_factory, tiny_tokenizer, clip_dir) -> World:
    """A world with folders beside the files: one from `to-transformers`, a vision model's, and the teacher's."""
    world = make_world(tmp_path_factory.mktemp("world"), tiny_tokenizer, clip_dir)
    tokenizer, folder = load_tokenizer(world.folder / "tokenizer"), world.folder
    sizes = {"vocab_size": len(tokenizer), "image_token_id": image_token_id(tokenizer)}
    llm = MiniMindLM(LMConfig(**STUDENT, vocab_size=len(tokenizer)))
    llm.load_state_dict(torch.load(folder / "full_sft_32.pth", weights_only=True))
    write_folder(llm, tokenizer, folder / "llama")
    vlm = MiniMindVLM(VLMConfig(**STUDENT, **sizes), folder / "clip")
    vlm.load_state_dict(torch.load(folder / "pretrain_vlm_32.pth", weights_only=True))
    vlm.save_pretrained(folder / "seeing")
    teacher = MiniMindLM(LMConfig(dim=48, n_layers=1, vocab_size=len(tokenizer)))
    teacher.load_state_dict(torch.load(folder / "teacher.pth", weights_only=True))
    teacher.save_pretrained(folder / "teaching")
    for name in ("seeing", "teaching"):
        tokenizer.save_pretrained(folder / name)
    return world


@pytest.mark.parametrize("script", AFTER_ANOTHER, ids=lambda script: script.name)
def test_every_stage_starts_the_same_from_a_stage_and_from_a_folder(world, tmp_path, script):
    run = world.call(script, tmp_path / "stage", *ONE_STEP)
    folder = world.folder / ("seeing" if script.name == "sft_vlm" else "llama")
    again = world.call(script, tmp_path / "folder", *ONE_STEP, "--from_weight", folder)
    assert distance(weights(run.out, run.name), weights(again.out, again.name)) == 0
    if key := {"lora/tiny": "base", "rlhf": "reference"}.get(script.name):
        assert about(again.out, again.name)[key] == "llama"


def test_a_whole_name_and_a_path_are_the_same_weights(world, tmp_path):
    script = next(script for script in SCRIPTS if script.name == "full_sft")
    forms = {"stage": "pretrain", "name": "pretrain_32", "path": world.folder / "pretrain_32.pth"}
    runs = [world.call(script, tmp_path / form, *ONE_STEP, "--from_weight", forms[form]) for form in forms]
    first, *others = [weights(run.out, run.name) for run in runs]
    assert [distance(first, other) for other in others] == [0, 0]


def test_a_teacher_is_named_in_the_same_ways(world, tmp_path):
    script = next(script for script in SCRIPTS if script.name == "full_dist")
    script = dataclasses.replace(script, flags=())
    taught = []
    for form in ("teacher", world.folder / "teacher.pth", world.folder / "teaching"):
        out = tmp_path / str(len(taught))
        run = world.call(script, out, *ONE_STEP, "--teacher_weight", form)
        taught.append((weights(run.out, run.name), about(run.out, run.name)["teacher_hash"]))
    (first, known), *others = taught
    assert [(distance(first, state), told == known) for state, told in others] == [(0, True), (0, True)]


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (("--dim", "64"), r"llama has dim 32, hidden_dim 128 according to its config\.json, .*give --dim 32$"),
        (("--n_layers", "3"), r"according to its config\.json, but the flags ask for n_layers 3: give --n_layers 2$"),
        (("--use_moe", "--overwrite"), r"has use_moe False according to its config\.json, .*give --no-use_moe$"),
        (("--tokenizer", "other"), r"llama has its own tokenizer.*give the right folder with --tokenizer$"),
        (("--from_weight", "images"), r"images/config\.json is missing: this is not a transformers model folder$"),
        (("--from_weight", "seeing"), r"unexpected: vision_proj.* \(it is a vision-language model\)$"),
    ],
)
def test_a_folder_that_does_not_fit_is_told_in_one_line(world, plain_tokenizer, tmp_path, capsys, flags, told):
    plain_tokenizer.save_pretrained(world.folder / "other")
    flags = [world.folder / flag if (world.folder / flag).is_dir() else flag for flag in flags]
    script = next(script for script in SCRIPTS if script.name == "full_sft")
    world.call(script, tmp_path, "--from_weight", world.folder / "llama", *flags, exit_code=2)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert re.search(told, line), line
