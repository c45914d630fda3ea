"""Splitting, cutting and packing, compared with brute force on random lengths."""

import itertools

import numpy as np
import pytest

from dataset.packing import WINDOW, best_fit, cut_long, pack, split_long


def random_lengths(seed: int, count: int, low: int, high: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(low, high + 1, count)


def pack_by_search(lengths: list[int], max_len: int) -> list[int]:
    """Best-fit rows, found by examining every open row."""
    free, chosen = [], []
    for length in lengths:
        fitting = [row for row, space in enumerate(free) if space >= length]
        if not fitting:
            free.append(max_len)
            fitting = [len(free) - 1]
        tightest = min(free[row] for row in fitting)
        # any of equally tight rows may be chosen: the test compares how full rows are, not which they are
        row = next(row for row in fitting if free[row] == tightest)
        free[row] -= length
        chosen.append(row)
    return chosen


def fillings(lengths, rows) -> list[int]:
    return sorted(np.bincount(rows, weights=lengths).astype(int).tolist())


@pytest.mark.parametrize("seed", range(20))
def test_best_fit_equals_a_search_over_all_rows(seed):
    max_len = int(np.random.default_rng(seed).integers(2, 60))
    lengths = random_lengths(seed, 200, 1, max_len).tolist()

    assert fillings(lengths, best_fit(lengths, max_len)) == fillings(lengths, pack_by_search(lengths, max_len))


@pytest.mark.parametrize("seed", range(20))
def test_packing_puts_every_piece_into_one_row_and_none_overflows(seed):
    max_len = int(np.random.default_rng(seed).integers(2, 300))
    lengths = random_lengths(seed, 500, 1, max_len)
    order, bounds = pack(lengths, max_len, seed)

    assert sorted(order.tolist()) == list(range(500))
    assert bounds[0] == 0
    assert bounds[-1] == 500
    assert (np.diff(bounds) > 0).all()  # no row is empty
    rows = [lengths[order[begin:end]].sum() for begin, end in itertools.pairwise(bounds)]
    assert max(rows) <= max_len
    longest_first = sorted(lengths.tolist(), reverse=True)  # best-fit decreasing
    assert sorted(rows) == fillings(longest_first, pack_by_search(longest_first, max_len))


def test_packing_depends_on_the_seed_alone_and_mixes_the_file():
    lengths = random_lengths(0, 2000, 5, 60)
    first, again, other = pack(lengths, 128, 1), pack(lengths, 128, 1), pack(lengths, 128, 2)

    assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))
    assert not np.array_equal(first[0], other[0])
    neighbours = [order[1] - order[0] for order in np.split(first[0], first[1][1:-1]) if len(order) > 1]
    assert np.abs(neighbours).mean() > 300  # of 667 pairs; two random orders would share about this many


def test_windows_are_packed_apart_and_lose_nothing():
    lengths = random_lengths(3, 2 * WINDOW + 100, 1, 40)
    order, bounds = pack(lengths, 64, 0)

    assert np.array_equal(np.sort(order), np.arange(len(lengths)))
    row_of = np.repeat(np.arange(len(bounds) - 1), np.diff(bounds))
    assert np.bincount(row_of, weights=lengths[order]).max() <= 64
    assert lengths.sum() / (64 * (len(bounds) - 1)) > 0.99
    shuffled = np.random.default_rng(0).permutation(len(lengths))
    place = np.empty(len(lengths), int)
    place[shuffled] = np.arange(len(lengths))
    for begin, end in itertools.pairwise(bounds):
        assert len(set(place[order[begin:end]] // WINDOW)) == 1


def test_no_piece_at_all_packs_into_no_row():
    order, bounds = pack(np.zeros(0, np.int64), 16, 0)
    assert (order.tolist(), bounds.tolist()) == ([], [0])


@pytest.mark.parametrize("max_len", [2, 3, 7, 16, 100])
def test_splitting_teaches_every_token_but_the_first_exactly_once(max_len):
    lengths = np.array([2, 3, max_len - 1, max_len, max_len + 1, 2 * max_len - 1, 2 * max_len, 5 * max_len + 3, 1000])
    lengths = lengths[lengths >= 2]
    pieces = split_long(lengths, max_len)
    targets = [[] for _ in lengths]
    for sample, start, length in zip(*pieces, strict=True):
        assert 2 <= length <= max_len
        assert start + length <= lengths[sample]
        targets[sample] += range(start + 1, start + length)  # a piece's first token is context, not a target

    assert targets == [list(range(1, length)) for length in lengths]
    whole = np.bincount(pieces.sample)[lengths <= max_len]
    assert (whole == 1).all()  # samples that fit a row are not split


def test_cutting_keeps_the_beginning_and_drops_what_has_nothing_left_to_learn():
    lengths = np.array([5, 10, 11, 30, 30, 30, 4])
    first_target = np.array([2, 9, 10, 9, 10, 25, 4])  # 4 of 4: no targets at all
    pieces = cut_long(lengths, first_target, 10)

    assert pieces.sample.tolist() == [0, 1, 3]
    assert pieces.start.tolist() == [0, 0, 0]
    assert pieces.length.tolist() == [5, 10, 10]
