"""Files that are whole or not there: written beside their place, then renamed over it."""

import contextlib
import json
import os
import pickle
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
        raise UserError(
            f"cannot write {path}: {error.strerror or error}; what was saved before is whole: "
            "make room there (or choose another --out_dir) and go on with --resume"
        ) from error
    finally:
        temporary.unlink(missing_ok=True)


def save_tensors(content, path: Path) -> None:
    """`torch.save`, whole or not at all."""
    with replacing(path) as temporary, open(temporary, "wb") as file:
        try:
            torch.save(content, file)
        except RuntimeError as error:  # PyTorch's own word for a write that failed
            raise OSError(str(error).splitlines()[0]) from error


def save_json(content: dict, path: Path) -> None:
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(content, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")


def load_tensors(path: Path) -> dict:
    """`torch.load` of tensors and plain values, nothing that could run code.

    Raises:
        UserError: not such a file, or not a whole one.
    """
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise UserError(
            f"{path} holds something else than tensors, maybe code: it is refused, and was not run"
        ) from None
    except (RuntimeError, EOFError, OSError, ValueError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"{path} is truncated or no checkpoint ({reason}): make or download it again") from None
