"""From rows to optimizer steps: shuffled by seed and epoch, divided among ranks, resumable at any step."""

import math
from collections.abc import Callable, Iterator
from functools import partial

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from dataset.jsonl import unwrap_worker_errors
from dataset.workers import collate_to_send, outlive_signals, require_room_for
from model.loss import IGNORE_INDEX

Batch = dict[str, torch.Tensor]

PADDING = {"labels": IGNORE_INDEX}  # everything else is padded with 0
PER_IMAGE = ("pixel_values", "image_features")  # not one a token


def collate(items: list[Batch], max_seq_len: int | None = None) -> Batch:
    """Stack rows, padded on the right to the longest of them (at least 2), or to `max_seq_len`.

    Padding has input 0, label -100 and positions from 0, as a sample of its own: other tokens never attend to it, and
    it is never in the loss.

    Args:
        items: rows of a dataset, dicts of `input_ids`, `labels`, `position_ids`, each int64 (n,); for a VLMDataset also
            `image_mask` bool (n,), and `pixel_values` or `image_features`, one per image.

    Returns:
        each of them (rows, T), images those of all rows one after another, and `attention_mask` bool (rows, T), False
        on padding.

    Raises:
        ValueError: a row is longer than max_seq_len.
    """
    longest = max((len(item["input_ids"]) for item in items), default=0)
    width = max_seq_len or max(longest, 2)
    if longest > width:
        raise ValueError(f"a row of {longest} tokens does not fit max_seq_len {width}")
    batch = {}
    for name in items[0]:
        parts = [item[name] for item in items]
        batch[name] = torch.cat(parts) if name in PER_IMAGE else _padded(parts, width, PADDING.get(name, 0))
    lengths = torch.tensor([len(item["input_ids"]) for item in items])[:, None]
    place = torch.arange(width)
    batch["attention_mask"] = place < lengths
    batch["position_ids"] = torch.where(batch["attention_mask"], batch["position_ids"], place - lengths)
    return batch


def _padded(rows: list[torch.Tensor], width: int, value: int) -> torch.Tensor:
    """Rows (n,) of different lengths -> (rows, width), padded with `value`."""
    padded = rows[0].new_full((len(rows), width), value)
    for place, row in zip(padded, rows, strict=True):
        place[: len(row)] = row
    return padded


class StepLoader:
    """The micro-batches of one rank, optimizer step by optimizer step.

    Each epoch reshuffles the rows, by (seed, epoch) only. A step takes the next batch_size * accumulation_steps *
    world_size of them (the last step of an epoch takes the rest) and distributes them in micro-batches of batch_size
    rows: first to rank 0, then to rank 1, and so on, in rounds. Every rank gets the same number of micro-batches, so
    that collective operations match; one without rows is only padding, and no row is seen twice.

    Micro-batches of a packed dataset always have the shape (batch_size, max_seq_len), with padding for missing rows, so
    that compiled code sees one shape; others have the available rows, at least one, padded to the longest.

    Args:
        dataset: rows, with the attributes `packing` and `max_seq_len`.
        batch_size: rows per micro-batch.
        accumulation_steps: micro-batches per step, on each rank.
        epochs: passes over the dataset.
        rank, world_size: this process, and the number of processes.
        num_workers: processes that load micro-batches ahead; 0 loads in this one. The order is the same.

    Attributes:
        steps_per_epoch, total_steps: optimizer steps.

    Raises:
        ValueError: batch_size, accumulation_steps or epochs below 1.
    """

    def __init__(
        self,
        dataset: Dataset,
        batch_size: int,
        accumulation_steps: int,
        epochs: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        num_workers: int = 0,
    ):
        if min(batch_size, accumulation_steps, epochs) < 1:
            raise ValueError(
                f"batch_size {batch_size}, accumulation_steps {accumulation_steps}, epochs {epochs}: "
                "each must be at least 1"
            )
        self.dataset = dataset
        self.batch_size = batch_size
        self.seed = seed
        self.rank = rank
        self.num_workers = num_workers
        self._round_rows = batch_size * world_size  # one micro-batch on every rank
        self._step_rows = self._round_rows * accumulation_steps
        self.steps_per_epoch = math.ceil(len(dataset) / self._step_rows)
        self.total_steps = epochs * self.steps_per_epoch

    def steps(self, start_step: int = 0, stop_step: int | None = None) -> Iterator[list[Batch]]:
        """Yield each step's micro-batches, collated, from step `start_step` (0-based) to before
        `stop_step`, or to the last.

        `steps(k)` yields what `steps(0)` does from its k-th on.
        """
        require_room_for(self.num_workers)
        micro_batches = unwrap_worker_errors(
            DataLoader(
                self.dataset,
                batch_sampler=self._micro_batches(start_step),
                collate_fn=partial(collate_to_send, collate=padded_collate(self.dataset, self.batch_size)),
                num_workers=self.num_workers,
                worker_init_fn=outlive_signals,
                # A DataLoader seeds its workers from a generator: from its own, or else it would advance torch's
                # global one, and a resumed run would see other dropout than one never interrupted.
                generator=torch.Generator(),
            )
        )
        stop_step = self.total_steps if stop_step is None else min(stop_step, self.total_steps)
        for step in range(start_step, stop_step):
            yield [next(micro_batches) for _ in range(self._rounds(step))]

    def _micro_batches(self, start_step: int) -> Iterator[list[int]]:
        """The row numbers of each micro-batch of this rank, starting with those of step `start_step`."""
        epoch, rows = None, np.zeros(0, dtype=np.int64)
        for step in range(start_step, self.total_steps):
            if step // self.steps_per_epoch != epoch:
                epoch = step // self.steps_per_epoch
                rows = np.random.default_rng((self.seed, epoch)).permutation(len(self.dataset))
            begin = step % self.steps_per_epoch * self._step_rows
            step_rows = rows[begin : begin + self._step_rows]
            for turn in range(self._rounds(step)):
                mine = turn * self._round_rows + self.rank * self.batch_size
                yield step_rows[mine : mine + self.batch_size].tolist()

    def _rounds(self, step: int) -> int:
        """The number of micro-batches per rank in a step."""
        begin = step % self.steps_per_epoch * self._step_rows
        rows = min(self._step_rows, len(self.dataset) - begin)
        return math.ceil(rows / self._round_rows)


def padded_collate(dataset, batch_size: int) -> Callable[[list[Batch]], Batch]:
    """The function that collates a dataset's rows into a micro-batch, of constant shape if they are packed."""
    fixed = {"rows": 1, "max_seq_len": None}
    if dataset.packing:
        fixed = {"rows": batch_size, "max_seq_len": dataset.max_seq_len}
    return partial(_collate_padded, empty_row=dataset.empty_row, **fixed)


def _collate_padded(items: list[Batch], rows: int, max_seq_len: int | None, empty_row: Batch) -> Batch:
    """Collate, with empty rows added until there are `rows`."""
    return collate(items + [empty_row] * (rows - len(items)), max_seq_len)
