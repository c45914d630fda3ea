"""Data for pretraining and fine-tuning: rows of tokens, with labels, and positions that restart at every sample."""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerFast

from dataset.jsonl import DataError, Ignored, named_counts
from dataset.packing import Pieces, cut_long, pack, split_long
from dataset.records import parse_chat, parse_text
from dataset.token_cache import Sample, open_token_cache
from model.chat import render_chat_arrays, render_text_arrays
from model.loss import IGNORE_INDEX

MAX_EVAL_SAMPLES = 500


class RowDataset(Dataset):
    """Rows of tokens over a token cache; a subclass defines what a line is and how a long sample is handled.

    An item is one row: a dict of `input_ids`, `labels`, `position_ids`, int64 (n,), 2 <= n <= max_seq_len.
    `labels[t]` is `input_ids[t]` if that token is a target, else -100 (the model does the shift); the first token
    of a sample never is. `position_ids` restart at 0 where a sample starts.

    Args:
        data_path: a jsonl file; `dataset/records.py` describes its lines.
        tokenizer: encodes the lines; needed only at construction.
        max_seq_len: the longest sample in tokens, at least 2; a row has this length, times the number of samples per
            line (`group`).
        packing: put as many samples into a row as fit; otherwise one.
        skip_bad_lines: leave bad lines out and count them, instead of stopping at the first.
        seed: determines which samples share a row.
        part: "all" samples, or those of "train" or "eval" by `split_samples`.

    Attributes:
        max_seq_len: the longest row in tokens.
        rows_key: the values that determine the rows, as JSON values.
        pieces: the samples after splitting or cutting, in file order; the rows consist of them.
        summary: one line to print at the start of a run: samples, tokens, rows; what was split, cut, dropped, skipped,
            and which keys of the lines were ignored.

    Raises:
        DataError: the file is missing, empty or has a bad line; no targets are left ("eval" is empty then).
        ValueError: max_seq_len below 2.
    """

    kind: str
    unit, group = "samples", 1  # what a line is, and how many samples it gives, which then share a row
    parse: Callable[[dict, Ignored], object]
    encode: Callable[[PreTrainedTokenizerFast, list], list[Sample]]
    cut: Callable[[np.ndarray, np.ndarray, int], Pieces]  # of samples' lengths, first targets, and the longest piece
    notes: Sequence[tuple[int, str]] = ()  # for the summary, what a subclass has to say beyond the usual

    def __init__(
        self,
        data_path: str | Path,
        tokenizer: PreTrainedTokenizerFast,
        max_seq_len: int = 512,
        packing: bool = True,
        skip_bad_lines: bool = False,
        seed: int = 42,
        part: str = "all",
    ):
        if max_seq_len < 2:
            raise ValueError(f"max_seq_len is {max_seq_len}, but a row needs 2 tokens: an input and a target")
        self.data_path = Path(data_path)
        self.max_seq_len = self.group * max_seq_len
        self.packing = packing
        self.cache = open_token_cache(
            data_path, tokenizer, self.kind, self.parse, partial(self.encode, tokenizer), skip_bad_lines
        )
        self.rows_key = [self.cache.folder.name, self.cache.data_sha256, max_seq_len, packing, seed, part]
        samples = self._grouped(split_samples(part, len(self.cache) // self.group))
        pieces = self.make_pieces(samples)
        self.pieces = pieces._replace(sample=samples[pieces.sample])
        lengths = pieces.length.reshape(-1, self.group).sum(1)
        if packing:
            order, bounds = pack(lengths, self.max_seq_len, seed)
        else:
            order, bounds = np.arange(len(lengths)), np.arange(len(lengths) + 1)
        self._order, self._bounds = self._grouped(order), bounds * self.group
        if not len(self) and part != "eval":
            raise DataError(f"{data_path}: no sample has a target within {max_seq_len} tokens")
        self.summary = f"{data_path}: {self._summary(samples, pieces, max_seq_len)}"

    @property
    def identity(self) -> dict:
        """The origin of the rows as JSON values, independent of its path: the hash of the data file's bytes."""
        return {"sha256": self.cache.data_sha256}

    def changed_since(self, identity: dict) -> str | None:
        """A description of what has changed since `identity` was saved; None if nothing has."""
        if "position" in identity:
            return "the saved run used --stream, but this one does not"
        ours = self.cache.data_sha256
        if identity.get("sha256", ours) == ours:
            return None
        return f"{self.data_path} has changed since the saved run began"

    def make_pieces(self, samples: np.ndarray) -> Pieces:
        """The pieces of these samples, numbered from 0."""
        return self.cut(self.cache.lengths[samples], self.cache.first_target[samples], self.max_seq_len)

    def _grouped(self, places: np.ndarray) -> np.ndarray:
        """The indices of the samples in these groups, group after group."""
        return (places[:, None] * self.group + np.arange(self.group)).ravel()

    def __len__(self) -> int:
        return len(self._bounds) - 1

    @property
    def row_tokens(self) -> np.ndarray:
        """The number of tokens in each row, int64 (rows,)."""
        ends = np.concatenate([[0], np.cumsum(self.pieces.length[self._order])])[self._bounds]
        return np.diff(ends)

    def __getitem__(self, row: int) -> dict[str, torch.Tensor]:
        pieces = [self.piece(number) for number in self._pieces_in(row)]
        names = ("input_ids", "labels", "position_ids")
        return {
            name: torch.from_numpy(np.concatenate(parts))
            for name, parts in zip(names, zip(*pieces, strict=True), strict=True)
        }

    @property
    def empty_row(self) -> dict[str, torch.Tensor]:
        """A row without tokens, to fill up a micro-batch."""
        return {name: torch.zeros(0, dtype=torch.int64) for name in ("input_ids", "labels", "position_ids")}

    def _pieces_in(self, row: int) -> np.ndarray:
        if not -len(self) <= row < len(self):
            raise IndexError(f"row {row} of {len(self)}")
        row %= len(self)
        return self._order[self._bounds[row] : self._bounds[row + 1]]

    def piece(self, number: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Ids, labels and positions of a piece, each int64 (length,)."""
        sample, start, length = (field[number] for field in self.pieces)
        ids = self.cache.ids(sample, start, length)
        labels = np.where(self.cache.targets(sample, start, length), ids, IGNORE_INDEX)
        labels[0] = IGNORE_INDEX  # nothing in the row comes before it that could predict it
        return ids, labels, np.arange(length)

    def _summary(self, samples: np.ndarray, pieces: Pieces, max_len: int) -> str:
        """The start-up report on these samples and the pieces that they were split into."""
        lengths = self.cache.lengths[samples]
        used, pieces_each = np.unique(pieces.sample, return_counts=True)
        split = pieces_each > 1
        cut = int((lengths[used] > max_len)[~split].sum())
        dropped = (len(samples) - len(used)) // self.group - sum(count for count, _ in self.notes)
        tokens = int(pieces.length.sum())
        parts = [f"{len(used) // self.group:,} {self.unit}", f"{tokens:,} tokens", f"{len(self):,} rows"]
        if self.packing and len(self):
            parts.append(f"{tokens / (len(self) * self.max_seq_len):.1%} of {self.max_seq_len} filled")
        notes = [
            (int(split.sum()), "split across rows"),
            (cut, f"cut at {max_len} tokens"),
            (dropped, "dropped without targets"),
            *self.notes,
        ]
        parts += [f"{count:,} {note}" for count, note in notes if count]
        if self.cache.ignored:
            parts.append(f"ignored keys: {named_counts(self.cache.ignored)}")
        if self.cache.bad_lines:
            parts.append(f"{self.cache.bad_lines:,} bad lines skipped, the first: {self.cache.bad_reports[0]}")
        return ", ".join(parts)


class PretrainDataset(RowDataset):
    """`{"text": …}` lines: every token but a sample's first is a target; samples longer than a row are split."""

    kind = "text"
    parse = staticmethod(parse_text)

    @staticmethod
    def encode(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> list[Sample]:
        return [(ids, None) for ids in render_text_arrays(tokenizer, texts)]

    @staticmethod
    def cut(lengths: np.ndarray, first_target: np.ndarray, max_len: int) -> Pieces:
        return split_long(lengths, max_len)


class SFTDataset(RowDataset):
    """`{"conversations": […]}` lines: assistant turns are the targets; samples longer than a row are truncated."""

    kind = "chat"
    parse = staticmethod(parse_chat)
    encode = staticmethod(render_chat_arrays)
    cut = staticmethod(cut_long)


def split_samples(part: str, n_samples: int) -> np.ndarray:
    """The indices of a part's samples in a file, ascending, int64 (samples in the part,).

    "eval" is every hundredth sample, at most 500, evenly spread over the file, or none if it has fewer than 200;
    "train" is the rest, "all" is both.

    Raises:
        ValueError: another part.
    """
    n_eval = min(n_samples // 100, MAX_EVAL_SAMPLES) if n_samples >= 200 else 0
    kept_aside = np.arange(n_eval) * n_samples // max(n_eval, 1)
    everything = np.arange(n_samples)
    if part == "all":
        return everything
    if part == "train":
        return np.delete(everything, kept_aside)
    if part == "eval":
        return kept_aside
    raise ValueError(f"part is {part!r}, not one of 'all', 'train', 'eval'")
