"""What a stage without dropout cannot show of a checkpoint: random state, and keys that are not the run's own."""

from types import SimpleNamespace

import pytest
import torch

from model import LMConfig, MiniMindLM
from trainer.checkpoint import Checkpoint, Progress
from trainer.runtime import Runtime, Totals
from trainer.schedule import make_optimizer


@pytest.fixture
def run(monkeypatch):
    run = Runtime(torch.device("cpu"), torch.float32)
    monkeypatch.setattr(Runtime, "catch_signals", lambda self: None)
    return run


@pytest.fixture
def open_checkpoint(run, tiny_tokenizer, tmp_path):
    config = LMConfig(dim=32, n_layers=1, n_heads=4, vocab_size=64)

    def make(resume: bool, **how):
        args = SimpleNamespace(
            **{"out_dir": str(tmp_path), "dim": 32, "use_moe": False, "data_path": "data.jsonl", "max_seq_len": 64},
            **{"resume": resume, "overwrite": False, "deepspeed": None, "eval_interval": 0, "eval_path": None},
            **{"learning_rate": 1e-3, "optimizer": "adamw"},
        )
        model = MiniMindLM(config)
        parts = (model, make_optimizer(model, args), torch.amp.GradScaler("cpu", enabled=False))
        return Checkpoint(args, "stage", config, tiny_tokenizer, run, **how), parts

    return make


def test_random_state_goes_on_where_it_was(open_checkpoint):
    checkpoint, parts = open_checkpoint(resume=False)
    torch.manual_seed(5)
    torch.rand(3)
    progress = Progress()
    progress.advance(Totals(1, 1, 1), skipped=0)
    checkpoint.save(*parts, progress, {})
    expected = torch.rand(4)
    del checkpoint  # and its lock
    checkpoint, parts = open_checkpoint(resume=True)
    assert checkpoint.load(*parts).step == 1
    assert torch.equal(torch.rand(4), expected)


def test_only_the_keys_to_keep_are_saved_and_the_others_stay_as_they_are(open_checkpoint, tmp_path):
    def keep(key: str) -> bool:
        return key.startswith("layers.0.attention.")

    checkpoint, parts = open_checkpoint(resume=False, keep=keep, rank=4)
    saved = parts[0].state_dict()
    checkpoint.save(*parts, Progress(step=3), {})
    assert torch.load(tmp_path / "stage_32.pth", weights_only=True).keys() == set(filter(keep, saved))
    del checkpoint  # and its lock
    checkpoint, parts = open_checkpoint(resume=True, keep=keep, rank=4)
    before = {key: value.clone() for key, value in parts[0].state_dict().items()}
    assert checkpoint.load(*parts).step == 3
    for key, value in parts[0].state_dict().items():
        assert torch.equal(value, saved[key] if keep(key) else before[key])


def test_a_parameter_with_two_names_takes_its_place_once(open_checkpoint, tmp_path):
    checkpoint, parts = open_checkpoint(resume=False)
    checkpoint.save(*parts, Progress(step=1), {})
    state = torch.load(tmp_path / "stage_32.pth", weights_only=True)
    assert state["output.weight"].data_ptr() == state["tok_embeddings.weight"].data_ptr()
