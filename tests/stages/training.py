"""Shared by the tests of the training stages: running a stage on the tiny data, and reading its results."""

import json
from collections.abc import Callable
from pathlib import Path

import torch

from tests.running import TINY_TRAINING, RunningScript, run_script
from trainer.metrics import read_metrics

MEASURED = ("seconds", "tokens_per_second")  # fields that differ from run to run


def weights(out: Path, name: str = "pretrain_32") -> dict[str, torch.Tensor]:
    """The weights that a stage saved, read with torch.load."""
    return torch.load(out / f"{name}.pth", weights_only=True)


def distance(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> float:
    """The largest difference between any two corresponding weights."""
    assert ours.keys() == theirs.keys()
    return max((ours[key] - theirs[key]).abs().max().item() for key in ours)


def reports(out: Path, name: str = "pretrain_32") -> list[dict]:
    """The lines of the metrics file, without fields that depend on the machine's speed."""
    lines = read_metrics(out / f"{name}.metrics.jsonl")
    return [{key: value for key, value in line.items() if key not in MEASURED} for line in lines]


def losses(out: Path, name: str = "pretrain_32") -> list[float]:
    return [line["loss"] for line in reports(out, name) if "loss" in line]


def about(out: Path, name: str = "pretrain_32") -> dict:
    """The json beside the weights."""
    return json.loads((out / f"{name}.json").read_text(encoding="utf-8"))


def snapshot(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, except the lock and its owner's name."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name not in ("lock", "lock.owner")
    }


class Stage:
    """A training stage with flags that make it tiny; call it with an --out_dir and further flags."""

    def __init__(self, script: str, *common: str | Path):
        self.script = script
        self.common = (*TINY_TRAINING, *common)
        self.data_path = common[common.index("--data_path") + 1]

    def __call__(self, out: Path, *flags: str | Path, by: Callable = run_script, before: tuple = (), **how):
        """Run it to its end by `run_script`, or start it with `by=RunningScript`; `before` precedes its name."""
        first, *others = (*before, self.script)
        return by(first, *others, *self.common, "--out_dir", out, *flags, **how)

    def interrupted(self, out: Path, signal: str, place: str, nth: int, *flags: str | Path, **how):
        """Run it until a signal strikes; see tests/stages/crash_points.py."""
        return self(out, *flags, before=("tests/stages/crash_points.py", signal, place, str(nth)), **how)

    def started(self, out: Path, *flags: str | Path, **how) -> RunningScript:
        return self(out, *flags, by=RunningScript, **how)
