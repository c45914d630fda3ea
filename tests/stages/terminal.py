"""A terminal to run scripts at, and a person's hands and eyes at it."""

import fcntl
import os
import pty
import select
import struct
import termios
import time

from tests.running import PATIENCE, RunningScript


class Terminal:
    """Runs a script at a terminal of its own; what it shows is read with `see`, `type` answers."""

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
        """Wait until `text` is shown; returns it with all that came since what was seen last.

        Raises:
            AssertionError: it is not, and nothing more comes.
        """
        deadline = time.monotonic() + PATIENCE
        while (found := self.shown.find(text, self._seen)) < 0:
            assert time.monotonic() < deadline, f"hangs after:\n{self.shown}"
            assert self._read() or self.script.exit_code() is None, f"no {text!r} in:\n{self.shown[self._seen :]}"
        begin, self._seen = self._seen, found + len(text)
        return self.shown[begin : self._seen]

    def end(self, again: str = "") -> int:
        """Its exit code, once it has ended; what was left to see is in `shown`.

        Args:
            again: type this every second until then. Python hears a Ctrl-C that comes just before `input` begins to
                wait for a key only with the next key.
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
        """Take the terminal away, as a dropped connection does; the exit code."""
        os.close(self._master)
        return self.script.wait().returncode

    def _read(self) -> str:
        """What comes within a moment; nothing at the end."""
        if not select.select([self._master], [], [], 0.05)[0]:
            return ""
        try:
            piece = os.read(self._master, 1 << 16).decode(errors="replace")
        except OSError:  # Linux's way to say that nobody has the terminal open
            return ""
        self.shown += piece
        return piece
