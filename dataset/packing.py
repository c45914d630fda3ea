"""Packing: long samples are split or cut, and the pieces are packed into rows with little padding.

A sample comes from a line of the data; a piece is a stretch of one sample, no longer than a row; a row is an input of
the model, one or several pieces. Arrays here have one number for each of them: (samples,), (pieces,), (rows,).
"""

from typing import NamedTuple

import numpy as np

# Pieces packed together. Large enough that the few rows left unfilled at its end do not count, small enough
# that sorting it by length leaves the whole file well mixed.
WINDOW = 1 << 15


class Pieces(NamedTuple):
    """Stretches of samples: piece p is tokens start[p] … start[p] + length[p] of sample[p]; int64 arrays (pieces,)."""

    sample: np.ndarray
    start: np.ndarray
    length: np.ndarray


def split_long(lengths: np.ndarray, max_len: int) -> Pieces:
    """Split samples into pieces of at most `max_len` tokens, losing nothing.

    A piece starts with the last token of the piece before it, which is context there and not a target again, so that
    every token of a sample but its first is a target exactly once.

    Args:
        lengths: tokens of each sample, int64 (samples,).
        max_len: at least 2.
    """
    stride = max_len - 1
    counts = np.maximum(1, np.ceil((lengths - 1) / stride).astype(np.int64))  # (samples,), pieces of each
    sample = np.repeat(np.arange(len(lengths)), counts)  # (pieces,)
    nth = np.arange(len(sample)) - np.repeat(np.cumsum(counts) - counts, counts)  # (pieces,), which of its sample's
    start = nth * stride
    return Pieces(sample, start, np.minimum(lengths[sample] - start, max_len))


def cut_long(lengths: np.ndarray, first_target: np.ndarray, max_len: int) -> Pieces:
    """One piece per sample, cut after `max_len` tokens; samples without targets are dropped.

    Args:
        lengths: tokens of each sample, int64 (samples,).
        first_target: index of the first target token in each sample, its length when there is none, int64 (samples,).
        max_len: at least 2.
    """
    kept = np.minimum(lengths, max_len)
    sample = np.flatnonzero(first_target < kept)
    return Pieces(sample, np.zeros_like(sample), kept[sample])


def pack(lengths: np.ndarray, max_len: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Pack pieces into rows of `max_len` tokens: best-fit decreasing, within windows of the shuffled pieces.

    Best-fit decreasing takes the pieces from the longest to the shortest and puts each into the row with the least
    space in which it still fits (Johnson, "Near-optimal bin packing algorithms", 1973).

    Args:
        lengths: tokens of each piece, all from 1 to `max_len`, int64 (pieces,).
        seed: determines the shuffle.

    Returns:
        order (pieces,) and bounds (rows + 1,), int64: row r has pieces order[bounds[r]:bounds[r + 1]].
    """
    shuffled = np.random.default_rng(seed).permutation(len(lengths))
    order, row_sizes = [], []
    for begin in range(0, len(shuffled), WINDOW):
        window = shuffled[begin : begin + WINDOW]
        window = window[np.argsort(-lengths[window], kind="stable")]
        row = best_fit(lengths[window].tolist(), max_len)
        order.append(window[np.argsort(row, kind="stable")])
        row_sizes.append(np.bincount(row))
    bounds = np.concatenate([[0], *row_sizes]).cumsum()
    return np.concatenate([shuffled[:0], *order]), bounds


def best_fit(lengths: list[int], max_len: int) -> list[int]:
    """The row each piece goes to, pieces taken in the given order; rows are numbered from 0 as they are opened.

    Open rows are in buckets by their free space, and bit s of the integer `spaces` says whether bucket s has any:
    the tightest row that fits is the lowest set bit at or above the length, found without a search.
    """
    buckets: list[list[int]] = [[] for _ in range(max_len + 1)]
    spaces = 0
    rows = 0
    chosen = []
    for length in lengths:
        fitting = spaces >> length
        if fitting:
            space = length + (fitting & -fitting).bit_length() - 1
            row = buckets[space].pop()
            if not buckets[space]:
                spaces ^= 1 << space
        else:
            space, row = max_len, rows
            rows += 1
        chosen.append(row)
        buckets[space - length].append(row)
        spaces |= 1 << (space - length)
    return chosen
