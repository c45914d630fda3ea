"""Exact duplicates: equal apart from white space, in the order of the lines, however the keys are sharded."""

import random

import numpy as np
import pytest

from scripts.preparing import exact_duplicates
from scripts.preparing.exact_duplicates import exact_keys, find_exact_duplicates


@pytest.mark.parametrize("at_once", [1 << 22, 3])
def test_the_first_of_equal_lines_stays(tmp_path, monkeypatch, at_once):
    monkeypatch.setattr(exact_duplicates, "KEYS_AT_ONCE", at_once)
    chance = random.Random(0)
    texts = [f"line {chance.randrange(40)}" for _ in range(100)]
    np.save(tmp_path / "a.npy", exact_keys(texts[:37]))
    np.save(tmp_path / "b.npy", exact_keys([]))
    np.save(tmp_path / "c.npy", exact_keys(texts[37:]))
    expected = [(number, texts.index(text)) for number, text in enumerate(texts) if texts.index(text) < number]
    dropped, repeats = find_exact_duplicates([tmp_path / f"{name}.npy" for name in "abc"])
    assert list(zip(dropped.tolist(), repeats.tolist(), strict=True)) == expected


def test_white_space_does_not_matter_and_all_else_does():
    keys = exact_keys(["a  b\n", "a b", "ab", "A b", "a b.", "\ud800"])
    assert keys.shape == (6, 2)
    assert keys[0].tolist() == keys[1].tolist()
    assert len({tuple(key) for key in keys.tolist()}) == 5


def test_no_lines_at_all():
    dropped, repeats = find_exact_duplicates([])
    assert len(dropped) == len(repeats) == 0
