"""Muon: momentum whose update of each matrix is orthogonalised, so that all its directions are learned equally."""

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from trainer.device import default_dtype

COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # Jordan et al. 2024: steepest at 0 of those that end between 0.7 and 1.2
ITERATIONS = 5
RMS_OF_ADAMW = 0.2  # of the entries of a typical AdamW update (Liu et al. 2025, section 2.2)


class Muon(torch.optim.Optimizer):
    """Muon for matrices (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/), scaled and with decoupled
    weight decay as in Liu et al. 2025, arXiv:2502.16982:

        m <- mu m + (1 - mu) g;  u = orthogonalise(mu m + (1 - mu) g)
        W <- W - lr (0.2 sqrt(max(W.shape)) u + decay W)

    An orthogonal matrix has entries with an RMS of 1 / sqrt(max(shape)); the factor gives them AdamW's 0.2, so that one
    learning rate serves both.

    Args:
        params: matrices, (rows, columns).
        lr: in AdamW's units.
        momentum: mu, with Nesterov's look ahead.
        weight_decay: decoupled.
    """

    def __init__(self, params: Iterable[Tensor], lr: float, momentum: float = 0.95, weight_decay: float = 0.1):
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            for matrix in group["params"]:
                if matrix.grad is None:
                    continue
                state = self.state[matrix]
                if not state:
                    state["momentum_buffer"] = torch.zeros_like(matrix.grad)
                momentum = state["momentum_buffer"].lerp_(matrix.grad, 1 - group["momentum"])
                update = orthogonalise(matrix.grad.lerp(momentum, group["momentum"]))
                matrix.mul_(1 - group["lr"] * group["weight_decay"])
                matrix.add_(update, alpha=-group["lr"] * RMS_OF_ADAMW * math.sqrt(max(matrix.shape)))


def orthogonalise(matrix: Tensor) -> Tensor:
    """About U V^T for U S V^T = `matrix`, by a Newton-Schulz iteration of degree five (Jordan et al. 2024):

        X <- a X + (b A + c A^2) X,   A = X X^T,   from X = matrix / |matrix|

    In bfloat16 where the device computes in it, else in float32: a CPU that only emulates bfloat16 is some twenty times
    slower in it.

    Args:
        matrix: (rows, columns).

    Returns:
        its shape and dtype; singular values between about 0.7 and 1.2.
    """
    a, b, c = COEFFICIENTS
    dtype = torch.bfloat16 if default_dtype(matrix.device) == "bfloat16" else torch.float32
    x = matrix.to(dtype)
    if high := x.size(0) > x.size(1):
        x = x.T  # the smaller of both products X X^T and X^T X
    x = x / x.norm().clamp(min=1e-7)
    for _ in range(ITERATIONS):
        gram = x @ x.T  # (smaller side, smaller side)
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x.T if high else x).to(matrix.dtype)
