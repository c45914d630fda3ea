"""Character statistics of a batch of texts, computed together in numpy: characters by kind, and repetition."""

import unicodedata
from functools import cache
from typing import NamedTuple

import numpy as np

KINDS = (
    *("symbol", "han", "latin", "accented", "other_letter", "digit", "space", "punctuation"),
    *("control", "broken", "kana", "joiner"),
)
KIND = {name: number for number, name in enumerate(KINDS)}
MASK = 0x1F  # of the kind in an entry of the table
UNTIDY = 0x80  # normalising may change it
ODD = 0x40  # frequent in text decoded wrongly, rare elsewhere
SENTENCE = ".,;:!?'\"()-–—…‘’“”、。，；：？！（）《》〈〉【】「」『』·・～"
# UTF-8 read as Latin-1 begins with one of these; read as GBK, full stops and commas become these characters
LATIN_LEADS = range(0xC2, 0xF5)
GBK_SIGNS = "锛銆鈥鐨锟斤拷鏄涓"
RUN = 4  # equal characters in a row, from which on they are a run
GRAM_HAN, GRAM_LATIN = 8, 16  # characters of the n-grams that may repeat: about as many words
SAMPLED, SUSPICIOUS = 4, 0.1  # one n-gram in so many is looked at first; the share from which on all are
SLICE_CHARS = 1 << 19  # counted at once


@cache
def table() -> np.ndarray:
    """The kind and marks of every code point, uint8 (0x110000,)."""
    kinds = np.full(0x110000, KIND["symbol"], np.uint8)
    letters = {"Lu", "Ll", "Lt", "Lm", "Lo", "Mn", "Mc", "Me"}
    for start, end, name in (
        *((0x3400, 0x4DC0, "han"), (0x4E00, 0xA000, "han"), (0xF900, 0xFB00, "han"), (0x20000, 0x32000, "han")),
        *((0xAC00, 0xD7A4, "other_letter"), (0xD800, 0xF900, "broken"), (0xF0000, 0x110000, "broken")),
    ):
        kinds[start:end] = KIND[name]
    for number in (*range(0x3400), *range(0xA000, 0xAC00), *range(0xFB00, 0x1F000)):
        category = unicodedata.category(char := chr(number))
        if category in letters:
            ascii_letter, latin = number < 0x80, number < 0x250 or 0x1E00 <= number < 0x1F00
            kind = "latin" if ascii_letter else "accented" if latin else "other_letter"
            kind = "kana" if 0x3040 <= number < 0x3100 or 0x31F0 <= number < 0x3200 else kind
            kind = "latin" if 0xFF21 <= number <= 0xFF5A else kind
        elif category == "Nd":
            kind = "digit"
        elif category in ("Zs", "Zl", "Zp") or char in "\n\r\t":
            kind = "space"
        elif category == "Cf" or 0xFE00 <= number < 0xFE10:
            kind = "joiner"
        elif category == "Cc":
            kind = "control"
        elif category in ("Co", "Cs") or number == 0xFFFD:
            kind = "broken"
        else:
            continue
        kinds[number] = KIND[kind]
        if number > 0xA0 and (unicodedata.combining(char) or unicodedata.normalize("NFC", char) != char):
            kinds[number] |= UNTIDY
    kinds[[ord(char) for char in SENTENCE]] = KIND["punctuation"]
    for number in (*range(0xF900, 0xFB00), *range(0x2F800, 0x2FA20)):
        if unicodedata.normalize("NFC", chr(number)) != chr(number):
            kinds[number] |= UNTIDY
    untidy = "\r\x0b\x0c\xa0\u1680\u202f\u205f\u2028\u2029\u200b\u2060\ufeff" + "".join(map(chr, range(0x2000, 0x200B)))
    kinds[[ord(char) for char in untidy]] |= UNTIDY
    for start, end in ((0xFF10, 0xFF1A), (0xFF21, 0xFF3B), (0xFF41, 0xFF5B), (0, 9), (14, 32), (0x7F, 0xA0)):
        kinds[start:end] |= UNTIDY  # full-width letters and digits, control characters
    kinds[list(LATIN_LEADS)] |= ODD
    kinds[[ord(char) for char in GBK_SIGNS]] |= ODD
    return kinds


class Counts(NamedTuple):
    """Character statistics of a batch of n texts.

    Attributes:
        chars: length of each, int64 (n,).
        kinds: characters of each kind, in the order of `KINDS`, int64 (n, kinds).
        untidy: whether normalising may change the text, bool (n,).
        odd: characters that are frequent in wrongly decoded text, int64 (n,).
        repeated: share of its n-grams that repeat an earlier one, float (n,).
        runs: share of its characters, white space apart, in a run of equal ones that are not symbols, float (n,).
    """

    chars: np.ndarray
    kinds: np.ndarray
    untidy: np.ndarray
    odd: np.ndarray
    repeated: np.ndarray
    runs: np.ndarray

    def of(self, *names: str) -> np.ndarray:
        """The number of characters of these kinds together, int64 (n,)."""
        return self.kinds[:, [KIND[name] for name in names]].sum(axis=1)

    def with_texts(self, numbers: list[int], others: "Counts") -> "Counts":
        """The counts after the texts with these numbers have changed, given the counts of the new texts."""
        changed = Counts(*(array.copy() for array in self))
        for array, new in zip(changed, others, strict=True):
            array[numbers] = new
        return changed


def count(texts: list[str]) -> Counts:
    """Count a batch of texts."""
    parts, begin, size = [], 0, 0
    for end, text in enumerate(texts, 1):
        size += len(text)
        if size >= SLICE_CHARS or end == len(texts):
            parts.append(_count(texts[begin:end]))
            begin, size = end, 0
    if len(parts) == 1:
        return parts[0]
    if not parts:
        return _count([])
    return Counts(*map(np.concatenate, zip(*parts, strict=True)))


def _count(texts: list[str]) -> Counts:
    n = len(texts)
    chars = np.fromiter(map(len, texts), np.int64, n)
    points = np.frombuffer("".join(texts).encode("utf-32-le", "surrogatepass"), np.uint32)
    marks = table()[points]
    owner = np.repeat(np.arange(n, dtype=np.int32), chars)
    width = len(KINDS)
    kinds = np.bincount(owner * width + (marks & MASK), minlength=n * width).reshape(n, width)
    untidy = np.bincount(owner[(marks & UNTIDY) != 0], minlength=n) > 0
    odd = np.bincount(owner[(marks & ODD) != 0], minlength=n)
    counts = Counts(chars, kinds, untidy, odd, np.zeros(n), np.zeros(n))
    if len(points):
        solid = np.maximum(1, chars - kinds[:, KIND["space"]])
        counts = counts._replace(
            repeated=_repeated(points, chars, counts.of("han", "kana") * 3 > counts.of("latin", "accented")),
            runs=np.minimum(1, _in_runs(points, owner, marks, n) / solid),
        )
    return counts


def _repeated(points: np.ndarray, chars: np.ndarray, is_han: np.ndarray) -> np.ndarray:
    """The share of each text's n-grams that repeat an earlier one; 8 characters of Han, 16 of other scripts.

    Sorting them all would be slow. So one in `SAMPLED` is examined first, chosen by its hash so that all its copies
    are, and then all n-grams of only those texts in which many of the sampled ones repeat.
    """
    guess = _share_repeated(points, chars, is_han, SAMPLED)
    shares = np.where(guess > SUSPICIOUS, guess, 0.0)
    if len(suspicious := np.flatnonzero(shares)):
        mine = np.repeat(shares > 0, chars)
        shares[suspicious] = _share_repeated(points[mine], chars[suspicious], is_han[suspicious], 1)
    return shares


def _share_repeated(points: np.ndarray, chars: np.ndarray, is_han: np.ndarray, sampled: int) -> np.ndarray:
    shares = np.zeros(len(chars))
    ends = np.cumsum(chars)
    hashed = points * np.uint32(0x9E3779B1)
    length = 1
    for gram, chosen in ((GRAM_HAN, is_han), (GRAM_LATIN, ~is_han)):
        while length < gram and len(hashed) > length:
            before = hashed[:-length] * np.uint32(0x85EBCA6B)
            before ^= before >> np.uint32(15)
            before += hashed[length:]
            hashed = before
            length *= 2
        if length < gram:
            break
        valid = np.repeat(chosen, chars)[: len(hashed)]
        for back in range(1, gram):  # those that reach into the next text
            crossing = ends[chars >= back] - back
            valid[crossing[crossing < len(valid)]] = False
        if sampled > 1:
            valid &= (hashed * np.uint32(0xC2B2AE35)) < np.uint32((1 << 32) // sampled)
        places = np.flatnonzero(valid)
        who = np.searchsorted(ends, places, side="right")
        grams = np.bincount(who, minlength=len(chars))
        keys = (who.astype(np.uint64) << np.uint64(32)) | hashed[places]
        keys.sort()
        again = (keys[1:][keys[1:] == keys[:-1]] >> np.uint64(32)).astype(np.int64)
        found = np.bincount(again, minlength=len(chars)) / np.maximum(1, grams)
        shares[chosen] = found[chosen]
    return shares


def _in_runs(points: np.ndarray, owner: np.ndarray, marks: np.ndarray, n: int) -> np.ndarray:
    """How many characters of each text, white space apart, belong to a run of at least `RUN` equal characters.

    Symbols and hyphens do not count: table rules and blanks to fill in are made of them.
    """
    kinds = marks[1:] & MASK
    same = (
        (points[1:] == points[:-1]) & (owner[1:] == owner[:-1]) & (kinds != KIND["space"]) & (kinds != KIND["symbol"])
    )
    same &= points[1:] != ord("-")
    whole = same.copy()
    for shift in range(1, RUN - 1):
        whole[:-shift] &= same[shift:]
        whole[-shift:] = False
    inside = np.zeros(len(points), bool)
    for shift in range(RUN):
        inside[shift : shift + len(whole)] |= whole[: len(inside) - shift]
    return np.bincount(owner[inside], minlength=n)
