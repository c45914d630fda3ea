"""Images checked before training: each is fully decoded once, and the result is kept until the file changes.

The results are stored beside the caches of the data file, in `pictures-….json`: the names in the lines, and each
image's fingerprint, the hash of its bytes, and its fault.
"""

import contextlib
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

from dataset.cache_folder import fingerprint_file, flush_to_disk, short_hash, writable_root
from dataset.jsonl import BadRecord, DataError, Ignored, JsonlReader, require_data_file
from dataset.token_cache import fingerprint
from model.images import ImageError, read_image

AT_ONCE = 256  # pictures between two looks at Ctrl-C
SHOWN = 200  # characters of a name
MISSING = "does not exist"


class Picture(NamedTuple):
    """The fingerprint of an image's file, the hash of its bytes, and its fault ("does not exist"), or None."""

    fingerprint: list[int]
    sha256: str
    fault: str | None


def picture_faults(paths: Sequence[Path]) -> list[str | None]:
    """The fault of each of these images, such as "does not exist"; None if it has none."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return [picture.fault for picture in pool.map(examine, paths)]


def examine(path: Path) -> Picture:
    """Read an image and decode all of it, because a truncated one may have a valid header."""
    try:
        if not os.path.isfile(path):  # Path's own raises where the name is too long, or a folder closed
            return Picture([], "", MISSING)
        before, content = fingerprint(path), path.read_bytes()
    except OSError as error:
        return Picture([], "", f"cannot be read: {error.strerror}")
    try:
        read_image(path, reduced=True)
        fault = None
    except ImageError as error:
        fault = str(error).removeprefix(f"{path} ")
    return Picture(before, hashlib.sha256(content).hexdigest(), fault)


def shown(name: str) -> str:
    """A name in a one-line message: a name may contain anything, by mistake even an image's bytes."""
    text = "".join(char if char.isprintable() else ascii(char)[1:-1] for char in name[:SHOWN])
    return text if len(name) < SHOWN else f"{text}…"


def refuse_faulty(names: Sequence[str], images_path: Path, faults: dict[str, str]) -> None:
    """Refuse a line that names an image with a fault.

    Args:
        names: the names in the line.
        faults: the faults of images, by name.

    Raises:
        BadRecord: the message says which image, and why.
    """
    for name in names:
        if name in faults:
            hint = " (--images_path names the folder)" if faults[name] == MISSING else ""
            raise BadRecord(f"the image {images_path / shown(name)} {faults[name]}{hint}")


def check_pictures(
    data_path: str | Path, images_path: Path, names_of: Callable[[dict, Ignored], Sequence[str]]
) -> dict[str, Picture]:
    """The images that the lines of a data file name, each checked, by name.

    Decoding is divided among threads, which use all cores. An image that has not changed since it was checked is not
    read again; nor are the lines if the data file has not changed.

    Args:
        images_path: the folder that the names are relative to.
        names_of: returns the names in a line's object; raises BadRecord for a line to be skipped here.

    Raises:
        DataError: the data file is missing; neither its folder nor the home folder is writable.
    """
    path = require_data_file(data_path)
    record = writable_root(path) / f"pictures-{short_hash([str(images_path.resolve())])}.json"
    state, known = fingerprint_file(path), _read(record)
    if known["state"] == state:
        names = list(known["pictures"])
    else:
        names = _names_in(JsonlReader(path, names_of, skip_bad_lines=True))
    pictures = {name: known["pictures"].get(name, Picture([], "", None)) for name in names}
    changed = [name for name in names if not _as_it_was(images_path / name, pictures[name])]
    try:
        for name, picture in _examined(changed, images_path):
            pictures[name] = picture
    finally:  # Ctrl-C loses nothing that was done
        if changed or known["state"] != state:
            _write({"state": state, "pictures": pictures}, record)
    return pictures


def _names_in(lines: JsonlReader) -> list[str]:
    try:
        return sorted({name for names in lines for name in names})
    except DataError:  # no line is good: who reads them for good says which, and why
        return []


def _as_it_was(path: Path, picture: Picture) -> bool:
    try:
        return fingerprint(path) == picture.fingerprint
    except (OSError, ValueError):  # it does not exist, or its name is not a valid file name
        return False


def _examined(names: Sequence[str], images_path: Path) -> Iterator[tuple[str, Picture]]:
    with (
        ThreadPoolExecutor(os.cpu_count()) as pool,
        tqdm(total=len(names), desc="checking pictures", unit="picture", disable=None) as progress,
    ):
        for begin in range(0, len(names), AT_ONCE):
            some = names[begin : begin + AT_ONCE]
            yield from zip(some, pool.map(examine, [images_path / name for name in some]), strict=True)
            progress.update(len(some))


def _read(record: Path) -> dict:
    """The saved results of earlier checks; empty if they cannot be read."""
    try:
        known = json.loads(record.read_text(encoding="ascii"))
        return {"state": known["state"], "pictures": {name: Picture(*seen) for name, seen in known["pictures"].items()}}
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return {"state": None, "pictures": {}}


def _write(found: dict, record: Path) -> None:
    beside = record.with_name(f".{record.name}.{os.getpid()}.tmp")
    try:
        beside.write_text(json.dumps(found), encoding="ascii")
        flush_to_disk(beside)
        beside.replace(record)
    except OSError:  # a full disk, say: the next run examines them again
        with contextlib.suppress(OSError):
            beside.unlink()
