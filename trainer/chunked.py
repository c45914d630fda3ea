"""Sums over tokens whose terms are too wide to hold at once."""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from model.loss import target_mask

TOKENS_AT_ONCE = 2048  # in whole rows


def sum_over_rows(
    loss_of: Callable[[Tensor, dict[str, Tensor], Tensor], Tensor],
    logits: Tensor,
    batch: dict[str, Tensor],
    labels: Tensor,
) -> Tensor:
    """`loss_of(logits, batch, labels)`, computed for a few rows at a time, so that its intermediate tensors never exist
    for the whole batch.

    Args:
        loss_of: (some rows' logits, their part of the batch, their labels) -> scalar, a sum over target tokens.
        logits: (target tokens, vocab), those at `target_mask(labels)`.
        batch: (batch, n) each.
        labels: (batch, n) int64, not shifted; -100 is ignored.

    Returns:
        fp32 scalar; its backward reaches `logits` and nothing else.
    """
    rows_at_once = max(1, TOKENS_AT_ONCE // labels.size(1))
    parts = [slice(first, first + rows_at_once) for first in range(0, len(labels), rows_at_once)]

    def loss_of_part(part_logits: Tensor, number: int) -> Tensor:
        rows = parts[number]
        return loss_of(part_logits, {name: tensor[rows] for name, tensor in batch.items()}, labels[rows])

    learned = target_mask(labels)
    return sum_in_chunks(loss_of_part, logits, [int(learned[rows].sum()) for rows in parts])


def sum_in_chunks(loss_of: Callable[[Tensor, int], Tensor], logits: Tensor, sizes: Iterable[int]) -> Tensor:
    """The sum of `loss_of` over chunks of `logits`, each differentiated before the next one starts.

    Intermediate tensors (softmaxes, another model's logits) thus exist for one chunk only; only the logits and their
    gradient exist as a whole.

    Args:
        loss_of: (logits of a chunk, its number) -> scalar, a sum over its tokens.
        logits: (tokens, vocab), any float dtype; the gradient has the same.
        sizes: the number of tokens in each chunk, in order; empty chunks are skipped.

    Returns:
        fp32 scalar; its backward reaches `logits` and nothing else.

    Raises:
        ValueError: the sizes do not add up to the tokens.
    """
    sizes = list(sizes)
    if sum(sizes) != len(logits):
        raise ValueError(f"parts of {sum(sizes)} tokens for {len(logits)}")
    return _SumInChunks.apply(logits, loss_of, sizes)


class _SumInChunks(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits: Tensor, loss_of: Callable[[Tensor, int], Tensor], sizes: list[int]) -> Tensor:
        gradient = torch.empty_like(logits)
        total = torch.zeros((), device=logits.device)
        for number, (part, its_gradient) in enumerate(zip(logits.split(sizes), gradient.split(sizes), strict=True)):
            if len(part) == 0:
                continue
            with torch.enable_grad():
                part = part.detach().requires_grad_()
                loss = loss_of(part, number)
            its_gradient.copy_(torch.autograd.grad(loss, part)[0])
            total += loss.detach()
        ctx.save_for_backward(gradient)
        return total

    @staticmethod
    def backward(ctx, upstream: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * upstream, None, None
