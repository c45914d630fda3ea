"""Cache folders: complete or absent, rebuilt when they vanish, and never removed while in use."""

import errno
import multiprocessing
import os
import re
import shutil
import signal
from pathlib import Path

import pytest

from dataset import cache_folder, locks
from dataset.cache_folder import (
    LEFT_OVER,
    cache_roots,
    find_cache,
    fingerprint_file,
    hold,
    home_caches,
    in_use,
    is_cache,
    open_cache,
    remove_cache,
    short_hash,
)
from dataset.jsonl import DataError
from tests.running import PATIENCE

fork = multiprocessing.get_context("fork")
STATE, OTHER_STATE = short_hash(["one"]), short_hash(["other"])
NAME = f"text-{short_hash([])}"


class Value:
    """The content of a cache of one file."""

    def __init__(self, folder: Path):
        hold(folder, self)
        self.folder = folder
        self.text = (folder / "value").read_text()
        if self.text != "whole":
            raise ValueError(f"it holds {self.text}")


def build(folder: Path) -> None:
    (folder / "value").write_text("whole")


def must_not_build(folder: Path) -> None:
    raise AssertionError("it was built again")


@pytest.fixture
def source(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    path = tmp_path / "data" / "lines.jsonl"
    path.parent.mkdir()
    path.write_text("{}\n")
    return path


@pytest.fixture
def root(source):
    return source.parent / ".cache" / source.name


def folders(root: Path) -> set[str]:
    return {path.name for path in root.iterdir()} - {"lock", "in_use"}


@pytest.fixture
def no_locks(monkeypatch):
    def refuse(descriptor, blocking):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(locks, "lock_descriptor", refuse)


def test_everything_is_on_the_disk_before_it_is_renamed(source, monkeypatch):
    events, names = [], {}
    fsync, rename = os.fsync, Path.rename

    def flushed(descriptor):
        status = os.fstat(descriptor)
        events.append(names.get((status.st_dev, status.st_ino)))
        fsync(descriptor)

    def renamed(self, target):
        events.append("renamed")
        return rename(self, target)

    def build_two(folder):
        for name in ("value", "other"):
            (folder / name).write_text("whole")
        for path in (folder, folder.parent, *folder.iterdir()):
            status = path.stat()
            names[status.st_dev, status.st_ino] = {folder: "folder", folder.parent: "root"}.get(path, path.name)

    monkeypatch.setattr(os, "fsync", flushed)
    monkeypatch.setattr(Path, "rename", renamed)
    open_cache(source, STATE, NAME, Value, build_two)
    place = events.index("renamed")
    assert {"value", "other", "folder", None} == set(events[:place])  # None: about.json, which is written afterwards
    assert events[place - 1] == "folder"
    assert events[place + 1 :] == ["root"]


def test_one_that_vanishes_before_it_is_loaded_is_made_again(source, root, capsys):
    folder = open_cache(source, STATE, NAME, Value, build).folder
    vanishing = [True]

    def load(folder):
        if vanishing:
            vanishing.clear()
            shutil.rmtree(folder)
        return Value(folder)

    assert open_cache(source, STATE, NAME, load, build).text == "whole"
    (line,) = capsys.readouterr().err.splitlines()
    assert str(folder) in line
    assert "gone" in line
    assert "rebuilding it" in line


def test_a_damaged_one_is_made_again_once(source, root, capsys):
    folder = open_cache(source, STATE, NAME, Value, build).folder
    (folder / "value").write_text("half of it")
    assert open_cache(source, STATE, NAME, Value, build).text == "whole"
    assert len(capsys.readouterr().err.splitlines()) == 1
    assert folders(root) == {folder.name}


def test_a_damaged_one_in_use_is_not_removed_but_told(source, root):
    used = open_cache(source, STATE, NAME, Value, build)
    (used.folder / "value").write_text("half of it")
    told = f"{re.escape(str(used.folder))} cannot be read, and cannot be replaced while in use"
    with pytest.raises(DataError, match=told):
        open_cache(source, STATE, NAME, Value, build)
    assert used.folder.is_dir()
    assert find_cache(source, STATE, NAME, Value) is None
    assert used.folder.is_dir()


def test_a_build_that_is_never_whole_ends(source):
    with pytest.raises(DataError, match="cannot be read"):
        open_cache(source, STATE, NAME, Value, lambda folder: (folder / "value").write_text("half of it"))


class TestUse:
    def test_it_lasts_as_long_as_the_holder(self, source):
        value = open_cache(source, STATE, NAME, Value, build)
        folder = value.folder
        second = Value(folder)
        assert in_use(folder)
        del value
        assert in_use(folder)
        assert not remove_cache(folder)
        del second
        assert not in_use(folder)
        assert [path.name for path in (folder.parent / "in_use").iterdir()] == ["lock"]
        assert remove_cache(folder)
        assert folders(folder.parent) == set()

    def test_another_cache_s_is_none_of_this_one(self, source):
        first = open_cache(source, STATE, NAME, Value, build).folder
        second = open_cache(source, STATE, f"{NAME[:-1]}x", Value, build)
        assert not in_use(first)
        assert in_use(second.folder)

    def test_by_another_process_and_not_after_it_was_killed(self, source):
        folder = open_cache(source, STATE, NAME, Value, build).folder
        ready = fork.Event()

        def use():
            value = Value(folder)
            ready.set()
            os.kill(os.getpid(), signal.SIGSTOP)
            del value

        process = fork.Process(target=use)
        process.start()
        assert ready.wait(PATIENCE)
        assert not remove_cache(folder)
        process.kill()
        process.join(PATIENCE)
        assert len(list((folder.parent / "in_use").iterdir())) == 2
        assert not in_use(folder)
        assert len(list((folder.parent / "in_use").iterdir())) == 1  # its remains are removed
        assert remove_cache(folder)

    def test_a_forked_worker_that_ends_does_not_end_its_parent_s(self, source):
        held = [open_cache(source, STATE, NAME, Value, build)]
        folder = held[0].folder
        worker = fork.Process(target=held.clear)
        worker.start()
        worker.join(PATIENCE)
        assert worker.exitcode == 0
        assert in_use(folder)

    def test_opening_notes_the_time(self, source):
        folder = open_cache(source, STATE, NAME, Value, build).folder
        os.utime(folder / "about.json", (1, 1))
        Value(folder)
        assert (folder / "about.json").stat().st_mtime > 1

    def test_one_removed_by_renaming_is_never_half_there(self, source, monkeypatch):
        folder = open_cache(source, STATE, NAME, Value, build).folder
        monkeypatch.setattr(shutil, "rmtree", lambda *_, **__: None)  # killed while it builds
        assert remove_cache(folder)
        assert not folder.exists()
        (left,) = folders(folder.parent)
        monkeypatch.undo()
        open_cache(source, STATE, NAME, Value, build)
        assert left not in folders(folder.parent)


class TestOtherStates:
    def test_they_go_when_the_next_is_built_unless_they_are_in_use(self, source, root):
        open_cache(source, STATE, NAME, Value, build)
        used = open_cache(source, STATE, f"chat-{short_hash([1])}", Value, build)
        new = open_cache(source, OTHER_STATE, NAME, Value, build)
        assert folders(root) == {used.folder.name, new.folder.name}

    def test_what_another_program_keeps_there_stays(self, source, root):
        for name in ("http-v2", "wheels", "models--a--b", "text-0123456789abcdef", f"{STATE}-{NAME}x"):
            (root / name).mkdir(parents=True)
        (root / f"{STATE}-{NAME}.txt").write_text("a file")
        before = folders(root)
        open_cache(source, OTHER_STATE, NAME, Value, build)
        assert folders(root) == before | {f"{OTHER_STATE}-{NAME}"}


class TestWithoutLocks:
    def test_it_works_on_and_says_so_in_one_line(self, source, root, no_locks, capsys):
        assert open_cache(source, STATE, NAME, Value, build).text == "whole"
        (line,) = capsys.readouterr().err.splitlines()
        assert f"{root} is on a file system without locks (No locks available)" in line
        assert "room" not in line
        assert open_cache(source, STATE, NAME, Value, must_not_build).text == "whole"

    def test_nothing_is_removed_as_it_may_be_in_use(self, source, root, no_locks):
        folder = open_cache(source, STATE, NAME, Value, build).folder
        assert not remove_cache(folder)
        (root / "partial-1-00000000").mkdir()  # perhaps another run's
        open_cache(source, OTHER_STATE, NAME, Value, build)
        assert {folder.name, "partial-1-00000000"} < folders(root)

    def test_of_two_that_build_at_once_the_first_one_s_is_used(self, source, root, no_locks):
        others = []

        def build_slowly(folder):
            others.append(open_cache(source, STATE, NAME, Value, build))
            build(folder)

        assert open_cache(source, STATE, NAME, Value, build_slowly).folder == others[0].folder
        assert folders(root) == {others[0].folder.name}


class TestPlaces:
    def test_without_a_home_there_is_one_place(self, source, monkeypatch):
        monkeypatch.delenv("XDG_CACHE_HOME")

        def no_home():
            raise RuntimeError("Could not determine home directory.")

        monkeypatch.setattr(Path, "home", no_home)
        assert open_cache(source, STATE, NAME, Value, build).text == "whole"
        source.parent.chmod(0o555)
        with pytest.raises(DataError, match=r"cannot be written in .*you have no home folder: set XDG_CACHE_HOME"):
            open_cache(source, OTHER_STATE, NAME, Value, build)

    @pytest.mark.parametrize(
        ("number", "ends"),
        [(errno.ENOSPC, "; free some space there"), (errno.EDQUOT, "; free some space there"), (errno.EIO, "")],
    )
    def test_a_full_disk_is_called_full_and_nothing_else_is(self, source, root, number, ends):
        def fail(folder):
            raise OSError(number, os.strerror(number))

        with pytest.raises(DataError) as raised:
            open_cache(source, STATE, NAME, Value, fail)
        assert str(raised.value) == f"the cache of {source} cannot be written in {root}: {os.strerror(number)}{ends}"
        assert folders(root) == set()

    def test_the_home_s_is_found_where_it_was_put(self, source, tmp_path):
        source.parent.chmod(0o555)
        value = open_cache(source, STATE, NAME, Value, build)
        assert value.folder.parent == cache_roots(source)[1]
        assert value.folder.is_relative_to(tmp_path / "home" / "minimind")
        assert open_cache(source, STATE, NAME, Value, must_not_build).folder == value.folder


def test_imports_nothing_that_only_unix_has():
    for module in (cache_folder, locks):
        assert "fcntl" not in Path(module.__file__).read_text(encoding="utf-8")


class TestNames:
    @pytest.mark.parametrize(
        ("name", "ours"),
        [
            (f"{'0a' * 8}-text-{'1f' * 8}", True),
            (f"features-{'0a' * 8}-{'1f' * 8}", True),
            (f"{'0a' * 8}-with-several-parts-{'1f' * 8}", True),
            (f"{'0a' * 7}-text-{'1f' * 8}", False),
            (f"{'0A' * 8}-text-{'1f' * 8}", False),
            (f"{'0a' * 8}-text-{'1f' * 8}x", False),
            (f"x{'0a' * 8}-text-{'1f' * 8}", False),
            (f"{'0a' * 8}-{'1f' * 8}", False),
            ("in_use", False),
        ],
    )
    def test_of_caches(self, tmp_path, name, ours):
        (tmp_path / name).mkdir()
        assert is_cache(tmp_path / name) is ours
        (tmp_path / name).rmdir()
        (tmp_path / name).touch()
        assert not is_cache(tmp_path / name)

    @pytest.mark.parametrize(
        ("name", "ours"),
        [
            *(("partial", True), ("partial-12-0123abcd", True), ("removed-0123abcd", True)),
            *(("partial-0123abcd", False), ("removed", False), ("removed-0123abcd-mine", False), ("partially", False)),
        ],
    )
    def test_of_what_is_left_over(self, name, ours):
        assert bool(LEFT_OVER.fullmatch(name)) is ours


def test_sixteen_digits_tell_one_list_from_another():
    names = {short_hash(parts) for parts in ([], [1], ["1"], [1, 2], [2, 1], [[1], 2], [None])}
    assert len(names) == 7
    assert all(len(name) == 16 and set(name) <= set("0123456789abcdef") for name in names)
    assert short_hash([1, "a"]) == "4a72386a027702c1"  # as by sha256sum: old caches are found by it


@pytest.mark.parametrize("place", [0, 65_535, 66_000, 500_000, 999_999])
def test_a_changed_byte_in_a_block_that_is_read_is_another_state(tmp_path, place):
    """Sixteen blocks of 64 KiB cover a file of 1 MB."""
    path = tmp_path / "lines"
    path.write_bytes(bytes(1_000_000))
    os.utime(path, ns=(5, 5))
    before = fingerprint_file(path)
    assert fingerprint_file(path) == before
    with open(path, "r+b") as file:
        file.seek(place)
        file.write(b"x")
    os.utime(path, ns=(5, 5))
    assert fingerprint_file(path) != before


def test_another_size_or_time_is_another_state(tmp_path):
    (tmp_path / "a").write_bytes(b"")
    states = set()
    for content, time in ((b"", 5), (b"", 6), (bytes(1), 5), (bytes(2), 5), (bytes(70_000), 5), (bytes(70_001), 5)):
        (tmp_path / "a").write_bytes(content)
        os.utime(tmp_path / "a", ns=(time, time))
        states.add(fingerprint_file(tmp_path / "a"))
    assert len(states) == 6


def test_where_caches_may_lie(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    source = tmp_path / "data" / ("x" * 60)
    beside, home = cache_roots(source)
    assert beside == tmp_path / "data" / ".cache" / ("x" * 60)
    assert home == tmp_path / "home" / "minimind" / f"{short_hash([str(tmp_path / 'data')])}-{'x' * 40}"
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    monkeypatch.setattr(Path, "home", lambda: tmp_path / "me")
    assert home_caches() == tmp_path / "me" / ".cache" / "minimind"
