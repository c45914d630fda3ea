"""Running scripts: processes forked from one that has imported everything, each with its own output and exit code."""

import atexit
import multiprocessing
import os
import socket
import tempfile
import threading
from pathlib import Path

PRELOADED = "benchmarks.fault_injection.preloaded"


class Forked:
    """A script running in its own processes; arguments as for `striking.run`.

    Args:
        processes: if more than 1, they share one run, as started by torchrun.
        env: added to this process's environment.

    Attributes:
        pids: its processes, by rank.
    """

    def __init__(self, *arguments: str, processes: int = 1, env: dict[str, str] | None = None):
        self._folder = tempfile.TemporaryDirectory(prefix="minimind-faults-")
        self._said = Path(self._folder.name)
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload([PRELOADED])
        self._processes = [
            context.Process(target=_become, args=(arguments, (env or {}) | place, str(self._said)))
            for place in ([{}] if processes == 1 else ranks(processes))
        ]
        for process in self._processes:
            process.start()
        self.pids = [process.pid for process in self._processes]

    @property
    def stdout(self) -> str:
        return self._read("out")

    @property
    def stderr(self) -> str:
        return self._read("err")

    def _read(self, name: str) -> str:
        path = self._said / name
        return path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""

    def codes(self) -> dict[int, int]:
        """The exit codes of those processes that have ended, by their ids."""
        return {process.pid: code for process in self._processes if (code := process.exitcode) is not None}

    def send(self, number: int) -> None:
        """Send a signal to all its processes that are still running."""
        for process in self._processes:
            if process.exitcode is None:
                os.kill(process.pid, number)


def ranks(processes: int) -> list[dict[str, str]]:
    """The environment variables that torchrun sets for each rank."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    common = {"WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return [common | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(processes)]


def _become(arguments: tuple[str, ...], env: dict[str, str], folder: str) -> None:
    os.setsid()
    for number, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(Path(folder) / name, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    os.environ.update(env)
    from benchmarks.fault_injection.striking import run

    try:
        run(*arguments)
    finally:
        threading._shutdown()  # as Python ends: a save is still being written
        atexit._run_exitfuncs()  # which multiprocessing leaves out
