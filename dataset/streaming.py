"""Training rows from any number of files of any size, read during training: nothing is cached or kept.

The files are divided into blocks of equal length. Each epoch takes the blocks in its own order, and reads them window
by window: the lines of a window's blocks, from different places in the data, are tokenised, split or cut, packed and
shuffled together. A window depends only on the data, the seed and its number, so that any process can make any window:
the workers of a rank take turns, and so do the ranks, which exchange what they have read. All see the same rows in the
same order, whatever the number of workers and ranks, and a resumed run reads one window again.
"""

import math
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch.utils.data import Dataset, IterableDataset, get_worker_info
from transformers import PreTrainedTokenizerFast

from dataset.jsonl import BadRecord, DataError, excerpt, named_counts, parse_object
from dataset.lm_dataset import MAX_EVAL_SAMPLES, RowDataset
from dataset.packing import Pieces, pack
from dataset.shapes import line_advice
from dataset.shards import Blocks, Shard, hash_shards, is_remote, list_shards
from dataset.token_cache import BATCH_BYTES, BATCH_RECORDS, find_first_target
from model.loss import IGNORE_INDEX

LEAST_BLOCK, LARGEST_BLOCK = 1 << 12, 1 << 18  # bytes
BLOCKS_WANTED = 2048  # of small data, so that its blocks, too, can be shuffled
HELD_OUT_BYTES = 1 << 21  # at most; and at most a hundredth of the blocks
BOM = b"\xef\xbb\xbf"


class Read(NamedTuple):
    """Counts of what was read: samples, split, cut and dropped ones, bad lines and the first of them, and keys without
    a meaning here."""

    samples: int = 0
    split: int = 0
    cut: int = 0
    dropped: int = 0
    bad_lines: int = 0
    first_bad: str = ""
    ignored: Counter = Counter()  # noqa: RUF012 - never changed

    def __add__(self, other: "Read") -> "Read":
        counts = (ours + theirs for ours, theirs in zip(self[:5], other[:5], strict=True))
        return Read(*counts, self.first_bad or other.first_bad, self.ignored + other.ignored)

    def __str__(self) -> str:
        parts = [f"{self.samples:,} samples read"]
        notes = ((self.split, "split across rows"), (self.cut, "cut"), (self.dropped, "dropped without targets"))
        parts += [f"{count:,} {note}" for count, note in notes if count]
        if self.ignored:
            parts.append(f"ignored keys: {named_counts(self.ignored)}")
        if self.bad_lines:
            parts.append(f"{self.bad_lines:,} bad lines skipped, the first: {self.first_bad}")
        return ", ".join(parts)


class Window(NamedTuple):
    """Rows that were read together.

    tokens: the tokens of all rows, joined, uint16 or uint32 (tokens,).
    targets: whether each is a target, bool (tokens,); None: all are.
    lengths: number of tokens in each piece, int64 (pieces,).
    bounds: row r has pieces bounds[r] … bounds[r + 1], int64 (rows + 1,).
    read: the counts of reading it.
    """

    tokens: np.ndarray
    targets: np.ndarray | None
    lengths: np.ndarray
    bounds: np.ndarray
    read: Read

    @property
    def rows(self) -> int:
        return len(self.bounds) - 1

    def row(self, number: int) -> dict[str, torch.Tensor]:
        """A row in the form of `RowDataset`'s."""
        first, last = self.bounds[number : number + 2]
        lengths = self.lengths[first:last]
        begin = int(self.lengths[:first].sum())
        end = begin + int(lengths.sum())
        starts = np.cumsum(lengths) - lengths  # of each piece in the row
        ids = self.tokens[begin:end].astype(np.int64)
        labels = ids.copy() if self.targets is None else np.where(self.targets[begin:end], ids, IGNORE_INDEX)
        labels[starts] = IGNORE_INDEX  # nothing in the row comes before them that could predict them
        positions = np.arange(end - begin) - np.repeat(starts, lengths)
        return {
            name: torch.from_numpy(column)
            for name, column in (("input_ids", ids), ("labels", labels), ("position_ids", positions))
        }


class Fault(NamedTuple):
    """The reason why a window cannot be read."""

    reason: str


class StreamedRows:
    """The rows of a stream, window by window; see `StreamLoader`.

    Args:
        data_path: a file, a folder, a pattern with *, or an address that fsspec reads.
        dataset_class: defines what a line is, and how a long sample is handled.
        max_seq_len, packing, skip_bad_lines, seed: as in `RowDataset`.
        buffer_bytes: the size of a window, whose text is shuffled together.
        hold_out: hold some blocks out, see `held_out`.

    Attributes:
        position: the next row, as "window" and "row" in it, JSON values; set it to resume a run.
        windows: the number of windows per epoch.
        summary: one line to print at the start of a run.

    Raises:
        DataError: there is nothing to read.
        ValueError: max_seq_len below 2.
    """

    def __init__(
        self,
        data_path: str,
        tokenizer: PreTrainedTokenizerFast,
        dataset_class: type[RowDataset],
        max_seq_len: int = 512,
        packing: bool = True,
        skip_bad_lines: bool = False,
        seed: int = 42,
        buffer_bytes: int = 8 << 20,
        hold_out: bool = False,
    ):
        if max_seq_len < 2:
            raise ValueError(f"max_seq_len is {max_seq_len}, but a row needs 2 tokens: an input and a target")
        self.data_path = data_path
        self.max_seq_len, self.packing, self.seed = max_seq_len, packing, seed
        self._tokenizer, self._class, self._skip_bad_lines = tokenizer, dataset_class, skip_bad_lines
        self._dtype = np.uint16 if len(tokenizer) <= 1 << 16 else np.uint32
        shards = list_shards(data_path)
        self._sha256 = hash_shards(shards)
        size = sum(shard.size for shard in shards)
        self._blocks = Blocks(shards, min(max(size // BLOCKS_WANTED, LEAST_BLOCK), LARGEST_BLOCK))
        order = np.random.default_rng(seed).permutation(len(self._blocks))
        apart = min(len(order) // 100, HELD_OUT_BYTES // self._blocks.block_bytes) if hold_out else 0
        self._held_out, self._learned = order[:apart], np.sort(order[apart:])
        self._window_blocks = max(1, buffer_bytes // self._blocks.block_bytes)
        self.windows = math.ceil(len(self._learned) / self._window_blocks)
        self._epoch, self._order = -1, self._learned
        self.position = {"window": 0, "row": 0}
        files = f"{len(shards):,} files" if len(shards) > 1 else "1 file"
        self.summary = (
            f"{data_path}: streamed from {files}, {size / 1e6:,.1f} MB, {self.windows:,} windows of "
            f"{self._window_blocks} x {self._blocks.block_bytes / 1024:g} KiB in an epoch"
        )

    @property
    def identity(self) -> dict:
        """The origin of the rows and the position of the next one, as JSON values."""
        return {"sha256": self._sha256, "position": dict(self.position)}

    def changed_since(self, identity: dict) -> str | None:
        """A description of what has changed since `identity` was saved; None if nothing has."""
        if "position" not in identity:
            return "the saved run did not --stream its data"
        if identity.get("sha256") == self._sha256:
            return None
        return f"{self.data_path} has changed since the saved run began"

    @property
    def empty_row(self) -> dict[str, torch.Tensor]:
        """A row without tokens, to fill up a micro-batch."""
        return {name: torch.zeros(0, dtype=torch.int64) for name in ("input_ids", "labels", "position_ids")}

    def held_out(self) -> "ListedRows | None":
        """The rows of the held-out blocks, in which no line for training begins, from at most 500 samples. None if
        there is too little data to hold out a block.

        Raises:
            DataError: there is a bad line.
        """
        window = self._read(self._held_out, (self.seed,), MAX_EVAL_SAMPLES)
        return ListedRows(window, self) if window.rows else None

    def window(self, number: int) -> Window | Fault:
        """A window, numbered from 0 through all epochs, or the reason why it cannot be read."""
        epoch, place = divmod(number, self.windows)
        if epoch != self._epoch:
            shuffled = np.random.default_rng((self.seed, epoch)).permutation(self._learned)
            self._epoch, self._order = epoch, shuffled
        begin = place * self._window_blocks
        try:
            return self._read(self._order[begin : begin + self._window_blocks], (self.seed, epoch, place))
        except DataError as error:
            return Fault(str(error))

    def _read(self, blocks: np.ndarray, seed: tuple[int, ...], most: int | None = None) -> Window:
        read = _Reading(self._class, self._skip_bad_lines)
        samples = []
        for records in read.batches(self._blocks, blocks):
            samples += self._class.encode(self._tokenizer, records)
            if most is not None and len(samples) >= most:
                samples = samples[:most]
                break
        lengths = np.array([len(ids) for ids, _ in samples], dtype=np.int64)
        masks = [None if learned is None else np.asarray(learned, bool) for _, learned in samples]
        first = np.array([1 if mask is None else find_first_target(mask) for mask in masks], dtype=np.int64)
        pieces = self._class.cut(lengths, first, self.max_seq_len)
        order, bounds = self._rows(pieces.length, seed)
        parts = [(int(pieces.sample[p]), int(pieces.start[p]), int(pieces.length[p])) for p in order]
        tokens = [np.asarray(samples[sample][0][start : start + n], self._dtype) for sample, start, n in parts]
        targets = [masks[sample][start : start + n] for sample, start, n in parts] if any_mask(masks) else None
        return Window(
            np.concatenate([np.zeros(0, self._dtype), *tokens]),
            None if targets is None else np.concatenate([np.zeros(0, bool), *targets]),
            pieces.length[order],
            bounds,
            _counted(lengths, pieces, self.max_seq_len) + read.counts,
        )

    def _rows(self, lengths: np.ndarray, seed: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
        """Which pieces share a row, as `pack` returns it, with the rows shuffled."""
        if self.packing:
            order, bounds = pack(lengths, self.max_seq_len, seed)
        else:
            order, bounds = np.arange(len(lengths)), np.arange(len(lengths) + 1)
        rows = np.random.default_rng((*seed, 1)).permutation(len(bounds) - 1)
        groups = [order[bounds[row] : bounds[row + 1]] for row in rows]
        ends = np.cumsum([0, *map(len, groups)])
        return np.concatenate([order[:0], *groups]), ends


def any_mask(masks: list[np.ndarray | None]) -> bool:
    """Whether the samples have a target mask; either all have one or none has."""
    return bool(masks) and masks[0] is not None


def _counted(lengths: np.ndarray, pieces: Pieces, max_len: int) -> Read:
    used, each = np.unique(pieces.sample, return_counts=True)
    cut = int((lengths[used] > max_len)[each == 1].sum())
    return Read(len(used), int((each > 1).sum()), cut, len(lengths) - len(used))


class _Reading:
    """Reads the records of some blocks, and counts their lines, bad lines and ignored keys."""

    def __init__(self, dataset_class: type[RowDataset], skip_bad_lines: bool):
        self._parse, self._skip_bad_lines = dataset_class.parse, skip_bad_lines
        self.counts = Read()

    def batches(self, blocks: Blocks, numbers: np.ndarray) -> Iterator[list]:
        """Records in lists long enough for the tokenizer's threads."""
        batch, size = [], 0
        for number in numbers:
            for shard, place, line in blocks.lines(int(number)):
                if not line.strip() and shard.is_blank_from(place):
                    break
                batch += self._records(shard, place, line)
                size += len(line)
                if len(batch) >= BATCH_RECORDS or size >= BATCH_BYTES:
                    yield batch
                    batch, size = [], 0
        if batch:
            yield batch

    def _records(self, shard: Shard, place: int, line: bytes) -> list:
        """The record of a line as a list; an empty list for a bad line that is skipped."""
        line = (line.removeprefix(BOM) if place == 0 else line).strip()
        ignored: Counter = Counter()
        try:
            record = self._parse(parse_object(line), ignored)
        except BadRecord as fault:
            self._refuse(shard, place, line, str(fault))
            return []
        if ignored:
            self.counts = self.counts._replace(ignored=self.counts.ignored + ignored)
        return [record]

    def _refuse(self, shard: Shard, place: int, line: bytes, reason: str) -> None:
        told = self.counts.first_bad
        if not told:  # the number of one is enough: all lines before it are counted
            shown = f": {excerpt(line)}" if line else ""
            advice = "" if is_remote(shard.address) else line_advice(Path(shard.address), line)
            told = f"{shard.address}, line {shard.line_number(place)}: {reason}{shown}{advice}"
        if not self._skip_bad_lines:
            raise DataError(told)
        self.counts = self.counts._replace(bad_lines=self.counts.bad_lines + 1, first_bad=told)


class ListedRows(Dataset):
    """The rows of one window, for evaluation."""

    def __init__(self, window: Window, rows: StreamedRows):
        self._window = window
        self.packing, self.max_seq_len, self.empty_row = rows.packing, rows.max_seq_len, rows.empty_row
        self.summary = f"{rows.data_path}: {window.read}, {window.rows:,} rows"

    def __len__(self) -> int:
        return self._window.rows

    def __getitem__(self, number: int) -> dict[str, torch.Tensor]:
        if not 0 <= number < len(self):
            raise IndexError(f"row {number} of {len(self)}")
        return self._window.row(number)


class Windows(IterableDataset):
    """Every `stride`th window from a first one on, without end; the workers of a DataLoader take turns.

    With `batch_size=None` a DataLoader asks its workers in turn, and so yields the windows in order.
    """

    def __init__(self, rows: StreamedRows, start: int, stride: int):
        self._rows, self._start, self._stride = rows, start, stride

    def __iter__(self) -> Iterator[Window | Fault]:
        worker = get_worker_info()
        turn, workers = (worker.id, worker.num_workers) if worker else (0, 1)
        number = self._start + turn * self._stride
        while True:
            yield self._rows.window(number)
            number += workers * self._stride
