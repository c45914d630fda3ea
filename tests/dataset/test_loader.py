"""From rows to steps: each row once per epoch, on one rank, in an order set by seed and epoch, from any step."""

import itertools
import os
import signal
import subprocess
import sys

import pytest
import torch
from torch.utils.data import Dataset

from dataset import StepLoader, collate


class NumberedRows(Dataset):
    """Row n is the token n + 1, n + 2 times, so that a batch shows which rows it contains."""

    def __init__(self, rows: int, packing: bool = False, max_seq_len: int = 64):
        self.rows, self.packing, self.max_seq_len = rows, packing, max_seq_len

    def __len__(self):
        return self.rows

    def __getitem__(self, n):
        if not 0 <= n < self.rows:
            raise IndexError(n)
        ids = torch.full((n + 2,), n + 1)
        return {"input_ids": ids, "labels": ids, "position_ids": torch.arange(n + 2)}

    @property
    def empty_row(self):
        return {name: torch.zeros(0, dtype=torch.int64) for name in ("input_ids", "labels", "position_ids")}


def rows_in(batch) -> list[int]:
    return [
        int(row[0]) - 1 for row, real in zip(batch["input_ids"], batch["attention_mask"], strict=True) if real.any()
    ]


def loader(rows=23, batch_size=2, accumulation_steps=2, epochs=3, seed=7, packing=False, **given) -> StepLoader:
    return StepLoader(NumberedRows(rows, packing), batch_size, accumulation_steps, epochs, seed, **given)


def all_rows(steps) -> list[list[list[int]]]:
    return [[rows_in(batch) for batch in batches] for batches in steps]


def test_every_epoch_has_every_row_once_in_another_order():
    steps = all_rows(loader().steps())
    per_epoch = loader().steps_per_epoch
    epochs = [[row for step in steps[i : i + per_epoch] for batch in step for row in batch] for i in (0, 6, 12)]

    assert (per_epoch, len(steps), loader().total_steps) == (6, 18, 18)
    assert all(sorted(epoch) == list(range(23)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    assert epochs[0] != list(range(23))
    assert [len(batch) for batch in steps[5]] == [2, 1]  # the last step of an epoch takes what is left


def test_seed_and_epoch_alone_decide_the_order():
    torch.manual_seed(1)
    first = all_rows(loader().steps())
    torch.manual_seed(2)
    torch.rand(5)

    assert all_rows(loader().steps()) == first
    assert all_rows(loader(seed=8).steps()) != first
    epochs_of_longer_run = all_rows(loader(epochs=5).steps())
    assert epochs_of_longer_run[:18] == first


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("world_size", [1, 2])
def test_a_run_resumed_at_any_step_sees_what_the_uninterrupted_sees(packing, num_workers, world_size):
    given = {"packing": packing, "epochs": 2, "rank": world_size - 1, "world_size": world_size}
    whole = list(loader(**given).steps())
    # for worker processes a few positions suffice: at the start, inside and at the end of an epoch
    places = [0, 2, len(whole) // 2, len(whole) - 1] if num_workers else range(len(whole) + 1)
    for start in places:
        rest = list(loader(num_workers=num_workers, **given).steps(start))
        assert len(rest) == len(whole) - start
        for step, expected in zip(rest, whole[start:], strict=True):
            assert len(step) == len(expected)
            for batch, other in zip(step, expected, strict=True):
                assert batch.keys() == other.keys()
                assert all(torch.equal(batch[name], other[name]) for name in batch)


def test_steps_end_before_the_stop_step():
    whole = all_rows(loader().steps())
    assert all_rows(loader().steps(3, 8)) == whole[3:8]
    assert all_rows(loader().steps(16, 99)) == whole[16:]
    assert all_rows(loader().steps(18)) == []


@pytest.mark.parametrize("rows", [1, 3, 8, 23, 24, 25])
@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_share_each_step_without_overlap(rows, world_size):
    ranks = [all_rows(loader(rows, rank=rank, world_size=world_size).steps()) for rank in range(world_size)]
    # one process with a batch as large as all ranks' together takes the same rows in each round
    together = all_rows(loader(rows, batch_size=2 * world_size).steps())

    assert len({len(steps) for steps in ranks}) == 1
    for step, everything in enumerate(together):
        shares = [steps[step] for steps in ranks]
        assert len({len(share) for share in shares}) == 1  # the same number of micro-batches on each rank
        for turn, rows_together in enumerate(everything):
            assert [row for share in shares for row in share[turn]] == rows_together
    epoch = [row for step in together[: len(together) // 3] for batch in step for row in batch]
    assert sorted(epoch) == list(range(rows))


def test_a_rank_without_rows_gets_padding_only():
    lone = list(loader(1, packing=True, rank=1, world_size=2).steps())
    for (batch,) in lone:
        assert batch["input_ids"].shape == (2, 64)
        assert not batch["attention_mask"].any()
        assert (batch["labels"] == -100).all()


def test_packed_batches_have_one_shape_and_others_are_as_wide_as_their_longest_row():
    shapes = {batch["input_ids"].shape for step in loader(packing=True).steps() for batch in step}
    assert shapes == {(2, 64)}

    for step in loader(packing=False).steps():
        for batch in step:
            rows = rows_in(batch)
            assert batch["input_ids"].shape == (len(rows), max(rows) + 2)


def test_fetching_does_not_touch_the_random_state_of_the_run():
    torch.manual_seed(0)
    before = torch.get_rng_state()
    list(loader(epochs=1).steps())
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("fault", [{"batch_size": 0}, {"accumulation_steps": 0}, {"epochs": 0}])
def test_settings_below_one_are_refused(fault):
    with pytest.raises(ValueError, match=r"each must be at least 1"):
        loader(**fault)


def test_collate_pads_on_the_right_as_a_sample_of_its_own():
    rows = NumberedRows(4)
    batch = collate([rows[0], rows[3]])

    assert batch["input_ids"].tolist() == [[1, 1, 0, 0, 0], [4, 4, 4, 4, 4]]
    assert batch["labels"].tolist() == [[1, 1, -100, -100, -100], [4, 4, 4, 4, 4]]
    assert batch["position_ids"].tolist() == [[0, 1, 0, 1, 2], [0, 1, 2, 3, 4]]
    assert batch["attention_mask"].tolist() == [[True, True, False, False, False], [True] * 5]
    assert {name: tensor.dtype for name, tensor in batch.items()} == {
        "input_ids": torch.int64,
        "labels": torch.int64,
        "position_ids": torch.int64,
        "attention_mask": torch.bool,
    }
    assert collate([rows[0]], max_seq_len=6)["input_ids"].tolist() == [[1, 1, 0, 0, 0, 0]]
    with pytest.raises(ValueError, match="5 tokens does not fit max_seq_len 4"):
        collate([rows[3]], max_seq_len=4)


class WhoReads(NumberedRows):
    """Each row contains the id of the process that reads it."""

    def __getitem__(self, n):
        return super().__getitem__(n) | {"input_ids": torch.full((n + 2,), os.getpid())}


@pytest.mark.parametrize("num_workers", [0, 2])
def test_so_many_processes_read_the_rows(num_workers):
    steps = StepLoader(WhoReads(8), 2, 1, 1, seed=0, num_workers=num_workers).steps()
    readers = {int(batch["input_ids"][0, 0]) for (batch,) in steps}
    assert len(readers) == max(num_workers, 1)
    assert (os.getpid() in readers) == (num_workers == 0)


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="Windows has no such signals")
@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP", "SIGINT"])
def test_workers_outlive_a_signal_that_another_process_sends(name):
    """A scheduler signals every process of a job, and the current step waits for its workers' batches."""
    steps = StepLoader(WhoReads(80), 2, 1, 1, seed=0, num_workers=2).steps()
    first = {int(batch["input_ids"][0, 0]) for (batch,) in itertools.islice(steps, 2)}
    kill = f"import os, signal; [os.kill(pid, signal.{name}) for pid in {sorted(first)}]"
    subprocess.run([sys.executable, "-c", kill], check=True)
    assert {int(batch["input_ids"][0, 0]) for (batch,) in steps} == first


def test_a_batch_of_nothing_is_two_wide_one_token_to_read_and_one_to_predict():
    batch = collate([NumberedRows(1).empty_row] * 3)
    assert {name: tuple(tensor.shape) for name, tensor in batch.items()} == dict.fromkeys(batch, (3, 2))
    assert not batch["attention_mask"].any()
