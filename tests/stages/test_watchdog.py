"""A process or a run that hangs: no rank waits for ever, and each says where it is stuck."""

import re
import signal
import time

import pytest

from tests.running import PATIENCE, RunningScript
from tests.stages.training import about, weights

ENDLESS = ("--epochs", "100000", "--save_interval", "1")


def ended(run: RunningScript) -> str:
    """The errors of a run of several ranks once one has ended by itself; hanging ones are killed, as by launchers."""
    deadline = time.monotonic() + PATIENCE
    while not run.codes():
        assert time.monotonic() < deadline, f"hangs:\n{run.stdout}\n{run.stderr}"
        time.sleep(0.05)
    said = run.stderr
    run.send(signal.SIGKILL)
    assert run.wait().returncode != 0
    return said


@pytest.mark.parametrize("struck", ["0", "1"])
def test_a_rank_that_is_halted_is_named_by_the_other(pretrain, tmp_path, struck):
    """By SIGSTOP, which resembles a lost machine: connections stay open, and PyTorch waits for half an hour."""
    run = pretrain.interrupted(
        *(tmp_path, "SIGSTOP", "log", 3, *ENDLESS, "--batch_size", "2"),
        **{"by": RunningScript, "processes": 2, "env": {"STRUCK_RANK": struck, "SILENT": "6"}},
    )
    other = {"0": "1", "1": "0"}[struck]
    said = [line for line in ended(run).splitlines() if line.startswith("error: ")]
    assert len(said) == 1, said
    assert f"error: rank {other}: rank {struck} has sent no heartbeat for 6 s" in said[0]
    assert re.search(r"after [234] steps at \w+.*\.py:\d+ \(\w+\)", said[0]), said
    assert "--resume" in said[0]
    assert about(tmp_path)["step"] in (1, 2)
    assert weights(tmp_path)


def test_a_run_that_stalls_says_where_every_rank_stands(pretrain, tmp_path):
    run = pretrain.interrupted(
        *(tmp_path, "SIGALRM", "log", 3, *ENDLESS, "--batch_size", "2", "--stall_timeout", "4"),
        **{"by": RunningScript, "processes": 2},
    )
    deadline = time.monotonic() + PATIENCE
    while len(run.codes()) < 2:
        assert time.monotonic() < deadline, f"hangs:\n{run.stdout}\n{run.stderr}"
        time.sleep(0.05)
    said = run.stderr
    assert run.wait().returncode == 1
    places = dict(
        re.findall(r"error: rank (\d): no step for \d+ s \(--stall_timeout 4\); this rank is stuck (.*)", said)
    )
    assert places.keys() == {"0", "1"}, said
    assert re.match(r"after 3 steps at tests/stages/crash_points\.py:\d+ \(stay\)", places["1"])
    assert re.match(r"after 3 steps at trainer/runtime\.py:\d+ \(\w+\)", places["0"])
    assert about(tmp_path)["step"] in (1, 2)


def test_one_process_that_stalls_ends(pretrain, tmp_path):
    flags = (*ENDLESS, "--stall_timeout", "3")
    done = pretrain.interrupted(tmp_path, "SIGALRM", "log", 3, *flags, exit_code=1)
    said = r"error: rank 0: no step for \d+ s \(--stall_timeout 3\); this rank is stuck after 3 steps"
    assert re.search(said, done.stderr)
    assert weights(tmp_path)


def test_a_run_that_is_slower_than_its_limit_at_the_end_is_no_stalled_one(pretrain, tmp_path):
    """The watchdog ends with the last step: final writes may take longer."""
    pretrain(tmp_path, "--max_steps", "3", "--stall_timeout", "600", "--batch_size", "2", processes=2)
    assert about(tmp_path)["step"] == 3
