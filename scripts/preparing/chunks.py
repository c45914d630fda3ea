"""Sources cut into chunks of a few MB, the unit of work: one process cleans each, in bounded memory.

The cuts depend only on a source's bytes, so that the result does not depend on the processes.
"""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import orjson

from scripts.preparing.json_values import LONGEST, BrokenValues, cut_values
from scripts.preparing.sources import BrokenArchive, Source, parse_table, read_blocks, sniff
from trainer.errors import shown

CHUNK_BYTES = 4 << 20
DOCUMENT_CHARS = 20_000  # of a text file that holds a whole book, cut between paragraphs
EXCERPT_CHARS = 80
PARAGRAPH = re.compile(r"\n[ \t]*\n\s*")


class Fault(str):
    """The reason why a line cannot be read."""


class Chunk(NamedTuple):
    """A piece of a source.

    Attributes:
        number: its number within the source.
        first: the number of its first line, row or value, from 1.
        data: bytes of whole lines, a list of values as bytes, an Arrow table, or texts as (file, line, text).
        header: the names of a table's columns.
        faults: lines that were too long to be kept, as (number, reason).
    """

    source: Source
    number: int
    first: int
    data: Any
    header: list[str] | None = None
    faults: tuple[tuple[int, str], ...] = ()


def cut_into_chunks(source: Source, unit: str, lost: list[str]) -> Iterator[Chunk]:
    """The chunks of a source, in its order.

    Args:
        unit: the unit of text in a text file: "document", "paragraph" or "line".
        lost: gets a line about each file that could not be read to its end.
    """
    cutters = {"jsonl": _cut_lines, "csv": _cut_table, "json": _cut_json, "parquet": _cut_parquet}
    if source.format == "text":
        yield from _cut_texts(source, unit, lost)
        return
    reached = 0
    try:
        for number, (first, count, data, header, faults) in enumerate(cutters[source.format](source)):
            yield Chunk(source, number, first, data, header, tuple(faults))
            reached = first + count - 1
    except (BrokenArchive, BrokenValues, OSError) as error:
        what = {"jsonl": "line", "csv": "line", "parquet": "row"}.get(source.format, "value")
        lost.append(f"{source.name}: nothing was read after {what} {reached:,}: {_reason(error)}")


def _reason(error: Exception) -> str:
    if isinstance(error, OSError) and not isinstance(error, BrokenArchive):
        return error.strerror or str(error)
    return str(error)


def _whole_lines(blocks: Iterator[bytes]) -> Iterator[tuple[bytes, bool]]:
    """Pieces of whole lines, of `CHUNK_BYTES` or slightly more; or the beginning of a line that is too long, and True.

    If an archive is damaged, the whole lines before the damage are yielded first.
    """
    ready: list[bytes] = []  # whole lines
    carry: list[bytes] = []  # the beginning of the next one
    ready_size = carry_size = 0
    skipping = False  # to the end of a line that is too long
    error = None
    try:
        for block in blocks:
            if skipping:
                begin = block.find(b"\n") + 1
                if not begin:
                    continue
                block, skipping = block[begin:], False
            end = block.rfind(b"\n") + 1
            if end:
                ready += [*carry, block[:end]]
                ready_size += carry_size + end
                carry, carry_size = [], 0
                if ready_size >= CHUNK_BYTES:
                    yield b"".join(ready), False
                    ready, ready_size = [], 0
            carry.append(block[end:])
            carry_size += len(block) - end
            if carry_size > LONGEST:
                if ready:
                    yield b"".join(ready), False
                yield b"".join(carry)[:EXCERPT_CHARS], True
                ready, ready_size, carry, carry_size, skipping = [], 0, [], 0, True
    except (BrokenArchive, OSError) as broken:
        error, carry = broken, []
    if whole := b"".join([*ready, *carry]):
        yield whole, False
    if error:
        raise error


Cut = tuple[int, int, Any, list[str] | None, list[tuple[int, str]]]  # first, count, data, header, faults


def _cut_lines(source: Source) -> Iterator[Cut]:
    first = 1
    for piece, too_long in _whole_lines(read_blocks(source, source.paths[0])):
        if too_long:
            yield first, 1, b"", None, [(first, f"longer than {LONGEST >> 20} MB")]
            first += 1
        else:
            count = piece.count(b"\n") + (not piece.endswith(b"\n"))
            yield first, count, piece, None, []
            first += count


def _cut_table(source: Source) -> Iterator[Cut]:
    """Cut a table between rows: at a line break outside quotation marks."""
    first, header, pending = 1, None, b""
    for piece, too_long in _whole_lines(read_blocks(source, source.paths[0])):
        if too_long:
            yield first, 1, b"", header, [(first, f"longer than {LONGEST >> 20} MB")]
            first += 1
            continue
        pending += piece
        end = len(pending)
        if source.quoted and pending.count(b'"') % 2 and end < 4 * CHUNK_BYTES:
            open_at = np.cumsum(np.frombuffer(pending, np.uint8) == ord('"')) % 2
            breaks = np.flatnonzero((np.frombuffer(pending, np.uint8) == ord("\n")) & (open_at == 0))
            end = int(breaks[-1]) + 1 if len(breaks) else 0
        if not end:
            continue
        data, pending = pending[:end], pending[end:]
        if header is None:
            header = next((row for _, row in parse_table(data, None, source) if isinstance(row, list)), [])
        count = data.count(b"\n") + (not data.endswith(b"\n"))
        yield first, count, data, header, []
        first += count
    if pending:
        header = header or next((row for _, row in parse_table(pending, None, source) if isinstance(row, list)), [])
        yield first, pending.count(b"\n"), pending, header, []


def _cut_json(source: Source) -> Iterator[Cut]:
    first, values, size = 1, [], 0
    error = None
    try:
        for value in cut_values(read_blocks(source, source.paths[0])):
            values.append(value)
            size += len(value)
            if size >= CHUNK_BYTES:
                yield first, len(values), values, None, []
                first, values, size = first + len(values), [], 0
    except (BrokenArchive, BrokenValues, OSError) as broken:
        error = broken
    if values:
        yield first, len(values), values, None, []
    if error:
        raise error


def _cut_parquet(source: Source) -> Iterator[Cut]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(source.paths[0], memory_map=False, pre_buffer=False) as file:
            about = file.metadata
            size = sum(about.row_group(group).total_byte_size for group in range(about.num_row_groups))
            rows = max(1, min(20_000, CHUNK_BYTES * about.num_rows // max(1, size)))
            first = 1
            for batch in file.iter_batches(batch_size=rows, use_threads=False):
                yield first, batch.num_rows, batch, None, []
                first += batch.num_rows
    except pyarrow.ArrowException as error:
        raise BrokenArchive(f"the parquet file is broken: {' '.join(str(error).split()):.120}") from error


def _cut_texts(source: Source, unit: str, lost: list[str]) -> Iterator[Chunk]:
    """The texts of many files together, or a piece of a long one; the reader of the chunk splits it into units."""
    number, data, size = 0, [], 0
    for path in source.paths:
        one = source if len(source.paths) == 1 else _sniffed_text(source, path)
        first = 1
        try:
            for piece, too_long in _whole_lines(read_blocks(one, path)):
                if too_long:
                    lost.append(f"{shown(path)}, line {first:,}: longer than {LONGEST >> 20} MB, left out")
                    first += 1
                    continue
                data.append((shown(path), first, piece))
                first += piece.count(b"\n")
                size += len(piece)
                if size >= CHUNK_BYTES:
                    yield Chunk(source, number, 1, (unit, data))
                    number, data, size = number + 1, [], 0
        except (BrokenArchive, OSError) as error:
            lost.append(f"{shown(path)}: nothing was read after line {first - 1:,}: {_reason(error)}")
    if data:
        yield Chunk(source, number, 1, (unit, data))


def _sniffed_text(source: Source, path: Path) -> Source:
    """The source of a single text in a folder, with its own compression and encoding."""
    one = sniff(path)
    return source._replace(paths=(path,), compression=one.compression, encoding=one.encoding)


class Row(NamedTuple):
    """A line as read: its place, and its object or the reason why there is none."""

    file: str
    line: int
    value: dict | Fault


def read_rows(chunk: Chunk) -> Iterator[Row]:
    """The rows of a chunk, each an object or a `Fault`; blank lines are skipped."""
    name = chunk.source.name
    for line, reason in chunk.faults:
        yield Row(name, line, Fault(reason))
    if chunk.source.format == "text":
        unit, data = chunk.data
        for file, first, piece in data:
            for line, text in cut_text(piece.decode("utf-8", errors="replace"), unit):
                yield Row(file, first + line, {"text": text})
    elif chunk.source.format == "csv":
        for line, row in parse_table(chunk.data, chunk.header, chunk.source):
            number = chunk.first + line
            if isinstance(row, str):
                yield Row(name, number, Fault(row))
            elif row and number > 1:
                yield Row(name, number, dict(zip(chunk.header, row, strict=True)))
    elif chunk.source.format == "parquet":
        for number, row in enumerate(chunk.data.to_pylist(), chunk.first):
            yield Row(name, number, row)
    else:
        lines = chunk.data.split(b"\n") if chunk.source.format == "jsonl" else chunk.data
        for number, line in enumerate(lines, chunk.first):
            if line and not line.isspace():
                yield Row(name, number, parse_object(line))


def parse_object(line: bytes) -> dict | Fault:
    """The JSON object of a line."""
    try:
        value = orjson.loads(line)
    except ValueError as error:
        try:
            # What orjson refuses and Python takes: half characters, NaN. A BOM in the middle comes from joined files.
            value = json.loads(line.removeprefix(b"\xef\xbb\xbf"))
        except UnicodeDecodeError:
            return Fault("not UTF-8")
        except (ValueError, RecursionError):
            return Fault(f"not valid JSON ({str(error).split(':')[0]})")
    return value if isinstance(value, dict) else Fault("not a JSON object")


def cut_text(text: str, unit: str) -> Iterator[tuple[int, str]]:
    """The units of a text, each with the number of line breaks before it."""
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    if unit == "line":
        for number, line in enumerate(text.split("\n")):
            if line.strip():
                yield number, line
        return
    if unit == "document" and len(text) <= DOCUMENT_CHARS:
        yield 0, text
        return
    limit = DOCUMENT_CHARS if unit == "document" else 1
    begin = place = lines = 0
    while place < len(text):
        found = PARAGRAPH.search(text, place)
        place = found.end() if found else len(text)
        # A paragraph that is itself longer is cut at a line break, or where it must be.
        while place - begin > 2 * limit and unit == "document":
            end = text.rfind("\n", begin, begin + limit) + 1 or begin + limit
            yield lines, text[begin:end]
            lines, begin = lines + text.count("\n", begin, end), end
        if place - begin >= limit or place == len(text):
            if text[begin:place].strip():
                yield lines, text[begin:place]
            lines, begin = lines + text.count("\n", begin, place), place
