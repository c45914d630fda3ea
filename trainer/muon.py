"""Muon: momentum with an orthogonalised update of each matrix, so that all its directions are learned equally."""

import math
from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor

from trainer.device import default_dtype

Polynomials = Sequence[tuple[float, float, float]]  # a x + b x^3 + c x^5, applied one after another

# Jordan et al. 2024: steepest at 0 of those that end between 0.7 and 1.2
JORDAN: Polynomials = ((3.4445, -4.7750, 2.0315),) * 5
# Amsel et al. 2025, arXiv:2505.16932: each is the best one for what the one before has left of the singular values in
# [0.001, 1], so that five of them end between 0.88 and 1.12
POLAR_EXPRESS: Polynomials = (
    (8.28721201814563, -23.595886519098837, 17.300387312530933),
    (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
    (3.9486908534822946, -2.908902115956949, 0.5518191394370137),
    (3.3184196573706015, -2.488488024314874, 0.51004894012372),
    (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
)
CUSHION = 1.01  # the same source divides by so much more: what rounds above 1 would soon be far above it
RMS_OF_ADAMW = 0.2  # of the entries of a typical AdamW update (Liu et al. 2025, section 2.2)
ENTRIES_AT_ONCE = 1 << 24  # of the matrices that are made orthogonal together: 64 MB in fp32


class Muon(torch.optim.Optimizer):
    """Muon for matrices (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/), scaled and with decoupled
    weight decay as in Liu et al. 2025, arXiv:2502.16982:

        m <- mu m + (1 - mu) g;  u = orthogonalise(mu m + (1 - mu) g)
        W <- W - lr (0.2 sqrt(max(W.shape)) u + decay W)

    An orthogonal matrix has entries with an RMS of 1 / sqrt(max(shape)); the factor gives them AdamW's 0.2, so that one
    learning rate serves both. Matrices of equal shape are orthogonalised together, in batched products.

    Args:
        params: matrices, (rows, columns).
        lr: in AdamW's units.
        momentum: mu, with Nesterov's look ahead.
        weight_decay: decoupled.
        polynomials: those of the iteration that orthogonalises an update.
        neuron_decay: beta_2 of NorMuon (Li et al. 2025, arXiv:2510.05491), 0.95 in the paper, which keeps the mean
            square of each row of u and divides the row by its root:

                v <- beta_2 v + (1 - beta_2) mean(u^2 over columns);  u <- u / sqrt(v), of the same norm as before

            None: plain Muon.
        cautious: decay only those weights that the update moves towards 0 (Chen et al. 2025, arXiv:2510.12402).
    """

    def __init__(
        self,
        params: Iterable[Tensor],
        lr: float,
        momentum: float = 0.95,
        weight_decay: float = 0.1,
        polynomials: Polynomials = JORDAN,
        neuron_decay: float | None = None,
        cautious: bool = False,
    ):
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})
        self.polynomials = polynomials
        self.neuron_decay = neuron_decay
        self.cautious = cautious

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            for matrices in _of_one_shape(group["params"]):
                looking_ahead = torch.stack([self._momentum(matrix, group["momentum"]) for matrix in matrices])
                updates = orthogonalise(looking_ahead, self.polynomials)  # (matrices, rows, columns)
                if self.neuron_decay is not None:
                    updates = self._level_neurons(matrices, updates, self.neuron_decay)
                scale = RMS_OF_ADAMW * math.sqrt(max(matrices[0].shape))
                for matrix, update in zip(matrices, updates, strict=True):
                    self._move(matrix, update.mul_(scale), group)

    def _momentum(self, matrix: Tensor, mu: float) -> Tensor:
        """Add the gradient to the momentum; returns the momentum as if the same gradient came once more (Nesterov)."""
        state = self.state[matrix]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(matrix.grad)
        momentum = state["momentum_buffer"].lerp_(matrix.grad, 1 - mu)
        return matrix.grad.lerp(momentum, mu)

    def _level_neurons(self, matrices: list[Tensor], updates: Tensor, decay: float) -> Tensor:
        """NorMuon's update: rows of about equal norm, scaled to the norm of an orthogonal matrix, sqrt(min(shape))."""
        squares = updates.square().mean(-1, keepdim=True)  # (matrices, rows, 1)
        for matrix, square in zip(matrices, squares, strict=True):
            state = self.state[matrix]
            if "neuron_buffer" not in state:
                state["neuron_buffer"] = torch.zeros_like(square)
            square.copy_(state["neuron_buffer"].lerp_(square, 1 - decay))
        levelled = updates / squares.sqrt().clamp(min=1e-8)
        norm = levelled.square().sum((-2, -1), keepdim=True).sqrt().clamp(min=1e-8)
        return levelled * (math.sqrt(min(matrices[0].shape)) / norm)

    def _move(self, matrix: Tensor, update: Tensor, group: dict) -> None:
        lr, decay = group["lr"], group["weight_decay"]
        if self.cautious:
            matrix.addcmul_(matrix, (update * matrix >= 0).to(matrix.dtype), value=-lr * decay)
        else:
            matrix.mul_(1 - lr * decay)
        matrix.add_(update, alpha=-lr)


def _of_one_shape(matrices: Iterable[Tensor]) -> Iterator[list[Tensor]]:
    """The parameters with a gradient, in lists of equal shape, each as long as `ENTRIES_AT_ONCE` allows."""
    by_shape: dict[tuple, list[Tensor]] = {}
    for matrix in matrices:
        if matrix.grad is not None:
            by_shape.setdefault((matrix.shape, matrix.dtype, matrix.device), []).append(matrix)
    for alike in by_shape.values():
        count = max(1, ENTRIES_AT_ONCE // max(1, alike[0].numel()))
        yield from (alike[first : first + count] for first in range(0, len(alike), count))


def orthogonalise(matrices: Tensor, polynomials: Polynomials = JORDAN) -> Tensor:
    """Approximately U V^T for each U S V^T of `matrices`, by odd polynomials of degree five, which change only the
    singular values (Newton-Schulz as in Jordan et al. 2024):

        X <- a X + (b A + c A^2) X,   A = X X^T,   from X = matrix / |matrix|

    In bfloat16 if the device supports it, else in float32: a CPU that only emulates bfloat16 is about twenty times
    slower in it.

    Args:
        matrices: (matrices, rows, columns).
        polynomials: (a, b, c) of each iteration.

    Returns:
        the same shape and dtype; singular values that were not tiny compared with the largest become about 1: 0.7 to
        1.2 with `JORDAN`, 0.87 to 1.13 with `POLAR_EXPRESS`.
    """
    dtype = torch.bfloat16 if default_dtype(matrices.device) == "bfloat16" else torch.float32
    x = matrices.to(dtype)
    if high := x.size(-2) > x.size(-1):
        x = x.mT  # the smaller of both products X X^T and X^T X
    norm = torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True)
    x = x / (CUSHION * norm if polynomials is POLAR_EXPRESS else norm).clamp(min=1e-7)
    for a, b, c in polynomials:
        gram = x @ x.mT  # (matrices, smaller side, smaller side)
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x.mT if high else x).to(matrices.dtype)
