"""From the windows of a stream to optimizer steps: divided among ranks, endless, resumable at any step."""

import sys
from collections.abc import Callable, Iterator

import torch
from torch.utils.data import DataLoader

from dataset.jsonl import DataError
from dataset.loader import Batch, padded_collate
from dataset.streaming import Fault, Read, StreamedRows, Window, Windows
from dataset.workers import outlive_signals, require_room_for


class StreamLoader:
    """The micro-batches of one rank, optimizer step by optimizer step, like a `StepLoader`, but from a stream.

    A step takes the next batch_size * accumulation_steps * world_size rows, across the ends of windows and epochs, and
    distributes them as a `StepLoader` does; every micro-batch has all its rows.

    Each rank reads every world_size-th window and gets the others' by `gather`: about 3 bytes per token.

    Args:
        dataset: the rows; `dataset.position` says where to begin, and is kept at the beginning of the step after the
            last one that was yielded.
        gather: returns the values of all ranks, by rank; all ranks call it.
        stop: called with the error for a bad line or unreadable file when the last step before it is yielded: the run
            is to save its progress and to end.
        report: prints a line.

    Attributes:
        steps_per_epoch: larger than any number of steps, because a stream has no end.
    """

    steps_per_epoch = sys.maxsize

    def __init__(
        self,
        dataset: StreamedRows,
        batch_size: int,
        accumulation_steps: int,
        rank: int = 0,
        world_size: int = 1,
        num_workers: int = 0,
        gather: Callable[[object], list] = lambda value: [value],
        stop: Callable[[Exception], None] = lambda error: None,
        report: Callable[[str], None] = print,
    ):
        self.dataset = dataset
        self.batch_size = batch_size
        self.rank, self.world_size = rank, world_size
        self.num_workers = num_workers
        self._round_rows = batch_size * world_size  # one micro-batch on every rank
        self._step_rows = self._round_rows * accumulation_steps
        self._gather, self._stop, self._report = gather, stop, report
        self._read = Read()

    def steps(self, start_step: int, stop_step: int) -> Iterator[list[Batch]]:
        """Yield the micro-batches of each step, from `dataset.position` on.

        Raises:
            DataError: the first step cannot be read. Later `stop` is called instead, and the steps end.
        """
        if start_step >= stop_step:
            return
        collate = padded_collate(self.dataset, self.batch_size)
        rows = self._rows()
        try:
            ahead = self._take(rows)
            for step in range(start_step, stop_step):
                taken, self.dataset.position = ahead
                batches = [
                    collate([window.row(number) for window, number in taken[begin : begin + self.batch_size]])
                    for begin in range(self.rank * self.batch_size, self._step_rows, self._round_rows)
                ]
                ahead = None
                if step + 1 < stop_step:
                    try:
                        ahead = self._take(rows)
                    except DataError as error:
                        self._stop(error)
                yield batches
                if ahead is None:
                    return
        finally:
            rows.close()
            self._report(f"{self.dataset.data_path}: {self._read}")

    def _take(self, rows: Iterator) -> tuple[list[tuple[Window, int]], dict]:
        """The rows of the next step, and the position at which the step after it begins."""
        taken, place = [], self.dataset.position
        for _ in range(self._step_rows):
            window, number, place = next(rows)
            taken.append((window, number))
        return taken, place

    def _rows(self) -> Iterator[tuple[Window, int, dict]]:
        """Each row, as its window and its number there, and the position after it."""
        first, skipped = self.dataset.position["window"], self.dataset.position["row"]
        empty = 0  # windows in a row
        for number, window in enumerate(self._windows(first), first):
            if isinstance(window, Fault):
                raise DataError(window.reason)
            self._read += window.read
            empty = 0 if window.rows else empty + 1
            if empty > 2 * self.dataset.windows:  # a whole epoch of them
                raise DataError(
                    f"{self.dataset.data_path}: no line has a target within {self.dataset.max_seq_len} tokens"
                    + (f"; {self._read}" if self._read.bad_lines else "")
                )
            for row in range(skipped, window.rows):
                yield window, row, {"window": number, "row": row + 1}
            skipped = 0

    def _windows(self, first: int) -> Iterator[Window | Fault]:
        """All windows from number `first` on: this rank's own, and the others' read counts in between."""
        require_room_for(self.num_workers)
        own = DataLoader(
            Windows(self.dataset, first + self.rank, self.world_size),
            batch_size=None,
            collate_fn=_as_it_is,
            num_workers=self.num_workers,
            worker_init_fn=outlive_signals,
            generator=torch.Generator(),  # or it would advance torch's global one, see StepLoader
        )
        for window in own:
            yield from self._gather(window)


def _as_it_is(window: Window | Fault) -> Window | Fault:
    """Keeps the DataLoader from making tensors of the arrays: arrays go through its pipe, without shared memory."""
    return window
