"""How a script ends on an error that the user can fix: one line that says what to do, exit code 2, no traceback."""

import importlib.util
import os
import signal
import sys
import time
from collections.abc import Callable

from trainer.start import missing

# PyTorch has no exceptions of their own for these
CPU_OUT_OF_MEMORY = "DefaultCPUAllocator: can't allocate memory"
LOST_WORKER = "DataLoader worker (pid"
BROKEN_PIPE = 128 + 13  # as a shell has it; Windows has no SIGPIPE
LOST_PEER = ("Connection closed by peer", "Connection reset by peer")


class UserError(Exception):
    """Something the user can fix; the message says what is wrong and what to do, in one line."""


def run_main(main: Callable[[], None]) -> None:
    """Run a script's `main`; an error that the user can fix becomes one line on stderr and exit code 2.

    Of several ranks only one reports: rank 0 at once, another rank that fails alone a little later, and last those that
    fail because a rank is gone; the launcher terminates the rest as soon as it can.
    """
    _prepare_streams()
    try:
        main()
        sys.stdout.flush()
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)
    except BrokenPipeError:  # `| head` has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(BROKEN_PIPE)
    except Exception as error:
        message, rank = _message(error), os.environ.get("RANK", "0")
        if os.environ.get("WORLD_SIZE", "1") != "1":
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            time.sleep(6 if message is None else 3 if rank != "0" else 0)
            if any(words in str(error) for words in LOST_PEER):
                print_notice(f"rank {rank} stops because another rank failed", every_rank=True)
                sys.exit(2)
        if message is None:
            raise
        print_notice(f"error: {message}", every_rank=True)
        sys.exit(2)


def _prepare_streams() -> None:
    """Make printing safe: a stream that is closed, or cannot encode a character, must not stop a script."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:  # closed by who started us
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115 - open as long as the process
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="replace")
    if sys.platform == "win32":  # where pipes and files would be written in an old code page
        for stream in (sys.stdin, sys.stdout, sys.stderr):
            stream.reconfigure(encoding="utf-8")


def shown(text: object) -> str:
    """A path, or a text with one in it, in a form that any file, terminal or library accepts: bytes that are not UTF-8,
    which Python keeps as lone surrogates, are escaped."""
    return str(text).encode("utf-8", "backslashreplace").decode()


def print_notice(text: str, every_rank: bool = False) -> None:
    """Print a line on stderr, only on rank 0 or on every rank."""
    if every_rank or os.environ.get("RANK", "0") == "0":
        print(shown(" ".join(text.split())), file=sys.stderr, flush=True)


def _message(error: Exception) -> str | None:
    """The message for the user; None for an error that is the program's own fault."""
    if isinstance(error, ModuleNotFoundError):
        package = (error.name or "").partition(".")[0]
        return missing([package]) if package and importlib.util.find_spec(package) is None else None
    from dataset.jsonl import DataError  # here, since it brings torch, for which --help need not wait

    if isinstance(error, UserError | DataError):
        return str(error)
    if str(error).startswith(LOST_WORKER):
        return (
            f"a --num_workers process died ({' '.join(str(error).split())}): out of memory, or of space in "
            "/dev/shm (docker run --shm-size 2g)? Try fewer workers, or --num_workers 0"
        )
    out_of_memory = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
    if out_of_memory or CPU_OUT_OF_MEMORY in str(error):
        return (
            "out of memory: try a smaller --batch_size or --max_seq_len, --gradient_checkpointing, or a smaller --dim"
        )
    return None
