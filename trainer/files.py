"""Atomic writes: a file is written under a temporary name, then renamed into place."""

import contextlib
import errno
import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path

import torch

from dataset.cache_folder import flush_to_disk
from trainer.errors import UserError


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a name beside `path` to write to; renamed over `path` once written and flushed, deleted on any failure.

    If `path` is a symbolic link, it stays one: the file that it points to is replaced in its own folder.

    Raises:
        UserError: it could not be written (disk full, no permission); `path` is as it was.
    """
    target = real_place(path)
    temporary = _temporary(target)
    try:
        make_folder(path.parent)
        yield temporary
        flush_to_disk(temporary)
        move(temporary, target)
    except OSError as error:
        raise write_error(path, error) from error
    finally:
        if temporary.exists():
            temporary.unlink()


def make_folder(folder: Path) -> None:
    """Make a folder and its missing parents; they are flushed to disk before this returns."""
    missing = [each for each in (folder, *folder.parents) if not each.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    for made in missing:
        _folder_to_disk(made.parent)


def real_place(path: Path) -> Path:
    """The path of a file or folder with all symbolic links resolved."""
    return Path(os.path.realpath(path))


def require_utf8(folder: Path, what: str) -> None:
    """A tokenizer is read and written by a library that takes no other paths.

    Args:
        what: what the folder is, such as the flag that names it.

    Raises:
        UserError: the path is not UTF-8.
    """
    try:
        str(folder).encode()
    except UnicodeEncodeError:
        raise UserError(
            f"{what} {folder}: the path is not UTF-8, which the tokenizers library requires: rename the folder"
        ) from None


def left_by_a_kill(path: Path) -> list[Path]:
    """The partial files of `replacing(path)` in processes that were killed; this process's own are being written."""
    target = real_place(path)
    if not target.parent.is_dir():
        return []
    prefix, own = _prefix(target), _temporary(target)
    files = target.parent.iterdir()
    return [file for file in files if file.name.startswith(prefix) and file.suffix == ".tmp" and file != own]


def _temporary(target: Path) -> Path:
    return target.with_name(f"{_prefix(target)}{os.getpid()}.tmp")


def _prefix(target: Path) -> str:
    return f".{target.name}."


def move(path: Path, to: Path) -> None:
    """Rename within a folder, replacing the target; the rename is flushed to disk before this returns."""
    os.replace(path, to)
    _folder_to_disk(to.parent)


def _folder_to_disk(folder: Path) -> None:
    """Flush a folder's entries to disk where the system can (Windows and some network file systems cannot)."""
    if not hasattr(os, "O_DIRECTORY"):
        return
    try:
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    except PermissionError:  # one that may be written and not listed
        return
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(handle)


def write_error(path: Path, error: OSError) -> UserError:
    """The error to raise when writing to `path` failed."""
    return UserError(
        f"cannot write {path}: {error.strerror or error}; the previous file is intact: "
        "fix that and run again, or choose another folder"
    )


def save_tensors(content, path: Path) -> str:
    """`torch.save`, atomically; returns the file's SHA-256."""
    with replacing(path) as temporary, writing_tensors(), open(temporary, "wb") as file:
        hashing = _Hashing(file)
        torch.save(content, hashing)
    return hashing.digest.hexdigest()


class _Hashing:
    """A file that is written sequentially and hashed at the same time."""

    def __init__(self, file):
        self.file = file
        self.digest = hashlib.sha256()

    def write(self, data) -> int:
        self.digest.update(data)
        return self.file.write(data)

    def flush(self) -> None:
        self.file.flush()


@contextlib.contextmanager
def writing_tensors() -> Iterator[None]:
    """Turns PyTorch's own error for a failed write into an OSError."""
    try:
        yield
    except RuntimeError as error:
        if isinstance(error.__context__, OSError):  # it had found out why
            raise error.__context__ from None
        raise OSError(str(error).splitlines()[0]) from error


def save_json(content: dict, path: Path) -> str:
    """Write a dict as readable JSON, atomically; returns the file's SHA-256."""
    text = json.dumps(content, ensure_ascii=False, indent=2) + "\n"
    data = text.encode(errors="backslashreplace")  # a file's name that is not UTF-8 in JSON's own escapes
    with replacing(path) as temporary:
        temporary.write_bytes(data)
    return hashlib.sha256(data).hexdigest()


def file_hash(path: Path) -> str:
    """A file's SHA-256, 64 hex digits; half a second per GB."""
    short_hash = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            short_hash.update(block)
    return short_hash.hexdigest()


def check_hash(path: Path, beside: Path, about: dict) -> None:
    """Compare a .pth with the "sha256" in the json beside it; without one it is not checked.

    Nor is the same model in another format, which shares the json.

    Raises:
        UserError: the file does not match.
    """
    if path.suffix == ".pth" and "sha256" in about and file_hash(path) != about["sha256"]:
        raise UserError(
            f"{path} does not match the sha256 in {beside}: it is damaged, was changed, or a save "
            "was interrupted: repair it with --resume of its stage, or restore it; if you changed it "
            f'yourself, remove "sha256" from {beside}'
        )


def load_tensors(path: Path) -> dict:
    """`torch.load` of tensors and plain values, nothing that could run code.

    Raises:
        UserError: missing, truncated, or another kind of file.
    """
    if not path.is_file():
        raise UserError(f"{path} is missing")
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file makes the reader raise almost anything
        raise UserError(
            f"{path} is truncated, damaged, or contains more than tensors (its code was not run): "
            "create or download it again"
        ) from error
