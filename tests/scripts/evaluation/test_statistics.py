"""Statistics compared with scipy, with results by hand, and on simulated models that know nothing, all, or a little."""

import itertools
import random

import numpy as np
import pytest
from scipy.stats import binomtest

from scripts.evaluation.statistics import chance_distribution, chance_p, holm, mcnemar, score, standard_error


@pytest.mark.parametrize(("n", "k"), [(1, 2), (7, 3), (40, 4), (169, 4), (11_582, 4)])
def test_the_p_of_a_score_is_binomtests(n, k):
    for right in {0, 1, n // k, n // k + 1, n // 3, n}:
        assert chance_p(right, [k] * n) == pytest.approx(binomtest(right, n, 1 / k).pvalue, rel=1e-6, abs=1e-300)


def test_with_several_numbers_of_options_each_outcome_is_weighed():
    options = [2, 3, 3, 5, 4]
    by_hand = np.zeros(6)
    for outcome in itertools.product((0, 1), repeat=5):
        by_hand[sum(outcome)] += np.prod([1 / k if hit else 1 - 1 / k for hit, k in zip(outcome, options, strict=True)])
    assert chance_distribution(options) == pytest.approx(by_hand)
    assert chance_p(4, options) == pytest.approx(by_hand[by_hand <= by_hand[4] * (1 + 1e-7)].sum())


def test_a_score_by_hand():
    found = score([True, True, False, False], [True, False, False, False], [2, 4, 4, 4])
    assert (found.n, found.acc, found.acc_norm, found.chance) == (4, 0.5, 0.25, (0.5 + 3 * 0.25) / 4)
    assert found.stderr == pytest.approx(np.std([1, 1, 0, 0], ddof=1) / 2)


def test_without_options_there_is_no_chance():
    found = score([True, False], None, [0, 0])
    assert (found.acc, found.acc_norm, found.chance, found.p) == (0.5, None, None, None)


def test_the_standard_error_of_one_answer_is_unknown():
    assert np.isnan(standard_error(1.0, 1))


def test_holm_by_hand():
    assert holm([0.01, 0.04, 0.03, 0.5]) == pytest.approx([0.04, 0.09, 0.09, 0.5])
    assert holm([]) == []
    assert holm([0.9, 0.8]) == [1.0, 1.0]


def test_mcnemar_by_hand():
    first, second = [True] * 10 + [False] * 10, [True] * 8 + [False] * 2 + [True] * 9 + [False]
    found = mcnemar(first, second)
    assert (found.n, found.only_first, found.only_second) == (20, 2, 9)
    assert found.difference == pytest.approx(0.35)
    assert found.stderr == pytest.approx(np.std(np.subtract(second, first, dtype=float), ddof=1) / np.sqrt(20))
    assert found.p == pytest.approx(binomtest(2, 11, 0.5).pvalue)
    assert mcnemar(first, first).p == 1.0


def answers(seed: int, n: int, edge: float = 0.0) -> list[bool]:
    """The answers of a model that guesses among four options but knows enough to raise its score by `edge`."""
    draw = random.Random(seed)
    knows = edge / 0.75
    return [draw.random() < knows or draw.randrange(4) == 0 for _ in range(n)]


def test_of_1000_that_know_nothing_at_most_70_differ_from_chance():
    different = [score(answers(seed, 200), None, [4] * 200).p < 0.05 for seed in range(1000)]
    assert 10 <= sum(different) <= 70


def test_an_edge_of_5_points_is_found_on_2000_questions():
    for seed in range(20):
        assert score(answers(seed, 2000, 0.05), None, [4] * 2000).p < 0.05


def test_a_model_5_points_better_is_found_on_2000_questions():
    for seed in range(20):
        base = answers(seed, 2000)
        draw = random.Random(1000 + seed)
        better = [right or draw.random() < 0.05 / 0.75 for right in base]
        assert mcnemar(base, better).p < 0.05
