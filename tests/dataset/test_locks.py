"""Locks: one holder at a time, released by closing or by death; a file system without locks is reported."""

import errno
import multiprocessing
import os
import signal

import pytest

from dataset import locks
from dataset.locks import NoLocksError, lock
from tests.running import PATIENCE

fork = multiprocessing.get_context("fork")


def test_one_holds_it_until_it_is_closed(tmp_path):
    held = lock(tmp_path / "lock")
    assert lock(tmp_path / "lock", wait=False) is None
    held.close()
    again = lock(tmp_path / "lock", wait=False)
    assert again is not None
    again.close()


def test_it_ends_with_the_process(tmp_path):
    ready = fork.Event()

    def hold_and_die():
        held = lock(tmp_path / "lock")
        ready.set()
        os.kill(os.getpid(), signal.SIGSTOP)
        held.close()

    process = fork.Process(target=hold_and_die)
    process.start()
    assert ready.wait(PATIENCE)
    assert lock(tmp_path / "lock", wait=False) is None
    process.kill()
    process.join(PATIENCE)
    lock(tmp_path / "lock", wait=False).close()


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_called_that(tmp_path, monkeypatch, number):
    descriptors = []

    def refuse(descriptor, blocking):
        descriptors.append(descriptor)
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(locks, "lock_descriptor", refuse)
    with pytest.raises(NoLocksError, match="lock"):
        lock(tmp_path / "lock")
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(descriptors[0])


def test_so_is_a_system_without_locks(tmp_path, monkeypatch):
    def refuse(descriptor, blocking):
        raise NotImplementedError("no flock")

    monkeypatch.setattr(locks, "lock_descriptor", refuse)
    with pytest.raises(NoLocksError, match="lock"):
        lock(tmp_path / "lock")


@pytest.mark.parametrize("failure", [OSError(errno.EIO, "Input/output error"), KeyboardInterrupt()])
def test_another_failure_stays_what_it_is_and_the_file_is_closed(tmp_path, monkeypatch, failure):
    descriptors = []

    def fail(descriptor, blocking):
        descriptors.append(descriptor)
        raise failure

    monkeypatch.setattr(locks, "lock_descriptor", fail)
    with pytest.raises(type(failure)) as raised:
        lock(tmp_path / "lock")
    assert not isinstance(raised.value, NoLocksError)
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(descriptors[0])
