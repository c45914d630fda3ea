"""Running the repository's scripts as a user does: a process of its own, read by its exit code and its output."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TINY = ("--dim", "32", "--n_layers", "2", "--device", "cpu")
TINY_TRAINING = (
    *(*TINY, "--max_seq_len", "64", "--batch_size", "4", "--dtype", "float32", "--compile", "0"),
    *("--warmup_iters", "2", "--log_interval", "1", "--eval_interval", "0"),
)


def run_script(
    script: str | Path,
    *arguments: str | Path,
    processes: int = 1,
    exit_code: int | None = 0,
    env: dict[str, str] | None = None,
    cwd: Path = ROOT,
    stdin: str = "",
) -> subprocess.CompletedProcess:
    """Run a script of the repository, under torchrun when `processes` is above 1; one thread a process.

    Args:
        exit_code: what it must end with; None accepts any.
        env: added to this process's environment.
        stdin: what is piped in; the script never sees a terminal.

    Raises:
        AssertionError: it ended with another exit code; the message holds all it printed.
    """
    launcher = [sys.executable]
    if processes > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    done = subprocess.run(
        [*launcher, str(ROOT / script), *map(str, arguments)],
        cwd=cwd,
        env=os.environ | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"} | (env or {}),
        input=stdin,
        capture_output=True,
        text=True,
        check=False,
    )
    assert exit_code is None or done.returncode == exit_code, (
        f"{script} ended with {done.returncode}, not {exit_code}\n{done.stdout}\n{done.stderr}"
    )
    return done


def one_error_line(done: subprocess.CompletedProcess) -> str:
    """The error a script ended with: exactly one line that begins with "error: ", and no traceback.

    Raises:
        AssertionError: it is not like that.
    """
    assert "Traceback" not in done.stderr, done.stderr
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, done.stderr
    return errors[0]
