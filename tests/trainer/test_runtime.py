"""Device, precision, sums over ranks, skipped steps and signals, in one process."""

import atexit
import contextlib
import errno
import os
import re
import runpy
import signal
import socket
import time
from types import SimpleNamespace

import pytest
import torch

from tests.trainer.accelerators import pretend
from trainer import runtime, signals
from trainer.errors import UserError
from trainer.runtime import EXIT_TIME_IS_UP, Runtime, start_runtime

if not hasattr(signal, "SIGHUP"):
    pytest.skip("Windows has no such signals", allow_module_level=True)

CPU = torch.device("cpu")
# what torchrun tells the second of two processes
PLACE = {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}


@pytest.fixture
def run():
    return Runtime(CPU, torch.float32)


def test_a_launcher_gives_each_rank_a_gpu_of_its_own(monkeypatch):
    pretend(monkeypatch, "cuda", 2)
    for name, value in PLACE.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match="--device cuda:0: a launcher gives each process its own GPU"):
        start_runtime(SimpleNamespace(device="cuda:0"))


def test_a_macs_gpu_cannot_be_shared(monkeypatch):
    pretend(monkeypatch, "mps", 1)
    for name, value in (PLACE | {"RANK": "0", "LOCAL_RANK": "0"}).items():  # which prints for all
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=r"--device mps: .* run without the launcher"):
        start_runtime(SimpleNamespace(device="mps"))


def test_sums_are_exact_also_where_the_device_has_no_float64():
    """A Mac's GPU refuses float64: the sums must be computed elsewhere, and one token in 2^24 must count."""
    run = Runtime(torch.device("mps"), torch.float32)
    assert run.sums(2**24 + 1, torch.tensor(0.5)) == [2**24 + 1, 0.5]
    assert run.sum(2**24 + 1) == 2**24 + 1


def test_a_step_is_counted_by_its_trained_tokens_its_rows_and_its_real_tokens(run):
    labels = torch.tensor([[5, -100, 7, 8], [-100, -100, -100, -100], [9, 1, -100, -100]])
    mask = torch.tensor([[1, 1, 1, 1], [0, 0, 0, 0], [1, 1, 1, 0]], dtype=torch.bool)
    totals = run.totals([{"labels": labels, "attention_mask": mask}] * 2)
    assert (totals.target_tokens, totals.rows, totals.non_padding_tokens) == (
        6,
        4,
        14,
    )  # a row's first token is never predicted


@pytest.fixture
def handlers():
    """Restores the signal handlers after the test."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # nohup sets it to be ignored, and a run then ignores it as well
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def test_the_group_outlives_the_model(run, monkeypatch):
    """It ends with the process: destroyed before DDP's reducer, it sometimes deadlocks."""
    registered = []
    monkeypatch.setattr(atexit, "register", registered.append)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "destroy_process_group", lambda: pytest.fail("the model still has it"))
    run.finish(finished=True)
    assert registered == [torch.distributed.destroy_process_group]


def test_a_rank_that_is_done_waits_for_what_rank_0_still_writes(run, monkeypatch):
    """A stopped rank exits with an error code, and torchrun kills the others half a minute later."""
    waited = []
    monkeypatch.setattr(type(run), "gather", lambda run, value: waited.append(value) or [value, None])
    with pytest.raises(SystemExit) as end:
        run.finish(finished=False)
    assert waited == [None]
    assert end.value.code == EXIT_TIME_IS_UP


@pytest.mark.parametrize("own", [signal.SIGTERM, None])
def test_all_ranks_end_with_the_code_of_the_first_that_a_signal_came_to(run, monkeypatch, own):
    """Also a rank that the launcher has sent SIGTERM because another has already ended."""
    monkeypatch.setattr(type(run), "gather", lambda run, value: [None, signal.SIGINT, value])
    monkeypatch.setattr(type(run._signals), "first", property(lambda signals: own))
    run._signalled = True
    with pytest.raises(SystemExit) as end:
        run.finish(finished=False)
    assert end.value.code == 128 + signal.SIGINT


@pytest.fixture
def caught(run, handlers):
    """A runtime that catches signals until the test ends."""
    run.start_loop()
    return run


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_asks_to_stop_after_the_step(caught, number, capfd):
    assert not caught.requests()[0]
    os.kill(os.getpid(), number)
    assert caught.requests()[0]
    assert number.name in capfd.readouterr().err
    with pytest.raises(SystemExit) as end:
        caught.finish(finished=False)
    assert end.value.code == 128 + number
    caught.finish(finished=True)  # a finished run exits with success


def test_a_signal_to_another_rank_asks_to_stop(run, monkeypatch):
    run.world_size = 2
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda ours: ours.add_(1.0))
    assert run.sum(3.0) == 4.0
    assert run.requests()[0]


def test_a_hang_up_that_nohup_ignores_stays_ignored(run, handlers):
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    run.start_loop()
    os.kill(os.getpid(), signal.SIGHUP)
    assert not run.requests()[0]


def test_a_system_without_sighup(run, handlers, monkeypatch):
    """On Windows: signals.py is imported again as it would be there."""
    monkeypatch.delattr(signal, "SIGHUP")
    monkeypatch.delattr(signal, "SIGUSR1")
    monkeypatch.setattr(signal, "SIGBREAK", signal.SIGUSR2, raising=False)
    before = signal.getsignal(signal.SIGUSR2)
    fresh = runpy.run_path(signals.__file__)
    came = fresh["Signals"]()
    came.catch(speak=False)
    os.kill(os.getpid(), signal.SIGUSR2)
    signal.signal(signal.SIGUSR2, before)
    assert came.stop_asked
    assert came.first == signal.SIGUSR2


@pytest.mark.skipif(not hasattr(signal, "SIGUSR1"), reason="Windows has no such signal")
def test_a_signal_that_asks_to_save_lets_the_run_go_on(caught):
    assert caught.requests() == (False, False)
    os.kill(os.getpid(), signal.SIGUSR1)
    assert caught.requests() == (False, True)
    assert caught.requests() == (False, False)  # once
    os.kill(os.getpid(), signal.SIGTERM)
    assert caught.requests() == (True, True)


def test_the_clock_asks_to_save_and_to_stop(run, monkeypatch):
    now = [1000.0]
    monkeypatch.setattr(runtime.time, "monotonic", lambda: now[0])
    run._clock = runtime.Clock(stop_after=100, save_every=30)
    asked = []
    for now[0] in (1000, 1029, 1030, 1059, 1060, 1070, 1099, 1100):
        asked.append(run.requests())
    no, save, stop = (False, False), (False, True), (True, True)
    assert asked == [no, no, save, no, save, no, save, stop]
    with pytest.raises(SystemExit) as end:
        run.finish(finished=False)
    assert end.value.code == 75


def test_only_the_first_ranks_clock_counts(run):
    run.rank, run._clock = 1, runtime.Clock(stop_after=1e-9, save_every=1e-9)
    assert run.requests() == (False, False)


def test_after_a_hang_up_a_print_fails_no_more(run):
    """Writing to a lost terminal fails like writing to a pipe without a reader."""
    reader, writer = os.pipe()
    os.close(reader)
    pid = os.fork()
    if pid == 0:
        with contextlib.suppress(BaseException):  # the forked copy must never continue with the tests
            os.dup2(writer, 1)
            os.dup2(writer, 2)
            signal.signal(signal.SIGPIPE, signal.SIG_IGN)
            signal.signal(signal.SIGHUP, signal.SIG_DFL)  # nohup sets it to be ignored
            run.start_loop()
            os.kill(os.getpid(), signal.SIGHUP)
            os.write(1, b"nobody reads it")
            os._exit(0)
        os._exit(1)
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
    pretend(monkeypatch, "cuda", 2)
    for name, value in PLACE.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv(gone)
    with pytest.raises(UserError, match=f"no {gone}|{gone}, .* is not in the environment"):
        start_runtime(SimpleNamespace(device=None))


def test_processes_that_do_not_meet(monkeypatch):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        for name, value in (PLACE | {"RANK": "0", "LOCAL_RANK": "0", "MASTER_PORT": port}).items():
            monkeypatch.setenv(name, value)
        with pytest.raises(UserError, match=f"cannot connect at 127.0.0.1:{port}"):
            start_runtime(SimpleNamespace(device="cpu", dtype=None, deepspeed=None, offload=None, seed=0))


def test_fsdp_on_a_cpu_where_pytorch_is_too_old_for_it(monkeypatch):
    """PyTorch 2.6's streams of a CPU record no events, which FSDP2 asks of them."""
    for name, value in PLACE.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cpu, "current_stream", object)
    args = SimpleNamespace(device="cpu", dtype=None, deepspeed=None, offload=None, fsdp=True)
    with pytest.raises(UserError, match=f"--fsdp on a CPU needs a newer PyTorch than {re.escape(torch.__version__)}"):
        start_runtime(args)


def test_one_ctrl_c_may_come_twice_and_a_second_one_stops_at_once(caught, monkeypatch):
    now = time.monotonic()
    for seconds, number in ((0, signal.SIGINT), (0.2, signal.SIGINT), (0.3, signal.SIGTERM), (5, signal.SIGTERM)):
        monkeypatch.setattr(time, "monotonic", lambda at=now + seconds: at)
        os.kill(os.getpid(), number)
    with pytest.raises(SystemExit) as end:  # noqa: PT012 - the handler runs between the two
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0)
    assert end.value.code == 130
