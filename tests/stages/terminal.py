"""A pseudo-terminal to run scripts at, with a user who types and reads."""

import os
import select
import struct
import time

import pytest

from tests.running import PATIENCE, RunningScript

# whole modules of tests are skipped where one that they use is missing
fcntl, pty, termios = (pytest.importorskip(name, reason="Windows has none") for name in ("fcntl", "pty", "termios"))


class Terminal:
    """Runs a script at its own terminal: `see` reads its output, `type` sends input."""

    def __init__(self, script: str, *arguments):
        self._master, slave = pty.openpty()
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 150, 0, 0))
        self.shown = ""
        self._seen = 0
        self.script = RunningScript(script, *arguments, terminal=os.ttyname(slave))
        os.close(slave)

    def type(self, text: str) -> None:
        os.write(self._master, text.encode())

    def see(self, text: str) -> str:
        """Wait until `text` is shown; returns the output since the last call, including it.

        Raises:
            AssertionError: it is not shown, and no more output comes.
        """
        deadline = time.monotonic() + PATIENCE
        while (found := self.shown.find(text, self._seen)) < 0:
            assert time.monotonic() < deadline, f"hangs after:\n{self.shown}"
            assert self._read() or self.script.exit_code() is None, f"no {text!r} in:\n{self.shown[self._seen :]}"
        begin, self._seen = self._seen, found + len(text)
        return self.shown[begin : self._seen]

    def end(self, again: str = "") -> int:
        """Wait for the end; returns the exit code. The remaining output is added to `shown`.

        Args:
            again: type this every second until then. If Ctrl-C arrives just before `input` begins to wait for a key,
                Python handles it only at the next key.
        """
        deadline = time.monotonic() + PATIENCE
        typed = time.monotonic()
        while self.script.exit_code() is None:
            assert time.monotonic() < deadline, f"hangs after:\n{self.shown}"
            if time.monotonic() > typed + 1:
                typed = time.monotonic()
                self.type(again)
            self._read()
        while self._read():
            pass
        os.close(self._master)
        return self.script.wait().returncode

    def drop(self) -> int:
        """Close the terminal, as a dropped connection does; returns the exit code."""
        os.close(self._master)
        return self.script.wait().returncode

    def _read(self) -> str:
        """The output that comes within a moment; empty at the end."""
        if not select.select([self._master], [], [], 0.05)[0]:
            return ""
        try:
            piece = os.read(self._master, 1 << 16).decode(errors="replace")
        except OSError:  # Linux's error when no process has the terminal open
            return ""
        self.shown += piece
        return piece
