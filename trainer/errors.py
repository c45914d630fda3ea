"""How a script ends when the user can mend what is wrong: one line that says what to do, exit code 2, no traceback."""

import os
import signal
import sys
import time
from collections.abc import Callable

# PyTorch has no exceptions of their own for these
CPU_OUT_OF_MEMORY = "DefaultCPUAllocator: can't allocate memory"
LOST_WORKER = "DataLoader worker (pid"
LOST_PEER = ("Connection closed by peer", "Connection reset by peer")


class UserError(Exception):
    """Something the user can mend; the message says what is wrong and what to do, in one line."""


def launch(main: Callable[[], None]) -> None:
    """Run a script's `main`; an error that the user can mend becomes one line on stderr and exit code 2.

    Of several ranks one speaks: rank 0 at once, another that fails alone a little later, and those last that fail
    because one is gone; the launcher ends the rest as soon as it can.
    """
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="replace")  # a terminal that cannot show a character is no reason to stop
    try:
        main()
        sys.stdout.flush()
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)
    except BrokenPipeError:  # `| head` has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(128 + signal.SIGPIPE)
    except Exception as error:
        message, rank = _message(error), os.environ.get("RANK", "0")
        if os.environ.get("WORLD_SIZE", "1") != "1":
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            time.sleep(6 if message is None else 3 if rank != "0" else 0)
            if any(words in str(error) for words in LOST_PEER):
                note(f"rank {rank} ends, as another rank has ended", every_rank=True)
                sys.exit(2)
        if message is None:
            raise
        note(f"error: {message}", every_rank=True)
        sys.exit(2)


def note(text: str, every_rank: bool = False) -> None:
    """Print a line on stderr, on rank 0 alone or on every rank."""
    if every_rank or os.environ.get("RANK", "0") == "0":
        print(" ".join(text.split()), file=sys.stderr, flush=True)


def _message(error: Exception) -> str | None:
    """What to tell the user; None for an error that is the program's own."""
    from dataset.jsonl import DataError  # here, since it brings torch, for which --help need not wait

    if isinstance(error, UserError | DataError):
        return str(error)
    if str(error).startswith(LOST_WORKER):
        return (
            f"a process of --num_workers has ended ({' '.join(str(error).split())}): out of memory, or of room in "
            "/dev/shm (docker run --shm-size 2g)? Try fewer of them, or --num_workers 0"
        )
    out_of_memory = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
    if out_of_memory or CPU_OUT_OF_MEMORY in str(error):
        return (
            "out of memory: try a smaller --batch_size or --max_seq_len, --gradient_checkpointing, or a smaller --dim"
        )
    return None
