"""The tests' own waiting functions: they must not wait for dead processes."""

import multiprocessing
import os
import signal

import pytest

from tests import running
from tests.running import RunningScript, from_process

fork = multiprocessing.get_context("fork")


def put_and_end(replies, number: int) -> None:
    replies.put(number)


def die(replies) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def stay(replies) -> None:
    signal.pause()


def test_what_a_process_says_last_is_heard():
    replies = fork.Queue()
    process = fork.Process(target=put_and_end, args=(replies, 5))
    process.start()
    process.join()
    assert from_process(replies, process) == 5


@pytest.mark.parametrize(("targets", "told"), [((die, stay), "has failed"), ((os.getpid,), "have ended")])
def test_a_process_that_has_died_is_not_waited_for(targets, told):
    replies = fork.Queue()
    processes = [
        fork.Process(target=target, args=() if target is os.getpid else (replies,), daemon=True) for target in targets
    ]
    for process in processes:
        process.start()
    try:
        with pytest.raises(AssertionError, match=told):
            from_process(replies, *processes)
    finally:
        for process in processes:
            process.kill()
            process.join()


def test_a_rank_that_waits_for_a_dead_one_is_ended(tmp_path, monkeypatch):
    """Also one that ignores SIGTERM."""
    script = tmp_path / "stuck.py"
    script.write_text(
        "import os, signal, sys\n"
        "if os.environ['RANK'] == '1':\n"
        "    sys.exit(3)\n"
        "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "signal.pause()\n"
    )
    monkeypatch.setattr(running, "LAST_WORDS", 0.5)
    assert RunningScript(script, processes=2).wait().returncode == 3
