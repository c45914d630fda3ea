"""OUT.work/: the finished work of a run, chunk by chunk, so that a killed run continues from there."""

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
import orjson

from scripts.preparing.sources import Source
from trainer.errors import UserError

HEAD_BYTES = 1 << 16
LINE = np.dtype([("end", "<u8"), ("chars", "<u4"), ("line", "<u8"), ("language", "u1"), ("tokens", "<u4")])


class WorkFolder:
    """The folder of a run.

    Attributes:
        path: its path.
        goes_on: whether it has results of a run with the same settings and inputs.
        other: whether it has results of a run with other settings or inputs.

    Raises (on construction):
        UserError: another run is using it, or it is not writable.
    """

    def __init__(self, path: Path, identity: dict):
        from dataset.locks import NoLocksError, lock  # here: it brings torch, which no worker needs

        self.path = path
        try:
            path.mkdir(parents=True, exist_ok=True)
            self._lock = lock(path / "lock", wait=False)
            if self._lock is None:
                raise UserError(f"{path}: another run is preparing there; wait for it, or choose another --out")
        except NoLocksError:
            self._lock = None
        except OSError as error:
            raise UserError(f"cannot write {path}: {error.strerror or error}") from None
        settings = path / "settings.json"
        text = json.dumps(identity, ensure_ascii=True, indent=1, sort_keys=True)
        self.goes_on = settings.exists() and settings.read_text(encoding="utf-8") == text
        self.other = settings.exists() and not self.goes_on
        if not self.goes_on:
            for entry in path.iterdir():
                if entry.name != "lock":
                    shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
            write_whole(settings, text.encode())
        for name in ("clean", "final", "keys"):
            (path / name).mkdir(exist_ok=True)

    def done(self, name: str) -> dict | None:
        """The record of a finished step; None if it is not finished."""
        path = self.path / f"{name}.json"
        return orjson.loads(path.read_bytes()) if path.exists() else None

    def note(self, name: str, content: dict) -> None:
        write_whole(self.path / f"{name}.json", orjson.dumps(content))

    def remove(self) -> None:
        """Delete the folder with all its content."""
        if self._lock is not None:
            self._lock.close()
        shutil.rmtree(self.path, ignore_errors=True)


def write_whole(path: Path, data: bytes) -> None:
    """Write a file of the work folder atomically; it is not flushed, because a lost file is simply made again."""
    with _whole(path) as file:
        file.write(data)


def save_array(path: Path, array: np.ndarray) -> None:
    """Write a .npy file, likewise."""
    with _whole(path) as file:
        np.save(file, array)


@contextlib.contextmanager
def _whole(path: Path) -> Iterator[BinaryIO]:
    """A file that appears whole. Unlike `trainer.files.replacing` it is not flushed and does not import torch."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with open(temporary, "wb") as file:
        yield file
    os.replace(temporary, path)


def identify(sources: Sequence[Source], settings: dict, others: Sequence[str]) -> dict:
    """Identifies the inputs of a result: the settings, this code, and each file's size, time and beginning."""
    code = hashlib.sha256()
    for path in sorted(Path(__file__).parent.glob("*.py")):
        code.update(path.read_bytes())
    files = [path for source in sources for path in source.paths] + [Path(name) for name in others]
    about = hashlib.sha256()
    for path in files:
        try:
            state = path.stat()
            with open(path, "rb") as file:
                head = hashlib.sha256(file.read(HEAD_BYTES)).hexdigest()
        except OSError as error:
            raise UserError(f"{path} cannot be read: {error.strerror or error}") from None
        about.update(repr((os.fspath(path), state.st_size, state.st_mtime_ns, head)).encode("utf-8", "surrogateescape"))
    groups = [source.group for source in sources]
    return {"settings": settings, "code": code.hexdigest(), "files": about.hexdigest(), "groups": groups}


class CleanChunk(NamedTuple):
    """A cleaned chunk on disk: its lines, and an entry of `LINE` about each."""

    path: Path

    def write(self, lines: Sequence[bytes], about: np.ndarray, summary: dict) -> None:
        """Write its files, the summary last: if that exists, the others are complete."""
        write_whole(self.path.with_suffix(".jsonl"), b"".join(lines))
        save_array(self.path.with_suffix(".npy"), about)
        write_whole(self.path.with_suffix(".json"), orjson.dumps(summary))

    def is_done(self) -> bool:
        return self.path.with_suffix(".json").exists()

    def summary(self) -> dict:
        return orjson.loads(self.path.with_suffix(".json").read_bytes())

    def about(self) -> np.ndarray:
        """The entries about its lines, (n,) of `LINE`."""
        return np.load(self.path.with_suffix(".npy"))

    def lines(self) -> list[bytes]:
        """All lines, without their line breaks."""
        return self.path.with_suffix(".jsonl").read_bytes().split(b"\n")[:-1]

    def some_lines(self, numbers: np.ndarray) -> list[bytes]:
        """The lines with these numbers, which must ascend, with their line breaks."""
        if not len(numbers):
            return []
        ends = self.about()["end"].astype(np.int64)
        starts = np.r_[0, ends[:-1]]
        with open(self.path.with_suffix(".jsonl"), "rb") as file:
            if len(numbers) * 4 > len(ends):
                data = file.read()
                return [data[start:end] for start, end in zip(starts[numbers], ends[numbers], strict=True)]
            found = []
            for start, end in zip(starts[numbers].tolist(), ends[numbers].tolist(), strict=True):
                file.seek(start)
                found.append(file.read(end - start))
            return found


class LineTexts(NamedTuple):
    """The texts of all lines of the chunks, by number: a `TextStore`."""

    chunks: tuple[CleanChunk, ...]
    starts: tuple[int, ...]  # the number of each chunk's first line, and of the line after the last
    what: str  # "whole_text" or "questions" of scripts/preparing/stage_records.py

    def read(self, numbers: Sequence[int]) -> list[str]:
        """The texts of these lines; the numbers must ascend."""
        from scripts.preparing import stage_records

        text_of = getattr(stage_records, self.what)
        numbers = np.asarray(numbers, np.int64)
        limits = np.searchsorted(numbers, self.starts)
        texts = []
        for chunk, start, first, last in zip(self.chunks, self.starts, limits[:-1], limits[1:], strict=False):
            if first < last:
                lines = chunk.some_lines(numbers[first:last] - start)
                texts += [text_of(orjson.loads(line)) for line in lines]
        return texts
