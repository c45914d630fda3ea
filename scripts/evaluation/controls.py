"""Controls: how much of a score remains without the question, and how much is a preference for a letter."""

import random
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from trainer.errors import UserError


def shuffle_stems(name: str, rows: Sequence[dict], stem: Sequence[str], seed: int) -> list[dict]:
    """Give every row another row's stem, with its own options: the score that remains is due to priors.

    Args:
        name: the exam's name.
        stem: the fields of a row that form the question without its options.
        seed: of a random order, in which each row takes the next one's stem.

    Raises:
        UserError: the stem cannot be separated from the options, or there is only one row.
    """
    if not stem:
        raise UserError(f"--control shuffle: {name} has no stem apart from its options")
    if len(rows) < 2:
        raise UserError(f"--control shuffle: {name} has a single question")
    order = list(range(len(rows)))
    random.Random(seed).shuffle(order)
    next_of = dict(zip(order, [*order[1:], order[0]], strict=True))
    return [row | {field: rows[next_of[i]][field] for field in stem} for i, row in enumerate(rows)]


class Position(NamedTuple):
    """The shares of all questions in which an option's position was chosen, and in which it was the right one."""

    chosen: float
    right: float


def position_bias(chosen: Iterable[int], targets: Iterable[int]) -> dict[str, Position]:
    """By letter, A for the first option: a model's preference for a position shows only in `chosen`."""
    chosen, targets = Counter(chosen), Counter(targets)
    n = sum(targets.values())
    places = range(max([*chosen, *targets]) + 1)
    return {chr(ord("A") + place): Position(chosen[place] / n, targets[place] / n) for place in places}
