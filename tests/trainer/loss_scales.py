"""The loss scale of float16 as PyTorch's GradScaler has it, step by step, for those that stand in its place."""

import functools
import math

import torch

NORMS = (1.0, 1.0, 1.0, math.inf, 1.0, 1.0, 1.0, 1.0, math.inf, math.inf, 1.0, 1.0, 1.0)
GROWTH = 3  # steps without an overflow after which the scale doubles; 2000 in a run


@functools.cache
def scales() -> tuple[float, ...]:
    """The scale at each step of NORMS."""
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
    return tuple(found)
