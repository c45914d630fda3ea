"""float16's loss scale when DeepSpeed holds the gradients, compared with PyTorch's own GradScaler."""

import math
from types import SimpleNamespace

import pytest
import torch

from trainer.zero import DeepSpeedScaler

NORMS = (1.0, 1.0, 1.0, math.inf, 1.0, 1.0, 1.0, 1.0, math.inf, math.inf, 1.0, 1.0, 1.0)
GROWTH = 3  # steps without an overflow after which the scale doubles; 2000 in a run


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


@pytest.fixture(scope="module")
def scales() -> list[float]:
    """GradScaler's scale at each step."""
    scaler = torch.amp.GradScaler("cpu", growth_interval=GROWTH)
    weight = torch.nn.Parameter(torch.ones(1))
    optimizer = torch.optim.SGD([weight], lr=0.1)
    found = []
    for norm in NORMS:
        scaler.scale(torch.zeros(()))
        found.append(scaler.get_scale())
        weight.grad = torch.tensor([norm])
        scaler.step(optimizer)
        scaler.update()
    return found


def take_step(scaler: DeepSpeedScaler, norm: float) -> float:
    """Take a step; returns the scale that the engine received."""
    scaler.scale(torch.ones(())).backward()
    scaler.engine.norm = norm
    assert scaler.clip_and_step() == norm
    return scaler.engine.told


def test_the_scale_is_that_of_gradscaler(scales):
    scaler = scaler_of_zero()
    assert [take_step(scaler, norm) for norm in NORMS] == scales
    assert len(set(scales)) == 3


@pytest.mark.parametrize("stopped_after", range(1, len(NORMS)))
def test_it_goes_on_where_it_was(scales, stopped_after):
    first, second = scaler_of_zero(), scaler_of_zero()
    before = [take_step(first, norm) for norm in NORMS[:stopped_after]]
    second.load_state_dict(first.state_dict())
    assert before + [take_step(second, norm) for norm in NORMS[stopped_after:]] == scales


def test_a_run_without_zero_goes_on_from_it_and_it_from_one(scales):
    plain, zero = torch.amp.GradScaler("cpu"), scaler_of_zero()
    for norm in NORMS[:2]:
        take_step(zero, norm)
    plain.load_state_dict(zero.state_dict())
    assert plain.state_dict() == zero.state_dict()
    again = scaler_of_zero()
    again.load_state_dict(plain.state_dict())
    assert [take_step(again, norm) for norm in NORMS[2:]] == scales[2:]
