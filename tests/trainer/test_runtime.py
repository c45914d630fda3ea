"""Device, precision, sums over ranks, skipped steps and signals of one process."""

import os
import signal
import time
from types import SimpleNamespace

import pytest
import torch

from tests.trainer.accelerators import pretend
from trainer.errors import UserError
from trainer.runtime import NON_FINITE_LIMIT, Runtime, start_runtime

CPU = torch.device("cpu")


@pytest.fixture
def run():
    return Runtime(CPU, torch.float32)


def test_a_launcher_gives_each_rank_a_gpu_of_its_own(monkeypatch):
    pretend(monkeypatch, "cuda", 2)
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("LOCAL_RANK", "1")
    with pytest.raises(UserError, match="--device cuda:0: a launcher gives each process a GPU of its own"):
        start_runtime(SimpleNamespace(device="cuda:0"))


def test_a_macs_gpu_cannot_be_shared(monkeypatch):
    pretend(monkeypatch, "mps", 1)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match=r"--device mps: .* leave the launcher out"):
        start_runtime(SimpleNamespace(device="mps"))


def test_sums_are_exact_also_where_the_device_has_no_float64():
    """A Mac's GPU refuses them; nothing may be made there, and a token more among 2^24 of them counts."""
    run = Runtime(torch.device("mps"), torch.float32)
    assert run.sum(2**24 + 1, torch.tensor(0.5)) == [2**24 + 1, 0.5]


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
