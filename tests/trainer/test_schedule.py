"""Learning rates and optimizers, compared with formulas by hand."""

import math
from types import SimpleNamespace

import pytest
import torch

from model import LMConfig, MiniMindLM
from trainer.muon import Muon
from trainer.schedule import cosine_schedule, make_optimizer, set_learning_rate, wsd_schedule

TINY = {"dim": 32, "n_layers": 2, "n_heads": 4, "vocab_size": 64}


def settings(**changes) -> SimpleNamespace:
    return SimpleNamespace(**{"optimizer": "adamw", "learning_rate": 1e-2} | changes)


def test_warm_up_is_linear_and_the_rest_half_a_cosine_down_to_a_tenth():
    rates = [cosine_schedule(step, 21, 5, 1.0) for step in range(21)]
    assert rates[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert rates[5] == pytest.approx(1.0)  # the cosine begins at its peak
    assert rates[20] == pytest.approx(0.1)  # and the last step is at its minimum
    for step in range(5, 21):
        assert rates[step] == pytest.approx(0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * (step - 5) / 15)))
    assert rates[5:] == sorted(rates[5:], reverse=True)


@pytest.mark.parametrize(("total", "warmup"), [(1, 0), (1, 1), (3, 10), (2, 1)])
def test_short_runs_have_a_rate_too(total, warmup):
    for step in range(total):
        assert 0 < cosine_schedule(step, total, warmup, 1.0) <= 1.0


def test_a_stable_rate_cools_down_in_the_last_fifth():
    rates = [wsd_schedule(step, 20, 4, 1.0) for step in range(20)]
    assert rates[:4] == pytest.approx([0.25, 0.5, 0.75, 1.0])
    assert rates[4:17] == [1.0] * 13  # the decay phase begins at its peak
    assert rates[17:] == pytest.approx([1 - math.sqrt(x) for x in (0.25, 0.5, 0.75)])
    assert wsd_schedule(99, 20, 4, 1.0) == 0
    assert wsd_schedule(0, 1, 0, 0.5) == 0.5


@pytest.mark.parametrize("use_moe", [False, True])
def test_every_parameter_is_taken_once_and_only_matrices_decay(use_moe):
    model = MiniMindLM(LMConfig(**TINY, use_moe=use_moe))
    for kind in ("adamw", "muon", "adamw8bit"):
        optimizer = make_optimizer(model, settings(optimizer=kind))
        taken = [p for group in optimizer.param_groups for p in group["params"]]
        assert sorted(map(id, taken)) == sorted(map(id, model.parameters()))
        for group in optimizer.param_groups:
            assert all((p.dim() >= 2) == (group["weight_decay"] > 0) for p in group["params"])


def test_what_is_frozen_is_left_alone():
    model = MiniMindLM(LMConfig(**TINY)).requires_grad_(False)
    model.norm.weight.requires_grad_(True)
    (group,) = make_optimizer(model, settings()).param_groups
    assert [id(p) for p in group["params"]] == [id(model.norm.weight)]


def test_muon_takes_the_hidden_matrices_and_nothing_else():
    model = MiniMindLM(LMConfig(**TINY, use_moe=True))
    muon, adamw = make_optimizer(model, settings(optimizer="muon")).optimizers
    assert isinstance(muon, Muon)
    names = {id(p): name for name, p in model.named_parameters()}
    hidden = [names[id(p)] for p in muon.param_groups[0]["params"]]
    others = [names[id(p)] for group in adamw.param_groups for p in group["params"]]
    assert all(name.startswith("layers.") and "gate" not in name and "norm" not in name for name in hidden)
    assert "tok_embeddings.weight" in others
    assert "layers.0.feed_forward.gate.weight" in others


def test_one_step_of_adamw_by_hand():
    """arXiv:1711.05101, algorithm 2: decoupled weight decay, both moments corrected for their start at 0."""
    torch.manual_seed(0)
    model = MiniMindLM(LMConfig(**TINY))
    weight = model.layers[0].attention.wq.weight
    before = weight.detach().clone()
    optimizer = make_optimizer(model, settings())
    set_learning_rate(optimizer, 0.02)
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    gradient = weight.grad.clone()
    optimizer.step()
    m, v = 0.1 * gradient / (1 - 0.9), 0.05 * gradient**2 / (1 - 0.95)
    expected = before - 0.02 * (m / (v.sqrt() + 1e-8) + 0.1 * before)
    torch.testing.assert_close(weight.detach(), expected, rtol=1e-5, atol=1e-6)


def test_the_update_of_muon_is_as_large_as_that_of_adamw():
    """arXiv:2502.16982: an orthogonal matrix times 0.2 sqrt(max(rows, columns)) has entries with an RMS of 0.2."""
    torch.manual_seed(0)
    model = MiniMindLM(LMConfig(**TINY))
    weight = model.layers[0].feed_forward.w1.weight
    before = weight.detach().clone()
    optimizer = make_optimizer(model, settings(optimizer="muon", learning_rate=1.0), weight_decay=0.0)
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    optimizer.step()
    update = before - weight.detach()
    assert update.square().mean().sqrt() == pytest.approx(0.2, rel=0.3)
    singular = torch.linalg.svdvals(update) / (0.2 * math.sqrt(max(update.shape)))
    assert singular.min() > 0.6  # five Newton-Schulz iterations come near 1 but do not reach it
    assert singular.max() < 1.3


def test_a_rate_reaches_every_group_and_a_state_comes_back():
    model = MiniMindLM(LMConfig(**TINY))
    optimizer = make_optimizer(model, settings(optimizer="muon"))
    set_learning_rate(optimizer, 0.5)
    assert {group["lr"] for group in optimizer.param_groups} == {0.5}
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    optimizer.zero_grad()
    assert all(p.grad is None for p in model.parameters())
    other = make_optimizer(model, settings(optimizer="muon"))
    other.load_state_dict(optimizer.state_dict())
    for ours, theirs in zip(other.optimizers, optimizer.optimizers, strict=True):
        for p in (p for group in theirs.param_groups for p in group["params"]):
            for name, value in theirs.state[p].items():
                assert torch.equal(torch.as_tensor(ours.state[p][name]), torch.as_tensor(value))


def test_three_steps_of_adamw_by_hand():
    """After one step the betas cancel out; differing gradients reveal each moment."""
    torch.manual_seed(0)
    model = MiniMindLM(LMConfig(**TINY))
    weight = model.layers[0].attention.wq.weight
    expected = weight.detach().clone().double()
    optimizer = make_optimizer(model, settings())
    m, v = torch.zeros_like(expected), torch.zeros_like(expected)
    for step, size in ((1, 1.0), (2, 10.0), (3, 0.1)):
        for p in model.parameters():
            p.grad = torch.randn_like(p) * size
        gradient = weight.grad.double()
        optimizer.step()
        m, v = 0.9 * m + 0.1 * gradient, 0.95 * v + 0.05 * gradient**2
        direction = (m / (1 - 0.9**step)) / ((v / (1 - 0.95**step)).sqrt() + 1e-8)
        expected -= 0.01 * (direction + 0.1 * expected)
    torch.testing.assert_close(weight.detach().double(), expected, rtol=1e-4, atol=1e-6)


def test_muon_and_adamw_share_one_rate_for_matrices_of_any_shape():
    torch.manual_seed(0)
    model = MiniMindLM(LMConfig(**TINY))
    optimizer = make_optimizer(model, settings(optimizer="muon", learning_rate=1.0), weight_decay=0.0)
    hidden = {key: p for key, p in model.named_parameters() if key.startswith("layers.") and p.dim() == 2}
    before = {key: p.detach().clone() for key, p in hidden.items()}
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    optimizer.step()
    assert len({tuple(p.shape) for p in hidden.values()}) > 3  # tall, wide and square ones
    for key, p in hidden.items():
        # an orthogonal matrix times 0.2 sqrt(max(rows, columns)); its entries have an RMS of 1 / sqrt of that
        assert (before[key] - p.detach()).square().mean().sqrt().item() == pytest.approx(0.2, rel=0.2), key


def test_muon_decays_what_it_moves():
    model = MiniMindLM(LMConfig(**TINY))
    muon = make_optimizer(model, settings(optimizer="muon")).optimizers[0]
    assert {group["weight_decay"] for group in muon.param_groups} == {0.1}


@pytest.mark.parametrize(
    ("step", "total", "warmup", "rate"),
    [
        (0, 10, 0, 1.0),
        (0, 10, 1, 1.0),
        (0, 10, 4, 0.25),
        (3, 10, 4, 1.0),
        (4, 10, 4, 1.0),
        (9, 10, 4, 0.1),
        (5, 11, 0, 0.55),  # half-way
        (40, 11, 0, 0.1),  # beyond its end it stays at its minimum
    ],
)
def test_rates_by_hand(step, total, warmup, rate):
    assert cosine_schedule(step, total, warmup, 1.0) == pytest.approx(rate)
    assert cosine_schedule(step, total, warmup, 3e-4) == pytest.approx(3e-4 * rate)


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_a_model_with_nothing_for_muon_has_one_optimizer(kind):
    model = MiniMindLM(LMConfig(**TINY))
    for key, p in model.named_parameters():
        p.requires_grad_(key == "norm.weight")
    assert isinstance(make_optimizer(model, settings(optimizer=kind)), torch.optim.AdamW)


def test_a_model_with_all_for_muon_has_one_optimizer():
    model = MiniMindLM(LMConfig(**TINY))
    for key, p in model.named_parameters():
        p.requires_grad_(key.endswith("wq.weight"))
    assert isinstance(make_optimizer(model, settings(optimizer="muon")), Muon)
