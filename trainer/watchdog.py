"""A watchdog: checks that a run keeps making steps, and that all its processes are alive."""

import datetime
import os
import re
import sys
import sysconfig
import threading
import time
from pathlib import Path

import torch
import torch.distributed as dist

ROOT = Path(__file__).parents[1]
LIBRARIES = {Path(path) for path in map(sysconfig.get_path, ("stdlib", "purelib", "platlib"))}
BEAT = 1.0  # seconds between two heartbeats
SILENT = 40.0  # seconds without one from another rank: its process is stopped, or its machine is gone
EXIT_STALLED = 1


def is_ours(file: Path) -> bool:
    """Whether a source file belongs to MiniMind; an environment inside its folder, such as `.venv`, does not."""
    folders = set(file.parents)
    return ROOT in folders and not folders & LIBRARIES


class Watchdog(threading.Thread):
    """A thread that ends its process, with a line that says where it is stuck, when no step has finished for a while,
    or when another rank sends no heartbeat: PyTorch's collectives would wait for half an hour.

    When one rank stalls, all ranks say where they are stuck: the one at fault is at a different line from the others.
    A rank that has ended, or was killed, has closed its connections, which the main thread notices at once.

    Args:
        world_size: the number of processes; if there are several, PyTorch's process group exists.
        stall_timeout: seconds without a step after which the run has stalled; 0: none.
    """

    def __init__(self, rank: int, world_size: int, stall_timeout: float):
        super().__init__(name="watchdog", daemon=True)
        self.rank = rank
        self.stall_timeout = stall_timeout
        self._group = None
        if world_size > 1:
            self._group = dist.new_group(backend="gloo", timeout=datetime.timedelta(seconds=SILENT))
        self._steps = 0
        self._stepped_at = time.monotonic()
        self._ending = threading.Event()
        self._main = threading.main_thread()

    def start(self) -> None:
        self._stepped_at = time.monotonic()
        if self._group is not None or self.stall_timeout:
            super().start()

    def count_step(self) -> None:
        self._steps += 1
        self._stepped_at = time.monotonic()

    def stop(self) -> None:
        """Stop watching a run that has ended properly; all ranks call it."""
        self._ending.set()
        if self.is_alive():
            self.join(SILENT)

    def run(self) -> None:
        together = True
        while together:
            self._ending.wait(min(BEAT, self.stall_timeout / 4 or BEAT))
            waited = time.monotonic() - self._stepped_at
            stalled = 0 < self.stall_timeout <= waited and not self._ending.is_set()
            if self._group is not None:
                together, stalled = self._meet(stalled)
            else:
                together = not self._ending.is_set()
            if stalled:
                self._end(f"no step for {waited:.0f} s (--stall_timeout {self.stall_timeout:g})")

    def _meet(self, stalled: bool) -> tuple[bool, bool]:
        """Exchange heartbeats with all other ranks.

        Returns:
            whether to do so again: no, once a rank is ending, because the others must not wait for its watchdog; and
            whether any rank has stalled.
        """
        ending = torch.tensor([self._ending.is_set(), stalled], dtype=torch.int64)
        try:
            dist.monitored_barrier(self._group, timeout=datetime.timedelta(seconds=SILENT), wait_all_ranks=True)
            dist.all_reduce(ending, group=self._group)
        except RuntimeError as error:
            text = str(error)
            if "failed to pass monitoredBarrier" in text:  # rank 0 alone knows who
                ranks = re.search(r"Ranks? ([\d, ]*\d)", text.partition("failed to pass")[0].rpartition("]")[2])
                self._end(f"rank {ranks[1] if ranks else '?'} has sent no heartbeat for {SILENT:.0f} s")
            if "imed out" in text:
                self._end(f"rank 0 has sent no heartbeat for {SILENT:.0f} s")
            return False, stalled  # a connection is closed: the main thread's next collective fails and tells
        return not ending[0], bool(ending[1])

    def _end(self, why: str) -> None:
        text = (
            f"error: rank {self.rank}: {why}; this rank is stuck after {self._steps} steps at {self._where()}: "
            "continue from the last checkpoint with --resume\n"
        )
        os.write(2, text.encode(errors="replace"))
        time.sleep(BEAT)  # the others hear of it over this process's connections
        os._exit(EXIT_STALLED)

    def _where(self) -> str:
        """The innermost line of MiniMind that the main thread is at, and the innermost function of any package."""
        frame = inner = sys._current_frames().get(self._main.ident)
        while frame is not None and not is_ours(Path(frame.f_code.co_filename)):
            frame = frame.f_back
        if frame is None:
            return "no line of MiniMind"
        return f"{Path(frame.f_code.co_filename).relative_to(ROOT)}:{frame.f_lineno} ({inner.f_code.co_name})"
