"""The last pass: the selection and order of lines, and the files that are written."""

import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from scripts.preparing.choosing import amounts, bucket_of, cutoff, draw
from scripts.preparing.options import Settings
from scripts.preparing.work_folder import CleanChunk
from trainer.errors import UserError
from trainer.files import flush_to_disk

BUCKET_BYTES = 64 << 20
MOST_BUCKETS = 256
FEWEST_LINES = 200  # of which some are held out


class Chosen(NamedTuple):
    """The selection among the cleaned lines.

    Attributes:
        chunks: in order; `starts`: the number of each one's first line, and of the line after the last.
        groups: the part of --mix that each chunk belongs to.
        train, held_out: bool (all lines,).
    """

    chunks: Sequence[CleanChunk]
    starts: Sequence[int]
    groups: Sequence[int]
    train: np.ndarray
    held_out: np.ndarray


def choose(chunks: Sequence[CleanChunk], groups: Sequence[int], kept: np.ndarray, settings: Settings) -> Chosen:
    """Select lines by --mix and --max_lines, and among them the held-out ones.

    Shares of --mix are of characters, because tokens are not counted; within one language this is equivalent.
    """
    starts = [0]
    for chunk in chunks:
        starts.append(starts[-1] + len(chunk.about()))
    taken = kept.copy()

    def portions(purpose: str, which: np.ndarray, group: int | None = None, chars: bool = False):
        def each() -> Iterator[tuple[np.ndarray, np.ndarray]]:
            for chunk, own, start, end in zip(chunks, groups, starts[:-1], starts[1:], strict=True):
                if group is None or own == group:
                    numbers = np.flatnonzero(which[start:end])
                    sizes = chunk.about()["chars"][numbers] if chars else np.ones(len(numbers))
                    yield draw(settings.seed, purpose, numbers + start), sizes.astype(float)

        return each

    if settings.mix:
        sizes = [sum(s.sum() for _, s in portions("mix", kept, group, True)()) for group in range(len(settings.mix))]
        if any(size == 0 for size in sizes):
            empty = settings.mix[sizes.index(0)][0]
            raise UserError(f"--mix: nothing is left of {empty}, so its share cannot be met")
        for group, amount in enumerate(amounts(sizes, [share for _, share in settings.mix])):
            if amount < sizes[group]:
                limit = cutoff(portions("mix", kept, group, True), amount)
                _cut(taken, starts, groups, group, settings.seed, "mix", limit)
    if settings.max_lines and taken.sum() > settings.max_lines:
        limit = cutoff(portions("lines", taken.copy()), settings.max_lines)
        _cut(taken, starts, groups, None, settings.seed, "lines", limit)
    held_out = np.zeros(len(taken), bool)
    lines = int(taken.sum())
    wanted = min(settings.val_lines, round(settings.val_share * lines)) if lines >= FEWEST_LINES else 0
    if wanted:
        held_out = taken.copy()
        _cut(held_out, starts, groups, None, settings.seed, "held out", cutoff(portions("held out", taken), wanted))
    return Chosen(chunks, starts, groups, taken & ~held_out, held_out)


def _cut(which: np.ndarray, starts, groups, group: int | None, seed: int, purpose: str, limit: int) -> None:
    """Unmark the lines of a group whose key is above the limit."""
    for own, start, end in zip(groups, starts[:-1], starts[1:], strict=True):
        if group is None or own == group:
            keys = draw(seed, purpose, np.arange(start, end))
            which[start:end] &= keys <= np.uint64(limit) if limit >= 0 else np.zeros(end - start, bool)


def write_lines(chosen: Chosen, which: np.ndarray, settings: Settings, out: "LineFiles", folder: Path) -> None:
    """Write the lines of `which` to `out`, shuffled or not.

    Shuffling takes bounded memory: every line goes by its key into one of several files, each of which is then sorted.
    """
    if not settings.shuffle:
        for chunk, start, end in zip(chosen.chunks, chosen.starts[:-1], chosen.starts[1:], strict=True):
            out.write(chunk.some_lines(np.flatnonzero(which[start:end])))
        return
    total = 0
    for chunk, start, end in zip(chosen.chunks, chosen.starts[:-1], chosen.starts[1:], strict=True):
        ends = chunk.about()["end"].astype(np.int64)
        total += int(np.diff(ends, prepend=0)[which[start:end]].sum())
    buckets = min(MOST_BUCKETS, total // BUCKET_BYTES + 1)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for chunk, start, end in zip(chosen.chunks, chosen.starts[:-1], chosen.starts[1:], strict=True):
        numbers = np.flatnonzero(which[start:end])
        lines = chunk.some_lines(numbers)
        keys = draw(settings.seed, "order", numbers + start)
        order = np.argsort(keys, kind="stable")
        limits = np.searchsorted(bucket_of(keys[order], buckets), np.arange(buckets + 1))
        for bucket in np.flatnonzero(np.diff(limits)):
            mine = order[limits[bucket] : limits[bucket + 1]]
            with open(folder / f"{bucket}.jsonl", "ab") as file:
                file.write(b"".join([lines[number] for number in mine]))
            with open(folder / f"{bucket}.keys", "ab") as file:
                sizes = np.array([len(lines[number]) for number in mine], np.uint64)
                file.write(np.stack([keys[mine], sizes], axis=1).tobytes())
    for bucket in range(buckets):
        if not (folder / f"{bucket}.keys").exists():
            continue
        keys, sizes = np.fromfile(folder / f"{bucket}.keys", np.uint64).reshape(-1, 2).T
        ends = np.cumsum(sizes.astype(np.int64))
        begins = ends - sizes.astype(np.int64)
        data = (folder / f"{bucket}.jsonl").read_bytes()
        order = np.argsort(keys, kind="stable")
        out.write([data[start:end] for start, end in zip(begins[order].tolist(), ends[order].tolist(), strict=True)])
        (folder / f"{bucket}.jsonl").unlink()
        (folder / f"{bucket}.keys").unlink()


class LineFiles:
    """One file of lines, or several with a given number of lines, written in a folder.

    Attributes:
        paths: of the files written so far.
        lines: the number of lines written.
    """

    def __init__(self, folder: Path, name: str, shard_lines: int = 0):
        self.folder, self.name, self.shard_lines = folder, name, shard_lines
        self.paths: list[Path] = []
        self.lines = 0
        self._file = None

    def write(self, lines: list[bytes]) -> None:
        """Append lines, each with its line break."""
        while lines:
            room = self.shard_lines - self.lines % self.shard_lines if self.shard_lines else len(lines)
            if self._file is None or (self.shard_lines and self.lines % self.shard_lines == 0):
                self._open()
            self._file.write(b"".join(lines[:room]))
            self.lines += len(lines[:room])
            lines = lines[room:]

    def _open(self) -> None:
        self._close()
        name = f"{self.name}-{len(self.paths) + 1:05d}.jsonl" if self.shard_lines else f"{self.name}.jsonl"
        self.paths.append(self.folder / name)
        self._file = open(self.paths[-1], "wb")  # noqa: SIM115 - closed with the next one, or at the end

    def _close(self) -> None:
        if self._file is not None:
            self._file.close()
            flush_to_disk(self.paths[-1])
            self._file = None

    def close(self) -> list[Path]:
        """Finish and return the files; an empty one if nothing was written."""
        if not self.paths:
            self._open()
        self._close()
        return self.paths
