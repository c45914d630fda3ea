"""Lines that contain a question of an evaluation: the score of a model trained on them is meaningless.

A unit is a Chinese (Japanese, Korean) character or a word of letters and digits; case, width, accents, white space and
punctuation do not matter. A line is contaminated by 13 consecutive units of a question, as for GPT-3
("Language Models are Few-Shot Learners", 2020, appendix C), or by a whole question of 6 to 12 units.
"""

import functools
import unicodedata
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from scripts.preparing.evaluation_files import read_questions

WINDOW = 13  # units
SHORTEST = 6
BLOCK = 1 << 17  # characters at a time: what the processor's cache holds
PIECE = 1 << 20  # characters of a line at a time
OVERLAP = 4096  # characters in which 13 units are looked for where a line is cut

OTHER, WORD, CHARACTER, MARK = range(4)  # kinds of code points
EAST_ASIAN = (
    *((0x2E80, 0x2FDF), (0x3005, 0x3007), (0x3041, 0x30FA), (0x30FC, 0x318F), (0x31A0, 0x31BF), (0x31F0, 0x31FF)),
    *((0x3400, 0x4DBF), (0x4E00, 0x9FFF), (0xAC00, 0xD7AF), (0xF900, 0xFAFF), (0x20000, 0x3FFFF)),
)
NAMED = 0x20000  # code points below have names, cases and forms

_LETTERS, _UNITS = 0x9E3779B97F4A7C15, 0xD6E8FEB86659FD93  # odd, so that they have inverses mod 2^64
_MIX = np.uint64(0x5851F42D4C957F2D)


class Match(NamedTuple):
    """A question's file and line, and the part of it that the contaminated line contains, as written there."""

    file: Path
    line: int
    shared: str


class Evaluation:
    """The questions of evaluation files, to look for in lines.

    Args:
        files: as in `read_questions`.

    Attributes:
        questions: the number of questions.
        too_short: the number of questions with fewer than 6 units, which are not searched for.

    Raises:
        UserError, DataError: as in `read_questions`.
    """

    def __init__(self, files: Sequence[Path]):
        found = list(read_questions(files))
        self.questions = len(found)
        self._places: list[tuple[Path, int]] = []
        self._texts: list[str] = []
        windows = {length: [np.empty((3, 0), np.uint64)] for length in range(SHORTEST, WINDOW + 1)}
        self.too_short = 0
        for numbers, texts in _blocks([text for *_, text in found]):
            units = _Units(texts)
            counts = np.bincount(units.text, minlength=len(texts))
            self.too_short += int((counts < SHORTEST).sum())
            for length, all_found in windows.items():
                hashes, places = units.windows(length)
                question = units.text[places]
                whole = (counts[question] == length) | (length == WINDOW)
                first = places - np.searchsorted(units.text, question)
                about = (hashes, question + len(self._texts), first)
                all_found.append(np.stack([values[whole].astype(np.uint64) for values in about]))
            self._places += [found[number][:2] for number in numbers]
            self._texts += texts
        self._tables = {}
        for length, all_found in windows.items():
            all_found = np.concatenate(all_found, axis=1)
            if all_found.size:
                self._tables[length] = _Table(all_found)

    def find(self, texts: Sequence[str]) -> list[Match | None]:
        """The first question found in each text, by the length of the shared part, or None."""
        found: list[Match | None] = [None] * len(texts)
        for numbers, block in _blocks(texts):
            units = _Units(block)
            for length in sorted(self._tables, reverse=True):
                hashes, places = units.windows(length)
                table = self._tables[length]
                hits = table.may_hold(hashes)
                for hashed, place in zip(hashes[hits], places[hits].tolist(), strict=True):
                    number = numbers[units.text[place]]
                    if found[number] is None:
                        found[number] = self._match(units, place, length, table.at(hashed))
        return found

    def _match(self, units: "_Units", place: int, length: int, candidates: np.ndarray) -> Match | None:
        """The match with the candidate whose units are the same letter by letter; None if there is none."""
        looked_for = units.spelled(place, length)
        for question, first in candidates.tolist():
            if _spelled(self._texts[question], first, length) == looked_for:
                return Match(*self._places[question], units.shown(place, length))
        return None


class _Table:
    """Hashes, each with the question and place that it comes from.

    Args:
        found: (3, n) uint64: hash, question, place of the first unit.
    """

    def __init__(self, found: np.ndarray):
        self.hashes, *about = found[:, np.lexsort(found[::-1])]
        self.about = np.stack(about, axis=1).astype(np.int64)
        bits = min(26, max(16, (32 * len(self.hashes)).bit_length()))  # few others share a place with one of ours
        self.shift = np.uint64(64 - bits)
        self.filter = np.zeros(1 << bits, bool)
        self.filter[self.hashes >> self.shift] = True

    def may_hold(self, hashes: np.ndarray) -> np.ndarray:
        """The indices of those hashes that are in the table."""
        some = np.flatnonzero(self.filter[hashes >> self.shift])
        at = np.searchsorted(self.hashes, hashes[some])
        return some[self.hashes[np.minimum(at, len(self.hashes) - 1)] == hashes[some]]

    def at(self, hashed: np.uint64) -> np.ndarray:
        """Question and place of each entry with this hash, (n, 2)."""
        return self.about[np.searchsorted(self.hashes, hashed) : np.searchsorted(self.hashes, hashed, "right")]


class _Units:
    """The units of some texts, with their hashes.

    Attributes:
        text: the number of each unit's text.
    """

    def __init__(self, texts: Sequence[str]):
        self.joined = "\n".join(texts) + "\n"
        codes = np.frombuffer(self.joined.encode("utf-32-le", "surrogatepass"), np.uint32)
        kinds, folded = _tables()
        kind = kinds[codes]
        if (kind == MARK).any():
            self.origin = np.flatnonzero(kind != MARK)
            codes, kind = codes[self.origin], kind[self.origin]
        else:
            self.origin = np.arange(len(codes))
        self.codes = folded[codes]
        word, character = kind == WORD, kind == CHARACTER
        self.starts = np.flatnonzero(character | (word & ~np.r_[False, word[:-1]]))
        self.ends = np.flatnonzero(character | (word & ~np.r_[word[1:], False])) + 1
        lengths = np.fromiter(map(len, texts), np.int64, len(texts))
        self.text = np.searchsorted(np.cumsum(lengths + 1), self.origin[self.starts], "right")
        letters = _prefix_hashes(self.codes.astype(np.uint64) + np.uint64(1), _LETTERS)
        hashes = (letters[self.ends] - letters[self.starts]) * _powers(_LETTERS, -1, len(letters))[self.starts]
        hashes ^= hashes >> np.uint64(31)
        self._hashes = _prefix_hashes(hashes * _MIX, _UNITS)

    def windows(self, length: int) -> tuple[np.ndarray, np.ndarray]:
        """The hash of each run of `length` units within one text, and the number of its first unit."""
        runs = max(0, len(self.text) - length + 1)
        places = np.flatnonzero(self.text[:runs] == self.text[length - 1 :][:runs])
        hashes = self._hashes[length : length + runs] - self._hashes[:runs]
        hashes *= _powers(_UNITS, -1, runs)[:runs]
        hashes ^= hashes >> np.uint64(31)
        hashes *= _MIX
        return hashes[places], places

    def spelled(self, first: int, length: int) -> list[str]:
        """The letters of some units, with case and width folded."""
        return [
            "".join(map(chr, self.codes[self.starts[unit] : self.ends[unit]].tolist()))
            for unit in range(first, first + length)
        ]

    def shown(self, first: int, length: int) -> str:
        """The stretch of text from the first of these units to the last."""
        return self.joined[self.origin[self.starts[first]] : self.origin[self.ends[first + length - 1] - 1] + 1]


@functools.lru_cache(maxsize=4096)
def _all_spelled(text: str) -> tuple[str, ...]:
    units = _Units([text])
    return tuple(units.spelled(0, len(units.text)))


def _spelled(text: str, first: int, length: int) -> list[str]:
    return list(_all_spelled(text)[first : first + length])


def _blocks(texts: Sequence[str]) -> Iterator[tuple[list[int], list[str]]]:
    """Blocks of texts of about `BLOCK` characters, with the texts' numbers; long texts are cut with an overlap."""
    numbers, block, size = [], [], 0
    for number, text in enumerate(texts):
        for start in range(0, max(1, len(text) - OVERLAP), PIECE):
            piece = text[start : start + PIECE + OVERLAP]
            if size and size + len(piece) > BLOCK:
                yield numbers, block
                numbers, block, size = [], [], 0
            numbers.append(number)
            block.append(piece)
            size += len(piece)
    if block:
        yield numbers, block


def _prefix_hashes(values: np.ndarray, base: int) -> np.ndarray:
    """Sums of the first values times base^0, base^1 …, mod 2^64, (n + 1,): a run's hash is the difference of two."""
    sums = np.zeros(len(values) + 1, np.uint64)
    np.cumsum(values * _powers(base, 1, len(values))[: len(values)], out=sums[1:])
    return sums


def _powers(base: int, sign: int, count: int) -> np.ndarray:
    """At least `count` powers base^0, base^1 … or base^0, base^-1 …, mod 2^64."""
    return _cached_powers(pow(base, sign, 1 << 64), 1 << max(BLOCK.bit_length(), count.bit_length()))


@functools.lru_cache(maxsize=8)
def _cached_powers(base: int, count: int) -> np.ndarray:
    powers = np.full(count, base, np.uint64)
    powers[0] = 1
    return np.cumprod(powers)


@functools.cache
def _tables() -> tuple[np.ndarray, np.ndarray]:
    """For each code point its kind (uint8), and its fold without case, width and accents (uint32)."""
    kinds, folded = np.zeros(0x110000, np.uint8), np.arange(0x110000, dtype=np.uint32)
    for code in range(NAMED):
        char = chr(code)
        if unicodedata.combining(char):
            kinds[code] = MARK
            continue
        base = unicodedata.normalize("NFKD", char).casefold()
        if len(base) == 1 or all(map(unicodedata.combining, base[1:])):
            char = base[0]
        folded[code] = ord(char)
        if char.isalnum():
            kinds[code] = WORD
    for first, last in EAST_ASIAN:
        kinds[first : last + 1][kinds[first : last + 1] != MARK] = CHARACTER
    kinds[(kinds == WORD) & (kinds[folded] == CHARACTER)] = CHARACTER  # of half width
    return kinds, folded
