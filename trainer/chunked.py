"""Sums over tokens whose terms are too wide to hold at once."""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor


def sum_in_chunks(loss_of: Callable[[Tensor, int], Tensor], logits: Tensor, sizes: Iterable[int]) -> Tensor:
    """The sum of `loss_of` over parts of `logits`, each differentiated before the next one starts.

    What a loss needs on its way (softmaxes, another model's logits) so exists for one part only; of the whole there
    are the logits and their gradient.

    Args:
        loss_of: (logits of a part, its number) -> scalar, a sum over its tokens.
        logits: (tokens, vocab), any float dtype; the gradient has the same.
        sizes: how many tokens each part has, in order; a part without any is left out.

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
