"""Runs a script with an injected fault, as `striking.py FAULT PLACE script arguments…`.

PLACE is the number of a step, of a file system call, or of bytes. Of several ranks the one that STRUCK_RANK in the
environment names is struck, by default rank 1.
"""

import contextlib
import errno
import math
import os
import runpy
import signal
import stat
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import torch

import trainer.watchdog
from trainer.metrics import Metrics
from trainer.snapshot import Background

ROOT = Path(__file__).resolve().parents[2]
CHANGES = ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir")  # audit events of what changes a folder


def is_struck() -> bool:
    struck = os.environ.get("STRUCK_RANK", "1")
    return os.environ.get("RANK", struck) == struck


def at_step(do: Callable[[], None]) -> Callable[[int], None]:
    """Runs a function when a step is reported."""

    def arrange(step: int) -> None:
        log = Metrics.log

        def watched(self, **values):
            log(self, **values)
            if self.progress.step == step and is_struck():
                do()

        Metrics.log = watched

    return arrange


def send(name: str) -> Callable[[], None]:
    return lambda: os.kill(os.getpid(), getattr(signal, name))


def watch_changes(out: Path, do: Callable[[str], None]) -> None:
    """Call `do` before each change of a folder that a save makes."""

    def hook(event: str, arguments: tuple) -> None:
        if event not in CHANGES or threading.current_thread().name != Background.NAME:
            return
        if event == "open" and not (isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR)):
            return
        if isinstance(arguments[0], str | Path) and out in Path(arguments[0]).parents:
            do(event)

    sys.addaudithook(hook)


def kill_in_save(nth: int) -> None:
    changes = []

    def count(event: str) -> None:
        changes.append(event)
        if len(changes) == nth:
            os.kill(os.getpid(), signal.SIGKILL)

    watch_changes(_out(), count)


def read_only(nth: int) -> None:
    """Refuse all changes from a save's nth change on, as on a disk that has been remounted read-only."""
    changes = []

    def refuse(event: str) -> None:
        changes.append(event)
        if len(changes) >= nth:
            raise OSError(errno.EROFS, "Read-only file system")

    watch_changes(_out(), refuse)


def full_disk(size: int) -> None:
    """Let no file grow beyond this many bytes."""
    import resource

    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # Python turns it into an OSError
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


def not_finite(where: str) -> Callable[[int], None]:
    """From a step on make the loss, a gradient or the first layer's input NaN."""

    def arrange(step: int) -> None:
        backwards = []
        backward, clip, embed = torch.Tensor.backward, torch.nn.utils.clip_grad_norm_, torch.nn.Embedding.forward

        def watched_backward(loss, *arguments):
            backwards.append(None)
            backward(loss * math.nan if where == "loss" and len(backwards) >= step else loss, *arguments)

        def watched_clip(parameters, *arguments):
            parameters = list(parameters)
            if where == "gradient" and len(backwards) >= step:
                next(p.grad for p in parameters if p.grad is not None).view(-1)[0] = math.nan
            return clip(parameters, *arguments)

        def watched_embed(self, ids):
            vectors = embed(self, ids)
            return vectors * math.nan if where == "input" and len(backwards) + 1 >= step else vectors

        torch.Tensor.backward = watched_backward
        torch.nn.utils.clip_grad_norm_ = watched_clip
        torch.nn.Embedding.forward = watched_embed

    return arrange


def set_clock_back(seconds: int) -> None:
    """Set the clock back after its first hundred calls."""
    asked, now = [], time.time

    def watched() -> float:
        asked.append(None)
        return now() - (seconds if len(asked) > 100 else 0)

    time.time = watched


class LosingDisk:
    """A disk that loses everything that was not flushed when the power fails: a file keeps its bytes of its last fsync,
    a folder its names of its last fsync. The remaining content at the nth fsync is written to OUT.after."""

    def __init__(self, nth: int):
        self.out, self.nth, self.flushed = _out(), nth, 0
        self.bytes: dict[int, bytes] = {}  # of a file, by its inode
        self.names: dict[int, dict[str, tuple[int, bool]]] = {}  # of a folder: inode and whether it is a folder
        self.fsync, self.lock = os.fsync, threading.Lock()
        os.fsync = self.watched

    def watched(self, descriptor: int) -> None:
        self.fsync(descriptor)
        with self.lock:
            about = os.fstat(descriptor)
            if stat.S_ISDIR(about.st_mode):
                entries = {}
                for name in os.listdir(descriptor):
                    with contextlib.suppress(FileNotFoundError):  # gone meanwhile
                        there = os.stat(name, dir_fd=descriptor)
                        entries[name] = (there.st_ino, stat.S_ISDIR(there.st_mode))
                self.names[about.st_ino] = entries
            else:
                self.bytes[about.st_ino] = os.pread(descriptor, about.st_size, 0)
            self.flushed += 1
            if self.flushed == self.nth:
                self.lay_down(self.out.stat().st_ino, Path(f"{self.out}.after"))
                os.kill(os.getpid(), signal.SIGKILL)

    def lay_down(self, inode: int, folder: Path) -> None:
        folder.mkdir()
        for name, (content, is_folder) in self.names.get(inode, {}).items():
            if is_folder:
                self.lay_down(content, folder / name)
            else:
                (folder / name).write_bytes(self.bytes.get(content, b""))


FAULTS: dict[str, Callable[[int], object]] = {
    "none": lambda _: None,
    "stop": at_step(send("SIGTERM")),
    "halt": at_step(send("SIGSTOP")),
    "kill": at_step(send("SIGKILL")),
    "kill_in_save": kill_in_save,
    "full_disk": full_disk,
    "read_only": read_only,
    "nan_loss": not_finite("loss"),
    "nan_gradient": not_finite("gradient"),
    "nan_input": not_finite("input"),
    "clock": set_clock_back,
    "power": LosingDisk,
}


def _out() -> Path:
    return Path(sys.argv[sys.argv.index("--out_dir") + 1]).resolve()


def run(fault: str, place: str, script: str, *arguments: str) -> None:
    """Run a script of the repository in this process, like `python script arguments…`."""
    script = str(ROOT / script)
    sys.argv = [script, *arguments]
    sys.path[0] = str(ROOT)
    trainer.watchdog.SILENT = float(os.environ.get("SILENT", trainer.watchdog.SILENT))
    FAULTS[fault](int(place))
    runpy.run_path(script, run_name="__main__")


if __name__ == "__main__":
    run(*sys.argv[1:])
