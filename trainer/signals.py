"""Signals that ask a run to save or to stop, and a closed terminal: neither may lose progress."""

import contextlib
import errno
import os
import signal
import stat
import sys
import time
from collections.abc import Iterator

# Ctrl-C, a scheduler's end, a dropped SSH; a closed window on Windows, which has no SIGHUP
NAMES = ("SIGINT", "SIGTERM", "SIGHUP", "SIGBREAK")
ASK_TO_STOP = tuple(getattr(signal, name) for name in NAMES if hasattr(signal, name))
ASK_TO_SAVE = tuple(getattr(signal, name) for name in ("SIGUSR1",) if hasattr(signal, name))  # Windows has none


class Signals:
    """The signals received since `catch`: each lets the current step end and be saved, and all but SIGUSR1 then end the
    run.

    A second Ctrl-C ends it at once. SIGHUP stays ignored if it was ignored at the start, as by nohup.
    """

    def __init__(self):
        self._came: list[tuple[int, float]] = []  # number and time of each that asks to stop
        self._save_asked = 0

    @property
    def stop_asked(self) -> bool:
        return bool(self._came)

    def take_save_asked(self) -> bool:
        """Whether a signal has asked for a save since the last call."""
        asked, self._save_asked = self._save_asked, 0
        return asked > 0

    @property
    def first(self) -> int | None:
        """The number of the first signal; None if none has come."""
        return self._came[0][0] if self._came else None

    def catch(self, speak: bool) -> None:
        """Record signals from now on instead of obeying them; `speak`: also report them on stderr."""
        process = os.getpid()

        def on_signal(number: int, _frame) -> None:
            if os.getpid() != process:  # a DataLoader's worker that has not begun, see dataset.workers.outlive_signals
                return
            now = time.monotonic()
            # At a terminal one Ctrl-C comes twice, from the terminal and from torchrun or DeepSpeed.
            if number == signal.SIGINT and self._came and now - self._came[0][1] > 1:
                sys.exit(128 + number)
            self._came.append((number, now))
            name = signal.Signals(number).name
            if name == "SIGHUP":
                leave_terminal()
            if speak and len(self._came) == 1:
                text = f"\n{name}: saving after this step (Ctrl-C again: stop at once)\n"
                with contextlib.suppress(OSError):  # the reader may be gone
                    os.write(2, text.encode())  # print is not to be used while another print may be under way

        def on_save_signal(_number: int, _frame) -> None:
            self._save_asked += 1

        for number in ASK_TO_SAVE:
            signal.signal(number, on_save_signal)
        for number in ASK_TO_STOP:
            ignored = signal.getsignal(number) is signal.SIG_IGN
            if not (ignored and signal.Signals(number).name == "SIGHUP"):
                signal.signal(number, on_signal)


@contextlib.contextmanager
def terminal_may_go() -> Iterator[None]:
    """Tolerate a terminal that disappears during a print inside: the run then continues without output."""
    try:
        yield
    except OSError as error:
        if error.errno != errno.EIO:
            raise
        leave_terminal()


def leave_terminal() -> None:
    """Discard output to a terminal or pipe from now on, where each print would fail; output to files continues."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in (1, 2):
        with contextlib.suppress(OSError):  # closed already
            if not stat.S_ISREG(os.fstat(stream).st_mode):
                os.dup2(nowhere, stream)
    os.close(nowhere)
