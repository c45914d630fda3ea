"""The files of a stream, on this machine or at an address that fsspec reads, and their lines by byte range."""

import glob
import math
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import fsspec
import numpy as np

from dataset.cache_folder import short_hash
from dataset.jsonl import DataError, require_data_file
from dataset.shapes import HEAD_BYTES, file_advice, foreign_file

PATTERN = "*.jsonl"  # the files that are read in a folder
PROBES, PROBE_BYTES = 16, 4096  # number of files to fingerprint, and bytes read from each end
REST_BYTES = 1 << 16  # read at once behind a block, to the end of its last line
COUNT_BYTES = 1 << 24  # read at once to count lines


class Shard(NamedTuple):
    """A file of a stream: its location, its name in messages, and its size in bytes."""

    address: str
    size: int

    @property
    def name(self) -> str:
        return self.address.replace("\\", "/").rpartition("/")[2]

    def read(self, begin: int, end: int) -> bytes:
        """The bytes from `begin` up to `end`, or to the end of the file.

        Raises:
            DataError: it cannot be read.
        """
        end = min(end, self.size)
        if begin >= end:
            return b""
        try:
            if is_remote(self.address):
                files, path = fsspec.core.url_to_fs(self.address)
                return files.cat_file(path, begin, end)
            with open(self.address, "rb") as file:
                file.seek(begin)
                return file.read(end - begin)
        except Exception as error:  # each kind of address has errors of its own
            raise unreadable(self.address, error) from error

    def lines(self, begin: int, end: int) -> Iterator[tuple[int, bytes]]:
        """The lines that begin in [begin, end), each with its place, without line ends.

        Adjacent ranges give each line of the file once, whatever its length.
        """
        place = begin
        data = self.read(max(0, begin - 1), end)
        if begin:  # the byte before says whether a line begins here
            first = data.find(b"\n") + 1
            if not first:
                return
            place, data = begin - 1 + first, data[first:]
        if place >= end or not data:
            return
        for line in _split(data + self._rest_of_line(end, data)):
            yield place, line.rstrip(b"\r\n")
            place += len(line)

    def _rest_of_line(self, at: int, before: bytes) -> bytes:
        """The rest of the line that continues at byte `at`; `before` is the data before that byte."""
        rest = bytearray()
        while at < self.size and not before.endswith(b"\n"):
            before = self.read(at, at + max(REST_BYTES, len(rest)))
            before = before[: before.find(b"\n") + 1 or None]
            rest += before
            at += len(before)
        return bytes(rest)

    def is_blank_from(self, place: int) -> bool:
        """Whether only white space follows."""
        while place < self.size:
            data = self.read(place, place + REST_BYTES)
            if data.strip():
                return False
            place += len(data)
        return True

    def line_number(self, place: int) -> int:
        """The number, from 1, of the line that begins at a place; counting all lines before it takes a while in a large
        file."""
        blocks = range(0, place, COUNT_BYTES)
        return 1 + sum(self.read(at, min(at + COUNT_BYTES, place)).count(b"\n") for at in blocks)


def _split(data: bytes) -> Iterator[bytes]:
    """The lines with their line ends; unlike in bytes.splitlines, only \\n ends a line."""
    begin = 0
    while begin < len(data):
        end = data.find(b"\n", begin) + 1 or len(data)
        yield data[begin:end]
        begin = end


def is_remote(address: str) -> bool:
    """Whether it is an address for fsspec: "s3://…", not "C:\\…"."""
    return "://" in address


def unreadable(address: str, error: Exception) -> DataError:
    reason = getattr(error, "strerror", None) or f"{type(error).__name__}: {error}"
    return DataError(f"{address} cannot be read ({' '.join(str(reason).split())[:200]})")


def list_shards(data_path: str) -> list[Shard]:
    """The files of a stream, by name: one file, those of a folder (`PATTERN`), or those that match a pattern with *.

    Raises:
        DataError: there is none, one is empty or not a jsonl file, or the address cannot be read.
    """
    if is_remote(data_path):
        shards = _remote_shards(data_path)
    else:
        path = Path(data_path)
        if path.is_dir():
            paths = sorted(path.glob(PATTERN))
        elif not path.exists() and glob.has_magic(data_path):
            paths = sorted(map(Path, glob.glob(data_path, recursive=True)))
        else:
            paths = [require_data_file(path)]
        shards = [Shard(str(path), path.stat().st_size) for path in paths if path.is_file()]
    shards = [shard for shard in shards if shard.size]
    if not shards:
        raise DataError(f"{data_path}: there is no file with content; a folder is searched for {PATTERN}")
    for shard in _some(shards):
        if shape := foreign_file(shard.read(0, HEAD_BYTES)):
            raise DataError(f"{shard.address} is {shape}{file_advice(Path(shard.address), shape)}")
    return shards


def _remote_shards(address: str) -> list[Shard]:
    try:
        files, path = fsspec.core.url_to_fs(address)
        if glob.has_magic(path):
            paths = sorted(files.glob(path))
        else:
            paths = sorted(files.glob(f"{path.rstrip('/')}/{PATTERN}")) if files.isdir(path) else [path]
        sizes = [files.info(path).get("size") for path in paths]
    except Exception as error:  # an unknown protocol, a package to install, a network that is down, …
        raise unreadable(address, error) from error
    shards = [Shard(files.unstrip_protocol(path), size) for path, size in zip(paths, sizes, strict=True)]
    if unknown := next((shard.address for shard in shards if shard.size is None), None):
        raise DataError(f"{unknown} does not report its size, which reading in pieces needs: download it")
    return shards


def hash_shards(shards: list[Shard]) -> str:
    """A fingerprint of the files' state that need not read them whole: names, sizes, and the beginning and end of
    some."""
    probes = [
        [shard.read(0, PROBE_BYTES).hex(), shard.read(max(0, shard.size - PROBE_BYTES), shard.size).hex()]
        for shard in _some(shards)
    ]
    return short_hash([[[shard.name, shard.size] for shard in shards], probes])


def _some(shards: list[Shard]) -> list[Shard]:
    places = np.unique(np.linspace(0, len(shards) - 1, PROBES, dtype=np.int64))
    return [shards[place] for place in places]


class Blocks:
    """Equal pieces of the files, which can be read in any order; only the last one of a file is shorter.

    Args:
        block_bytes: the size of each.
    """

    def __init__(self, shards: list[Shard], block_bytes: int):
        self.shards = shards
        self.block_bytes = block_bytes
        self._ends = np.cumsum([math.ceil(shard.size / block_bytes) for shard in shards])

    def __len__(self) -> int:
        return int(self._ends[-1])

    def lines(self, block: int) -> Iterator[tuple[Shard, int, bytes]]:
        """The lines that begin in a block, each with its file and its place there."""
        number = int(np.searchsorted(self._ends, block, side="right"))
        begin = (block - int(self._ends[number - 1]) if number else block) * self.block_bytes
        shard = self.shards[number]
        for place, line in shard.lines(begin, begin + self.block_bytes):
            yield shard, place, line
