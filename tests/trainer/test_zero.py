"""float16's loss scale when DeepSpeed holds the gradients, compared with PyTorch's own GradScaler."""

import math
from types import SimpleNamespace

import pytest
import torch

from tests.trainer.loss_scales import GROWTH, NORMS, scales
from trainer.zero import DeepSpeedScaler


class Engine:
    """As much of a ZeRO engine as the scaler uses."""

    device = torch.device("cpu")

    def __init__(self):
        self.norm = self.told = None
        self.optimizer = SimpleNamespace(override_loss_scale=lambda scale: setattr(self, "told", scale))

    def zero_optimization_stage(self) -> int:
        return 2

    def backward(self, loss) -> None:
        pass

    def step(self) -> None:
        pass

    def get_global_grad_norm(self) -> float:
        return self.norm


def scaler_of_zero() -> DeepSpeedScaler:
    scaler = DeepSpeedScaler(Engine(), torch.amp.GradScaler("cpu"))
    scaler.set_growth_interval(GROWTH)
    return scaler


def take_step(scaler: DeepSpeedScaler, norm: float) -> float:
    """Take a step; returns the scale that the engine received."""
    scaler.scale(torch.ones(())).backward()
    scaler.engine.norm = norm
    assert scaler.clip_and_step() == norm
    return scaler.engine.told


def test_the_scale_is_that_of_gradscaler():
    scaler = scaler_of_zero()
    assert [take_step(scaler, norm) for norm in NORMS] == list(scales())
    assert len(set(scales())) == 3


class EngineByHand(Engine):
    """One without ZeRO: its weight is the module's, its steps are counted."""

    def __init__(self):
        super().__init__()
        self.module, self.steps = torch.nn.Linear(1, 1, bias=False), 0
        self.optimizer = torch.optim.SGD(self.module.parameters(), lr=0.1)

    def zero_optimization_stage(self) -> int:
        return 0

    def gradient_clipping(self) -> float:
        return 1e9

    def backward(self, loss) -> None:
        self.module.weight.grad = None
        loss.backward()

    def step(self) -> None:
        self.steps += 1

    def zero_grad(self) -> None:
        self.module.zero_grad()


def test_without_zero_the_scale_is_gradscalers_and_what_is_not_finite_is_skipped():
    scaler, found = DeepSpeedScaler(EngineByHand(), torch.amp.GradScaler("cpu")), []
    scaler.set_growth_interval(GROWTH)
    for number, norm in enumerate(NORMS):
        before = scaler.engine.steps
        scaler.scale((scaler.engine.module.weight * norm).sum()).backward()
        found.append(scaler.get_scale())
        assert scaler.clip_and_step() == norm, number
        assert scaler.engine.steps - before == math.isfinite(norm)
    assert found == list(scales())


@pytest.mark.parametrize("engine", [Engine, EngineByHand])
def test_in_float32_and_bfloat16_nothing_is_scaled(engine):
    scaler = DeepSpeedScaler(engine(), torch.amp.GradScaler("cpu", enabled=False))
    assert not scaler.is_enabled()
    scaler.engine.norm = 3.0
    weight = torch.nn.Parameter(torch.ones(1)) if engine is Engine else scaler.engine.module.weight
    scaler.scale((weight * 3.0).sum()).backward()
    assert scaler.clip_and_step() == 3
    assert scaler.engine.told is None
    assert scaler.state_dict() == {}


@pytest.mark.parametrize("stopped_after", range(1, len(NORMS)))
def test_it_goes_on_where_it_was(stopped_after):
    first, second = scaler_of_zero(), scaler_of_zero()
    before = [take_step(first, norm) for norm in NORMS[:stopped_after]]
    second.load_state_dict(first.state_dict())
    assert before + [take_step(second, norm) for norm in NORMS[stopped_after:]] == list(scales())


def test_a_run_without_zero_goes_on_from_it_and_it_from_one():
    plain, zero = torch.amp.GradScaler("cpu"), scaler_of_zero()
    for norm in NORMS[:2]:
        take_step(zero, norm)
    plain.load_state_dict(zero.state_dict())
    assert plain.state_dict() == zero.state_dict()
    again = scaler_of_zero()
    again.load_state_dict(plain.state_dict())
    assert [take_step(again, norm) for norm in NORMS[2:]] == list(scales())[2:]
