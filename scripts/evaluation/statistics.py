"""Statistics of a score: its standard error, the chance level, and whether it differs from chance."""

import math
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

ALPHA = 0.05


class Score(NamedTuple):
    """The score on n questions.

    acc: share of right answers. acc_norm: the same with each option's log-likelihood divided by its length in
    characters, as in the harness. stderr: of acc. chance: expected share with random choices among each question's
    options. p: two-sided, for the hypothesis that choices are random. chance and p are None without options.
    """

    n: int
    acc: float
    acc_norm: float | None
    stderr: float
    chance: float | None
    p: float | None


def score(right: Sequence[bool], right_norm: Sequence[bool] | None, options: Sequence[int]) -> Score:
    """The score of some answers.

    Args:
        right, right_norm: whether each question was answered correctly, also by length-normalised likelihood.
        options: the number of each question's options; 0 if it has none.
    """
    n, acc = len(right), float(np.mean(right))
    acc_norm = None if right_norm is None else float(np.mean(right_norm))
    chance = p = None
    if all(options):
        chance = float(np.mean([1 / k for k in options]))
        p = chance_p(int(sum(right)), options)
    return Score(n, acc, acc_norm, standard_error(acc, n), chance, p)


def standard_error(share: float, n: int) -> float:
    """The standard error of a share s of n questions: sqrt(s (1 - s) / (n - 1)); NaN for n = 1."""
    return math.sqrt(share * (1 - share) / (n - 1)) if n > 1 else math.nan


def chance_distribution(options: Sequence[int]) -> np.ndarray:
    """The probability of each number of right answers with random choices among each question's k options, (n + 1,).

    A binomial distribution if k is always the same, else a Poisson-binomial one: the convolution of a binomial for each
    k.
    """
    whole = np.ones(1)
    for k, n in sorted(Counter(options).items()):
        whole = np.convolve(whole, binomial(n, 1 / k))
    return whole


def binomial(n: int, p: float) -> np.ndarray:
    """The probabilities of 0 to n successes, (n + 1,)."""
    if p in (0.0, 1.0):
        return np.eye(n + 1)[int(p * n)]
    log_factorial = np.array([math.lgamma(i + 1) for i in range(n + 1)])
    successes = np.arange(n + 1)
    ways = log_factorial[n] - log_factorial - log_factorial[::-1]
    return np.exp(ways + successes * math.log(p) + (n - successes) * math.log1p(-p))


def chance_p(right: int, options: Sequence[int]) -> float:
    """The exact two-sided p of this many right answers under chance: the total probability of all numbers that are no
    more probable, as in R's and scipy's `binomtest`."""
    return _no_more_probable(chance_distribution(options), right)


def _no_more_probable(probabilities: np.ndarray, seen: int) -> float:
    limit = probabilities[seen] * (1 + 1e-7)  # rounding must not separate equal values
    return min(1.0, float(probabilities[probabilities <= limit].sum()))


def holm(p_values: Sequence[float]) -> list[float]:
    """Each p adjusted for the others: the probability that any true hypothesis gets one below alpha is at most alpha
    (Holm 1979, "A simple sequentially rejective multiple test procedure")."""
    adjusted, largest = [0.0] * len(p_values), 0.0
    for rank, i in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        largest = max(largest, (len(p_values) - rank) * p_values[i])
        adjusted[i] = min(1.0, largest)
    return adjusted


class Paired(NamedTuple):
    """Two models on the same n questions: the numbers that only the first, or only the second, answered correctly; p of
    McNemar's exact test; the second's accuracy minus the first's, and its standard error."""

    n: int
    only_first: int
    only_second: int
    difference: float
    stderr: float
    p: float


def mcnemar(first: Sequence[bool], second: Sequence[bool]) -> Paired:
    """The exact test whether one model is better (McNemar 1947, "Note on the sampling error of the difference between
    correlated proportions"): under the null hypothesis, a question that only one has right is equally likely to be
    either's."""
    n = len(first)
    only_first = sum(a and not b for a, b in zip(first, second, strict=True))
    only_second = sum(b and not a for a, b in zip(first, second, strict=True))
    apart = only_first + only_second
    difference = (only_second - only_first) / n
    stderr = math.sqrt(max(0.0, apart / n - difference**2) / (n - 1)) if n > 1 else math.nan
    return Paired(n, only_first, only_second, difference, stderr, _no_more_probable(binomial(apart, 0.5), only_first))
