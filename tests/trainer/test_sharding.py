"""What stands in the loop for its GradScaler where the gradients are shared out, against PyTorch's own."""

import math

import pytest
import torch

from tests.trainer.loss_scales import GROWTH, NORMS, scales
from trainer.sharding import ShardScaler, WholeStateOptimizer


def shard_scaler(enabled: bool, grad_clip: float = 1e9) -> ShardScaler:
    model = torch.nn.Linear(1, 1, bias=False)
    optimizer = WholeStateOptimizer(torch.optim.AdamW(model.parameters(), lr=0.5))
    scaler = ShardScaler(model, optimizer, torch.amp.GradScaler("cpu", enabled=enabled), grad_clip)
    if enabled:
        scaler.set_growth_interval(GROWTH)
    return scaler


def take_step(scaler: ShardScaler, norm: float) -> tuple[float, bool]:
    """The norm that is told, and whether the weight has moved; the gradient is as large as `norm` before scaling."""
    (weight,) = scaler.model.parameters()
    before = weight.detach().clone()
    scaler.scale((weight * norm).sum()).backward()
    told = scaler.clip_and_step()
    assert weight.grad is None
    return told, bool(weight.detach() != before)


def test_the_scale_falls_and_grows_as_gradscalers():
    scaler, found = shard_scaler(enabled=True), []
    for norm in NORMS:
        scaler.scale(torch.zeros(()))
        found.append(scaler.get_scale())
        told, moved = take_step(scaler, norm)
        assert told == norm
        assert moved == math.isfinite(norm)
    assert found == list(scales())


def test_in_float32_and_bfloat16_nothing_is_scaled():
    scaler = shard_scaler(enabled=False)
    assert not scaler.is_enabled()
    assert take_step(scaler, 3.0) == (3.0, True)
    assert take_step(scaler, math.inf) == (math.inf, False)
    assert scaler.state_dict() == {}


@pytest.mark.parametrize("enabled", [False, True])
def test_the_gradient_is_clipped_behind_the_scale(enabled, monkeypatch):
    scaler, seen = shard_scaler(enabled, grad_clip=0.5), []
    (weight,) = scaler.model.parameters()
    step = scaler.optimizer.optimizer.step
    monkeypatch.setattr(scaler.optimizer.optimizer, "step", lambda *_, **__: seen.append(float(weight.grad)) or step())
    assert take_step(scaler, 3.0)[0] == pytest.approx(3)
    assert seen == [pytest.approx(0.5, rel=1e-5)]
