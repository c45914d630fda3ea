"""Near-duplicates: the pairs are those by plain Levenshtein distance, whatever the order of lines and files."""

import math
import random
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from scripts.preparing import near_duplicates, shingles
from scripts.preparing.near_duplicates import find_near_duplicates, is_near, near_pairs
from scripts.preparing.shingles import BINS, SAMPLE, likeness, parts, signatures

CHINESE = [chr(0x4E00 + number) for number in range(2000)]
LATIN = "abcdefghijklmnopqrstuvwxyz     "


class Texts:
    """All texts in memory."""

    def __init__(self, texts):
        self.texts = texts

    def read(self, numbers):
        assert list(numbers) == sorted(numbers)
        return [self.texts[number] for number in numbers]


def drawn(length: int, letters, chance: random.Random) -> str:
    return "".join(chance.choice(letters) for _ in range(length))


def edited(text: str, edits: int, letters, chance: random.Random) -> str:
    """A copy with this many characters replaced, inserted or deleted."""
    found = list(text)
    for _ in range(edits):
        place, how = chance.randrange(len(found)), chance.randrange(3)
        if how == 0:
            found[place] = chance.choice(letters)
        elif how == 1:
            found.insert(place, chance.choice(letters))
        else:
            del found[place]
    return "".join(found)


def distance(one: str, other: str) -> int:
    """The Levenshtein distance by the textbook's table."""
    row = list(range(len(other) + 1))
    for number, letter in enumerate(one, 1):
        before, row[0] = row[0], number
        for place, letter_there in enumerate(other, 1):
            before, row[place] = row[place], min(row[place] + 1, row[place - 1] + 1, before + (letter != letter_there))
    return row[-1]


def find(texts, folder, threshold=0.8, chunks=1, **others):
    size, files = math.ceil(len(texts) / chunks) or 1, []
    for start in range(0, len(texts), size):
        files.append(folder / f"{start}.npy")
        np.save(files[-1], signatures(texts[start : start + size]))
    lines, kept = find_near_duplicates(files, Texts(texts), threshold, folder / "work", **others)
    return dict(zip(lines.tolist(), kept.tolist(), strict=True))


@pytest.fixture(scope="module")
def planted():
    """Lines of 10 to 1,500 characters; every fifth has a copy with a tenth of its characters changed at random."""
    chance = random.Random(0)
    texts = [
        drawn(chance.choice([10, 20, 40, 90, 170, 220, 500, 1500]), letters, chance)
        for letters in 150 * [CHINESE, LATIN]
    ]
    copies = {}
    for number in range(0, len(texts), 5):
        letters = CHINESE if texts[number][0] in CHINESE else LATIN
        copies[len(texts)] = number
        texts.append(edited(texts[number], len(texts[number]) // 10, letters, chance))
    order = list(range(len(texts)))
    chance.shuffle(order)
    place = {number: where for where, number in enumerate(order)}
    return [texts[number] for number in order], {frozenset((place[one], place[other])) for one, other in copies.items()}


def test_copies_with_a_tenth_changed_are_found_and_nothing_else(planted, tmp_path):
    texts, pairs = planted
    found = find(texts, tmp_path)
    assert {frozenset(pair) for pair in found.items()} == pairs


def test_the_result_depends_on_neither_the_chunks_nor_the_workers_nor_the_shares(planted, tmp_path, monkeypatch):
    texts, _ = planted
    once = find(texts, tmp_path / "a" if (tmp_path / "a").mkdir() is None else None)
    (tmp_path / "b").mkdir()
    monkeypatch.setattr(near_duplicates, "ENTRIES_AT_ONCE", 100)
    monkeypatch.setattr(near_duplicates, "PORTION", 7)
    monkeypatch.setattr(near_duplicates, "PAIRS_AT_ONCE", 16)
    with ThreadPoolExecutor(2) as pool:
        assert find(texts, tmp_path / "b", chunks=7, pool=pool) == once


def test_a_pair_counts_from_the_threshold_on(tmp_path):
    text = "abcdefghijklmnopqrstuvwxyz0123456789ABCD"  # 40 characters
    four, five = text[:32] + "????" + text[36:], text[:31] + "?????" + text[36:]
    assert find([text, four], tmp_path, 0.9) == {1: 0}
    assert find([text, five], tmp_path, 0.9) == {}


def test_the_longer_line_stays_or_else_the_earlier(tmp_path):
    text = "Rivers carry sand and gravel from the mountains to the sea."
    assert find([text, text + " Yes."], tmp_path) == {0: 1}
    assert find([text, text.replace("sand", "mud!")], tmp_path) == {1: 0}


def test_a_line_stays_that_is_near_to_a_dropped_one_only(tmp_path):
    text = drawn(100, CHINESE, random.Random(1))
    first, middle, last = text, "甲" * 15 + text[15:], "甲" * 15 + text[15:85] + "乙" * 15
    assert is_near(first, middle, 0.8)
    assert is_near(middle, last, 0.8)
    assert not is_near(first, last, 0.8)
    assert find([first, middle, last], tmp_path) == {1: 0}


def test_lines_that_were_dropped_as_exact_duplicates_count_no_more(tmp_path):
    text = "Rivers carry sand and gravel from the mountains to the sea."
    assert find([text, text, text + "!"], tmp_path, dropped=np.array([2])) == {1: 0}


def test_of_300_lines_nearly_the_same_one_stays(tmp_path):
    chance = random.Random(2)
    text = drawn(80, LATIN, chance)
    texts = [edited(text, 3, LATIN, chance) for _ in range(300)]
    found = find(texts, tmp_path)
    assert len(found) >= 298
    assert not set(found.values()) & set(found)


def test_a_pair_is_found_among_many_lines_of_one_template(tmp_path):
    chance = random.Random(3)
    template = "Please read the following text with care and answer the question below it in one sentence: "
    texts = [template + drawn(90, LATIN, chance) for _ in range(400)]
    texts.append(edited(texts[123], 12, LATIN, chance))
    assert {frozenset(pair) for pair in find(texts, tmp_path).items()} == {frozenset((123, 400))}


def test_nothing_and_lines_too_short_for_a_shingle(tmp_path):
    assert find([], tmp_path) == {}
    assert find(["", "a", "好", "a"], tmp_path) == {}


def test_nearness_is_that_of_the_textbook():
    chance = random.Random(4)
    ones = [drawn(chance.randrange(1, 40), "abc", chance) for _ in range(300)]
    others = [edited(one, chance.randrange(0, 8), "abc", chance) if len(one) > 8 else "cab" for one in ones]
    expected = [
        distance(one, other) <= (1 - 0.75) * max(len(one), len(other)) for one, other in zip(ones, others, strict=True)
    ]
    assert near_pairs(ones, others, 0.75).tolist() == expected
    assert any(expected)
    assert not all(expected)
    assert [is_near(*pair, 0.75) for pair in zip(ones, others, strict=True)] == expected


def test_a_long_pair_that_counts_in_pieces_counts_as_a_whole(monkeypatch):
    chance = random.Random(5)
    text = drawn(900, CHINESE, chance)
    near, far = edited(text, 80, CHINESE, chance), edited(text, 400, CHINESE, chance)
    monkeypatch.setattr(near_duplicates, "PIECE", 100)
    assert near_pairs([text, text, text], [near, far, text[450:] + text[:450]], 0.8).tolist() == [True, False, False]


def test_a_sketch_estimates_how_much_is_the_same():
    chance = random.Random(6)
    text = drawn(3000, CHINESE, chance)
    ones = signatures([text] * 20)
    others = signatures([text[:1500] + drawn(1500, CHINESE, chance) for _ in range(20)])
    _, one, _ = parts(ones)
    _, other, _ = parts(others)
    assert one.shape == (20, BINS)
    assert likeness(one, one) == pytest.approx(1)
    assert likeness(one, other).mean() == pytest.approx(1 / 3, abs=0.1)  # half of each: a third of their union


def test_the_parts_of_a_signature(monkeypatch):
    texts = ["", "好" * 10, drawn(300, LATIN, random.Random(7)), drawn(5000, CHINESE, random.Random(8))]
    lengths, sketches, entries = parts(signatures(texts))
    assert lengths.tolist() == [0, 10, 300, 5000]
    assert not sketches[0].any()
    assert np.all(entries[:-1] < entries[1:])
    lines = entries & np.uint64((1 << 24) - 1)
    assert np.bincount(lines.astype(int), minlength=4).tolist() == [0, 1, SAMPLE, SAMPLE]
    monkeypatch.setattr(shingles, "BLOCK", 16)

    assert np.array_equal(parts(signatures(texts))[2], entries)
