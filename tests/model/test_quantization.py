"""model/quantization.py: rounding by hand, its error, and a layer that learns to compensate for it."""

import copy

import pytest
import torch
from torch import nn

from model.quantization import (
    GROUP,
    QuantizationAwareLinear,
    dequantize_int4,
    dequantize_int8,
    make_quantization_aware,
    quantize_int4,
    quantize_int8,
    quantize_weights,
    round_trip,
)
from tests.model.networks import network, random_ids


def random_weight(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def test_int8_by_hand():
    q, scale = quantize_int8(torch.tensor([[1.27, -0.5, 0.004, 0.006], [0.0, 0.0, 0.0, 0.0], [-2.54, 2.54, 0.02, 0.0]]))
    assert q.tolist() == [[127, -50, 0, 1], [0, 0, 0, 0], [-127, 127, 1, 0]]
    torch.testing.assert_close(scale, torch.tensor([0.01, 0.0, 0.02]))
    torch.testing.assert_close(dequantize_int8(q, scale)[0], torch.tensor([1.27, -0.5, 0.0, 0.01]))


def test_int4_by_hand():
    """A group whose values are multiples of an eighth of its largest is kept exactly; groups do not affect each
    other."""
    exact = torch.cat([torch.tensor([-8.0, 7, 6, -5, 4, -3, 2, -1]).repeat(4) * 0.25, torch.full((GROUP,), 100.0)])
    q, scale = quantize_int4(torch.stack([exact, -exact]))
    assert q[0, :8].tolist() == [-8, 7, 6, -5, 4, -3, 2, -1]
    assert q[1, :8].tolist() == [-8, 7, 6, -5, 4, -3, 2, -1]  # the sign belongs to the scale
    torch.testing.assert_close(scale, torch.tensor([[0.25, -12.5], [-0.25, 12.5]]))
    torch.testing.assert_close(dequantize_int4(q, scale), torch.stack([exact, -exact]))


def test_int4_clips_an_outlier_where_that_costs_less():
    group = torch.full((1, GROUP), 0.5)
    group[0, 0] = 5.0
    plain = (group / (5 / 8)).round().clamp(-8, 7) * (5 / 8)
    rounded = round_trip(group, 4)
    assert (rounded - group).square().sum() < (plain - group).square().sum()


def test_the_error_is_that_of_the_step():
    weight = random_weight(64, 256)
    assert ((round_trip(weight, 8) - weight).abs() <= weight.abs().amax(1, keepdim=True) / 254 * 1.0001).all()
    error = (round_trip(weight, 4) - weight).norm() / weight.norm()
    assert 0.06 < error < 0.1  # about 0.084 for a normal distribution
    assert ((round_trip(torch.zeros(2, GROUP), 4)) == 0).all()


def test_int4_needs_whole_groups():
    with pytest.raises(ValueError, match="multiples of 32 weights, not 40"):
        quantize_int4(torch.ones(4, 40))


@pytest.mark.parametrize("kind", [{}, {"use_moe": True}], ids=["dense", "moe"])
def test_a_models_matrices_are_rounded_and_nothing_else(kind):
    model = network(**kind)
    before = copy.deepcopy(model.state_dict())
    quantize_weights(model, 4)
    for name, weight in model.state_dict().items():
        if weight.dim() < 2 or name.endswith("gate.weight"):
            assert torch.equal(weight, before[name]), name
        else:
            bits = 8 if "tok_embeddings" in name or "output" in name else 4
            torch.testing.assert_close(weight, round_trip(before[name], bits), rtol=0, atol=0)


def test_a_quantization_aware_layer_computes_with_rounded_weights_and_learns_exact_ones():
    linear = nn.Linear(GROUP, 3, bias=False)
    layer = QuantizationAwareLinear(linear, 4)
    assert layer.weight is linear.weight
    x = torch.randn(5, GROUP)
    torch.testing.assert_close(layer(x), x @ round_trip(linear.weight.detach(), 4).T)
    layer(x).square().sum().backward()
    with torch.no_grad():
        expected = 2 * layer(x).T @ x  # the gradient at the rounded weights, passed straight through
    torch.testing.assert_close(layer.weight.grad, expected)


def test_training_wins_back_what_rounding_loses():
    """Regression to a matrix that int4 cannot represent, on low-rank inputs, for which errors can cancel."""
    target, x = random_weight(8, GROUP, 1), random_weight(256, 4, 2) @ random_weight(4, GROUP, 3)
    losses = {}
    for aware in (False, True):
        linear = nn.Linear(GROUP, 8, bias=False)
        with torch.no_grad():
            linear.weight.copy_(target)
        layer = QuantizationAwareLinear(linear, 4) if aware else linear
        optimizer = torch.optim.Adam(layer.parameters(), lr=1e-2)
        for _ in range(100):
            optimizer.zero_grad()
            (layer(x) - x @ target.T).square().mean().backward()
            optimizer.step()
        losses[aware] = (x @ round_trip(linear.weight.detach(), 4).T - x @ target.T).square().mean().item()
    assert losses[True] < losses[False]


def test_a_model_made_aware_keeps_its_names_and_the_embedding_exact():
    model = network()
    names = list(model.state_dict())
    exact = model(random_ids(1, 8)).logits
    make_quantization_aware(model, 4)
    assert list(model.state_dict()) == names
    aware = [name for name, module in model.named_modules() if isinstance(module, QuantizationAwareLinear)]
    assert len(aware) == 7 * model.config.n_layers
    assert not any("output" in name for name in aware)
    rounded = network()
    rounded.load_state_dict(model.state_dict())
    for name, weight in rounded.named_parameters():
        if weight.dim() == 2 and "tok_embeddings" not in name and "output" not in name:
            weight.data.copy_(round_trip(weight.data, 4))
    torch.testing.assert_close(model(random_ids(1, 8)).logits, rounded(random_ids(1, 8)).logits)
    assert not torch.equal(exact, rounded(random_ids(1, 8)).logits)
