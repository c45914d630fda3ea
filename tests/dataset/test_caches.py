"""All caches of some data files: their descriptions, and which are removed when they exceed the limit."""

import json
import os
from pathlib import Path

import pytest

from dataset.cache_folder import hold, in_use, open_cache, short_hash
from dataset.caches import caches_in, free, human_size, limit_caches, places_in

STATE = short_hash(["one"])


class Value:
    def __init__(self, folder: Path):
        hold(folder, self)
        self.folder = folder


def build(folder: Path) -> None:
    (folder / "values").write_bytes(bytes(1000))


@pytest.fixture
def make(tmp_path, monkeypatch):
    """Make a cache of 1000 bytes for the file of this name, last used at this time; returns what keeps it in use."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    (tmp_path / "data").mkdir()

    def make_one(name: str, used: int, kind: str = "text", state: str = STATE) -> Value:
        source = tmp_path / "data" / name
        source.write_text("{}")
        value = open_cache(
            source,
            state,
            f"{kind}-{short_hash([name])}",
            Value,
            lambda folder: (folder / "values").write_bytes(bytes(1000)),
        )
        os.utime(value.folder / "about.json", (used, used))
        return value

    return make_one


def sources(place: Path) -> list[str]:
    return [Path(cache.source).name for cache in caches_in([place])]


def test_what_is_known_of_each(make, tmp_path):
    text, features = make("a.jsonl", 2).folder, make("images", 1, kind="0" * 16, state="features").folder
    make("pairs.jsonl", 3, kind="reference")
    first, second, third = caches_in([tmp_path / "data" / ".cache", tmp_path / "gone"])
    assert (first.folder, first.source, first.kind, first.used) == (
        features,
        str(tmp_path / "data" / "images"),
        "features",
        1,
    )
    assert (second.folder, second.kind, second.used) == (text, "tokens (text)", 2)
    assert third.kind == "reference"
    assert first.bytes == 1000 + len((features / "about.json").read_bytes())


def test_one_of_an_earlier_version_is_known_by_where_it_lies(make, tmp_path):
    folder = make("a.jsonl", 1).folder
    (folder / "about.json").unlink()
    os.utime(folder, (7, 7))
    (cache,) = caches_in([tmp_path / "data" / ".cache"])
    assert (cache.source, cache.used, cache.bytes) == (str(tmp_path / "data" / "a.jsonl"), 7, 1000)


def test_what_another_program_keeps_is_not_ours(make, tmp_path):
    make("a.jsonl", 1)
    place = tmp_path / "data" / ".cache"
    (place / "pip" / "wheels-of-a-kind").mkdir(parents=True)
    (place / "pip" / "wheels-of-a-kind" / "w").write_bytes(bytes(9000))
    (place / "file").write_text("")
    assert sources(place) == ["a.jsonl"]
    limit_caches([tmp_path / "data" / "a.jsonl"], 1)
    assert (place / "pip" / "wheels-of-a-kind" / "w").exists()
    assert sources(place) == []


class TestLimit:
    def test_the_least_recently_used_go_until_it_is_kept(self, make, tmp_path, capsys):
        for name, used in (("a", 3), ("b", 1), ("c", 4), ("d", 2)):
            make(name, used)
        one = caches_in([tmp_path / "data" / ".cache"])[0].bytes
        limit_caches([tmp_path / "data" / "a"], 4 * one + 20)
        assert capsys.readouterr().err == ""
        limit_caches([tmp_path / "data" / "a"], 2 * one + 20)
        assert sources(tmp_path / "data" / ".cache") == ["a", "c"]
        (line,) = capsys.readouterr().err.splitlines()
        assert "(--cache_limit): removed the 2 least recently used, 2" in line
        assert str(tmp_path / "data" / "b") in line

    def test_one_in_use_stays_and_the_next_goes(self, make, tmp_path):
        old = make("old", 1)
        make("newer", 2)
        new = make("new", 3)
        limit_caches([tmp_path / "data" / "new"], 1)
        assert sources(tmp_path / "data" / ".cache") == ["old", "new"]
        assert in_use(old.folder)
        assert in_use(new.folder)

    def test_nothing_is_no_limit(self, make, tmp_path):
        make("a", 1)
        limit_caches([tmp_path / "data" / "a"], 0)
        assert sources(tmp_path / "data" / ".cache") == ["a"]

    def test_the_home_s_count_too(self, make, tmp_path):
        (tmp_path / "data").chmod(0o555)
        elsewhere = tmp_path / "elsewhere"
        elsewhere.mkdir()
        (elsewhere / "a").write_text("{}")
        elsewhere.chmod(0o555)

        open_cache(elsewhere / "a", STATE, f"text-{short_hash([])}", Value, build)
        (tmp_path / "data").chmod(0o755)
        make("b", 1)
        limit_caches([tmp_path / "data" / "b"], 1)
        assert sources(tmp_path / "home" / "minimind") == []
        assert sources(tmp_path / "data" / ".cache") == []


def test_freeing_the_last_one_leaves_no_folder_behind(make, tmp_path):
    make("a", 1)
    make("a", 2, kind="chat")
    root = tmp_path / "data" / ".cache" / "a"
    (root / "pictures-0123.json").write_text("{}")
    first, second = caches_in([root.parent])
    assert free(first)
    assert root.is_dir()
    assert free(second)
    assert not root.exists()


def test_what_is_in_use_is_not_freed(make, tmp_path):
    used = make("a", 1)
    (cache,) = caches_in([tmp_path / "data" / ".cache"])
    assert not free(cache)
    assert json.loads((used.folder / "about.json").read_text())["source"] == str(tmp_path / "data" / "a")


def test_places_of_a_folder_and_of_those_in_it(tmp_path):
    (tmp_path / "a" / ".cache").mkdir(parents=True)
    (tmp_path / ".cache").mkdir()
    assert places_in(tmp_path) == [tmp_path / ".cache", tmp_path / "a" / ".cache"]
    assert places_in(tmp_path / ".cache") == [tmp_path / ".cache"]


@pytest.mark.parametrize(
    ("count", "shown"),
    [
        (0, "0.0 kB"),
        (1500, "1.5 kB"),
        (999_960, "1.0 MB"),
        (47_100_000_000, "47.1 GB"),
        (2.5e15, "2,500.0 TB"),
        (49, "0.0 kB"),
        (51, "0.1 kB"),
        (999_949, "999.9 kB"),
        (999_949_000, "999.9 MB"),
        (999_960_000, "1.0 GB"),
        (999_949_000_000, "999.9 GB"),
        (999_960_000_000, "1.0 TB"),
    ],
)
def test_sizes_as_people_read_them(count, shown):
    assert human_size(count) == shown


def test_caches_that_take_just_the_limit_stay(make, tmp_path, capsys):
    make("a", 1)
    make("b", 2)
    total = sum(cache.bytes for cache in caches_in([tmp_path / "data" / ".cache"]))
    limit_caches([tmp_path / "data" / "a"], total)
    assert sources(tmp_path / "data" / ".cache") == ["a", "b"]
    limit_caches([tmp_path / "data" / "a"], total - 1)
    assert sources(tmp_path / "data" / ".cache") == ["b"]
    assert "caches exceeded 2." in capsys.readouterr().err


def test_of_two_used_at_the_same_time_the_first_by_name_goes_first(make, tmp_path):
    make("b", 5)
    make("a", 5)
    assert sources(tmp_path / "data" / ".cache") == ["a", "b"]
