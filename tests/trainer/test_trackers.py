"""What is sent to each tracker, all of them offline."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from trainer.arguments import check_training_arguments, training_parser
from trainer.errors import UserError
from trainer.trackers import start_tracker

NOT_UTF8 = b"a\xff".decode("utf-8", "surrogateescape")


@pytest.mark.parametrize("kind", ["wandb", "swanlab"])
def test_names_and_settings_are_text_that_can_be_sent(kind, monkeypatch):
    got = {}
    monkeypatch.setitem(sys.modules, kind, SimpleNamespace(init=lambda **given: got.update(given)))
    args = training_parser("A stage.", batch_size=4).parse_args(["--data_path", NOT_UTF8])
    start_tracker(kind, "tiny", Path(NOT_UTF8 + ".pth"), vars(args), 0)
    assert json.dumps(got, ensure_ascii=False).encode()
    assert got["config"]["data_path"] == got["name"] == "a\\udcff"
    assert (got["config"]["batch_size"], got["project"]) == (4, "tiny")


@pytest.mark.parametrize("kind", ["wandb", "swanlab", "tensorboard"])
def test_one_that_is_not_installed(kind, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard" if kind == "tensorboard" else kind, None)
    with pytest.raises(UserError, match=f"--tracker {kind}: .*; pip install {kind}"):
        start_tracker(kind, "tiny", tmp_path / "pretrain_32.pth", {}, 0)


@pytest.mark.parametrize("kind", ["wandb", "swanlab"])
def test_one_that_does_not_start(kind, monkeypatch, tmp_path):
    def init(**_):
        raise RuntimeError("no account\nand a page more")

    monkeypatch.setitem(sys.modules, kind, SimpleNamespace(init=init))
    expected = rf"--tracker {kind}: no account and a page more \({kind.upper()}_MODE=offline needs no account\)"
    with pytest.raises(UserError, match=expected):
        start_tracker(kind, "tiny", tmp_path / "pretrain_32.pth", {}, 0)


def scalars(folder: Path, name: str) -> dict[int, float]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder))
    events.Reload()
    return {event.step: event.value for event in events.Scalars(name)}


def test_tensorboard_shows_a_run_that_went_on_from_an_earlier_step(tmp_path):
    path = tmp_path / "pretrain_32.pth"
    for start, loss in ((0, 4.0), (2, 1.0)):
        tracker = start_tracker("tensorboard", "tiny", path, {"dim": 32}, start)
        for step in range(start + 1, start + 4):
            tracker.log({"loss": loss, "eval_loss": None}, step)
        tracker.finish()
    assert scalars(tmp_path / "pretrain_32.tensorboard", "loss") == {1: 4.0, 2: 4.0, 3: 1.0, 4: 1.0, 5: 1.0}


def test_two_trackers_are_one_too_many():
    parse = training_parser("A stage.", batch_size=4).parse_args
    check_training_arguments(parse(["--use_wandb", "--tracker", "wandb"]))
    with pytest.raises(UserError, match="--use_wandb means --tracker wandb, which contradicts --tracker swanlab"):
        check_training_arguments(parse(["--use_wandb", "--tracker", "swanlab"]))
