"""Lines that are nearly another one: pairs are proposed by shared shingles and count by their Levenshtein distance.

All entries (a shingle and its line) are sorted, a share of the range of shingles at a time, so that equal ones come
together. A group of lines with one shingle is compared pair by pair where it is small. In a large one (a phrase, a
template) each line is compared with those most like it by their sketches, and with the longest: where most of them are
near-duplicates of each other they are dropped at that, and those that are left are compared in another round.

Everything between the steps lies in files; what is in memory does not grow with the data, but for a few bytes a line.
"""

import functools
import itertools
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Executor
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np

from scripts.preparing.shingles import BINS, LINE_BITS, likeness, parts, sorted_once
from scripts.preparing.work_folder import save_array

ENTRIES_AT_ONCE = 1 << 22
PAIRS_AT_ONCE = 1 << 19
SMALL_GROUP = 32  # lines that are compared pair by pair
NEIGHBOURS = 4  # of a line in a large group, in each of its orders
ORDERS = 2
LIKE = 0.2  # the sketches' estimate from which a pair is read; a tenth of the characters changed leaves 0.5
ROUNDS = 4
PIECE = 50_000  # characters that are compared at once
NUMBER_BITS = 32  # of a line in a pair


class TextStore(Protocol):
    """The texts of all lines. It goes to worker processes, so it is small when pickled."""

    def read(self, numbers: Sequence[int]) -> list[str]:
        """The texts of these lines, whose numbers ascend."""


class _Search(NamedTuple):
    """What every process needs to know."""

    signature_files: tuple[Path, ...]
    starts: tuple[int, ...]  # the number of each file's first line, and of the line after the last
    texts: TextStore
    threshold: float
    work: Path
    shares: int  # of the range of shingles
    line_bits: int

    def lengths(self) -> np.ndarray:
        return np.load(self.work / "lengths.npy", mmap_mode="r")

    def pairs_file(self, turn: int, share: int) -> Path:
        return self.work / f"pairs-{turn}-{share}.npy"


def find_near_duplicates(
    signature_files: Sequence[Path],
    texts: TextStore,
    threshold: float,
    work: Path,
    dropped: np.ndarray | None = None,
    pool: Executor | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """The lines that are near-duplicates of one that is kept: of two, the longer one is, or else the earlier.

    A pair counts when 1 - Levenshtein distance / length of the longer is at least `threshold`.

    Args:
        signature_files: what `signatures` returned for each chunk, as .npy, in the order of the lines.
        work: a folder of its own, which may be deleted afterwards.
        dropped: numbers of lines to leave out, because they repeat another exactly.
        pool: processes that share the work; the result does not depend on them.

    Returns:
        the numbers of the lines to drop, ascending, and of the kept line that each is near to; both int64.

    Raises:
        OSError: the folder cannot be written to.
    """
    search, alive = _prepare(signature_files, texts, threshold, work)
    if dropped is not None:
        alive[dropped] = False
    at_first, edges = alive.copy(), np.empty((0, 2), np.int64)
    shares, winners = list(range(search.shares)), {}
    for turn in range(ROUNDS):
        save_array(work / "alive.npy", np.stack([at_first, alive]))
        large = _run(pool, functools.partial(_propose, search, turn), shares)
        shares = [share for share, is_large in zip(shares, large, strict=True) if is_large]
        found = _check_all(search, pool, [search.pairs_file(turn, share) for share in range(search.shares)])
        if len(found) == 0:
            break
        edges = np.concatenate([edges, found])
        winners = _decide(edges, search.lengths())
        alive = at_first.copy()
        alive[list(winners)] = False
        if not shares:
            break
    lines = np.array(sorted(winners), np.int64)
    return lines, np.array([winners[line] for line in lines.tolist()], np.int64)


def _prepare(files: Sequence[Path], texts: TextStore, threshold: float, work: Path) -> tuple[_Search, np.ndarray]:
    """Lengths and sketches of all lines, each in one file; which lines there are, all true."""
    work.mkdir(parents=True, exist_ok=True)
    starts, entries = [0], 0
    for file in files:
        lengths, _, found = parts(np.load(file, mmap_mode="r"))
        starts.append(starts[-1] + len(lengths))
        entries += len(found)
    lines = starts[-1]
    all_lengths = np.zeros(lines, np.uint32)
    with open(work / "sketches", "wb") as out:
        for file, start in zip(files, starts, strict=False):
            lengths, sketches, _ = parts(np.load(file, mmap_mode="r"))
            all_lengths[start : start + len(lengths)] = lengths
            out.write(sketches.tobytes())
    save_array(work / "lengths.npy", all_lengths)
    shares = 1 << max(4, -(-entries // ENTRIES_AT_ONCE).bit_length())
    line_bits = max(1, lines.bit_length())
    search = _Search(tuple(files), tuple(starts), texts, threshold, work, shares, line_bits)
    return search, np.ones(lines, bool)


def _run(pool: Executor | None, job, items: Iterable) -> list:
    return list(map(job, items) if pool is None else pool.map(job, items))


# ----------------------------------------------------------------------------------------------------- pairs to look at


def _propose(search: _Search, turn: int, share: int) -> bool:
    """Write the pairs of one share of the shingles, the loser's number first; says whether a group was large.

    The first turn looks at all groups, the others at those that were large, without the lines dropped since.
    """
    at_first, alive = np.load(search.work / "alive.npy", mmap_mode="r")
    groups, lines = _groups(search, share, at_first)
    starts = np.flatnonzero(np.r_[True, groups[1:] != groups[:-1]]) if len(groups) else np.empty(0, np.int64)
    sizes = np.diff(np.r_[starts, len(groups)])
    large = np.repeat(sizes > SMALL_GROUP, sizes)
    any_large = bool(large.any())
    if turn:
        still = large & alive[lines]
        groups, lines, large = groups[still], lines[still], large[still]
        _, index, sizes = np.unique(groups, return_inverse=True, return_counts=True)
        large = (sizes > SMALL_GROUP)[index]
    lengths = search.lengths()
    sketches = np.memmap(search.work / "sketches", np.uint8, "r", shape=(len(lengths), BINS)) if len(lengths) else None
    proposed = [np.empty(0, np.uint64)]
    for first, second in _all_pairs(search, groups, lines, large, sketches):
        for start in range(0, len(first), PAIRS_AT_ONCE):
            one, other = first[start : start + PAIRS_AT_ONCE], second[start : start + PAIRS_AT_ONCE]
            long, short = np.maximum(lengths[one], lengths[other]), np.minimum(lengths[one], lengths[other])
            near = (short >= search.threshold * long) & (one != other)
            one, other = one[near], other[near]
            near = likeness(sketches[one], sketches[other]) >= LIKE
            proposed.append(_pack(one[near], other[near], lengths))
    save_array(search.pairs_file(turn, share), sorted_once(np.concatenate(proposed)))
    return any_large


def _groups(search: _Search, share: int, alive: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The entries of a share whose shingle stands in two lines or more, sorted: (shingle, line's number)."""
    shift, bits = np.uint64(64 - search.shares.bit_length() + 1), np.uint64(search.line_bits)
    in_chunk, found = np.uint64((1 << LINE_BITS) - 1), [np.empty(0, np.uint64)]
    for file, start in zip(search.signature_files, search.starts, strict=False):
        entries = parts(np.load(file, mmap_mode="r"))[2]
        low = np.searchsorted(entries, np.uint64(share) << shift)
        high = len(entries) if share + 1 == search.shares else np.searchsorted(entries, np.uint64(share + 1) << shift)
        mine = np.array(entries[low:high])
        lines = (mine & in_chunk) + np.uint64(start)
        mine = (mine >> np.uint64(LINE_BITS) << bits | lines)[alive[lines.astype(np.int64)]]
        found.append(mine)  # of the shingle, as many bits as there is room for; a share has the first ones in common
    found = np.concatenate(found)
    found.sort()
    shingles = found >> bits
    repeated = np.zeros(len(found) + 1, bool)
    repeated[1:-1] = shingles[1:] == shingles[:-1]
    together = repeated[1:] | repeated[:-1]
    found = found[together]
    return found >> bits, (found & np.uint64((1 << search.line_bits) - 1)).astype(np.int64)


def _all_pairs(
    search: _Search, groups: np.ndarray, lines: np.ndarray, large: np.ndarray, sketches: np.ndarray
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """The lines to compare, in portions."""
    yield from _neighbours(groups[~large], lines[~large], SMALL_GROUP - 1)
    groups, lines = groups[large], lines[large]
    if not len(groups):
        return
    _, groups = np.unique(groups, return_inverse=True)
    lengths = search.lengths()
    for order in range(ORDERS):  # by some bytes of the sketch: which ones, depends on the group
        column = (groups * 7 + order * BINS // ORDERS) % BINS
        found = [sketches[lines, (column + i) % BINS] for i in range(4)]
        sort = np.lexsort((lines, *reversed(found), groups))
        yield from _neighbours(groups[sort], lines[sort], NEIGHBOURS)
    sort = np.lexsort((lines, -lengths[lines].astype(np.int64), groups))
    groups, lines = groups[sort], lines[sort]
    longest = np.searchsorted(groups, groups)  # the first of the group
    yield lines[longest], lines


def _neighbours(groups: np.ndarray, lines: np.ndarray, most: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Each line with the `most` that follow in its group."""
    places = np.arange(len(groups))
    for distance in range(1, most + 1):
        places = places[places < len(groups) - distance]
        places = places[groups[places] == groups[places + distance]]
        if not len(places):
            return
        yield lines[places], lines[places + distance]


def _pack(one: np.ndarray, other: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """A pair as one number, first the line that goes if the two are near: the shorter, or else the later one."""
    first = (lengths[one] < lengths[other]) | ((lengths[one] == lengths[other]) & (one > other))
    loser, winner = np.where(first, one, other), np.where(first, other, one)
    return loser.astype(np.uint64) << np.uint64(NUMBER_BITS) | winner.astype(np.uint64)


# ----------------------------------------------------------------------------------------------------- pairs that count


def _check_all(search: _Search, pool: Executor | None, files: list[Path]) -> np.ndarray:
    """(n, 2): loser and winner of each proposed pair that counts."""
    files = [file for file in files if file.exists()]
    total = sum(len(np.load(file, mmap_mode="r")) for file in files)
    portions = max(1, min(search.starts[-1], total // (PAIRS_AT_ONCE // 8)))
    limits = np.linspace(0, search.starts[-1], portions + 1).astype(np.int64).tolist()
    found = _run(pool, functools.partial(_check, search, files), list(itertools.pairwise(limits)))
    return np.concatenate(found)


def _check(search: _Search, files: list[Path], losers: tuple[int, int]) -> np.ndarray:
    low, high = (np.uint64(number) << np.uint64(NUMBER_BITS) for number in losers)
    found = [np.empty(0, np.uint64)]
    for file in files:
        pairs = np.load(file, mmap_mode="r")
        found.append(np.array(pairs[np.searchsorted(pairs, low) : np.searchsorted(pairs, high)]))
    pairs = sorted_once(np.concatenate(found))
    loser = (pairs >> np.uint64(NUMBER_BITS)).astype(np.int64)
    winner = (pairs & np.uint64((1 << NUMBER_BITS) - 1)).astype(np.int64)
    numbers = sorted_once(np.concatenate([loser, winner]))
    texts = dict(zip(numbers.tolist(), search.texts.read(numbers.tolist()), strict=True))
    near = [
        is_near(texts[one], texts[other], search.threshold)
        for one, other in zip(loser.tolist(), winner.tolist(), strict=True)
    ]
    near = np.array(near, bool)
    return np.stack([loser[near], winner[near]], axis=1)


def is_near(one: str, other: str, threshold: float) -> bool:
    """Whether 1 - Levenshtein distance / length of the longer is at least `threshold`.

    Long texts are compared in as many pieces each, of at most 50,000 characters. The sum of the pieces' distances is
    no less than the distance of the whole, so no pair counts that should not.
    """
    from rapidfuzz.distance import Levenshtein

    longer = max(len(one), len(other))
    if longer <= PIECE:
        return Levenshtein.normalized_similarity(one, other, score_cutoff=threshold) >= threshold
    pieces, distance, most = -(-longer // PIECE), 0, int((1 - threshold) * longer + 1e-9)
    for piece in range(pieces):
        parts_of = [text[len(text) * piece // pieces : len(text) * (piece + 1) // pieces] for text in (one, other)]
        distance += Levenshtein.distance(*parts_of, score_cutoff=most - distance)
        if distance > most:
            return False
    return True


def _decide(edges: np.ndarray, lengths: np.ndarray) -> dict[int, int]:
    """{line to drop: the kept line that it is near to}, of (n, 2) losers and winners.

    The longest lines are decided first: one is dropped if it is near to one that is kept, not to one that is dropped.
    """
    loser, winner = edges.T
    order = np.lexsort((winner, -lengths[winner].astype(np.int64), loser, -lengths[loser].astype(np.int64)))
    found = {}
    for one, other in edges[order].tolist():
        if one not in found and other not in found:
            found[one] = other
    return found
