"""Shared by benchmarks that train models and compare them: compute time, data, and the results of all calls."""

import json
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import mean, stdev

import torch
from transformers import PreTrainedTokenizerBase

from dataset import PretrainDataset
from trainer.errors import UserError
from trainer.files import replacing

SAVE_EVERY = 60.0  # seconds of computing


def computed(device: torch.device) -> float:
    """Seconds: CPU time of all threads on a CPU; elsewhere wall-clock time, after the device has finished."""
    if device.type == "cpu":
        return time.process_time()
    torch.ones(1, device=device).item()  # waits
    return time.monotonic()


def open_texts(
    path: str | Path, tokenizer: PreTrainedTokenizerBase, max_seq_len: int, **how
) -> tuple[PretrainDataset, PretrainDataset]:
    """Rows to train on, and every hundredth sample, held out.

    Raises:
        UserError: too few samples to hold any out.
    """
    rows, held_out = (PretrainDataset(path, tokenizer, max_seq_len, part=part, **how) for part in ("train", "eval"))
    if not len(held_out):
        raise UserError(f"{path} has fewer than 200 samples: none is held out")
    return rows, held_out


def read_results(folder: Path) -> list[dict]:
    """The results of all calls so far in a folder, in the order of their file names."""
    return [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*_seed_*.json"))]


def spread(values: Sequence[float], form: str) -> str:
    """Mean and, of several values, standard deviation, each in the number format `form`."""
    return f"{mean(values):{form}}" + (f" ± {stdev(values):{form}}" if len(values) > 1 else "")


def save_table(said: str, file: Path) -> None:
    with replacing(file) as temporary:
        temporary.write_text(said + "\n", encoding="utf-8")
