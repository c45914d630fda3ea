"""Files that are whole or not there: written beside their place, then renamed over it."""

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path

import torch

from trainer.errors import UserError


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a name beside `path` to write to; renamed over `path` once written and flushed, deleted on any failure.

    Raises:
        UserError: it could not be written (disk full, no permission); `path` is as it was.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise cannot_write(path, error) from error
    finally:
        if temporary.exists():
            temporary.unlink()


def cannot_write(path: Path, error: OSError) -> UserError:
    """The error to raise when writing to `path` failed."""
    return UserError(
        f"cannot write {path}: {error.strerror or error}; what was there before is whole: "
        "mend that and run again, or choose another folder"
    )


def save_tensors(content, path: Path) -> None:
    """`torch.save`, whole or not at all."""
    with replacing(path) as temporary, writing_tensors(), open(temporary, "wb") as file:
        torch.save(content, file)


@contextlib.contextmanager
def writing_tensors() -> Iterator[None]:
    """Turns PyTorch's own word for a write that failed into an OSError."""
    try:
        yield
    except RuntimeError as error:
        if isinstance(error.__context__, OSError):  # it had found out why
            raise error.__context__ from None
        raise OSError(str(error).splitlines()[0]) from error


def save_json(content: dict, path: Path) -> None:
    with replacing(path) as temporary:  # a file's name that is not UTF-8 in JSON's own escapes
        text = json.dumps(content, ensure_ascii=False, indent=2) + "\n"
        temporary.write_text(text, encoding="utf-8", errors="backslashreplace")


def load_tensors(path: Path) -> dict:
    """`torch.load` of tensors and plain values, nothing that could run code.

    Raises:
        UserError: missing, not such a file, or not a whole one.
    """
    if not path.is_file():
        raise UserError(f"{path} is missing")
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file makes the reader raise almost anything
        raise UserError(
            f"{path} is truncated, damaged, or holds something else than tensors (code in it was not run): "
            "make or download it again"
        ) from error
