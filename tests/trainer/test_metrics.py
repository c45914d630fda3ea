"""The metrics file and the curve: what a crash or a number that is none cannot spoil."""

import json
from types import SimpleNamespace

import pytest
import torch

from trainer.checkpoint import Progress
from trainer.metrics import Metrics, draw_curve, read_metrics
from trainer.runtime import Runtime


def test_a_line_that_a_crash_cut_off_is_left_out(tmp_path):
    path = tmp_path / "a.metrics.jsonl"
    assert read_metrics(path) == []
    path.write_text('{"step": 1, "loss": 2.0}\n[3]\n{"loss": 1}\n\x00\x00\n{"step": 2, "loss": 1.5}\n{"step": 3, "lo')
    assert read_metrics(path) == [{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.5}]


def test_a_curve_of_what_there_is(tmp_path):
    path = tmp_path / "stage_32.metrics.jsonl"
    assert draw_curve(path) is None
    path.write_text('{"step": 1, "loss": null}\n')
    assert draw_curve(path) is None
    lines = [{"step": n, "loss": 3 / n} for n in range(1, 9)] + [{"step": 9, "loss": None}, {"step": 8, "eval_loss": 1}]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    image = draw_curve(path)
    assert image == tmp_path / "stage_32.png"
    assert image.read_bytes().startswith(b"\x89PNG")


@pytest.fixture
def metrics(tmp_path):
    """Metrics of a run of 10 steps that goes on after step `at`."""
    args = SimpleNamespace(dtype="float32", use_wandb=False)
    run = Runtime(torch.device("cpu"), torch.float32)

    def start(at: int) -> Metrics:
        return Metrics(args, tmp_path / "a.pth", torch.nn.Linear(2, 2), 10, Progress(step=at), run)

    return start


def test_what_is_due(metrics):
    """Every so many steps, at the end, and when the run is stopped."""
    due = []
    for step in range(1, 11):
        due += [step] * metrics(step).due(4)
    assert due == [4, 8, 10]
    assert metrics(3).due(4, stopping=True)


def test_a_run_that_goes_on_drops_what_was_reported_after_its_checkpoint(metrics, tmp_path):
    first = metrics(0)
    for step in range(1, 5):
        first.progress.step = step
        first.log(loss=float(step), lr=1e-3, grad_norm=1.0)
    again = metrics(2)
    again.progress.step = 3
    again.log(loss=30.0, lr=1e-3, grad_norm=float("nan"))
    lines = read_metrics(tmp_path / "a.metrics.jsonl")
    assert [(line["step"], line["loss"]) for line in lines] == [(1, 1.0), (2, 2.0), (3, 30.0)]
    assert lines[-1]["grad_norm"] is None
    new = metrics(0)
    new.progress.step = 1
    new.log(loss=9.0, lr=1e-3, grad_norm=1.0)
    assert [line["loss"] for line in read_metrics(tmp_path / "a.metrics.jsonl")] == [9.0]
