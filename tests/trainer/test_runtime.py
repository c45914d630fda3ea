"""Device, precision, sums over ranks, skipped steps and signals of one process."""

import atexit
import os
import signal
import time
from types import SimpleNamespace

import pytest
import torch

from trainer.errors import UserError
from trainer.runtime import NON_FINITE_LIMIT, Runtime, default_dtype, pick_device, start_runtime

CPU = torch.device("cpu")


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
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("LOCAL_RANK", "1")
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
def caught(run):
    """A runtime that catches signals, until the test ends."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    run.catch_signals()
    yield run
    for number, handler in before.items():
        signal.signal(number, handler)


def test_the_group_outlives_the_model(run, monkeypatch):
    """It ends with the process: destroyed before DDP's reducer is, it now and then waits for itself for ever."""
    registered = []
    monkeypatch.setattr(atexit, "register", registered.append)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "destroy_process_group", lambda: pytest.fail("the model still has it"))
    run.finish()
    assert registered == [torch.distributed.destroy_process_group]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_asks_to_stop_after_the_step(caught, number, capfd):
    caught.sum(0.0)
    assert not caught.asked_to_stop
    os.kill(os.getpid(), number)
    caught.sum(0.0)
    assert caught.asked_to_stop
    assert number.name in capfd.readouterr().err
    with pytest.raises(SystemExit) as end:
        caught.finish()
    assert end.value.code == 128 + number


def test_one_ctrl_c_may_come_twice_and_a_second_one_stops_at_once(caught, monkeypatch):
    now = time.monotonic()
    for seconds, number in ((0, signal.SIGINT), (0.2, signal.SIGINT), (0.3, signal.SIGTERM), (5, signal.SIGTERM)):
        monkeypatch.setattr(time, "monotonic", lambda at=now + seconds: at)
        os.kill(os.getpid(), number)
    with pytest.raises(SystemExit) as end:  # noqa: PT012 - the handler runs between the two
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0)
    assert end.value.code == 130
