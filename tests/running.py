"""Runs the repository's scripts as a user does, in their own process, and checks exit code and output."""

import contextlib
import functools
import importlib
import json
import multiprocessing
import os
import queue
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from unittest import mock

from dataset import StepLoader
from trainer.errors import run_main
from trainer.snapshot import Background

ROOT = Path(__file__).resolve().parent.parent
TINY = ("--dim", "32", "--n_layers", "2", "--device", "cpu")
TINY_TRAINING = (
    *(*TINY, "--max_seq_len", "64", "--batch_size", "4", "--dtype", "float32", "--compile", "0"),
    *("--warmup_iters", "2", "--log_interval", "1", "--eval_interval", "0"),
)
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")
PATIENCE = 900  # seconds; only a hanging run takes as long
LAST_WORDS = 60  # seconds; for the ranks whose peer is gone


def run_script(
    script: str | Path,
    *arguments: str | Path,
    processes: int = 1,
    exit_code: int | None = 0,
    env: dict[str, str] | None = None,
    cwd: Path = ROOT,
    stdin: str | Path = "",
    launcher: Sequence[str] | None = None,
    each: Sequence[Sequence[str | Path]] = (),
) -> subprocess.CompletedProcess:
    """Run a script of the repository to its end, with one thread per process.

    Args:
        processes: if more than 1, they share one run, as started by torchrun.
        exit_code: the required exit code; None accepts any.
        env: added to this process's environment.
        stdin: text to pipe in, or a file; the script never sees a terminal.
        launcher: start a new Python with these arguments before the script's name, instead of forking a process that
            has imported everything.
        each: arguments of each process, added to those of all, as on machines that differ.

    Raises:
        AssertionError: it ended with another exit code; the message contains its output.
    """
    if launcher is not None:
        done = subprocess.run(
            [sys.executable, *launcher, str(ROOT / script), *map(str, arguments)],
            cwd=cwd,
            env=_environment(env),
            input=stdin if isinstance(stdin, str) else stdin.read_text(encoding="utf-8"),
            capture_output=True,
            text=True,
            check=False,
            timeout=PATIENCE,
        )
    else:
        how = {"processes": processes, "env": env, "cwd": cwd, "stdin": stdin, "each": each}
        done = RunningScript(script, *arguments, **how).wait()
    assert exit_code is None or done.returncode == exit_code, (
        f"{script} ended with {done.returncode}, not {exit_code}\n{done.stdout}\n{done.stderr}"
    )
    return done


class RunningScript:
    """A running script; arguments as for `run_script`.

    Args:
        terminal: path of a terminal to run it at, instead of pipes.

    Attributes:
        pids: its processes, by rank.
    """

    def __init__(
        self,
        script: str | Path,
        *arguments: str | Path,
        processes: int = 1,
        env: dict[str, str] | None = None,
        cwd: Path = ROOT,
        stdin: str | Path = "",
        terminal: str | None = None,
        each: Sequence[Sequence[str | Path]] = (),
    ):
        self._folder = tempfile.TemporaryDirectory(prefix="minimind-script-")
        folder = Path(self._folder.name)
        if not isinstance(stdin, Path):
            (folder / "stdin").write_text(stdin, encoding="utf-8")
            stdin = folder / "stdin"
        self._out, self._err = folder / "out", folder / "err"
        order = {
            "script": str(ROOT / script),
            "cwd": str(cwd),
            "stdin": terminal or str(stdin),
            "out": terminal or str(self._out),
            "err": terminal or str(self._err),
        }
        ranks = [{}] if processes == 1 else _ranks(processes)
        self.pids = []
        for number, rank in enumerate(ranks):
            own = [*map(str, (*arguments, *(each[number] if each else ())))]
            self.pids.append(_ask(start=order | {"arguments": own, "env": _environment(env) | rank})["pid"])
        self._codes: dict[int, int] = {}
        self._failed_at: float | None = None

    @property
    def stdout(self) -> str:
        return self._out.read_text(encoding="utf-8", errors="replace") if self._out.exists() else ""

    @property
    def stderr(self) -> str:
        return self._err.read_text(encoding="utf-8", errors="replace") if self._err.exists() else ""

    def codes(self) -> dict[int, int]:
        """The exit codes of those processes that have ended, by their ids; the others are not waited for."""
        for pid in self.pids:
            if pid not in self._codes and (code := _ask(poll=pid)["exit_code"]) is not None:
                self._codes[pid] = code
        return self._codes

    def exit_code(self) -> int | None:
        """None while it runs. When a rank fails, the others are terminated, as launchers do, and killed if they still
        wait for it after a while."""
        if any(self.codes().values()) and self._failed_at is None:
            self.send(signal.SIGTERM)
            self._failed_at = time.monotonic()
        if self._failed_at and time.monotonic() > self._failed_at + LAST_WORDS:
            self.send(signal.SIGKILL)
        failed = [code for code in self._codes.values() if code]
        return None if len(self._codes) < len(self.pids) else (failed or [0])[0]

    def send(self, number: int) -> None:
        """Send a signal to all its processes that are still running."""
        for pid in self.pids:
            if pid not in self._codes:
                os.kill(pid, number)

    def wait_for(self, text: str) -> None:
        """Wait until it has printed `text` on stdout.

        Raises:
            AssertionError: it ended before that.
        """
        deadline = time.monotonic() + PATIENCE
        while text not in self.stdout:
            ended = self.exit_code() is not None
            assert text in self.stdout or not ended, f"no {text!r} in:\n{self.stdout}\n{self.stderr}"
            assert time.monotonic() < deadline, f"hangs:\n{self.stdout}\n{self.stderr}"
            time.sleep(0.01)

    def wait(self) -> subprocess.CompletedProcess:
        """Wait for its end."""
        deadline = time.monotonic() + PATIENCE
        while (code := self.exit_code()) is None:
            if time.monotonic() > deadline:
                self.send(signal.SIGKILL)
                raise AssertionError(f"hangs:\n{self.stdout}\n{self.stderr}")
            time.sleep(0.01)
        done = subprocess.CompletedProcess(self.pids, code, self.stdout, self.stderr)
        self._folder.cleanup()
        return done


def from_process(replies: multiprocessing.Queue, *processes: multiprocessing.Process):
    """The next item that one of these processes puts into a queue.

    Raises:
        AssertionError: one has failed, or all have ended without putting one.
    """
    deadline = time.monotonic() + PATIENCE
    while True:
        codes = [process.exitcode for process in processes]  # checked first: what it has put is there when it ends
        with contextlib.suppress(queue.Empty):
            return replies.get(timeout=0.05)
        assert all(code in (None, 0) for code in codes), f"a process has failed: {codes}"
        assert None in codes, "all processes have ended, and nothing has come"
        assert time.monotonic() < deadline, "nothing comes"


def one_error_line(done: subprocess.CompletedProcess) -> str:
    """The error that a script ended with: exactly one line beginning with "error: ", and no traceback.

    Raises:
        AssertionError: the output is not of that form.
    """
    assert "Traceback" not in done.stderr, done.stderr
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, done.stderr
    return errors[0]


def call_script(script: str, *arguments: str | Path, stop_after: int | None = None, exit_code: int = 0) -> None:
    """Run a script of the repository in this process, without start-up time; capsys reads its output.

    Args:
        stop_after: abort after this many optimizer steps (which are saved if due).

    Raises:
        AssertionError: it ended with another exit code.
    """
    steps = StepLoader.steps

    def interrupted(self, *places):
        for number, batches in enumerate(steps(self, *places)):
            if number == stop_after:
                raise KeyboardInterrupt
            yield batches

    module = importlib.import_module(script.removesuffix(".py").replace("/", "."))
    argv = mock.patch.object(sys, "argv", [script, *map(str, arguments)])
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    with argv, mock.patch.object(StepLoader, "steps", interrupted):
        try:
            run_main(module.main)
            code = 0
        except SystemExit as end:
            code = end.code
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
            for thread in threading.enumerate():
                if thread.name == Background.NAME:  # a process waits at its end for a save under way
                    thread.join()
    assert code == exit_code, f"{script} ended with {code}, not {exit_code}"


def _environment(added: dict[str, str] | None) -> dict[str, str]:
    return os.environ | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"} | (added or {})


def free_port() -> int:
    """A free port of this machine.

    It lies below the ephemeral ports, in a range of this pytest worker's own, so that it is still free when a script
    binds it.
    """
    worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
    first = 20_000 + worker % 12 * 1000
    while True:
        port = first + secrets.randbelow(1000)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


def _ranks(processes: int) -> list[dict[str, str]]:
    """The environment variables that torchrun sets for each rank."""
    common = {"WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    return [common | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(processes)]


@functools.cache
def _fork_server() -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-m", "tests.fork_server"],
        cwd=ROOT,
        env=_environment(None),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def _ask(**request) -> dict:
    server = _fork_server()
    print(json.dumps(request), file=server.stdin, flush=True)
    return json.loads(server.stdout.readline())
