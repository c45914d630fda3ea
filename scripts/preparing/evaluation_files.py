"""The questions of evaluation files, in the formats of their publishers and of this project."""

import csv
from collections.abc import Iterator, Sequence
from pathlib import Path

from dataset.jsonl import BadRecord, read_objects
from trainer.errors import UserError

SUFFIXES = (".csv", ".tsv", ".json", ".jsonl", ".txt")
COLUMNS = ("question", "query", "prompt", "problem", "text")  # of a table, in any case; the first that is there
NAMES = (  # keys of a record's question, without options and answer; the first entry whose keys all exist
    ("context", "question"),
    ("question",),
    ("question_stem",),
    ("ctx",),
    ("ctx_a", "ctx_b"),
    ("goal",),
    ("instruction", "input"),
    ("instruction",),
    ("query",),
    ("problem",),
    ("prompt",),
    ("text",),
)
CHATS = ("conversations", "messages", "chosen", "prompt", "question")
ASKS = ("user", "human")

Question = tuple[Path, int, str]  # file, its line (of a table or a JSON list: its row, from 1), the question


def read_questions(paths: Sequence[Path]) -> Iterator[Question]:
    """All questions of some files, and of the csv, tsv, json, jsonl and txt files in some folders.

    A table has a column "question" (as in CMMLU and C-Eval), a record one of the keys of the benchmarks that
    eval_benchmarks.py reads, or of our own stages, where the user's turns are the questions. A text file has one per
    line.

    Raises:
        UserError, DataError: a file is missing or in another format; with file and line.
    """
    for path in paths:
        if not path.is_dir():
            yield from _of_file(path)
            continue
        files = sorted(file for file in path.rglob("*") if file.suffix.lower() in SUFFIXES)
        if not files:
            raise UserError(f"{path} has no file of questions ({', '.join(SUFFIXES)})")
        for file in files:
            yield from _of_file(file)


def _of_file(path: Path) -> Iterator[Question]:
    suffix = path.suffix.lower()
    if not path.is_file():
        raise UserError(f"{path} is missing")
    if suffix not in SUFFIXES:
        raise UserError(f"{path} is not a file of questions ({', '.join(SUFFIXES)})")
    try:
        if suffix in (".csv", ".tsv"):
            yield from _of_table(path, "\t" if suffix == ".tsv" else ",")
        elif suffix == ".txt":
            lines = path.read_text(encoding="utf-8-sig").splitlines()
            yield from ((path, number, line) for number, line in enumerate(lines, 1) if line.strip())
        else:
            yield from _of_records(path)
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 ({error.reason} at byte {error.start + 1})") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None


def _of_table(path: Path, separator: str) -> Iterator[Question]:
    with open(path, encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file, delimiter=separator)
        try:
            names = {name.strip().lower(): name for name in reversed(reader.fieldnames or ()) if name}
            column = next((names[name] for name in COLUMNS if name in names), None)
            if column is None:
                raise UserError(f"{path}, row 0: the header has none of {', '.join(COLUMNS)}")
            for number, row in enumerate(reader, 1):
                if row[column] is not None:
                    yield path, number, row[column]
        except csv.Error as error:
            raise UserError(f"{path}, line {reader.line_num}: {error}") from None


def _of_records(path: Path) -> Iterator[Question]:
    for number, questions in read_objects(path, _questions):
        yield from ((path, number, question) for question in questions)


def _questions(record: dict) -> list[str]:
    """The questions in a record.

    Raises:
        BadRecord: it has none under a known key.
    """
    for key in CHATS:
        turns = record.get(key)
        if isinstance(turns, list):
            return _asked(turns, key)
    if isinstance(record.get("question"), dict):
        record = {"question": record["question"].get("stem")}
    for keys in NAMES:
        if all(isinstance(record.get(key), str) for key in keys):
            return ["\n".join(record[key] for key in keys)]
    raise BadRecord(f'no question under a known key ("question", "conversations", "text"…), only {list(record)}')


def _asked(turns: list, key: str) -> list[str]:
    found = []
    for number, turn in enumerate(turns):
        if not isinstance(turn, dict):
            raise BadRecord(f'"{key}" is not a list of objects')
        role = turn.get("role", turn.get("from", "assistant" if number % 2 else "user"))
        content = turn.get("content", turn.get("value"))
        if role in ASKS and isinstance(content, str):
            found.append(content)
    return found
