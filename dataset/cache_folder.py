"""Folders of computed data: made once, whole or not at all, found again by every later run, rank and worker."""

import fcntl
import hashlib
import json
import os
import shutil
import stat
import tempfile
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO, TextIO

from dataset.jsonl import DataError


def digest(parts: list) -> str:
    """16 hex digits of a list of JSON values."""
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


def find_cache_folder(source: Path, state: str, name: str) -> Path | None:
    """What `open_cache_folder` would find, None where it would build."""
    places = [root / f"{state}-{name}" for root in _cache_roots(source)]
    return next((folder for folder in places if folder.is_dir()), None)


def open_cache_folder(source: Path, state: str, name: str, build: Callable[[Path], None]) -> Path:
    """The folder of this name, in `.cache/` beside `source`, or in `~/.cache` if that is read-only.

    Where there is none, `build` fills an empty one that gets its name when it is whole; a second process waits, and
    uses the first one's. Then those of other states of the source are removed, unless a process uses one (`hold`).

    Args:
        source: the file or folder that it is computed from.
        state: tells one state of the source from another, a `digest`.
        name: tells what is computed, and by which settings.

    Raises:
        DataError: it cannot be written; whatever `build` raises.
    """
    if found := find_cache_folder(source, state, name):
        return found
    roots = _cache_roots(source)
    root = next((root for root in roots if _can_write(root, source)), None)
    if root is None:
        raise DataError(f"the cache of {source} can be written neither in {roots[0]} nor in {roots[1]}")
    folder = root / f"{state}-{name}"
    try:
        with _lock(root / "lock"):
            if not folder.is_dir():
                with _renamed_when_whole(folder) as partial:
                    build(partial)
                _remove_stale(root, state)
    except OSError as error:
        reason = error.strerror or error
        raise DataError(f"the cache of {source} cannot be written in {root}: {reason}; make room there") from error
    return folder


def hold(folder: Path, holder: object) -> None:
    """Keep a cache folder from being removed as long as `holder` lives: a shared lock on its info.json."""
    file = os.open(folder / "info.json", os.O_RDONLY)
    weakref.finalize(holder, os.close, file)
    fcntl.flock(file, fcntl.LOCK_SH)


def _remove_stale(root: Path, state: str) -> None:
    """Remove what was computed from other states of the source, and what a crash left; the caller holds the lock."""
    for folder in root.iterdir():
        if folder.is_dir() and not folder.name.startswith(f"{state}-"):
            # BlockingIOError: somebody holds it. Another one: it is not ours to remove, and does no harm.
            with suppress(OSError), open(folder / "info.json", "a+") as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(folder)


def _cache_roots(source: Path) -> list[Path]:
    """Where the caches of a source may lie, the best place first."""
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    place = digest([str(source.parent.resolve())])
    return [source.parent / ".cache" / source.name, home / "minimind" / f"{place}-{source.name[:40]}"]


def _can_write(root: Path, source: Path) -> bool:
    # Root could write into a folder marked read-only; the mark says that its owner does not want it.
    marked = not source.parent.stat().st_mode & (stat.S_IWUSR | stat.S_IWGRP | stat.S_IWOTH)
    if marked and root.is_relative_to(source.parent):
        return False
    try:
        root.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=root):
            return True
    except OSError:
        return False


@contextmanager
def _lock(path: Path) -> Iterator[None]:
    """Hold an exclusive lock; it ends with the process, so a crash leaves none behind."""
    with open(path, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


@contextmanager
def _renamed_when_whole(folder: Path) -> Iterator[Path]:
    """A fresh folder to fill, renamed to `folder` at the end, removed on an error. The caller holds the lock."""
    partial = folder.with_name("partial")
    shutil.rmtree(partial, ignore_errors=True)  # left by a crash
    partial.mkdir()
    try:
        yield partial
        partial.rename(folder)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def to_disk(file: BinaryIO | TextIO) -> None:
    """Reach the disk before the rename does: after a power cut a folder with its final name is whole."""
    file.flush()
    os.fsync(file.fileno())
