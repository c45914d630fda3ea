"""The selection and order of lines, by a hash of the seed and each line's number."""

from collections.abc import Callable, Iterable, Sequence

import numpy as np

BINS = 1 << 16
_STEP = np.uint64(0x9E3779B97F4A7C15)


def draw(seed: int, purpose: str, numbers: np.ndarray) -> np.ndarray:
    """A reproducible random 64-bit number for each line, uint64 (n,).

    By SplitMix64: Steele, Lea, Flood, "Fast splittable pseudorandom number generators", 2014.
    """
    salt = seed
    for char in purpose:
        salt = (salt * 0x100000001B3 + ord(char)) % (1 << 64)
    with np.errstate(over="ignore"):
        mixed = (numbers.astype(np.uint64) + np.uint64(1)) * _STEP + np.uint64(salt) * np.uint64(0xD6E8FEB86659FD93)
        for _ in range(2):  # the salt of one run and the next differ in few bits
            mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
            mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
            mixed ^= mixed >> np.uint64(31)
    return mixed


Portions = Callable[[], Iterable[tuple[np.ndarray, np.ndarray]]]  # keys, and how much each line is


def cutoff(portions: Portions, amount: float) -> int:
    """The largest key for which the lines up to it come to the amount, or just below it.

    Returns:
        -1 if not even one line fits.
    """
    sums = np.zeros(BINS)
    for keys, sizes in portions():
        sums += np.bincount((keys >> np.uint64(48)).astype(np.int64), weights=sizes, minlength=BINS)
    reached = np.cumsum(sums)
    crossing = int(np.searchsorted(reached, amount, side="right"))
    if crossing == BINS:
        return (1 << 64) - 1
    rest = amount - (reached[crossing - 1] if crossing else 0)
    found = [(keys[mine], sizes[mine]) for keys, sizes, mine in _of_bin(portions, crossing)]
    keys, sizes = (np.concatenate(parts) for parts in zip(*found, strict=True))
    order = np.argsort(keys)
    fits = int(np.searchsorted(np.cumsum(sizes[order]), rest, side="right"))
    return int(keys[order[fits - 1]]) if fits else (crossing << 48) - 1


def _of_bin(portions: Portions, number: int):
    for keys, sizes in portions():
        yield keys, sizes, keys >> np.uint64(48) == number


def bucket_of(keys: np.ndarray, buckets: int) -> np.ndarray:
    """The bucket that each key falls into; buckets are in the order of the keys."""
    return ((keys >> np.uint64(32)) * np.uint64(buckets) >> np.uint64(32)).astype(np.int64)


def amounts(sizes: Sequence[float], shares: Sequence[float]) -> list[float]:
    """The amount to take from each part so that the shares hold and nothing is taken twice."""
    from dataset.mixing import amounts as of_files

    return of_files(sizes, shares)
