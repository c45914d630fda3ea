"""What a DataLoader's workers send, and what happens when it cannot be sent."""

import os
import signal
import threading
from functools import partial

import pytest
import torch
from torch.utils.data import DataLoader

from dataset import workers
from dataset.jsonl import DataError, unwrap_worker_errors
from dataset.workers import collate_to_send, require_room_for

ROWS = [torch.full((3,), float(n)) for n in range(6)]
NAMED = [{"a": row} for row in ROWS]


def stacked(items):
    return {"a": torch.stack([item["a"] for item in items])}


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize(("rows", "collate"), [(ROWS, torch.cat), (NAMED, stacked)])
def test_what_is_sent_is_what_was_collated(num_workers, rows, collate):
    loader = DataLoader(rows, 2, num_workers=num_workers, collate_fn=partial(collate_to_send, collate=collate))
    for number, batch in enumerate(loader):
        (batch,) = batch.values() if isinstance(batch, dict) else (batch,)
        assert batch.is_shared() == (num_workers > 0)
        assert torch.equal(batch.view(2, 3), torch.stack(ROWS[2 * number : 2 * number + 2]))


@pytest.mark.parametrize(("rows", "collate"), [(ROWS, torch.cat), (NAMED, stacked)])
def test_no_room_in_shared_memory(monkeypatch, rows, collate):
    def share_memory_(tensor):
        raise RuntimeError(
            "unable to allocate shared memory(shm) for file </torch_1_2_0>: No space left on device (28)"
        )

    monkeypatch.setattr(torch.Tensor, "share_memory_", share_memory_)  # inherited by the workers
    loader = DataLoader(
        rows,
        2,
        num_workers=2,
        collate_fn=partial(collate_to_send, collate=collate),
        multiprocessing_context="fork",
    )
    with pytest.raises(
        DataError, match=r"^a --num_workers batch .* /dev/shm \(No space left on device \(28\)\): .*--shm-size"
    ):
        list(unwrap_worker_errors(loader))


@pytest.mark.parametrize(("num_workers", "queues"), [(0, 0), (1, 2), (4, 5)])
def test_as_many_queues_are_tried_as_a_loader_has(monkeypatch, num_workers, queues):
    """One queue per worker for its indices, and one for the results of all."""
    tried = []

    class Queue:
        def close(self):
            tried.append("closed")

    monkeypatch.setattr(workers.multiprocessing, "Queue", Queue)
    require_room_for(num_workers)
    assert tried == ["closed"] * queues


def test_no_room_for_a_lock_is_told(monkeypatch):
    def refuse():
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(workers.multiprocessing, "Queue", refuse)
    with pytest.raises(
        DataError, match=r"^--num_workers cannot use shared memory, /dev/shm \(No space left on device\): .*--shm-size"
    ):
        require_room_for(1)
    require_room_for(0)


def test_a_worker_does_not_outlive_sigterm_for_long(monkeypatch):
    started = []
    monkeypatch.setattr(threading.Timer, "start", lambda timer: started.append(timer))
    workers._end_later(signal.SIGTERM, None)
    (timer,) = started
    assert (timer.interval, timer.function, timer.args, timer.daemon) == (workers.LAST, os._exit, [0], True)
