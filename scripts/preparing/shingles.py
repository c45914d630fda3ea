"""Candidates for near-duplicate lines, by samples of their shingles, that is, of the runs of characters in them.

Two lines are compared if their samples have a shingle in common. A sample is a bottom-k sketch (Broder, "On the
resemblance and containment of documents", 1997): the shingles with the k smallest hashes, so that similar lines choose
the same ones independently. One common shingle is enough, so shingles are long: a run of six Chinese or twelve Latin
characters seldom occurs in two lines by chance. For short lines all shingles are taken, and shorter ones: if a tenth of
20 characters has been changed, some run of five is unchanged wherever the changes are.

A second sketch estimates the similarity of two lines (one-permutation hashing: Li, Owen, Zhang, NeurIPS 2012), so that
few chance pairs are read and compared.
"""

from collections.abc import Iterator, Sequence

import numpy as np

SAMPLE = 24  # shingles of a line
SHORT = (4, 5)  # characters of a shingle, if it begins with a Chinese (Japanese, Korean) character, or else
LONG = (6, 12)
BLENDED = (2, 4)  # of the sketch
SHORT_LINE = 200  # up to this width a line gives short shingles; a Chinese character is 2 wide
LONG_LINE = 160  # from this width on long ones: of two lines with lengths as 4 to 5, both give either
BINS = 32  # of the sketch, a byte each
CHINESE = 0x2E80  # the first code point of the East Asian scripts

KEY_BITS, LINE_BITS = 40, 24  # of an entry: a shingle's hash, and the line of the chunk that it is of
BLOCK = 1 << 17  # characters at a time: what the processor's cache holds
LONGEST = 1 << 21  # characters of a line that are sampled; the rest of such a line is not

_BASE = 0x9E3779B97F4A7C15
_MIX = np.uint64(0xD6E8FEB86659FD93)
_SPREAD = np.uint64(0x5851F42D4C957F2D)
_KEY_MASK = np.uint64((1 << KEY_BITS) - 1)


def signatures(texts: Sequence[str]) -> np.ndarray:
    """The data that `find_near_duplicates` needs on a chunk's lines, which must be fewer than 16 million.

    Returns:
        uint64, one after the other: the number of lines n; their lengths in characters (n); their sketches (4 n, 32
        bytes each); the entries, sorted: a shingle's hash (40 bits) and its line (24 bits).
    """
    assert len(texts) < 1 << LINE_BITS
    lengths = np.fromiter(map(len, texts), np.uint64, len(texts))
    order = np.argsort(lengths, kind="stable")  # so that most blocks want shingles of one size
    sketches, entries = np.zeros((len(texts), BINS), np.uint8), [np.empty(0, np.uint64)]
    for numbers in _blocks(lengths[order]):
        lines = order[numbers]
        block = _Block([texts[line][:LONGEST] for line in lines.tolist()])
        sketches[lines] = block.sketches()
        for keys, line in block.samples():
            entries.append(keys << np.uint64(LINE_BITS) | lines[line].astype(np.uint64))
    entries = np.sort(np.concatenate(entries))
    return np.concatenate([np.array([len(texts)], np.uint64), lengths, sketches.view(np.uint64).ravel(), entries])


def parts(signature: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Lengths (n) uint64, sketches (n, 32) uint8 and entries in a result of `signatures`, as views."""
    lines = int(signature[0])
    sketches, entries = signature[1 + lines : 1 + 5 * lines], signature[1 + 5 * lines :]
    return signature[1 : 1 + lines], sketches.view(np.uint8).reshape(lines, BINS), entries


def likeness(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """The estimated Jaccard similarity of two lines' short shingles: two uint8 (n, 32) -> float32 (n,)."""
    either = _count_true((one | other) != 0)
    same = _count_true((one == other) & (one != 0))
    return (same / np.maximum(either, 1)).astype(np.float32)


def _count_true(flags: np.ndarray) -> np.ndarray:
    """The number of true values in each row of 32, summed eight bytes at a time."""
    eights = flags.view(np.uint64)
    return (eights.sum(axis=1) * np.uint64(0x0101010101010101) >> np.uint64(56)).astype(np.int64)


def sorted_once(values: np.ndarray) -> np.ndarray:
    """The distinct values, ascending; `np.unique` takes four times as long (NumPy 2.4)."""
    values = np.sort(values)
    new = np.ones(len(values), bool)
    new[1:] = values[1:] != values[:-1]
    return values[new]


def _blocks(lengths: np.ndarray) -> Iterator[slice]:
    """Slices of consecutive texts with these lengths, of about `BLOCK` characters each."""
    ends = np.cumsum(lengths)
    start = 0
    while start < len(ends):
        before = int(ends[start - 1]) if start else 0
        stop = max(start + 1, int(np.searchsorted(ends, np.uint64(before + BLOCK), "right")))
        yield slice(start, stop)
        start = stop


class _Block:
    """The code points of some texts, joined, and the hashes of the runs that begin at each of them."""

    def __init__(self, texts: list[str]):
        codes = np.frombuffer("".join(texts).encode("utf-32-le", "surrogatepass"), np.uint32)
        self.lengths = np.fromiter(map(len, texts), np.int32, len(texts))
        ends = np.cumsum(self.lengths, dtype=np.int32)
        self.line = np.repeat(np.arange(len(texts), dtype=np.int32), self.lengths)
        self.left = np.repeat(ends, self.lengths) - np.arange(
            len(codes), dtype=np.int32
        )  # characters to the line's end
        self.chinese = codes >= CHINESE
        self.width = self.lengths + np.bincount(self.line[self.chinese], minlength=len(texts))
        self._hashes = {1: np.concatenate([codes, np.zeros(LONG[1], np.uint32)]).astype(np.uint64) + np.uint64(1)}

    def _hash(self, run: int) -> np.ndarray:
        """A polynomial hash of the `run` code points from each one on, mod 2^64, combined from shorter runs' hashes."""
        if run not in self._hashes:
            first = run // 2 if run % 2 == 0 else run - 1
            power = np.uint64(pow(_BASE, run - first, 1 << 64))
            head, tail = self._hash(first), self._hash(run - first)
            size = min(len(head), len(tail) - first)
            self._hashes[run] = head[:size] * power + tail[first : first + size]
        return self._hashes[run]

    def _smallest(self, runs: tuple[int, int], wanted: int, lines: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """About the `wanted` smallest shingle hashes of each line in the mask `lines`, and the line of each hash."""
        size = len(self.line)
        hashes = np.where(self.chinese, self._hash(runs[0])[:size], self._hash(runs[1])[:size])
        hashes ^= hashes >> np.uint64(31)
        hashes *= _MIX
        hashes ^= hashes >> np.uint64(32)
        share = np.minimum(wanted / np.maximum(self.lengths, 1), 1) * lines
        most = (share * (2.0**64 - 2048)).astype(np.uint64)  # the largest such float
        small = hashes < np.repeat(most, self.lengths)
        small &= self.left >= np.where(self.chinese, *map(np.int32, runs))
        small = np.flatnonzero(small)
        return hashes[small], self.line[small]

    def sketches(self) -> np.ndarray:
        """Eight bits of the smallest hash in each bin, 0 for an empty bin, uint8 (n, 32)."""
        hashes, line = self._smallest(BLENDED, 8 * BINS, np.ones(len(self.lengths), bool))
        smallest = np.full(len(self.lengths) * BINS, 0xFFFFFFFF, np.uint32)
        bins = line * np.int64(BINS) + (hashes & np.uint64(BINS - 1)).astype(np.int64)
        np.minimum.at(smallest, bins, (hashes >> np.uint64(32)).astype(np.uint32))
        sketch = (smallest % np.uint32(255) + np.uint32(1)).astype(np.uint8)
        sketch[smallest == 0xFFFFFFFF] = 0
        return sketch.reshape(-1, BINS)

    def samples(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """The samples of short and of long shingles: 40 bits of each shingle's hash, and its line."""
        for runs, lines in ((SHORT, self.width <= SHORT_LINE), (LONG, self.width >= LONG_LINE)):
            if lines.any():
                hashes, line = self._smallest(runs, 3 * SAMPLE, lines)
                found = line.astype(np.uint64) << np.uint64(KEY_BITS) | hashes >> np.uint64(64 - KEY_BITS)
                found = sorted_once(found)
                line = (found >> np.uint64(KEY_BITS)).astype(np.int64)
                first = np.searchsorted(line, np.arange(len(lines)))
                chosen = np.arange(len(found)) - first[line] < SAMPLE
                # small hashes were chosen: they are spread again, so that equal shares of their range hold as many
                yield (found[chosen] & _KEY_MASK) * _SPREAD & _KEY_MASK, line[chosen]
