"""scripts/cache.py: the table, and what is removed."""

import json
import os
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from dataset import PretrainDataset
from dataset.cache_folder import home_caches
from dataset.caches import Cache
from scripts.cache import format_line, is_chosen, places
from tests.conftest import SENTENCES, write_jsonl
from tests.running import call_script


@pytest.fixture
def data(tmp_path, tiny_tokenizer, monkeypatch):
    """Two data files with caches; the first one's was not opened for 40 days, the second one's is in use."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    folder = tmp_path / "data"
    folder.mkdir()
    opened = []
    for name in ("old.jsonl", "used.jsonl"):
        path = write_jsonl(folder / name, [{"text": text} for text in SENTENCES])
        opened.append(PretrainDataset(path, tiny_tokenizer, 64))
    old = opened.pop(0).cache.folder
    os.utime(old / "about.json", times=(time.time() - 40 * 86_400,) * 2)
    yield folder
    opened.clear()


@pytest.fixture
def cache(capsys):
    """Runs it; returns its output, or its line of error."""

    def call(*arguments, exit_code: int = 0) -> str:
        call_script("scripts/cache.py", *arguments, exit_code=exit_code)
        printed = capsys.readouterr()
        return printed.err if exit_code else printed.out

    return call


def left(data) -> set[str]:
    return {path.parent.name for path in data.glob(".cache/*/*-text-*")}


def test_the_table(cache, data):
    head, old, used, total = cache("list", data).splitlines()
    assert head.split() == ["size", "days", "kind", "computed", "from"]
    assert old.split()[2:] == ["40.0", "tokens", "(text)", str(data / "old.jsonl")]
    assert "in use" in used
    assert used.endswith(str(data / "used.jsonl"))
    assert total.endswith("total")
    assert float(total.split()[0]) == pytest.approx(sum(float(line.split()[0]) for line in (old, used)), abs=0.11)
    assert len(cache("list", data, "--name", "used").splitlines()) == 3
    assert left(data) == {"old.jsonl", "used.jsonl"}


@pytest.mark.parametrize(
    ("flags", "stays"),
    [
        (("--all",), {"used.jsonl"}),
        (("--older_than", "39"), {"used.jsonl"}),
        (("--older_than", "41"), {"old.jsonl", "used.jsonl"}),
        (("--name", "old"), {"used.jsonl"}),
        (("--name", "data"), {"old.jsonl", "used.jsonl"}),  # the folder's name, not the file's
        (("--name", "old", "--older_than", "41"), {"old.jsonl", "used.jsonl"}),
        (("--name", "used"), {"old.jsonl", "used.jsonl"}),
    ],
)
def test_what_is_freed(cache, data, flags, stays):
    printed = cache("free", data, *flags)
    assert left(data) == stays
    assert ("freed   " in printed) == (stays == {"used.jsonl"})
    assert ("in use" in printed) == (flags in (("--all",), ("--name", "used")))


def test_free_needs_to_be_told_what(cache, data):
    assert "free what? --all, --older_than DAYS or --name TEXT" in cache("free", data, exit_code=2)
    assert left(data) == {"old.jsonl", "used.jsonl"}


def test_a_folder_that_is_not_there(cache, tmp_path):
    assert "gone is not a folder" in cache("list", tmp_path / "gone", exit_code=2)


def test_without_a_folder_it_looks_beside_the_data_and_in_the_home(cache, data, tmp_path):
    lying = tmp_path / "home" / "minimind" / "0123456789abcdef-x" / "0123456789abcdef-chat-0123456789abcdef"
    lying.mkdir(parents=True)
    (lying / "about.json").write_text(json.dumps({"source": "/read/only/x.jsonl"}))
    assert "/read/only/x.jsonl" in cache("list", "--name", "x.jsonl")


def test_folders_that_are_named_are_all_that_is_looked_at(data):
    assert home_caches() not in places([data])
    assert places([])[-1] == home_caches()


DAY = 86_400.0


@pytest.mark.parametrize(
    ("older_than", "name", "chosen"),
    [
        (None, None, True),
        (10, None, True),  # equally old
        (10.001, None, False),
        (0, None, True),
        (None, "line", True),
        (None, "data", False),
        (10, "line", True),
        (10, "data", False),
        (11, "line", False),
        (None, "", True),
    ],
)
def test_which_caches_are_meant(older_than, name, chosen):
    cache = Cache(Path("c"), "/data/lines.jsonl", "tokens (text)", 1_500_000, 5 * DAY)
    assert is_chosen(cache, SimpleNamespace(older_than=older_than, name=name), 15 * DAY) is chosen


def test_a_line_to_the_letter():
    cache = Cache(Path("c"), "/data/lines.jsonl", "tokens (text)", 1_500_000, 5 * DAY)
    line = format_line(cache, "in use", 17.5 * DAY)
    assert line == "    1.5 MB    12.5  in use      tokens (text)       /data/lines.jsonl"


def test_what_was_in_use_is_not_counted_as_freed(cache, data):
    listed, freed = cache("list", data).splitlines(), cache("free", data, "--all").splitlines()
    assert [line.split()[3] for line in freed[1:3]] == ["freed", "in"]
    assert freed[-1].split() == [*freed[1].split()[:2], "freed"]
    assert listed[-1].split()[2:] == ["total"]
