"""AdamW with its two moments stored in 8 bits, from scratch: a quarter of the optimizer state's memory."""

from collections.abc import Iterable
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

BLOCK = 256  # numbers that share a scale
SMALLEST = 4096  # tensors with fewer numbers keep their moments in fp32: they weigh nothing


@cache
def code_book(signed: bool) -> tuple[float, ...]:
    """The 256 values of dynamic tree quantisation, ascending (Dettmers 2016, arXiv:1511.04561; Dettmers et al. 2022,
    arXiv:2110.02861, section 1.3).

    After the sign bit, if there is one, z zero bits stand for the power 10^-z, a one ends them, and the remaining bits
    select one of evenly spaced fractions between 0.1 and 1. So small numbers, the most common, have few digits but are
    distinguished over seven orders of magnitude. 0 and 1 have codes of their own.

    Args:
        signed: -1 … 1, for the first moment; or 0 … 1 with twice as many fractions, for the second, which is positive.
    """
    values = [0.0, 1.0]
    for zeros in range(7):
        count = 2 ** (6 - zeros if signed else 7 - zeros)
        width = 0.9 / count
        fractions = [10.0**-zeros * (0.1 + (i + 0.5) * width) for i in range(count)]
        values += fractions
        if signed:
            values += [-fraction for fraction in fractions]
    return tuple(sorted(values))


def quantize(x: Tensor, signed: bool) -> tuple[Tensor, Tensor]:
    """Quantise blocks of BLOCK numbers, each scaled by its largest absolute value, to the nearest code book value.

    A positive second moment is never rounded to 0, since the first moment divided by its square root would give an
    arbitrarily large step. It gets the smallest value instead, which makes the step too small.

    Args:
        x: fp32, of any shape.

    Returns:
        codes uint8 (numbers,) and scales fp32 (ceil(numbers / BLOCK),).
    """
    values = torch.tensor(code_book(signed), device=x.device)
    flat = x.flatten()
    blocks = F.pad(flat, (0, -len(flat) % BLOCK)).view(-1, BLOCK)
    scales = blocks.abs().amax(1)
    scaled = blocks / scales.clamp(min=torch.finfo(torch.float32).tiny)[:, None]
    codes = torch.bucketize(scaled, (values[1:] + values[:-1]) / 2)
    if not signed:
        codes = torch.where(scaled > 0, codes.clamp(min=1), codes)
    return codes.to(torch.uint8).flatten()[: len(flat)], scales


def dequantize(codes: Tensor, scales: Tensor, signed: bool) -> Tensor:
    """The inverse of `quantize`: fp32 (numbers,)."""
    values = torch.tensor(code_book(signed), device=codes.device)
    return values[codes.int()] * scales.repeat_interleave(BLOCK)[: len(codes)]


class AdamW8bit(torch.optim.Optimizer):
    """AdamW (Loshchilov & Hutter 2019, arXiv:1711.05101) with moments stored in 8 bits, block-wise (Dettmers et al.
    2022, arXiv:2110.02861). They are dequantised, updated and quantised again one tensor at a time; the arithmetic
    is in fp32. Each moment takes 1 + 4 / BLOCK bytes per parameter: 2.03 for both, where AdamW takes 8.

    State of a parameter: `step`, and for each moment `NAME` either `NAME` in fp32, or `NAME_codes` and `NAME_scales`.
    """

    MOMENTS = {"exp_avg": True, "exp_avg_sq": False}  # noqa: RUF012  (name: signed)

    def __init__(
        self,
        params: Iterable,
        lr: float,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 0.1,
    ):
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, group)

    def _update(self, parameter: Tensor, group: dict) -> None:
        state, gradient = self.state[parameter], parameter.grad.float()
        step = state["step"] = state.get("step", 0) + 1
        m, v = (self._moment(state, name, gradient) for name in self.MOMENTS)
        beta1, beta2 = group["betas"]
        m.lerp_(gradient, 1 - beta1)
        v.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        for name, moment in zip(self.MOMENTS, (m, v), strict=True):
            self._keep(state, name, moment)
        root = v.div_(1 - beta2**step).sqrt_().add_(group["eps"])
        parameter.mul_(1 - group["lr"] * group["weight_decay"])
        parameter.addcdiv_(m, root, value=-group["lr"] / (1 - beta1**step))

    def _moment(self, state: dict, name: str, like: Tensor) -> Tensor:
        """A copy of a moment in fp32; zeros before the first step."""
        if name in state:
            return state[name].clone()
        if f"{name}_codes" in state:
            signed = self.MOMENTS[name]
            return dequantize(state[f"{name}_codes"], state[f"{name}_scales"], signed).view_as(like)
        return torch.zeros_like(like)

    def _keep(self, state: dict, name: str, moment: Tensor) -> None:
        if moment.numel() < SMALLEST:
            state[name] = moment.clone()
        else:
            state[f"{name}_codes"], state[f"{name}_scales"] = quantize(moment, self.MOMENTS[name])

    def load_state_dict(self, state_dict: dict) -> None:
        super().load_state_dict(state_dict)
        for state in self.state.values():  # PyTorch has cast the codes to the dtype of their parameter
            for name in self.MOMENTS:
                if f"{name}_codes" in state:
                    state[f"{name}_codes"] = state[f"{name}_codes"].to(torch.uint8)
