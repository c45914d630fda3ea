"""Muon: against PyTorch's own, which computes in bfloat16, and against what an orthogonal matrix is."""

import math

import pytest
import torch

from trainer import muon
from trainer.muon import Muon, orthogonalise

SHAPES = [(48, 48), (32, 96), (96, 32), (1, 20), (20, 1)]


@pytest.mark.parametrize("shape", SHAPES)
def test_ten_steps_are_those_of_pytorch(shape):
    torch.manual_seed(0)
    ours = torch.nn.Parameter(torch.randn(shape, dtype=torch.float32))
    theirs = torch.nn.Parameter(ours.detach().clone())
    optimizers = (
        Muon([ours], lr=0.01, weight_decay=0.3),
        torch.optim.Muon([theirs], lr=0.01, weight_decay=0.3, adjust_lr_fn="match_rms_adamw"),
    )
    before = ours.detach().clone()
    for step in range(10):
        ours.grad = torch.randn(shape) * 10.0 ** (step % 3 - 1)
        theirs.grad = ours.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    moved = (theirs - before).abs().max().item()
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0.02 * moved)  # bfloat16 has three digits
    assert torch.equal(
        optimizers[0].state[ours]["momentum_buffer"], optimizers[1].state[theirs]["momentum_buffer"]
    )  # what a run of before goes on with


@pytest.mark.parametrize("shape", SHAPES)
def test_an_update_is_about_orthogonal(shape):
    torch.manual_seed(1)
    matrix = torch.randn(shape) * 1e-3
    u, _, v = torch.linalg.svd(matrix, full_matrices=False)
    exact, update = u @ v, orthogonalise(matrix)
    assert update.dtype == torch.float32
    singular = torch.linalg.svdvals(update)
    assert 0.6 < singular.min() <= singular.max() < 1.3
    assert (update * exact).sum() / (update.norm() * exact.norm()) > 0.98


def test_nothing_comes_of_a_gradient_of_zeros_or_of_none():
    matrices = [torch.nn.Parameter(torch.ones(4, 4)) for _ in range(2)]
    optimizer = Muon(matrices, lr=0.5, weight_decay=0.1)
    matrices[0].grad = torch.zeros(4, 4)
    optimizer.step()
    assert torch.equal(matrices[0], torch.full((4, 4), 0.95))  # decayed
    assert torch.equal(matrices[1], torch.ones(4, 4))
    assert matrices[1] not in optimizer.state


@pytest.mark.parametrize(
    ("fast", "dtype"), [("bfloat16", torch.bfloat16), ("float16", torch.float32), ("float32", torch.float32)]
)
def test_it_computes_in_what_the_device_is_fast_in(monkeypatch, fast, dtype):
    seen = []
    monkeypatch.setattr(muon, "default_dtype", lambda device: fast)
    monkeypatch.setattr(torch, "addmm", lambda x, y, z, **factors: seen.append(y.dtype) or x)
    orthogonalise(torch.randn(8, 8))
    assert set(seen) == {dtype}


def test_the_iteration_by_hand():
    """On a diagonal matrix each singular value goes its own way: x <- a x + b x^3 + c x^5, five times."""
    values = torch.tensor([3.0, 1.0, 0.1, 0.0])
    x = values / values.norm()
    for _ in range(5):
        x = 3.4445 * x - 4.7750 * x**3 + 2.0315 * x**5
    expected = torch.diag(x)
    assert math.isclose(x[0].item(), 1, abs_tol=0.3)
    torch.testing.assert_close(orthogonalise(torch.diag(values)), expected, rtol=2e-2, atol=2e-2)
