"""Near-duplicate lines: pairs are proposed by shared shingles and decided by their Levenshtein distance.

All entries (a shingle and its line) are sorted, a share of the range of shingles at a time, so that equal shingles are
adjacent. In a group of lines with the same shingle, each is compared with those nearest to it in length; in a large
group (a phrase, a template) also with those most similar by their sketches. A pair is read and measured if the sketches
are similar. Once lines have been dropped, the remaining lines of large groups are compared in another round.

Intermediate results are in files; memory does not grow with the data, apart from a few bytes per line.
"""

import functools
import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Executor
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
from rapidfuzz import process
from rapidfuzz.distance import Levenshtein

from scripts.preparing.shingles import BINS, LINE_BITS, likeness, parts, sorted_once
from scripts.preparing.work_folder import save_array

ENTRIES_AT_ONCE = 1 << 22
PAIRS_AT_ONCE = 1 << 19
PORTION = 1 << 17  # entries whose sketches are in memory
GROUP = 8  # lines that each line of a group is compared with, those that are nearest in length
NEIGHBOURS = 3  # further lines to compare with in a large group, the most similar ones
LIKE = 0.25  # the sketches' estimate from which a pair is read; a tenth of the characters changed leaves 0.5
ROUNDS = 4
KEPT = 4  # lines of a cluster that all its lines are compared with
PIECE = 50_000  # characters that are compared at once
NUMBER_BITS = 32  # of a line in a pair


class TextStore(Protocol):
    """The texts of all lines. It is sent to worker processes, so it is small when pickled."""

    def read(self, numbers: Sequence[int]) -> list[str]:
        """The texts of these lines; the numbers must ascend."""


class _Search(NamedTuple):
    """The settings that every process needs."""

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
    """The lines that are near-duplicates of a kept line: of two, the longer one is kept, or if equal, the earlier.

    A pair counts when 1 - Levenshtein distance / length of the longer is at least `threshold`.

    Args:
        signature_files: the results of `signatures` for each chunk, as .npy, in the order of the lines.
        work: an own folder, which may be deleted afterwards.
        dropped: numbers of lines to leave out because they are exact duplicates.
        pool: processes that share the work; the result does not depend on them.

    Returns:
        the numbers of the lines to drop, ascending, and of the kept line that each is near; both int64.

    Raises:
        OSError: the folder cannot be written to.
    """
    search, at_first = _prepare(signature_files, texts, threshold, work)
    if dropped is not None:
        at_first[dropped] = False
    before = alive = at_first
    edges, shares = np.empty((0, 2), np.int64), list(range(search.shares))
    keeper = np.full(len(alive), -1)
    for turn in range(ROUNDS):
        save_array(work / "alive.npy", np.stack([at_first, before, alive]))
        large = _run(pool, functools.partial(_propose, search, turn), shares)
        found = _check_all(search, pool, [search.pairs_file(turn, share) for share in shares])
        if not len(found):
            break
        edges, keeper = _settle(search, pool, np.concatenate([edges, found]))
        before, alive = alive, at_first & (keeper < 0)
        shares = [share for share, is_large in zip(shares, large, strict=True) if is_large]
    lines = np.flatnonzero(keeper >= 0)
    return lines, keeper[lines]


def _prepare(files: Sequence[Path], texts: TextStore, threshold: float, work: Path) -> tuple[_Search, np.ndarray]:
    """Write the lengths and the sketches of all lines to one file each; returns also a mask of the lines, all true."""
    work.mkdir(parents=True, exist_ok=True)
    starts, entries = [0], 0
    for file in files:
        lengths, _, found = parts(np.load(file, mmap_mode="r"))
        starts.append(starts[-1] + len(lengths))
        entries += len(found)
    lines = starts[-1]
    all_lengths = np.zeros(lines, np.uint32)
    with open(work / "sketches.npy", "wb") as out:
        shape = {"descr": "|u1", "fortran_order": False, "shape": (lines, BINS)}
        np.lib.format.write_array_header_1_0(out, shape)
        for file, start in zip(files, starts, strict=False):
            lengths, sketches, _ = parts(np.load(file, mmap_mode="r"))
            all_lengths[start : start + len(lengths)] = lengths
            out.write(sketches.tobytes())
    save_array(work / "lengths.npy", all_lengths)
    shares = 1 << max(4, math.ceil(entries / ENTRIES_AT_ONCE).bit_length())
    line_bits = max(1, lines.bit_length())
    search = _Search(tuple(files), tuple(starts), texts, threshold, work, shares, line_bits)
    return search, np.ones(lines, bool)


def _run(pool: Executor | None, job, items: Iterable) -> list:
    return list(map(job, items) if pool is None else pool.map(job, items))


# ----------------------------------------------------------------------------------------------------- pairs to look at


def _propose(search: _Search, turn: int, share: int) -> bool:
    """Write the candidate pairs of one share of the shingles, the loser's number first; returns whether any group was
    large.

    The first turn examines all groups, later turns only the large ones that have lost a line since.
    """
    at_first, before, alive = np.load(search.work / "alive.npy", mmap_mode="r")
    groups, lines = _groups(search, share, at_first)
    lengths = search.lengths()[lines]
    sort = np.lexsort((lengths, groups))
    groups, lines, lengths = groups[sort], lines[sort], lengths[sort]
    large = _is_large(groups, lengths, search.threshold)
    any_large = bool(large.any())
    if turn:
        changed = _of_groups(groups, before[lines] & ~alive[lines])
        again = large & changed & alive[lines]
        groups, lines, lengths = groups[again], lines[again], lengths[again]
        large = _is_large(groups, lengths, search.threshold)
    sketches = np.load(search.work / "sketches.npy", mmap_mode="r")
    proposed, done = [np.empty(0, np.uint64)], 0
    while done < len(groups):
        end = np.searchsorted(groups, groups[min(done + PORTION, len(groups)) - 1], "right")
        here = slice(done, end)
        found = _compare(groups[here], lengths[here], large[here], np.asarray(sketches[lines[here]]), search.threshold)
        proposed += [
            _pack(lines[here][one], lines[here][other], lengths[here][one], lengths[here][other])
            for one, other in found
        ]
        done = end
    proposed = sorted_once(np.concatenate(proposed))
    if turn:
        proposed = np.setdiff1d(proposed, np.load(search.pairs_file(turn - 1, share)), assume_unique=True)
    save_array(search.pairs_file(turn, share), proposed)
    return any_large


def _is_large(groups: np.ndarray, lengths: np.ndarray, threshold: float) -> np.ndarray:
    """Whether an entry's group is too large to compare all pairs of lines that are similar in length."""
    far = np.zeros(len(groups), bool)
    far[:-GROUP] = (groups[GROUP:] == groups[:-GROUP]) & (lengths[:-GROUP] >= threshold * lengths[GROUP:])
    return _of_groups(groups, far)


def _of_groups(groups: np.ndarray, some: np.ndarray) -> np.ndarray:
    """True for all entries of a group if it is true for one of them."""
    new = np.ones(len(groups), bool)
    new[1:] = groups[1:] != groups[:-1]
    group = np.cumsum(new)
    found = np.zeros(len(groups) + 1, bool)
    found[group[some]] = True
    return found[group]


def _groups(search: _Search, share: int, alive: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The entries of a share whose shingle occurs in two or more lines, sorted: (shingle, line number)."""
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


def _compare(
    groups: np.ndarray, lengths: np.ndarray, large: np.ndarray, sketches: np.ndarray, threshold: float
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """The indices of pairs of entries in one group that, by lengths and sketches, may be near-duplicates.

    Args:
        groups: ascending; the lengths ascend within each group.
    """
    for one, other in _neighbours(groups, lengths, GROUP, threshold):
        like = likeness(sketches[one], sketches[other]) >= LIKE
        yield one[like], other[like]
    places = np.flatnonzero(large)
    if not len(places):
        return
    groups, lengths, sketches = groups[places], lengths[places], sketches[places]
    # some bytes of the sketch, by the group which ones: two near-duplicates have most large groups in common
    column = (groups * np.uint64(7) % np.uint64(BINS)).astype(np.int64)
    chosen = [sketches[np.arange(len(groups)), (column + i) % BINS] for i in range(4)]
    sort = np.lexsort((*chosen, groups))
    for one, other in _neighbours(groups[sort], None, NEIGHBOURS, threshold):
        one, other = sort[one], sort[other]
        like = np.minimum(lengths[one], lengths[other]) >= threshold * np.maximum(lengths[one], lengths[other])
        one, other = one[like], other[like]
        like = likeness(sketches[one], sketches[other]) >= LIKE
        yield places[one[like]], places[other[like]]


def _neighbours(
    groups: np.ndarray, lengths: np.ndarray | None, most: int, threshold: float
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Each entry paired with up to `most` entries after it in its group, as far as the ascending lengths allow."""
    places = np.arange(len(groups))
    for distance in range(1, most + 1):
        places = places[: np.searchsorted(places, len(groups) - distance)]
        near = groups[places] == groups[places + distance]
        if lengths is not None:
            near &= lengths[places] >= threshold * lengths[places + distance]
        places = places[near]
        if not len(places):
            return
        yield places, places + distance


def _pack(one: np.ndarray, other: np.ndarray, of_one: np.ndarray, of_other: np.ndarray) -> np.ndarray:
    """A pair as one number; the line to drop if they are near comes first: the shorter, or if equal, the later one."""
    first = (of_one < of_other) | ((of_one == of_other) & (one > other))
    loser, winner = np.where(first, one, other), np.where(first, other, one)
    return loser.astype(np.uint64) << np.uint64(NUMBER_BITS) | winner.astype(np.uint64)


# ----------------------------------------------------------------------------------------------------- pairs that count


def _check_all(search: _Search, pool: Executor | None, files: list[Path]) -> np.ndarray:
    """Loser and winner of each proposed pair that is near enough, (n, 2)."""
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
    near = near_pairs([texts[one] for one in loser.tolist()], [texts[one] for one in winner.tolist()], search.threshold)
    return np.stack([loser[near], winner[near]], axis=1)


def near_pairs(ones: Sequence[str], others: Sequence[str], threshold: float) -> np.ndarray:
    """`is_near` for each pair of texts, bool (n,)."""
    settings = {"scorer": Levenshtein.normalized_similarity, "score_cutoff": threshold, "dtype": np.float64}
    lengths = np.maximum(*(np.fromiter(map(len, texts), np.int64, len(texts)) for texts in (ones, others)))
    if len(ones) and lengths.max() <= PIECE:
        return process.cpdist(ones, others, **settings) >= threshold
    return np.array([is_near(*pair, threshold) for pair in zip(ones, others, strict=True)], bool)


def is_near(one: str, other: str, threshold: float) -> bool:
    """Whether 1 - Levenshtein distance / length of the longer is at least `threshold`.

    Long texts are compared in the same number of pieces, of at most 50,000 characters. The sum of the pieces' distances
    is at least the distance of the whole, so there are no false positives.
    """
    longer = max(len(one), len(other))
    if longer <= PIECE:
        return Levenshtein.normalized_similarity(one, other, score_cutoff=threshold) >= threshold
    pieces, distance, most = math.ceil(longer / PIECE), 0, int((1 - threshold) * longer + 1e-9)
    for piece in range(pieces):
        parts_of = [text[len(text) * piece // pieces : len(text) * (piece + 1) // pieces] for text in (one, other)]
        distance += Levenshtein.distance(*parts_of, score_cutoff=most - distance)
        if distance > most:
            return False
    return True


def _settle(search: _Search, pool: Executor | None, edges: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The near pairs, (n, 2) losers and winners, with some added, and for each line the one that it is dropped for.

    In a cluster of lines that are connected by near pairs, every line is also compared with the lines for which most
    were dropped: if one of those is dropped later, the lines dropped for it still have another.
    """
    lengths, file, tried = search.lengths(), search.work / "pairs-settle.npy", np.empty(0, np.uint64)
    for _ in range(ROUNDS):
        keeper = _decide(edges, lengths)
        cluster = _clusters(edges, len(lengths))
        losers = sorted_once(edges[:, 0])
        kept, lines_dropped = np.unique(keeper[keeper >= 0], return_counts=True)
        kept = kept[np.lexsort((kept, -lines_dropped, cluster[kept]))]
        first = np.searchsorted(cluster[kept], cluster[losers])
        proposed = [np.empty(0, np.uint64)]
        for place in range(KEPT):
            there = np.minimum(first + place, len(kept) - 1)
            good = (cluster[kept[there]] == cluster[losers]) & (first + place < len(kept))
            good &= (kept[there] != losers) & (kept[there] != keeper[losers])
            one, other = losers[good], kept[there[good]]
            proposed.append(_pack(one, other, lengths[one], lengths[other]))
        pairs = np.setdiff1d(sorted_once(np.concatenate(proposed)), tried, assume_unique=True)
        if not len(pairs):
            break
        tried = np.concatenate([tried, pairs])
        save_array(file, pairs)
        edges = np.concatenate([edges, _check_all(search, pool, [file])])
    return edges, _decide(edges, lengths)


def _clusters(edges: np.ndarray, lines: int) -> np.ndarray:
    """For each line the lowest line number that any path of edges leads to, int64 (lines,)."""
    least = np.arange(lines)
    while True:
        before = least.copy()
        low = np.minimum(*least[edges.T])
        np.minimum.at(least, edges[:, 0], low)
        np.minimum.at(least, edges[:, 1], low)
        least = least[least]
        if np.array_equal(before, least):
            return least


def _decide(edges: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """For each line the kept line that it is dropped for, or -1.

    The longest lines are decided first; a line is dropped only if it is near a line that is kept.
    """
    loser, winner = edges.T
    order = np.lexsort((winner, -lengths[winner].astype(np.int64), loser, -lengths[loser].astype(np.int64)))
    keeper = np.full(len(lengths), -1)
    kept_for = memoryview(keeper)  # faster than an array where one number at a time is read
    for start in range(0, len(order), PAIRS_AT_ONCE):
        for one, other in edges[order[start : start + PAIRS_AT_ONCE]].tolist():
            if kept_for[one] < 0 and kept_for[other] < 0:
                kept_for[one] = other
    return keeper
