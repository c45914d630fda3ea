"""Device, precision, sums over ranks, skipped steps and signals of one process."""

import errno
import os
import runpy
import signal
import socket
import time
from types import SimpleNamespace

import pytest
import torch

from trainer import signals
from trainer.errors import UserError
from trainer.runtime import NON_FINITE_LIMIT, Runtime, default_dtype, pick_device, start_runtime

CPU = torch.device("cpu")
# what torchrun tells the second of two processes
PLACE = {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}


@pytest.fixture
def run():
    return Runtime(CPU, torch.float32)


@pytest.mark.parametrize("name", ["gpu", "meta", "mps", "cuda:x", "", "cuda"])
def test_a_device_that_is_not_there(name, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="--device"):
        pick_device(name)


def test_the_gpu_of_a_rank(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    current = []
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    assert pick_device(None, local_rank=1) == torch.device("cuda:1")
    assert pick_device("cuda:0", local_rank=1) == torch.device("cuda:0")
    assert pick_device("cpu") == CPU
    assert current == [torch.device("cuda:1"), torch.device("cuda:0")]
    with pytest.raises(UserError, match="2 GPUs"):
        pick_device("cuda", local_rank=2)


def test_a_launcher_gives_each_rank_a_gpu_of_its_own(monkeypatch):
    for name, answer in (("is_available", True), ("device_count", 2), ("set_device", None)):
        monkeypatch.setattr(torch.cuda, name, lambda *_, answer=answer: answer)
    for name, value in PLACE.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match="--device cuda:0: a launcher gives each process a GPU of its own"):
        start_runtime(SimpleNamespace(device="cuda:0"))


@pytest.mark.parametrize(
    ("able", "dtype"),
    [
        ({"avx2": True}, "float32"),
        ({"avx512_f": True, "avx512_bf16": False}, "float32"),
        ({"avx512_bf16": True}, "bfloat16"),
        ({"amx_bf16": True}, "bfloat16"),
        ({"neon": True, "bf16": True}, "bfloat16"),
        ({"neon": True}, "float32"),
    ],
)
def test_a_cpu_trains_in_bfloat16_where_it_computes_in_it(able, dtype, monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: able)
    assert default_dtype(CPU) == dtype


@pytest.mark.parametrize(("able", "dtype"), [(True, "bfloat16"), (False, "float16")])
def test_a_gpu_trains_in_bfloat16_where_it_computes_in_it(able, dtype, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: able)
    assert default_dtype(torch.device("cuda")) == dtype


def test_a_step_is_counted_by_its_trained_tokens_its_rows_and_its_real_tokens(run):
    labels = torch.tensor([[5, -100, 7, 8], [-100, -100, -100, -100], [9, 1, -100, -100]])
    mask = torch.tensor([[1, 1, 1, 1], [0, 0, 0, 0], [1, 1, 1, 0]], dtype=torch.bool)
    totals = run.totals([{"labels": labels, "attention_mask": mask}] * 2)
    assert (totals.trained, totals.rows, totals.real) == (6, 4, 14)  # a row's first token is never predicted


def test_steps_that_are_not_finite_are_counted_until_there_are_too_many_in_a_row(run):
    nan, inf = float("nan"), float("inf")
    assert run.is_finite(torch.tensor(1.0), 2.0)
    for norm, loss in ((torch.tensor(nan), 1.0), (torch.tensor(1.0), inf), (inf, 1.0)) * 3:
        assert not run.is_finite(norm, loss)
    assert run.non_finite == 9
    assert run.is_finite(1.0, 1.0)
    for _ in range(NON_FINITE_LIMIT - 1):
        assert not run.is_finite(nan, nan)
    with pytest.raises(UserError, match="not finite"):
        run.is_finite(nan, nan)
    assert run.non_finite == 9 + NON_FINITE_LIMIT


@pytest.fixture
def handlers():
    """What signals do now is what they do when the test has ended."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def caught(run, handlers):
    """A runtime that catches signals, until the test ends."""
    run.catch_signals()
    return run


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_asks_to_stop_after_the_step(caught, number, capfd):
    caught.sum(0.0)
    assert not caught.asked_to_stop
    os.kill(os.getpid(), number)
    caught.sum(0.0)
    assert caught.asked_to_stop
    assert number.name in capfd.readouterr().err
    with pytest.raises(SystemExit) as end:
        caught.finish(finished=False)
    assert end.value.code == 128 + number
    caught.finish(finished=True)  # a run that is done has done what it was started for


def test_a_hang_up_that_nohup_ignores_stays_ignored(run, handlers):
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    run.catch_signals()
    os.kill(os.getpid(), signal.SIGHUP)
    run.sum(0.0)
    assert not run.asked_to_stop


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_a_worker_outlives_the_signal_for_a_while(caught, number):
    """A scheduler sends it to all processes, and the step under way waits for what its workers fetch."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.kill(os.getpid(), number)
        os.write(writer, str(signal.alarm(1)).encode())  # how long it had, at most; it ends in a second
        signal.pause()
    os.close(writer)
    seconds = int(os.read(reader, 9))
    assert (1 <= seconds <= 5) if number == signal.SIGTERM else seconds == 0
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == (0 if number == signal.SIGTERM else -signal.SIGALRM)
    os.close(reader)


def test_a_system_without_sighup(run, handlers, monkeypatch):
    """Windows: signals.py is imported anew as it would be there."""
    monkeypatch.delattr(signal, "SIGHUP")
    monkeypatch.setattr(signal, "SIGBREAK", signal.SIGUSR1, raising=False)
    before = signal.getsignal(signal.SIGUSR1)
    fresh = runpy.run_path(signals.__file__)
    came = fresh["StopSignals"]()
    came.catch(speak=False)
    os.kill(os.getpid(), signal.SIGUSR1)
    signal.signal(signal.SIGUSR1, before)
    assert len(came) == 1
    assert came.first == signal.SIGUSR1


def test_after_a_hang_up_a_print_fails_no_more(run):
    """What a terminal that is gone answers, and a pipe whose reader is."""
    reader, writer = os.pipe()
    os.close(reader)
    pid = os.fork()
    if pid == 0:
        os.dup2(writer, 1)
        os.dup2(writer, 2)
        signal.signal(signal.SIGPIPE, signal.SIG_IGN)
        run.catch_signals()
        os.kill(os.getpid(), signal.SIGHUP)
        os.write(1, b"nobody reads it")
        os._exit(0)
    os.close(writer)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


def test_a_terminal_that_goes_without_a_word_ends_nothing(monkeypatch):
    left = []
    monkeypatch.setattr(signals, "leave_terminal", lambda: left.append(True))
    with signals.terminal_may_go():
        raise OSError(errno.EIO, "Input/output error")
    assert left == [True]
    with pytest.raises(OSError, match="No space"), signals.terminal_may_go():
        raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("gone", ["RANK", "LOCAL_RANK"])
def test_several_gpus_and_half_a_launcher(monkeypatch, gone):
    for name, answer in (("is_available", True), ("device_count", 2), ("set_device", None)):
        monkeypatch.setattr(torch.cuda, name, lambda *_, answer=answer: answer)
    for name, value in PLACE.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv(gone)
    with pytest.raises(UserError, match=f"no {gone}|{gone} is not in the environment"):
        start_runtime(SimpleNamespace(device=None))


def test_processes_that_do_not_meet(monkeypatch):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        for name, value in (PLACE | {"RANK": "0", "LOCAL_RANK": "0", "MASTER_PORT": port}).items():
            monkeypatch.setenv(name, value)
        with pytest.raises(UserError, match=f"do not meet at 127.0.0.1:{port}"):
            start_runtime(SimpleNamespace(device="cpu", dtype=None, deepspeed=None, seed=0))


def test_one_ctrl_c_may_come_twice_and_a_second_one_stops_at_once(caught, monkeypatch):
    now = time.monotonic()
    for seconds, number in ((0, signal.SIGINT), (0.2, signal.SIGINT), (0.3, signal.SIGTERM), (5, signal.SIGTERM)):
        monkeypatch.setattr(time, "monotonic", lambda at=now + seconds: at)
        os.kill(os.getpid(), number)
    with pytest.raises(SystemExit) as end:  # noqa: PT012 - the handler runs between the two
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0)
    assert end.value.code == 130
