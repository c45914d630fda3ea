"""Lines with equal texts, apart from white space, by a 128-bit hash; the first of them is kept."""

import hashlib
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np

KEYS_AT_ONCE = 1 << 22  # in memory, 16 bytes each and as much again to sort them


def exact_keys(texts: Sequence[str]) -> np.ndarray:
    """A 128-bit hash (BLAKE2b) of each text, with every run of white space replaced by one space.

    Returns:
        (n, 2) uint64.
    """
    hashes = b"".join(
        hashlib.blake2b(" ".join(text.split()).encode("utf-8", "surrogatepass"), digest_size=16).digest()
        for text in texts
    )
    return np.frombuffer(hashes, dtype="<u8").reshape(-1, 2)


def find_exact_duplicates(key_files: Sequence[Path]) -> tuple[np.ndarray, np.ndarray]:
    """The lines that repeat an earlier one.

    Only a share of the keys, by their first bits, is in memory at a time.

    Args:
        key_files: the results of `exact_keys` for each chunk, as .npy, in the order of the lines.

    Returns:
        the numbers of the lines to drop, ascending, and of the line that each repeats; both int64.
    """
    total = sum(len(np.load(file, mmap_mode="r")) for file in key_files)
    shares = 1 << max(0, math.ceil(total / KEYS_AT_ONCE) - 1).bit_length()
    dropped, repeats = [np.empty(0, np.int64)], [np.empty(0, np.int64)]
    for share in range(shares):
        keys, lines, start = [np.empty((0, 2), np.uint64)], [np.empty(0, np.int64)], 0
        for file in key_files:
            found = np.load(file)
            mine = np.flatnonzero(found[:, 0] & np.uint64(shares - 1) == share)
            keys.append(found[mine])
            lines.append(mine + start)
            start += len(found)
        keys, lines = np.concatenate(keys), np.concatenate(lines)
        order = np.lexsort((keys[:, 1], keys[:, 0]))  # stable: equal keys stay in the order of their lines
        keys, lines = keys[order], lines[order]
        new = np.ones(len(keys), bool)
        new[1:] = (keys[1:] != keys[:-1]).any(axis=1)
        firsts = np.maximum.accumulate(np.where(new, np.arange(len(keys)), 0))
        dropped.append(lines[~new])
        repeats.append(lines[firsts[~new]])
    dropped, repeats = np.concatenate(dropped), np.concatenate(repeats)
    order = np.argsort(dropped)
    return dropped[order], repeats[order]
