"""trainer/adamw8bit.py: rounding by hand, updates compared with PyTorch's AdamW, memory, bit-exact resumption."""

import copy

import pytest
import torch

from trainer.adamw8bit import BLOCK, SMALLEST, AdamW8bit, code_book, dequantize, quantize


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_the_code_books_by_hand():
    """A byte s000 0001 has one fraction, the middle of 0.1 and 1; s1xx xxxx has 64 fractions at a power of 0."""
    signed, positive = code_book(True), code_book(False)
    assert len(set(signed)) == len(set(positive)) == 256
    assert signed[127] == positive[0] == 0
    assert (signed[0], signed[-1], positive[-1]) == (pytest.approx(-0.9929688), 1, 1)
    assert signed[128] == pytest.approx(0.55e-6)
    assert positive[1:3] == pytest.approx((0.325e-6, 0.775e-6))
    assert signed[-2] - signed[-3] == pytest.approx(0.9 / 64)
    assert [round(-value, 12) for value in signed[:127]] == [round(v, 12) for v in signed[-2:127:-1]]


@pytest.mark.parametrize("signed", [True, False])
def test_each_number_becomes_the_nearest_of_its_block(signed):
    x = random(3 * BLOCK + 7) * 10.0 ** random(3 * BLOCK + 7, seed=1)
    x = x if signed else x.square()
    codes, scales = quantize(x, signed)
    assert (codes.dtype, codes.shape, scales.shape) == (torch.uint8, x.shape, (4,))
    values = torch.tensor(code_book(signed))
    for number, block in enumerate(x.split(BLOCK)):
        scale = block.abs().max()
        assert scales[number] == scale
        found = dequantize(codes, scales, signed).split(BLOCK)[number] / scale
        nearest = values[(block[:, None] / scale - values).abs().argmin(1)]
        small = (block / scale < 1.7e-7) & (not signed)
        torch.testing.assert_close(found[~small], nearest[~small])


def test_zeros_stay_and_a_tiny_second_moment_does_not_become_zero():
    for signed in (True, False):
        assert dequantize(*quantize(torch.zeros(10), signed), signed).eq(0).all()
    x = torch.tensor([1.0, 1e-12, 0.0])
    found = dequantize(*quantize(x, signed=False), signed=False)
    assert found.tolist() == pytest.approx([1, 0.325e-6, 0])


def test_small_tensors_are_stepped_as_by_pytorch():
    ours = torch.nn.Parameter(random(20, 30))
    theirs = torch.nn.Parameter(ours.detach().clone())
    settings = {"lr": 0.01, "betas": (0.9, 0.95), "weight_decay": 0.3}
    pair = AdamW8bit([ours], **settings), torch.optim.AdamW([theirs], **settings)
    for step in range(5):
        ours.grad = random(20, 30, seed=step + 1) * 10.0 ** (step % 3 - 1)
        theirs.grad = ours.grad.clone()
        for optimizer in pair:
            optimizer.step()
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def regression(make) -> tuple[torch.nn.Parameter, torch.optim.Optimizer, list[float]]:
    """200 steps of least squares with noise, with columns that differ a thousandfold in scale."""
    generator = torch.Generator().manual_seed(3)
    sizes = 10.0 ** torch.linspace(-1.5, 1.5, 64)
    true = torch.randn(80, 64, generator=generator)
    weight = torch.nn.Parameter(torch.zeros(80, 64))
    optimizer, losses = make([weight]), []
    for step in range(200):
        for group in optimizer.param_groups:
            group["lr"] = 0.05 * (1 - step / 200)
        x = torch.randn(32, 64, generator=generator) * sizes
        y = x @ true.T + 0.1 * torch.randn(32, 80, generator=generator)
        loss = (x @ weight.T - y).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return weight, optimizer, losses


def test_it_learns_as_adamw_does():
    settings = {"lr": 0.05, "betas": (0.9, 0.95), "weight_decay": 0.0}
    exact, _, losses = regression(lambda params: torch.optim.AdamW(params, **settings))
    weight, optimizer, ours = regression(lambda params: AdamW8bit(params, **settings))
    assert "exp_avg_codes" in optimizer.state[weight]
    assert losses[-1] < 0.05 * losses[0]
    assert ours[-1] == pytest.approx(losses[-1], rel=0.3)
    sizes = 10.0 ** torch.linspace(-1.5, 1.5, 64)  # of the columns: in both, the small ones are lost in the noise
    assert ((weight - exact) * sizes).norm() < 0.05 * (exact * sizes).norm()


def test_a_state_takes_two_bytes_a_parameter_and_little_more():
    weights = [torch.nn.Parameter(random(128, 96)), torch.nn.Parameter(random(SMALLEST - 1))]
    optimizer = AdamW8bit(weights, lr=0.1)
    for weight in weights:
        weight.grad = torch.ones_like(weight)
    optimizer.step()
    held = [sum(v.nbytes for v in optimizer.state[w].values() if torch.is_tensor(v)) for w in weights]
    assert held == [2 * 128 * 96 + 2 * 4 * 128 * 96 // BLOCK, 8 * (SMALLEST - 1)]
    assert held[0] / (128 * 96) < 2.04


def test_a_state_that_was_saved_goes_on_bit_for_bit():
    runs = []
    for reloaded in (False, True):
        weights = [torch.nn.Parameter(random(80, 64)), torch.nn.Parameter(random(5))]
        optimizer = AdamW8bit(weights, lr=0.1)
        for step in range(6):
            if reloaded and step == 3:
                state = copy.deepcopy(optimizer.state_dict())
                optimizer = AdamW8bit(weights, lr=0.1)
                optimizer.load_state_dict(state)
                assert optimizer.state[weights[0]]["exp_avg_codes"].dtype == torch.uint8
            for number, weight in enumerate(weights):
                weight.grad = random(*weight.shape, seed=10 * step + number)
            optimizer.step()
        runs.append(weights)
    for ours, theirs in zip(*runs, strict=True):
        assert torch.equal(ours, theirs)
