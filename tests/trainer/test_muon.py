"""Muon: compared with PyTorch's own, which computes in bfloat16, and with exact orthogonal matrices; its newer variants
compared with their papers' formulas by singular value decomposition."""

import copy
import math

import numpy as np
import pytest
import torch

from trainer import muon
from trainer.muon import JORDAN, POLAR_EXPRESS, Muon, orthogonalise

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
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0.02 * moved)  # bfloat16 has about three digits
    assert torch.equal(
        optimizers[0].state[ours]["momentum_buffer"], optimizers[1].state[theirs]["momentum_buffer"]
    )  # an earlier run resumes with it


@pytest.mark.parametrize("shape", SHAPES)
def test_an_update_is_about_orthogonal(shape):
    torch.manual_seed(1)
    matrix = torch.randn(shape) * 1e-3
    u, _, v = torch.linalg.svd(matrix, full_matrices=False)
    exact, update = u @ v, orthogonalise(matrix[None])[0]
    assert update.dtype == torch.float32
    singular = torch.linalg.svdvals(update)
    assert 0.6 < singular.min() <= singular.max() < 1.3
    assert (update * exact).sum() / (update.norm() * exact.norm()) > 0.98


def test_nothing_comes_of_a_gradient_of_zeros_or_of_none():
    matrices = [torch.nn.Parameter(torch.ones(4, 4)) for _ in range(2)]
    optimizer = Muon(matrices, lr=0.5, weight_decay=0.1)
    matrices[0].grad = torch.zeros(4, 4)
    optimizer.step()
    assert torch.equal(matrices[0], torch.full((4, 4), 0.95))  # weight decay
    assert torch.equal(matrices[1], torch.ones(4, 4))
    assert matrices[1] not in optimizer.state


@pytest.mark.parametrize(
    ("fast", "dtype"), [("bfloat16", torch.bfloat16), ("float16", torch.float32), ("float32", torch.float32)]
)
def test_it_computes_in_what_the_device_is_fast_in(monkeypatch, fast, dtype):
    seen = []
    monkeypatch.setattr(muon, "default_dtype", lambda device: fast)
    monkeypatch.setattr(torch, "baddbmm", lambda x, y, z, **factors: seen.append(y.dtype) or x)
    orthogonalise(torch.randn(1, 8, 8))
    assert set(seen) == {dtype}


def test_the_iteration_by_hand():
    """On a diagonal matrix each singular value evolves separately: x <- a x + b x^3 + c x^5, five times."""
    values = torch.tensor([3.0, 1.0, 0.1, 0.0])
    x = values / values.norm()
    for _ in range(5):
        x = 3.4445 * x - 4.7750 * x**3 + 2.0315 * x**5
    expected = torch.diag(x)
    assert math.isclose(x[0].item(), 1, abs_tol=0.3)
    torch.testing.assert_close(orthogonalise(torch.diag(values)[None])[0], expected, rtol=2e-2, atol=2e-2)


def test_matrices_of_all_shapes_move_as_each_would_alone(monkeypatch):
    """Also if there are too many of one shape for one batch, and if some have no gradient."""
    torch.manual_seed(0)
    shapes = [(6, 4), (4, 6), (6, 4), (5, 5), (6, 4), (6, 4)]
    monkeypatch.setattr(muon, "ENTRIES_AT_ONCE", 50)  # two of 24 entries
    together = [torch.nn.Parameter(torch.randn(shape)) for shape in shapes]
    alone = [torch.nn.Parameter(p.detach().clone()) for p in together]
    optimizers = [Muon(together, lr=0.1), *(Muon([p], lr=0.1) for p in alone)]
    for step in range(3):
        for number, (ours, theirs) in enumerate(zip(together, alone, strict=True)):
            ours.grad = None if (number + step) % 4 == 0 else torch.randn_like(ours)
            theirs.grad = None if ours.grad is None else ours.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    for ours, theirs in zip(together, alone, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_each_polynomial_of_polar_express_is_the_best_for_what_is_left():
    """The best odd polynomial maps [l, 2 - l] onto [l', 2 - l']: its errors above and below 1 are equal."""
    low, high = 1e-3, 1.0
    for a, b, c in POLAR_EXPRESS:
        x = np.linspace(low, high, 100_001)
        y = a * x + b * x**3 + c * x**5
        low, high = y.min(), y.max()
        assert low + high == pytest.approx(2, abs=1e-6)
    assert high == pytest.approx(1.1236, abs=1e-4)


@pytest.mark.parametrize(
    ("polynomials", "low", "high"), [(JORDAN, 0.68, 1.21), (POLAR_EXPRESS, 0.87, 1.13)], ids=["jordan", "polar"]
)
def test_singular_values_from_a_hundredth_on_end_near_1(polynomials, low, high):
    torch.manual_seed(2)
    u, _, v = torch.linalg.svd(torch.randn(2, 12, 30), full_matrices=False)
    matrices = u * torch.logspace(-2, 0, 12) @ v
    singular = torch.linalg.svdvals(orthogonalise(7 * matrices, polynomials))
    assert low < singular.min() <= singular.max() < high


def exactly_orthogonal(matrices, polynomials):
    u, _, v = torch.linalg.svd(matrices, full_matrices=False)
    return u @ v


@pytest.mark.parametrize("shape", [(3, 5), (5, 3)])
def test_normuon_is_that_of_its_paper(shape, monkeypatch):
    """arXiv:2510.05491, algorithm 1, row by row, with Nesterov's momentum."""
    monkeypatch.setattr(muon, "orthogonalise", exactly_orthogonal)
    torch.manual_seed(0)
    weight = torch.nn.Parameter(torch.randn(shape))
    optimizer = Muon([weight], lr=0.1, momentum=0.9, weight_decay=0.5, neuron_decay=0.8)
    expected = weight.detach().double()
    m, v = torch.zeros(shape, dtype=torch.float64), [0.0] * shape[0]
    for step in range(3):
        weight.grad = torch.randn(shape) * 10.0**step
        gradient = weight.grad.double()
        optimizer.step()
        m = 0.9 * m + 0.1 * gradient
        update = exactly_orthogonal(0.9 * m + 0.1 * gradient, None)
        for row in range(shape[0]):
            v[row] = 0.8 * v[row] + 0.2 * sum(entry**2 for entry in update[row].tolist()) / shape[1]
            update[row] /= math.sqrt(v[row])
        rate = 0.2 * 0.1 * math.sqrt(shape[0] * shape[1]) / math.sqrt(update.square().sum())
        expected = expected - 0.1 * 0.5 * expected - rate * update
        torch.testing.assert_close(weight.detach().double(), expected, rtol=1e-4, atol=1e-5)


def test_cautious_decay_leaves_what_the_update_moves_away_from_0(monkeypatch):
    monkeypatch.setattr(muon, "orthogonalise", lambda matrices, polynomials: matrices.sign())
    weight = torch.nn.Parameter(torch.tensor([[1.0, -1.0], [1.0, -1.0]]))
    optimizer = Muon([weight], lr=0.1, weight_decay=0.5, cautious=True)
    weight.grad = torch.tensor([[1.0, -1.0], [-1.0, 1.0]])  # the first row goes towards 0, the second away
    optimizer.step()
    moved = 0.1 * 0.2 * math.sqrt(2)
    expected = torch.tensor([[0.95 - moved, moved - 0.95], [1 + moved, -1 - moved]])
    torch.testing.assert_close(weight.detach(), expected)


def test_a_row_without_a_gradient_stays_where_it_is():
    """It is a dead neuron, with a mean square of 0."""
    weight = torch.nn.Parameter(torch.ones(2, 3))
    optimizer = Muon([weight], lr=0.1, weight_decay=0.0, neuron_decay=0.95)
    weight.grad = torch.tensor([[1.0, 2.0, 3.0], [0.0, 0.0, 0.0]])
    optimizer.step()
    assert torch.equal(weight[1], torch.ones(3))
    assert torch.isfinite(weight).all()
    assert not torch.equal(weight[0], torch.ones(3))


def test_what_neurons_kept_comes_back():
    torch.manual_seed(0)
    weights = [torch.nn.Parameter(torch.ones(3, 4)) for _ in range(2)]
    optimizers = [Muon([weight], lr=0.1, neuron_decay=0.9) for weight in weights]
    gradients = torch.randn(4, 3, 4)
    for gradient in gradients[:2]:
        weights[0].grad = gradient
        optimizers[0].step()
    weights[1].data.copy_(weights[0].data)
    optimizers[1].load_state_dict(copy.deepcopy(optimizers[0].state_dict()))  # otherwise they would share it
    for gradient in gradients[2:]:
        for weight, optimizer in zip(weights, optimizers, strict=True):
            weight.grad = gradient
            optimizer.step()
    assert torch.equal(*weights)
