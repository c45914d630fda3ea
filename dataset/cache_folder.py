"""Cache folders: built once, atomically, and reused by every later run, rank and worker.

The caches of a source (a data file, a folder of images) are in one folder, `.cache/NAME/` beside it:

    STATE-NAME/       a cache: STATE identifies a state of the source, NAME what is computed, and how
    STATE-NAME/about.json   the source; its modification time is when the cache was last opened
    in_use/           a locked file for every opened cache and process: caches in use are never removed
    lock              held by the process that builds
    partial-…/, removed-…/  caches being built or removed, or left so by a killed process
"""

import errno
import hashlib
import json
import os
import re
import secrets
import shutil
import stat
import sys
import tempfile
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import BinaryIO, TypeVar

import numpy as np

from dataset.jsonl import DataError
from dataset.locks import NoLocksError, lock

Loaded = TypeVar("Loaded")

ABOUT, IN_USE = "about.json", "in_use"
CACHE = re.compile("(features|[0-9a-f]{16})-.+-[0-9a-f]{16}")  # our names: another program may also use a `.cache`
LEFT_OVER = re.compile("partial|partial-[0-9]+-[0-9a-f]{8}|removed-[0-9a-f]{8}")  # the first by earlier versions
DISK_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


def short_hash(parts: list) -> str:
    """16 hex digits of a list of JSON values."""
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


def fingerprint_file(path: Path, blocks: int = 16, block_bytes: int = 1 << 16) -> str:
    """A fingerprint of a file's state that need not read 9 GB: size, time, and blocks spread over the file."""
    status = path.stat()
    content = hashlib.sha256()
    with open(path, "rb") as file:
        for start in np.linspace(0, max(0, status.st_size - block_bytes), blocks, dtype=np.int64).tolist():
            file.seek(start)
            content.update(file.read(block_bytes))
    return short_hash([status.st_size, status.st_mtime_ns, content.hexdigest()])


def open_cache(
    source: Path, state: str, name: str, load: Callable[[Path], Loaded], build: Callable[[Path], None]
) -> Loaded:
    """The cache of this name, loaded by `load`, from `.cache/` beside `source`, or `~/.cache` if that is read-only.

    If there is none, `build` fills an empty folder, which is renamed once it is complete; a second process waits, and
    uses the first one's. Then caches of other states of the source are removed, except those in use (`hold`). A cache
    that vanishes before it is loaded, or is damaged, is built again.

    Args:
        source: the file or folder that the cache is computed from.
        state: identifies the state of the source, a `short_hash`.
        name: identifies what is computed, and with which settings.
        load: takes the folder, and calls `hold` before it reads it; raises OSError, ValueError or LookupError if the
            content is damaged.

    Raises:
        DataError: the cache cannot be written or rebuilt; and whatever `build` raises.
    """
    found = find_cache(source, state, name, load)
    for _ in range(2):
        if found is None:
            folder = _build(source, state, name, build)
            found = find_cache(source, state, name, load)
    if found is None:
        raise DataError(f"the cache {folder} cannot be read, and cannot be replaced while in use: wait, or remove it")
    return found


def find_cache(source: Path, state: str, name: str, load: Callable[[Path], Loaded]) -> Loaded | None:
    """The cache that `open_cache` would find; None if it would build one. A damaged cache is removed."""
    for root in cache_roots(source):
        folder = root / f"{state}-{name}"
        if folder.is_dir():
            try:
                return load(folder)
            except (OSError, ValueError, LookupError, EOFError) as error:
                reason = f"{type(error).__name__}: {error}"
            _tell(f"the cache {folder} is damaged or gone ({reason:.400}): rebuilding it")
            remove_cache(folder)  # not before the handler has ended, and let go of what began to load and holds it
    return None


def hold(folder: Path, holder: object) -> None:
    """Keep a cache folder from being removed while `holder` lives, and record that it was used now.

    On a read-only file system or one without locks it is not kept, because others cannot see that it is in use.
    """
    with suppress(OSError):
        os.utime(folder / ABOUT)
    try:
        with _marking(folder.parent):
            mark = folder.parent / IN_USE / f"{folder.name}~{os.getpid()}-{secrets.token_hex(4)}"
            weakref.finalize(holder, _release, lock(mark), mark, os.getpid())
    except OSError:
        return


def _release(held: BinaryIO, mark: Path, process: int) -> None:
    held.close()
    if os.getpid() == process:  # a forked worker that ends does not end its parent's use
        with suppress(OSError):  # its folder may be gone
            mark.unlink()


def in_use(folder: Path) -> bool:
    """Whether a process uses the cache folder, or may use it as far as can be known here."""
    try:
        for mark in (folder.parent / IN_USE).iterdir():
            if mark.name.startswith(f"{folder.name}~"):
                held = lock(mark, wait=False)
                if held is None:
                    return True
                held.close()
                mark.unlink(missing_ok=True)  # left by a process that was killed
    except FileNotFoundError:
        return False
    except OSError:  # no locks, or another user's
        return True
    return False


def remove_cache(folder: Path) -> bool:
    """Remove a cache folder unless a process uses it; returns whether it was removed."""
    removed = folder.with_name(f"removed-{secrets.token_hex(4)}")
    try:
        with _marking(folder.parent):  # so that no process begins to use it between the check and the renaming
            if in_use(folder):
                return False
            folder.rename(removed)
    except OSError:  # no locks, so it may be in use; or not ours to remove; or open in another process of Windows
        return False
    shutil.rmtree(removed, ignore_errors=True)
    return True


@contextmanager
def _marking(root: Path) -> Iterator[None]:
    """Hold the lock on the marks of caches in use.

    Raises:
        OSError: the folder is not writable; NoLocksError if its file system has no locks.
    """
    (root / IN_USE).mkdir(exist_ok=True)
    with lock(root / IN_USE / "lock"):
        yield


def cache_roots(source: Path) -> list[Path]:
    """The folders that may contain the caches of a source, the preferred one first."""
    beside = source.parent / ".cache" / source.name
    home = home_caches()
    if home is None:
        return [beside]
    place = short_hash([str(source.parent.resolve())])
    return [beside, home / f"{place}-{source.name[:40]}"]


def home_caches() -> Path | None:
    """The folder of caches that cannot be stored beside their source; None for a user without a home."""
    given = os.environ.get("XDG_CACHE_HOME")
    try:
        return (Path(given) if given else Path.home() / ".cache") / "minimind"
    except RuntimeError:
        return None


def writable_root(source: Path) -> Path:
    """The folder in which to write a source's caches.

    Raises:
        DataError: there is none.
    """
    roots = cache_roots(source)
    root = next((root for root in roots if _can_write(root, source)), None)
    if root is None and len(roots) == 1:
        raise DataError(
            f"the cache of {source} cannot be written in {roots[0]}, and you have no home folder: set XDG_CACHE_HOME"
        )
    if root is None:
        raise DataError(f"the cache of {source} can be written neither in {roots[0]} nor in {roots[1]}")
    return root


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


def _build(source: Path, state: str, name: str, build: Callable[[Path], None]) -> Path:
    root = writable_root(source)
    folder = root / f"{state}-{name}"
    try:
        with _alone(root) as alone:
            if folder.is_dir():
                return folder
            if alone:
                _clear(root)
            with _renamed_when_whole(folder) as partial:
                build(partial)
                about = {"source": str(source.resolve()), "name": name}
                (partial / ABOUT).write_text(json.dumps(about), encoding="ascii")
            for other in root.iterdir():
                if is_cache(other) and not other.name.startswith(f"{state}-"):
                    remove_cache(other)
    except OSError as error:
        reason = f"{error.strerror or error}" + ("; free some space there" if error.errno in DISK_FULL else "")
        raise DataError(f"the cache of {source} cannot be written in {root}: {reason}") from error
    return folder


def is_cache(path: Path) -> bool:
    """Whether this is one of our cache folders."""
    return CACHE.fullmatch(path.name) is not None and path.is_dir()


@contextmanager
def _alone(root: Path) -> Iterator[bool]:
    """Hold the folder's build lock; yields False if its file system has no locks."""
    try:
        held = lock(root / "lock")
    except NoLocksError as error:
        _tell(
            f"{root} is on a file system without locks ({error.strerror}): "
            "runs that start together may each build their own cache, and old ones are not removed"
        )
        held = None
    with held or nullcontext():
        yield held is not None


def _clear(root: Path) -> None:
    """Remove what killed processes left half built or half removed; the caller holds the lock."""
    for folder in root.iterdir():
        if LEFT_OVER.fullmatch(folder.name) and folder.is_dir():
            shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def _renamed_when_whole(folder: Path) -> Iterator[Path]:
    """A new folder to fill: at the end it is flushed to disk and renamed to `folder`, on an error it is removed."""
    partial = folder.with_name(f"partial-{os.getpid()}-{secrets.token_hex(4)}")
    partial.mkdir()
    try:
        yield partial
        for path in (*partial.iterdir(), partial):
            flush_to_disk(path)
        try:
            partial.rename(folder)
        except OSError:
            if not folder.is_dir():  # where there are no locks another may have been first
                raise
            shutil.rmtree(partial)
        flush_to_disk(folder.parent)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def flush_to_disk(path: Path) -> None:
    """Flush a written file, or a folder's entries, to disk.

    After a power failure a file system may have kept a renaming but not the data written before it.
    """
    if path.is_dir():
        with suppress(OSError):  # Windows opens no folders, and some file systems flush none
            descriptor = os.open(path, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
    else:
        with open(path, "r+b") as file:
            os.fsync(file.fileno())


def _tell(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
