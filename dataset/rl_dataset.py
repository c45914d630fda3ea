"""Data for reinforcement learning: questions, each with its right answer; the model generates its own."""

import json
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from transformers import PreTrainedTokenizerFast

from dataset.jsonl import BadRecord, Ignored
from dataset.lm_dataset import RowDataset
from dataset.packing import Pieces
from dataset.records import Turns, parse_question
from dataset.token_cache import Sample
from model.chat import render_chat_arrays
from model.loss import IGNORE_INDEX


class Problem(NamedTuple):
    """A question, as a chat up to the user's last turn, and its right answer."""

    chat: Turns
    answer: str


def parse_problem(record: dict, ignored: Ignored) -> Problem:
    """The problem of a record `{"question" or "conversations", "answer": text or number}`.

    Raises:
        BadRecord: no answer, an answer that is not text or a finite number; or as in `parse_question`.
    """
    if "answer" not in record:
        raise BadRecord('the key "answer" is missing')
    answer = record["answer"]
    if isinstance(answer, bool) or not isinstance(answer, str | int | float):
        raise BadRecord(f'"answer" is {answer!r:.40}, but must be text or a number')
    text = answer if isinstance(answer, str) else json.dumps(answer)
    if not text.strip() or text in ("NaN", "Infinity", "-Infinity"):
        raise BadRecord(f'"answer" is {text!r:.40}, but must be text or a number')
    rest = {name: value for name, value in record.items() if name != "answer"}
    return Problem(parse_question(rest, ignored), text.strip())


class RLDataset(RowDataset):
    """`{"question" or "conversations", "answer"}` lines: a row is a prompt, which ends where the model is to answer.

    An item has `input_ids`, `labels` (all -100: there are no targets), `position_ids`, int64 (n,), and `number`, int64
    (n,), the line's number among the lines read, n times. Rows are never packed.

    Args:
        max_new_tokens: tokens that a prompt must leave free in `max_seq_len`; longer ones are dropped and counted.
    """

    kind = "problem"
    parse = staticmethod(parse_problem)

    def __init__(self, *args, max_new_tokens: int = 1, **settings):
        self._room = max_new_tokens
        super().__init__(*args, **settings)

    @staticmethod
    def encode(tokenizer: PreTrainedTokenizerFast, problems: list[Problem]) -> list[Sample]:
        prompts = render_chat_arrays(tokenizer, [problem.chat for problem in problems], add_generation_prompt=True)
        return [
            (ids, None, {"chat": problem.chat, "answer": problem.answer})
            for (ids, _), problem in zip(prompts, problems, strict=True)
        ]

    def make_pieces(self, samples: np.ndarray) -> Pieces:
        lengths = self.cache.lengths[samples]
        fits = np.flatnonzero(lengths + self._room <= self.max_seq_len)
        if dropped := len(samples) - len(fits):
            self.notes = [(dropped, f"dropped because {self._room} tokens of an answer do not fit after them")]
        return Pieces(fits, np.zeros_like(fits), lengths[fits])

    def __getitem__(self, row: int) -> dict[str, torch.Tensor]:
        item = super().__getitem__(row)
        (piece,) = self._pieces_in(row)
        item["labels"] = torch.full_like(item["labels"], IGNORE_INDEX)
        item["number"] = torch.full_like(item["input_ids"], int(self.pieces.sample[piece]))
        return item

    @property
    def empty_row(self) -> dict[str, torch.Tensor]:
        return super().empty_row | {"number": torch.zeros(0, dtype=torch.int64)}

    @property
    def numbers(self) -> np.ndarray:
        """The numbers of all problems that are kept, int64 (problems,)."""
        return self.pieces.sample

    def prompt(self, number: int) -> list[int]:
        """The ids of a problem's prompt."""
        return self.cache.ids(number, 0, int(self.cache.lengths[number])).tolist()

    def problem(self, number: int) -> Problem:
        """The problem of a line."""
        note = self.cache.note(number)
        return Problem(note["chat"], note["answer"])


def asking_for(max_new_tokens: int) -> partial:
    """The dataset class for answers of up to this many tokens, in the form that `open_data` takes."""
    return partial(RLDataset, max_new_tokens=max_new_tokens)
