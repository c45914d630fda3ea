"""The boundaries of the samples in a packed batch."""

import torch
from torch import Tensor

from model.loss import IGNORE_INDEX


def sample_numbers(batch: dict[str, Tensor]) -> Tensor:
    """The number of each token's sample, counted over all rows, (rows, n) int64; padding has the number of the sample
    before it, or -1.

    Args:
        batch: position_ids and attention_mask, (rows, n): positions restart at 0 where a sample begins.
    """
    starts = (batch["position_ids"] == 0) & batch["attention_mask"]
    return starts.flatten().cumsum(0).view_as(starts) - 1


def last_targets(batch: dict[str, Tensor], labels: Tensor) -> Tensor:
    """The position of each sample's last target token, (rows, n) bool: one True per sample with targets."""
    learned = labels != IGNORE_INDEX
    numbers = sample_numbers(batch)[learned]
    places = learned.flatten().nonzero()[:, 0]
    last = torch.ones_like(numbers, dtype=torch.bool)
    last[:-1] = numbers[1:] != numbers[:-1]
    return torch.zeros_like(learned.flatten()).index_fill(0, places[last], True).view_as(learned)
