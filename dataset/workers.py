"""Support for a DataLoader's worker processes."""

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable

from torch import Tensor
from torch.utils.data import get_worker_info

from dataset.jsonl import DataError

LAST = 5  # seconds that a worker lives on after SIGTERM
MORE_ROOM = "give it more (docker run --shm-size 2g), or --num_workers 0, which needs none"


def require_room_for(num_workers: int) -> None:
    """Try to allocate what a DataLoader will set up for its workers, because its own failure would be noisy.

    Raises:
        DataError: there is not even room for a lock.
    """
    try:
        for _ in range(num_workers and num_workers + 1):
            multiprocessing.Queue().close()
    except OSError as error:
        raise DataError(f"--num_workers cannot use shared memory, /dev/shm ({error.strerror}): {MORE_ROOM}") from None


def outlive_signals(_worker: int) -> None:
    """Let a worker survive the signals that ask a run to stop, for `worker_init_fn`.

    A terminal or a scheduler sends them to all processes of a run, and the current step still needs its batches. By
    default torch ends a worker at once, unless the main process sent the signal, and with it the run, unsaved.
    """
    for name in ("SIGINT", "SIGHUP", "SIGBREAK"):  # Windows has not all of them, and the last only Windows
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    signal.signal(signal.SIGTERM, _end_later)


def _end_later(_number: int, _frame) -> None:
    end = threading.Timer(LAST, os._exit, [0])
    end.daemon = True
    end.start()


def collate_to_send(items: list, collate: Callable[[list], Tensor | dict[str, Tensor]]) -> Tensor | dict[str, Tensor]:
    """`collate(items)`; in a worker the batch is put into shared memory at once, in which the main process gets it.

    By default a thread of the worker does this, and if it fails (such as when Docker's /dev/shm of 64 MB is full), the
    batch is lost and the main process waits for it forever.

    Raises:
        DataError: there is no room for it.
    """
    batch = collate(items)
    if get_worker_info() is None:
        return batch
    try:
        for tensor in batch.values() if isinstance(batch, dict) else (batch,):
            tensor.share_memory_()
    except RuntimeError as error:
        reason = str(error).splitlines()[0].rpartition(">: ")[2]
        raise DataError(
            f"a --num_workers batch does not fit in shared memory, /dev/shm ({reason}): {MORE_ROOM}"
        ) from None
    return batch
