"""Shared by scripts that train and evaluate: running a stage, reading questions, generating many answers at once."""

import hashlib
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from model import MiniMindLM
from model.chat import render_chats
from trainer.arguments import ROOT
from trainer.device import pick_device
from trainer.errors import UserError
from trainer.files import save_json
from trainer.loading import load_for_inference


def run(script: str, *arguments: str) -> None:
    """Run a script of the repository, with its output visible to the user.

    Raises:
        UserError: it failed, and has printed the reason.
    """
    print(f"\n$ python {script} {' '.join(arguments)}", flush=True)
    done = subprocess.run([sys.executable, str(ROOT / script), *arguments], check=False)
    if done.returncode:
        raise UserError(f"{script} ended with exit code {done.returncode}; run the same command to continue")


class Results(dict[str, dict]):
    """Measurements by name, kept in a json file: another call reads them and measures only what is missing."""

    def __init__(self, file: Path):
        super().__init__(json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {})
        self.file = file

    def keep(self, name: str, measured: dict) -> dict:
        """Add a measurement, or replace it, and save them all; returns it."""
        self[name] = measured
        save_json(self, self.file)
        return measured


def read_lines(path: Path) -> list[dict]:
    """All lines of a jsonl file."""
    with open(path, encoding="utf-8") as file:  # which splits at line ends alone, and str.splitlines at U+2028, too
        return [json.loads(line) for line in file]


def identify_training(weights: Path) -> str:
    """Identifies a training of these weights, by the json beside them; empty if there is none."""
    about = weights.with_suffix(".json")
    return hashlib.sha256(about.read_bytes()).hexdigest()[:16] if about.is_file() else ""


def open_model(weights: Path) -> tuple[MiniMindLM, PreTrainedTokenizerBase]:
    """A model for inference and its tokenizer, on a GPU if there is one."""
    model, tokenizer = load_for_inference(weights)
    return model.to(pick_device(None)), tokenizer


def left_padded(rows: Sequence[Sequence[int]]) -> Tensor:
    """Rows of different lengths as one int64 tensor (rows, longest), with zeros before the shorter ones."""
    longest = max(map(len, rows))
    return torch.tensor([[0] * (longest - len(row)) + list(row) for row in rows])


def answer(
    model: MiniMindLM,
    tokenizer: PreTrainedTokenizerBase,
    questions: Sequence[str],
    batch_size: int = 128,
    max_new_tokens: int = 48,
    **sampling,
) -> tuple[list[str], int]:
    """Answers to single questions, and the number of answers that ended by themselves with `</s>`.

    Args:
        sampling: temperature, top_p, … as for `generate`; default: greedy.
    """
    chats = [[{"role": "user", "content": question}] for question in questions]
    prompts = [ids for ids, _ in render_chats(tokenizer, chats, add_generation_prompt=True)]
    replies: list[str] = [""] * len(prompts)
    ended = 0
    by_length = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    for start in range(0, len(by_length), batch_size):
        chosen = by_length[start : start + batch_size]
        ids = left_padded([prompts[i] for i in chosen]).to(model.device)
        mask = left_padded([[1] * len(prompts[i]) for i in chosen]).to(model.device)
        written = model.generate(ids, mask, max_new_tokens=max_new_tokens, **sampling)[:, ids.size(1) :].tolist()
        for i, tokens in zip(chosen, written, strict=True):
            if tokenizer.eos_token_id in tokens:
                tokens = tokens[: tokens.index(tokenizer.eos_token_id)]
                ended += 1
            replies[i] = tokenizer.decode(tokens)
    return replies, ended
