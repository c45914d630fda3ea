"""Watching that a run takes its steps, and that all its processes are there."""

import contextlib
import os
import sys
import threading
import time
from pathlib import Path

import torch.distributed as dist

ROOT = Path(__file__).resolve().parents[1]
BEAT = 3.0  # seconds between two signs of life
SILENT = 40.0  # seconds without one from another rank: its process is gone, or stopped
EXIT_STALLED = 1
DONE = "done"  # the sign of a rank that has ended in order


class Watchdog(threading.Thread):
    """A thread that ends its process, with a line that says where it stands, when no step has been finished for a time,
    or when another rank gives no sign of life: PyTorch's collectives would wait for half an hour.

    Args:
        stall_timeout: seconds without a step after which the run has stalled; 0: none.
    """

    def __init__(self, rank: int, world_size: int, stall_timeout: float):
        super().__init__(name="watchdog", daemon=True)
        self.rank = rank
        self.others = [other for other in range(world_size) if other != rank]
        self.stall_timeout = stall_timeout
        self._steps = 0
        self._stepped_at = time.monotonic()
        self._stopped = threading.Event()
        self._seen: dict[int, tuple[str, float]] = {}  # of each other rank: its last sign of life, and when it was new
        self._main = threading.main_thread()

    def start(self) -> None:
        self._stepped_at = time.monotonic()
        if self.others or self.stall_timeout:
            super().start()

    def count_step(self) -> None:
        self._steps += 1
        self._stepped_at = time.monotonic()

    def stop(self) -> None:
        """The run has ended in order."""
        self._stopped.set()

    def run(self) -> None:
        store = _connect() if self.others else None
        beat = 0
        while not self._stopped.wait(min(BEAT, self.stall_timeout / 2 or BEAT)):
            beat += 1
            if store is not None:
                try:
                    store.set(f"alive/{self.rank}", f"{beat} {self._steps}")
                    lost = self._lost(store)
                except RuntimeError:  # who keeps the store is gone: the main thread's next
                    return  # collective ends, and tells
                if lost is not None:
                    steps = self._seen[lost][0].partition(" ")[2] if lost in self._seen else "0"
                    self._end(f"rank {lost} has given no sign of life for {SILENT:.0f} s, since its step {steps}")
            waited = time.monotonic() - self._stepped_at
            if self.stall_timeout and waited >= self.stall_timeout:
                self._end(f"no step for {waited:.0f} s (--stall_timeout {self.stall_timeout:g})")
        if store is not None:
            with contextlib.suppress(RuntimeError):  # whoever keeps the store may have ended before
                store.set(f"alive/{self.rank}", DONE)

    def _lost(self, store: dist.Store) -> int | None:
        """A rank that has not told anything new for too long."""
        now = time.monotonic()
        for other in self.others:
            key = f"alive/{other}"
            sign = store.get(key).decode() if store.check([key]) else ""
            if other not in self._seen or self._seen[other][0] != sign:
                self._seen[other] = (sign, now)
            elif sign != DONE and now - self._seen[other][1] > SILENT:
                return other
        return None

    def _end(self, why: str) -> None:
        text = (
            f"error: rank {self.rank}: {why}; it stands after {self._steps} steps at {self._where()}: continue from "
            "the last checkpoint with --resume\n"
        )
        os.write(2, text.encode(errors="replace"))
        os._exit(EXIT_STALLED)

    def _where(self) -> str:
        """The innermost line of ours that the main thread is in, and what it calls there."""
        frame = inner = sys._current_frames().get(self._main.ident)
        while frame is not None and ROOT not in Path(frame.f_code.co_filename).parents:
            frame = frame.f_back
        if frame is None:
            return "no line of MiniMind's"
        place = f"{Path(frame.f_code.co_filename).relative_to(ROOT)}:{frame.f_lineno}"
        return f"{place} ({inner.f_code.co_name})"


def _connect() -> dist.TCPStore:
    """The store that the ranks met at, by a connection of this thread's own."""
    return dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False)
