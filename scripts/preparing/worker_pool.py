"""Processes that share a pass's chunks; results come in the order of the items."""

import contextlib
import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.connection import wait
from typing import TypeVar

from trainer.errors import UserError

Item = TypeVar("Item")
Result = TypeVar("Result")
AHEAD = 2  # queued chunks per process, besides the one in progress


class WorkerPool:
    """A pool of processes; with one, the work is done in this process.

    Attributes:
        executor: the processes' executor, None with one.
    """

    def __init__(self, workers: int):
        self.workers = workers
        self.executor: Executor | None = None

    def __enter__(self) -> "WorkerPool":
        if self.workers > 1:
            # Spawned, since a forked copy of a process with threads (Arrow's, PyTorch's) may hang
            context = multiprocessing.get_context("spawn")
            self.executor = ProcessPoolExecutor(self.workers, mp_context=context, initializer=_begin)
        return self

    def __exit__(self, *error) -> None:
        if self.executor:
            self.executor.shutdown(wait=error[0] is None, cancel_futures=True)

    def map(self, job: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
        """The result of each item, in order; only few items are taken ahead.

        Raises:
            UserError: a process was killed from outside, such as for lack of memory.
        """
        if self.executor is None:
            yield from map(job, items)
            return
        waiting: deque = deque()
        try:
            for item in items:
                waiting.append(self.executor.submit(job, item))
                if len(waiting) > self.workers * AHEAD:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        except BrokenProcessPool:
            raise UserError(
                "a worker process was killed: out of memory? Run again with fewer --workers; the run continues from "
                "here"
            ) from None


def _begin() -> None:
    """Let a worker leave Ctrl-C to its parent, and exit when the parent does, even if that was killed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    for name in ("OMP_NUM_THREADS", "TOKENIZERS_PARALLELISM"):
        os.environ.setdefault(name, "1" if name[0] == "O" else "false")
    parent = multiprocessing.parent_process()
    if parent is not None:

        def watch() -> None:
            with contextlib.suppress(OSError):
                wait([parent.sentinel])
            os._exit(1)

        threading.Thread(target=watch, daemon=True).start()
