"""Folders of computed data: made once, whole or not at all, found again by every later run, rank and worker."""

import fcntl
import hashlib
import json
import os
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, TextIO

from dataset.jsonl import DataError


def digest(parts: list) -> str:
    """16 hex digits of a list of JSON values."""
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


def open_cache_folder(source: Path, name: str, build: Callable[[Path], None]) -> Path:
    """The folder of this name, in `.cache/` beside `source`, or in `~/.cache` if that is read-only.

    Where there is none, `build` fills an empty one that gets its name when it is whole; a second process waits, and
    uses the first one's.

    Raises:
        DataError: it cannot be written; whatever `build` raises.
    """
    roots = _cache_roots(source)
    for root in roots:
        if (root / name).is_dir():
            return root / name
    root = next((root for root in roots if _can_write(root)), None)
    if root is None:
        raise DataError(f"the cache of {source} can be written neither in {roots[0]} nor in {roots[1]}")
    folder = root / name
    try:
        with _lock(root / f"{name}.lock"):
            if not folder.is_dir():
                with _renamed_when_whole(folder) as partial:
                    build(partial)
    except OSError as error:
        raise DataError(f"the cache of {source} cannot be written in {root}: {error.strerror}") from error
    return folder


def _cache_roots(path: Path) -> list[Path]:
    """Where a cache may lie, the best place first."""
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return [path.parent / ".cache", home / "minimind"]


def _can_write(root: Path) -> bool:
    # Root could write into a folder marked read-only; the mark says that its owner does not want it.
    if not root.is_dir() and not root.parent.stat().st_mode & (stat.S_IWUSR | stat.S_IWGRP | stat.S_IWOTH):
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
    partial = folder.with_name(f"{folder.name}.partial")
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
