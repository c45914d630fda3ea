"""Listing caches, and removing the least recently used beyond a size limit."""

import json
import shutil
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from dataset.cache_folder import ABOUT, IN_USE, cache_roots, is_cache, remove_cache


class Cache(NamedTuple):
    """A cache folder: its source, its kind of content, its bytes, and when it was last opened (Unix time)."""

    folder: Path
    source: str
    kind: str
    bytes: int
    used: float


def caches_in(places: Iterable[Path]) -> list[Cache]:
    """The caches in `.cache` folders, the least recently used first; a place that does not exist has none."""
    roots = {root.resolve() for place in places for root in _folders_in(place)}
    found = [_cache(folder) for root in roots for folder in _folders_in(root) if is_cache(folder)]
    return sorted(filter(None, found), key=lambda cache: (cache.used, cache.folder))


def limit_caches(sources: Sequence[str | Path], limit: int) -> None:
    """Remove the least recently used caches beyond a total of `limit` bytes (0: no limit), beside these sources and in
    the home folder. Caches in use stay, so call this when all have been opened.
    """
    if not limit:
        return
    caches = caches_in(root.parent for source in sources for root in cache_roots(Path(source)))
    total, removed = sum(cache.bytes for cache in caches), []
    for cache in caches:
        if total > limit and remove_cache(cache.folder):
            total -= cache.bytes
            removed.append(cache)
    if removed:
        freed = human_size(sum(cache.bytes for cache in removed))
        print(
            f"caches exceeded {human_size(limit)} (--cache_limit): removed the {len(removed)} least recently used, "
            f"{freed}, the first being that of {removed[0].source}",
            file=sys.stderr,
            flush=True,
        )


def free(cache: Cache) -> bool:
    """Remove a cache unless it is in use, and its root if it was the last; returns whether it was removed."""
    removed, root = remove_cache(cache.folder), cache.folder.parent
    if removed and not any(is_cache(path) for path in root.iterdir()):
        shutil.rmtree(root / IN_USE, ignore_errors=True)
        for path in (root / "lock", *root.glob("pictures-*.json")):
            path.unlink(missing_ok=True)
        if not any(root.iterdir()):
            root.rmdir()
    return removed


def places_in(folder: Path) -> list[Path]:
    """The cache folders of a folder and of its subfolders, existing or not; the folder itself if it is one."""
    if folder.name == ".cache":
        return [folder]
    return [folder / ".cache", *(below / ".cache" for below in _folders_in(folder) if below.name != ".cache")]


def human_size(count: float) -> str:
    """A size in readable form: "47.1 GB"."""
    for unit in ("kB", "MB", "GB"):
        count /= 1000
        if count < 999.95:
            return f"{count:.1f} {unit}"
    return f"{count / 1000:,.1f} TB"


def _folders_in(folder: Path) -> list[Path]:
    try:
        return sorted(path for path in folder.iterdir() if path.is_dir())
    except OSError:  # not there, or not ours to look into
        return []


def _cache(folder: Path) -> Cache | None:
    """The cache in a folder; None if it has been removed meanwhile."""
    try:
        files = {path.name: path.stat() for path in folder.iterdir()}
        used = files.get(ABOUT, folder.stat()).st_mtime
    except OSError:
        return None
    kind = "features" if folder.name.startswith("features-") else folder.name.split("-")[1]
    if kind not in ("features", "reference"):
        kind = f"tokens ({kind})"
    return Cache(folder, _read_source(folder), kind, sum(status.st_size for status in files.values()), used)


def _read_source(folder: Path) -> str:
    try:
        return json.loads((folder / ABOUT).read_text(encoding="ascii"))["source"]
    except (OSError, ValueError, LookupError, TypeError):  # an earlier version's: inferred from its folder
        root = folder.parent
        return str(root.parent.parent / root.name) if root.parent.name == ".cache" else root.name
