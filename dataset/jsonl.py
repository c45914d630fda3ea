"""Reading jsonl files: one line at a time, and every error reported with its file, line and reason."""

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import jsonlines

from dataset.shapes import HEAD_BYTES, file_advice, foreign_file, foreign_first_line, line_advice

DATA_SETS = "https://huggingface.co/datasets/jingyaogong/minimind_dataset"
EXCERPT_CHARS = 80
MOST_REPORTED = 20  # bad lines, or names of keys
MOST_COUNTED = 1000  # names of keys; in a file with more, the keys are data

Ignored = Counter[str]  # the number of lines with each key that has no meaning here


class DataError(ValueError):
    """A data file cannot be used; the message is one line that says which file, where in it, and why."""


class BadRecord(ValueError):
    """A JSON object is not valid data for the stage; the message is the reason."""


def unwrap_worker_errors(items: Iterable) -> Iterator:
    """Yield a DataLoader's items; a worker's DataError, which arrives wrapped in a traceback, is unwrapped.

    Raises:
        DataError: the unwrapped one.
    """
    try:
        yield from items
    except DataError as error:
        raise DataError(
            str(error).strip().splitlines()[-1].removeprefix(f"{DataError.__module__}.DataError: ")
        ) from None


def require_data_file(path: str | Path) -> Path:
    """Return `path` as a Path if it is a readable file that is not empty.

    Raises:
        DataError: it is missing, not a file, empty or not readable.
    """
    path = Path(path)
    if not path.exists():
        raise DataError(
            f"{path} does not exist: download it from {DATA_SETS}, or name another file with --data_path "
            "(`make demo` needs no download)"
        )
    if not path.is_file():
        raise DataError(f"{path} is not a file")
    try:
        with open(path, "rb") as file:
            if not file.read(1):
                raise DataError(f"{path} is empty")
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from error
    return path


class JsonlReader:
    """Iterates over a jsonl file, holding one line in memory at a time.

    Args:
        path: the file, UTF-8, one JSON object per line; a BOM, CRLF and blank lines at the end are accepted.
        parse: converts the object of a line into a record, and counts the keys that it does not use in the counter that
            it is given; raises BadRecord if it cannot.
        skip_bad_lines: count bad lines instead of stopping at the first.

    Attributes (they grow while iterating):
        bytes_read: the number of bytes of the lines read so far.
        sha256: of these bytes, a hashlib object.
        bad_lines: the number of skipped lines.
        bad_reports: "line 17: reason: first characters" of the first `MOST_REPORTED` of them.
        ignored: the number of good lines with each key that has no meaning here.

    Raises:
        DataError: the file is missing or empty, or, while iterating, is not jsonl, has a bad line, or has no good line.
    """

    def __init__(self, path: str | Path, parse: Callable[[dict, Ignored], Any], skip_bad_lines: bool = False):
        self.path = require_data_file(path)
        self.parse = parse
        self.skip_bad_lines = skip_bad_lines
        self.bytes_read = 0
        self.sha256 = hashlib.sha256()
        self.bad_lines = 0
        self.bad_reports: list[str] = []
        self.ignored: Ignored = Counter()
        self._line = b""

    def __iter__(self) -> Iterator[Any]:
        number = good = 0
        # Python's json is named because jsonlines otherwise takes orjson or ujson where it finds one, and what
        # counts as a bad line must not depend on that.
        with open(self.path, "rb") as file, jsonlines.Reader(self._lines(file), loads=_decoder.decode) as reader:
            while True:
                number += 1
                ignored: Ignored = Counter()
                try:
                    record = self.parse(reader.read(type=dict), ignored)
                except EOFError:
                    break
                except (jsonlines.InvalidLineError, RecursionError, BadRecord) as fault:
                    self._refuse(number, self._reason(fault, number))
                else:
                    good += 1
                    self._count(ignored)
                    yield record
        if not good:
            found = f"{self.bad_lines} bad, the first: {self.bad_reports[0]}" if self.bad_reports else "all are blank"
            raise DataError(f"{self.path} has no valid line; {found}{line_advice(self.path, self._line)}")

    def _count(self, ignored: Ignored) -> None:
        for key, count in ignored.items():
            name = excerpt(key.encode(errors="replace"), 40)
            self.ignored[name if name in self.ignored or len(self.ignored) < MOST_COUNTED else "others"] += count

    def _lines(self, file: BinaryIO) -> Iterator[bytes]:
        """The lines as bytes, so that jsonlines can say which one is not UTF-8; counted, and kept for excerpts."""
        blank = 0  # lines, which are at the end of the file if nothing follows them
        for line in self._read(file):
            self.bytes_read += len(line)
            self.sha256.update(line)
            line = line.strip()
            if not line:
                blank += 1
                continue
            self._line = b""
            for _ in range(blank):
                yield b""
            blank = 0
            self._line = line
            yield line

    def _read(self, file: BinaryIO) -> Iterator[bytes]:
        try:
            if shape := foreign_file(file.read(HEAD_BYTES)):
                raise DataError(f"{self.path} is {shape}{file_advice(self.path, shape)}")
            file.seek(0)
            yield from file
        except OSError as error:
            raise DataError(f"{self.path} cannot be read: {error.strerror}") from error

    def _refuse(self, number: int, reason: str) -> None:
        bad = f"line {number}: {reason}" + (f": {excerpt(self._line)}" if self._line else "")
        if not self.skip_bad_lines:
            raise DataError(f"{self.path}, {bad}{line_advice(self.path, self._line)}")
        self.bad_lines += 1
        if len(self.bad_reports) < MOST_REPORTED:
            self.bad_reports.append(bad)

    def _reason(self, fault: Exception, number: int) -> str:
        if isinstance(fault, BadRecord):
            return str(fault)
        seems = foreign_first_line(self.path, self._line) if number == 1 else None
        cause = fault if isinstance(fault, RecursionError) else fault.__cause__
        return _why_no_object(cause, self._line) + (f"; the file seems to be {seems}" if seems else "")


def read_objects(path: Path, parse: Callable[[dict], Any]) -> Iterator[tuple[int, Any]]:
    """The objects of a jsonl file, or of a file that is one JSON list, parsed, each with its number from 1.

    Args:
        parse: raises BadRecord for an object that it cannot use.

    Raises:
        DataError: the file is neither, or an object is bad; with its line or row.
    """
    with open(path, "rb") as file:
        is_list = file.read(64).removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"[")
    if not is_list:
        yield from enumerate(JsonlReader(path, lambda record, ignored: parse(record)), 1)
        return
    try:
        records = json.loads(path.read_text(encoding="utf-8-sig"))
    except ValueError as error:
        raise DataError(f"{path} is not valid JSON ({error})") from None
    for number, record in enumerate(records, 1):
        try:
            if not isinstance(record, dict):
                raise BadRecord("not a JSON object")
            yield number, parse(record)
        except BadRecord as error:
            raise DataError(f"{path}, row {number}: {error}") from None


def parse_object(line: bytes) -> dict[str, Any]:
    """The JSON object of a line, as `JsonlReader` reads it.

    Raises:
        BadRecord: the line is empty, not UTF-8, not JSON or not an object.
    """
    try:
        found = _decoder.decode(line.decode("utf-8"))
    except (ValueError, RecursionError) as cause:
        raise BadRecord(_why_no_object(cause, line)) from cause
    if not isinstance(found, dict):
        raise BadRecord(_why_no_object(None, line))
    return found


def _why_no_object(cause: BaseException | None, line: bytes) -> str:
    if isinstance(cause, RecursionError):
        return "not valid JSON (nested too deeply)"
    if not line:
        return "the line is empty"
    if isinstance(cause, BadRecord):
        return str(cause)
    if isinstance(cause, UnicodeDecodeError):
        return f"not UTF-8 ({cause.reason} at byte {cause.start + 1})"
    if isinstance(cause, json.JSONDecodeError):
        return f"not valid JSON ({cause.msg}, column {cause.pos + 1})"
    return f"not valid JSON ({cause})" if cause else "not a JSON object"


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object, refused if a key appears twice: json.loads would silently keep only the last value."""
    found = dict(pairs)
    if len(found) < len(pairs):
        twice, _ = Counter(key for key, _ in pairs).most_common(1)[0]
        raise BadRecord(f'the key "{twice:.40}" appears twice in one object')
    return found


_decoder = json.JSONDecoder(object_pairs_hook=_object)  # json.loads would make one for every line


def named_counts(ignored: Mapping[str, int]) -> str:
    """The counted keys, the most frequent first: "id 60, source 60"; at most `MOST_REPORTED`."""
    names = sorted(ignored, key=lambda name: (-ignored[name], name))
    shown = [f"{name} {ignored[name]:,}" for name in names[:MOST_REPORTED]]
    if len(names) > MOST_REPORTED:
        shown.append(f"and {len(names) - MOST_REPORTED:,} more")
    return ", ".join(shown)


def excerpt(line: bytes, width: int = EXCERPT_CHARS) -> str:
    """The first `width` characters of a line, safe to print: unprintable characters are escaped or replaced."""
    text = line[: 8 * width].decode("utf-8", errors="replace").rstrip("\r\n")
    shown = "".join(char if char.isprintable() else ascii(char)[1:-1] for char in text[:width])
    return shown + ("…" if len(text) > width else "")
