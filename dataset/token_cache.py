"""A data file as tokens on disk: tokenised once, then memory-mapped by every run, rank and worker.

A cache is a folder, written under another name and renamed when it is complete:

    tokens.bin        the tokens of all samples, joined, uint16 (uint32 for a vocabulary beyond 65,536)
    mask.bin          one bit per token, whether it is a target; empty if every token is
    offsets.bin       int64 (samples + 1,): sample i is tokens[offsets[i]:offsets[i + 1]]
    first_target.bin  int64 (samples,): index of the first target token in the sample, its length if there is none
    notes.bin         further data of each sample, JSON, joined; empty if there is none
    note_offsets.bin  int64 (samples + 1,): like offsets.bin, in bytes
    info.json         counts, the first skipped bad lines, the keys without a meaning here, and the
                      hash of all bytes of the data file

Samples are whole, so one cache serves every row length. When the data file changes, the next cache replaces the old.

A cache is found by the data file's size, time and sampled content, and used once its hash is known to be the file's: by
`fingerprint`, which every edit changes, or else by hashing the file again.
"""

import hashlib
import json
import math
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast

from dataset.cache_folder import fingerprint_file, flush_to_disk, hold, open_cache, short_hash
from dataset.jsonl import DataError, Ignored, JsonlReader, require_data_file
from model.template_chat import lays_out_thinking
from model.tokenizer import tokenizer_hash

Ids, Learned = Sequence[int], Sequence[bool] | None
Sample = tuple[Ids, Learned] | tuple[Ids, Learned, Any]  # ids, which of them are targets (None: all), a JSON value

FORMAT = 5  # to be raised when the files above, or the way text becomes tokens, change
BATCH_RECORDS = 8192  # given to the tokenizer at once, which spreads them over its threads…
BATCH_BYTES = 1 << 21  # …but no more than this, as a token takes about 100 bytes on its way


class TokenCache:
    """The samples of a cache folder. It pickles as the folder's name, so each worker maps the files itself.

    Attributes:
        lengths: tokens of each sample, int64 (samples,).
        first_target: index of the first target token in each sample, its length when there is none, int64 (samples,).
        bad_lines, told, ignored: `JsonlReader`'s counts and reports of bad lines, and of keys without a meaning here.
        data_sha256: the hash of all bytes of the data file, hex.

    Raises:
        OSError, ValueError, LookupError: a file is missing, truncated or damaged, or not the `expected` cache's.
    """

    def __init__(self, folder: Path, expected: str | None = None):
        self.folder = folder
        hold(folder, self)
        info = json.loads((folder / "info.json").read_text(encoding="utf-8"))
        self.data_sha256: str = info["data_sha256"]
        if expected not in (None, self.data_sha256):
            raise ValueError(f"{folder} was rebuilt from other data")
        self.bad_lines: int = info["bad_lines"]
        self.bad_reports: list[str] = info["told"]
        self.ignored: dict[str, int] = info["ignored"]
        samples, tokens, note_bytes = (info[name] for name in ("samples", "tokens", "note_bytes"))
        self._tokens = self._map("tokens", info["dtype"], tokens)
        self._mask = self._map("mask", np.uint8, math.ceil(tokens / 8)) if info["masked"] else None
        self._offsets = self._map("offsets", np.int64, samples + 1)
        self.first_target = self._map("first_target", np.int64, samples)
        self._notes = self._map("notes", np.uint8, note_bytes) if note_bytes else None
        self._note_offsets = self._map("note_offsets", np.int64, samples + 1) if note_bytes else None

    def _map(self, name: str, dtype: type | str, length: int) -> np.ndarray:
        path = self.folder / f"{name}.bin"
        expected, found = length * np.dtype(dtype).itemsize, path.stat().st_size
        if found != expected:
            raise ValueError(f"{path.name} has {found} bytes, not {expected}")
        # As a plain array over the mapping: slicing a np.memmap itself is several times slower.
        return np.asarray(np.memmap(path, dtype, mode="r"))

    def __reduce__(self):
        return TokenCache, (self.folder, self.data_sha256)

    def __len__(self) -> int:
        return len(self.first_target)

    @property
    def lengths(self) -> np.ndarray:
        return np.diff(self._offsets)

    @property
    def begins(self) -> np.ndarray:
        """The index of each sample's first token, int64 (samples,)."""
        return self._offsets[:-1]

    def ids(self, sample: int, start: int, length: int) -> np.ndarray:
        """The tokens from `start` to `start + length` of a sample, int64 (length,)."""
        begin = self._offsets[sample] + start
        return self._tokens[begin : begin + length].astype(np.int64)

    def targets(self, sample: int, start: int, length: int) -> np.ndarray:
        """Whether each of these tokens is a target, bool (length,)."""
        if self._mask is None:  # no mask stored: every token is a target, as in plain text
            return np.ones(length, dtype=bool)
        begin = self._offsets[sample] + start
        bits = np.unpackbits(self._mask[begin // 8 : (begin + length + 7) // 8])
        return bits[begin % 8 : begin % 8 + length].astype(bool)

    def note(self, sample: int) -> Any:
        """The note of a sample; None if the samples have none."""
        if self._notes is None:
            return None
        begin, end = self._note_offsets[sample : sample + 2]
        return json.loads(self._notes[begin:end].tobytes())


def open_token_cache(
    data_path: str | Path,
    tokenizer: PreTrainedTokenizerFast,
    kind: str,
    parse: Callable[[dict, Ignored], Any],
    encode: Callable[[list], list[Sample]],
    skip_bad_lines: bool = False,
) -> TokenCache:
    """Open the cache of a data file, building it if there is none; a second process waits and uses the first one's.

    Args:
        data_path: a jsonl file. The cache lies in `.cache/` beside it, or in `~/.cache` if that is read-only.
        tokenizer: its hash is part of the cache's name, as are the file's size, time and sampled content.
        kind: identifies `parse` and `encode`.
        parse: as in `JsonlReader`: the JSON object of a line -> record.
        encode: list of records -> list of samples, any number of them per record.
        skip_bad_lines: leave bad lines out and count them.

    Raises:
        DataError: the file is missing or empty, has a bad line or no good line, has changed meanwhile, or the cache
            cannot be written.
    """
    path = require_data_file(data_path)
    state = fingerprint_file(path)
    decided_by = [FORMAT, tokenizer_hash(tokenizer), tokenizer.bos_token_id, tokenizer.eos_token_id]
    settings = short_hash([*decided_by, *([tokenizer.chat_template] if lays_out_thinking(tokenizer) else [])])

    def load(folder: Path) -> TokenCache:
        cache = TokenCache(folder)
        _check_source(cache, path)
        return cache

    def build(folder: Path) -> None:
        before = fingerprint(path)
        reader = JsonlReader(path, parse, skip_bad_lines)
        _build(folder, reader, encode, np.uint16 if len(tokenizer) <= 1 << 16 else np.uint32)
        if fingerprint_file(path) != state:
            raise DataError(f"{path} changed while it was being read: run again")
        _write_json(before, folder / "fingerprint.json")

    cache = open_cache(path, state, f"{kind}-{settings}", load, build)
    if cache.bad_lines and not skip_bad_lines:
        raise DataError(f"{path}, {cache.bad_reports[0]}")
    return cache


def fingerprint(path: Path) -> list[int]:
    """Values of which any edit of a file changes at least one: size, times of writing and of any change, and inode.

    The time of writing can be reset, that of any change cannot; on Windows the latter is the creation time instead.
    """
    status = path.stat()
    return [status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino]


def sha256_of(path: Path) -> str:
    """The hash of all bytes of a file, hex."""
    content = hashlib.sha256()
    progress = tqdm(total=path.stat().st_size, desc=f"comparing {path.name}", unit="B", unit_scale=True, disable=None)
    with progress, open(path, "rb") as file:
        while block := file.read(1 << 20):
            content.update(block)
            progress.update(len(block))
    return content.hexdigest()


def _check_source(cache: TokenCache, path: Path) -> None:
    """Check that the cache was made from the file's present content.

    Raises:
        ValueError: it was not.
    """
    record, now = cache.folder / "fingerprint.json", fingerprint(path)
    if json.loads(record.read_text(encoding="ascii")) == now:
        return
    if sha256_of(path) != cache.data_sha256:
        raise ValueError(f"{path} was edited without changing its size and time")
    with suppress(OSError):  # where nothing can be written, the next run hashes the file again
        beside = record.with_name(f".{record.name}.{os.getpid()}")
        _write_json(now, beside)
        beside.replace(record)


def _write_json(content: object, path: Path) -> None:
    """Write ASCII JSON, with escapes for everything else, because a file name need not be UTF-8."""
    path.write_text(json.dumps(content, indent=2), encoding="ascii")
    flush_to_disk(path)


def _build(folder: Path, reader: JsonlReader, encode: Callable[[list], list[Sample]], dtype: type) -> None:
    progress = tqdm(
        total=reader.path.stat().st_size,
        desc=f"tokenising {reader.path.name}",
        unit="B",
        unit_scale=True,
        disable=None,  # silent if stderr is not a terminal
    )
    with progress, _Writer(folder, dtype) as writer:
        for samples in _encoded(_batches(reader), encode):
            writer.write(samples)
            progress.update(reader.bytes_read - progress.n)
    if not writer.samples:
        raise DataError(f"{reader.path} has no valid line that gives a sample")
    info = {
        "source": reader.path.name,
        "dtype": np.dtype(dtype).name,
        "masked": writer.masked,
        "samples": writer.samples,
        "tokens": writer.tokens,
        "note_bytes": writer.note_bytes,
        "bad_lines": reader.bad_lines,
        "told": reader.bad_reports,
        "ignored": reader.ignored,
        "data_sha256": reader.sha256.hexdigest(),
    }
    _write_json(info, folder / "info.json")


def _batches(reader: JsonlReader) -> Iterator[list]:
    """Records in lists long enough for the tokenizer's threads; a very long line ends its list."""
    batch, begin = [], 0
    for record in reader:
        batch.append(record)
        if len(batch) == BATCH_RECORDS or reader.bytes_read - begin >= BATCH_BYTES:
            yield batch
            batch, begin = [], reader.bytes_read
    if batch:
        yield batch


def _encoded(batches: Iterator[list], encode: Callable[[list], list[Sample]]) -> Iterator[list[Sample]]:
    """The samples of each batch, encoded while the next one is read: the tokenizer releases Python's lock."""
    with ThreadPoolExecutor(1) as thread:
        encoding = None
        for batch in batches:
            before, encoding = encoding, thread.submit(encode, batch)
            if before is not None:
                yield before.result()
        if encoding is not None:
            yield encoding.result()


class _Writer:
    """Appends samples to the files of a cache folder."""

    def __init__(self, folder: Path, dtype: type):
        self.dtype = dtype
        self.samples = 0
        self.tokens = 0
        self.note_bytes = 0
        self.masked = False
        self._odd_bits = np.zeros(0, dtype=bool)  # the mask's last bits, not yet a byte
        with ExitStack() as stack:
            names = ("tokens", "mask", "offsets", "first_target", "notes", "note_offsets")
            self._files = {name: stack.enter_context(open(folder / f"{name}.bin", "wb")) for name in names}
            self._stack = stack.pop_all()
        for name in ("offsets", "note_offsets"):
            self._files[name].write(np.zeros(1, np.int64))

    def __enter__(self) -> "_Writer":
        return self

    def __exit__(self, error_type: type[BaseException] | None, *_: object) -> None:
        with self._stack:
            if error_type is None:
                self._files["mask"].write(np.packbits(self._odd_bits))

    def write(self, samples: list[Sample]) -> None:
        """Append samples; in one cache either all samples have a mask or none has, and the same is true of notes."""
        if not samples:
            return
        ids = [np.asarray(sample[0], self.dtype) for sample in samples]
        masks = [np.asarray(sample[1], bool) for sample in samples if sample[1] is not None]
        notes = [json.dumps(sample[2]).encode() for sample in samples if len(sample) > 2]
        self._files["tokens"].write(np.concatenate(ids))
        self.tokens = self._write_ends("offsets", self.tokens, ids)
        first = [find_first_target(mask) for mask in masks] if masks else [1] * len(ids)
        self._files["first_target"].write(np.asarray(first, np.int64))
        if masks:
            self.masked = True
            self._write_bits(masks)
        if notes:
            self._files["notes"].write(b"".join(notes))
            self.note_bytes = self._write_ends("note_offsets", self.note_bytes, notes)
        self.samples += len(ids)

    def _write_ends(self, name: str, begin: int, parts: list) -> int:
        """Append the end of each of the parts, which are stored consecutively from `begin`; returns the last end."""
        ends = begin + np.cumsum([len(part) for part in parts], dtype=np.int64)
        self._files[name].write(ends)
        return int(ends[-1])

    def _write_bits(self, masks: list[np.ndarray]) -> None:
        bits = np.concatenate([self._odd_bits, *masks])
        whole = len(bits) // 8 * 8
        self._files["mask"].write(np.packbits(bits[:whole]))
        self._odd_bits = bits[whole:]


def find_first_target(mask: np.ndarray) -> int:
    """The index of the first target, `len(mask)` if there is none; the first token, without context, does not count."""
    after_first = mask[1:]
    return int(after_first.argmax()) + 1 if after_first.any() else len(mask)
