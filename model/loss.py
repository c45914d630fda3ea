"""The language-model loss, and the positions that it covers."""

import torch.nn.functional as F
from torch import Tensor

IGNORE_INDEX = -100  # the label of tokens that are not in the loss


def target_mask(labels: Tensor) -> Tensor:
    """Which positions predict a target token: labels (batch, n) int64, not shifted -> bool (batch, n)."""
    return F.pad(labels[:, 1:] != IGNORE_INDEX, (0, 1))


def next_token_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Summed cross-entropy of the target tokens, each given the logits one position earlier, in nats.

    Args:
        logits: (batch, n, vocab), or only those at `target_mask(labels)`, (target tokens, vocab); any float dtype, the
            softmax is taken in fp32.
        labels: (batch, n) int64, not shifted; -100 is ignored.

    Returns:
        fp32 scalar, the sum over all target tokens (divide by their number for the mean).
    """
    if logits.dim() == 3:
        logits = logits[target_mask(labels)]
    targets = labels[:, 1:]
    return F.cross_entropy(logits.float(), targets[targets != IGNORE_INDEX], reduction="sum")
