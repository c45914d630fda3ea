"""The inputs: files, folders and patterns, of any format and compression, as a list of sources."""

import bz2
import codecs
import contextlib
import csv
import glob
import gzip
import io
import lzma
import re
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

from trainer.errors import UserError, shown

TEXTS = (".txt", ".md", ".markdown", ".text")
TABLES = {".csv": ",", ".tsv": "\t"}
ENDINGS = (".json", ".jsonl", ".ndjson", ".parquet", *TEXTS, *TABLES)
PACKED = {b"\x1f\x8b": "gzip", b"\x28\xb5\x2f\xfd": "zstd", b"\xfd7zXZ\x00": "xz", b"BZh": "bzip2"}
PACKED_ENDINGS = (".gz", ".zst", ".xz", ".bz2")
HEAD_BYTES = 1 << 16
BLOCK_BYTES = 1 << 20
ARRAY = re.compile(r"\[\s*[\[{\"]")


class BrokenArchive(Exception):
    """A compressed file is damaged from here on; what was read before is intact."""


class Source(NamedTuple):
    """One file, or many small texts in one folder.

    Attributes:
        number: its number among all sources.
        name: its name in the report.
        paths: one file, or the texts of a folder.
        format: "jsonl", "json", "csv", "parquet" or "text".
        compression: "gzip", "zstd", "xz", "bzip2" or None.
        encoding: "utf-8", or another encoding of the text.
        delimiter: a table's delimiter.
        quoted: whether a table's cells may be quoted.
        group: the part of --mix that it belongs to.
    """

    number: int
    name: str
    paths: tuple[Path, ...]
    format: str
    compression: str | None = None
    encoding: str = "utf-8"
    delimiter: str = ","
    quoted: bool = True
    group: int = 0


def find_sources(given: list[str], group: int = 0, first: int = 0) -> list[Source]:
    """The sources in files, folders (with all subfolders) and patterns, each sorted by name.

    Raises:
        UserError: there is nothing, or nothing readable.
    """
    sources: list[Source] = []
    for name in given:
        files = _files(name)
        texts = [path for path in files if _ending(path) in TEXTS]
        together = len(texts) > 1
        for path in files:
            if not (together and _ending(path) in TEXTS):
                sources.append(sniff(path, group, first + len(sources)))
        if together:
            sources.append(Source(first + len(sources), shown(name), tuple(texts), "text", group=group))
    return sources


def _files(name: str) -> list[Path]:
    path = Path(name)
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.is_file() and _ending(file) in ENDINGS)
        if not files:
            raise UserError(
                f"{name} has no file to read (of {', '.join(ENDINGS)}, plain or {', '.join(PACKED_ENDINGS)})"
            )
        return files
    if path.exists():
        return [path]
    files = sorted(Path(found) for found in glob.glob(name, recursive=True))
    files = [file for file in files if file.is_file()]
    if not files:
        raise UserError(f"{name} does not exist" + (": no file has such a name" if glob.has_magic(name) else ""))
    return files


def _ending(path: Path) -> str:
    """ ".jsonl" of a.jsonl and of a.jsonl.gz."""
    name = path.name.lower()
    for packed in PACKED_ENDINGS:
        name = name.removesuffix(packed)
    return Path(name).suffix


def sniff(path: Path, group: int = 0, number: int = 0) -> Source:
    """The kind of a file, by its beginning first and by its name second."""
    source = Source(number, shown(path), (path,), "text", group=group)
    try:
        with open(path, "rb") as file:
            magic = file.read(8)
        compression = next((name for begin, name in PACKED.items() if magic.startswith(begin)), None)
        head = b""
        if not magic.startswith(b"PAR1"):
            with contextlib.suppress(BrokenArchive), unpacked(path, compression) as file:
                head = file.read(HEAD_BYTES)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from None
    if magic.startswith(b"PAR1"):
        return source._replace(format="parquet")
    encoding = guess_encoding(head)
    text = head.decode(encoding, errors="replace").removeprefix("\ufeff").lstrip("\x00 \t\r\n")
    ending = _ending(path)
    source = source._replace(compression=compression, encoding=encoding)
    if ending in TEXTS:
        return source
    if ending in TABLES or (ending not in ENDINGS and not text.startswith(("{", "["))):
        return _table(source, text, TABLES.get(ending)) if ending in TABLES else source
    if ARRAY.match(text):
        return source._replace(format="json")
    if text.startswith("{") and ending != ".jsonl" and not _is_lines(text):
        return source._replace(format="json")
    return source._replace(format="jsonl")


def _is_lines(text: str) -> bool:
    """Whether a line at the beginning is a JSON object; also true if there is only one line, which may be cut."""
    import orjson

    for line in text.split("\n")[:20]:
        with contextlib.suppress(ValueError):
            if isinstance(orjson.loads(line), dict):
                return True
    return "\n" not in text


def _table(source: Source, head: str, delimiter: str | None) -> Source:
    first = head.split("\n", 1)[0]
    if delimiter == ",":
        delimiter = max(",;\t|", key=first.count)
    quoted = delimiter != "\t" or bool(re.search(r'(?:^|\t)"[^\t]*"(?:\t|\r?$)', head, re.MULTILINE))
    return source._replace(format="csv", delimiter=delimiter, quoted=quoted)


def guess_encoding(head: bytes) -> str:
    """The encoding of a text by its beginning: UTF-8 unless it is clearly another."""
    if head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return "utf-16"
    if len(head) >= 4 and head[:400].count(0) > len(head[:400]) // 4:
        if not any(head[:400:2]):
            return "utf-16-be"
        if not any(head[1:400:2]):
            return "utf-16-le"
    lines = [line for line in head.split(b"\n")[:-1] or [head[:-3]] if not line.isascii()]
    broken = sum(not _is_utf8(line) for line in lines)
    if broken * 2 <= len(lines):
        return "utf-8"
    try:
        head[: head.rfind(b"\n") + 1 or None].decode("gb18030")
        return "gb18030"
    except UnicodeDecodeError:
        from charset_normalizer import from_bytes

        best = from_bytes(head).best()
        return best.encoding if best else "utf-8"


def _is_utf8(line: bytes) -> bool:
    try:
        line.decode()
    except UnicodeDecodeError:
        return False
    return True


@contextlib.contextmanager
def unpacked(path: Path, compression: str | None) -> Iterator[BinaryIO]:
    """The file, opened for reading and decompressed while it is read.

    Raises:
        BrokenArchive: reading an archive failed, inside the with block.
        OSError: the file is unreadable.
    """
    if compression is None:
        with open(path, "rb") as file:
            yield file
        return
    import pyarrow

    openers = {"gzip": gzip.open, "xz": lzma.open, "bzip2": bz2.open}
    opener = openers.get(compression) or (lambda path: pyarrow.input_stream(str(path), compression="zstd"))
    try:
        with opener(path) as file:
            yield file
    except (OSError, EOFError, zlib.error, lzma.LZMAError, pyarrow.ArrowException) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise BrokenArchive(f"the {compression} archive is broken: {reason:.120}") from error


def read_blocks(source: Source, path: Path) -> Iterator[bytes]:
    """A file's text as UTF-8, without a BOM, in blocks of about 1 MB.

    Raises:
        BrokenArchive: the archive ends or is damaged there.
        OSError: the file is unreadable.
    """
    decoder = None if source.encoding == "utf-8" else codecs.getincrementaldecoder(source.encoding)(errors="replace")
    first = True
    with unpacked(path, source.compression) as file:
        while block := file.read(BLOCK_BYTES):
            if decoder:
                block = decoder.decode(block).encode("utf-8", "replace")
            if first:
                block, first = block.removeprefix(codecs.BOM_UTF8).removeprefix("\ufeff".encode()), False
            yield bytes(block)
        if decoder and (rest := decoder.decode(b"", final=True)):
            yield rest.encode("utf-8", "replace")


def parse_table(data: bytes, header: list[str] | None, source: Source) -> Iterator[tuple[int, list[str] | str]]:
    """The rows of a piece of a table, or the fault of one, each with the number of lines before it."""
    csv.field_size_limit(1 << 30)
    text = io.StringIO(data.decode("utf-8", errors="replace").replace("\x00", "\ufffd"), newline="")
    quoting = csv.QUOTE_MINIMAL if source.quoted else csv.QUOTE_NONE
    rows = csv.reader(text, delimiter=source.delimiter, quoting=quoting)
    while True:
        line = rows.line_num
        try:
            row = next(rows)
        except StopIteration:
            return
        except csv.Error as error:
            yield line, f"not a row of a table ({error})"
            continue
        if header is None or len(row) == len(header) or not row:
            yield line, row
        else:
            yield line, f"{len(row)} cells in a table of {len(header)} columns"
