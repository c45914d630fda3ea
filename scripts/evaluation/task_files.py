"""The published files of each benchmark, as rows with the field names that the harness's prompts use.

Everything is read as text: an option "1.0", "NA" or "007" stays what it is.
"""

import csv
from collections.abc import Callable, Iterable
from pathlib import Path

from dataset.jsonl import BadRecord, read_objects
from trainer.errors import UserError

Row = dict[str, object]
Splits = dict[str, list[Row]]  # "train", "validation", "dev" or "test": rows

LETTERS = "ABCD"
FILES = {  # of each benchmark: by the harness's name of a split, what the publishers call it
    "openbookqa": {
        "train": ("train.jsonl", "train_complete.jsonl"),
        "validation": ("dev.jsonl", "dev_complete.jsonl"),
        "test": ("test.jsonl", "test_complete.jsonl"),
    },
    "arc_easy": {
        "train": ("ARC-Easy-Train.jsonl",),
        "validation": ("ARC-Easy-Dev.jsonl",),
        "test": ("ARC-Easy-Test.jsonl",),
    },
    "arc_challenge": {
        "train": ("ARC-Challenge-Train.jsonl",),
        "validation": ("ARC-Challenge-Dev.jsonl",),
        "test": ("ARC-Challenge-Test.jsonl",),
    },
    "hellaswag": {
        "train": ("hellaswag_train.jsonl", "hellaswag_train.json"),
        "validation": ("hellaswag_val.jsonl", "hellaswag_val.json"),
    },
    "piqa": {"train": ("train.jsonl",), "validation": ("valid.jsonl", "dev.jsonl")},
    "siqa": {"train": ("train.jsonl",), "validation": ("dev.jsonl",)},
    "sciq": {
        "train": ("train.json", "train.jsonl"),
        "validation": ("valid.json", "valid.jsonl"),
        "test": ("test.json", "test.jsonl"),
    },
}


# --------------------------------------------------------------------------------------------- a folder of a benchmark


def folder_of(benchmark: str, data_dir: Path) -> Path:
    """`data_dir`/NAME, or `data_dir` itself if there is no such folder.

    Raises:
        UserError: `data_dir` is not a folder.
    """
    if not data_dir.is_dir():
        raise UserError(f"--data_dir {data_dir} is not a folder")
    return data_dir / benchmark if (data_dir / benchmark).is_dir() else data_dir


def read_splits(benchmark: str, data_dir: Path, needed: str) -> Splits:
    """The files of a benchmark without subjects; missing ones are left out.

    Args:
        needed: the split that is scored.

    Raises:
        UserError: that split is missing, or a file is malformed; with file and row.
    """
    folder = folder_of(benchmark, data_dir)
    splits = {}
    for split, names in FILES[benchmark].items():
        found = next((path for name in names for path in sorted(folder.rglob(name))), None)
        if found is not None:
            splits[split] = READERS[benchmark](found)
        elif split == needed:
            raise UserError(f"{benchmark}: no {' or '.join(names)} in {folder} (--data_dir)")
    return splits


def read_subjects(benchmark: str, data_dir: Path, splits: tuple[str, ...], needed: str) -> dict[str, Splits]:
    """The subjects of CMMLU or C-Eval: DIR/{dev,val,test}/SUBJECT.csv, or SUBJECT_SPLIT.csv as published by C-Eval.

    Args:
        needed: the split that is scored; its files are the subjects.

    Raises:
        UserError: as in `read_splits`.
    """
    folder = folder_of(benchmark, data_dir)
    files = sorted((folder / needed).glob("*.csv"))
    if not files:
        raise UserError(f"{benchmark}: no {needed}/*.csv in {folder} (--data_dir)")
    subjects = {}
    for file in files:
        subject = file.stem.removesuffix(f"_{needed}")
        subjects[subject] = {}
        for split in splits:
            names = (f"{subject}.csv", f"{subject}_{split}.csv")
            path = next((folder / split / name for name in names if (folder / split / name).is_file()), None)
            if path is not None:
                answered = not (benchmark == "ceval" and split == "test")
                subjects[subject][split] = read_letters(path, benchmark == "cmmlu", answered)
    return subjects


# ------------------------------------------------------------------------------------------------------------- formats


def read_letters(path: Path, capitals: bool, answered: bool = True) -> list[Row]:
    """A CSV of questions with options A to D: `,Question,A,B,C,D,Answer`, or `id,question,A,B,C,D,answer[,…]`.

    Args:
        capitals: whether it is the first of these formats.
        answered: False if the answers are not published; they are then "A", because the harness needs one.

    Raises:
        UserError: the file is malformed; with file and row.
    """
    question, answer = ("Question", "Answer") if capitals else ("question", "answer")
    names = [question, *LETTERS, *([answer] if answered else [])]
    rows = []
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file, strict=True)
            if lacking := [name for name in names if name not in (reader.fieldnames or ())]:
                raise UserError(f"{path}, row 0: the header lacks {', '.join(lacking)}")
            for number, found in enumerate(reader, 1):
                if None in found or None in found.values():
                    fields = sum(value is not None for value in found.values()) + len(found.get(None, [0])) - 1
                    raise UserError(
                        f"{path}, row {number}: {fields} fields, and the header has {len(reader.fieldnames)}"
                    )
                row = {name: found[name] for name in names} | ({} if answered else {answer: "A"})
                row[answer] = row[answer].strip()
                if not row[question].strip():
                    raise UserError(f"{path}, row {number}: the question is empty")
                if row[answer] not in tuple(LETTERS):
                    raise UserError(f"{path}, row {number}: the answer is {row[answer]!r:.40}, not A, B, C or D")
                rows.append(row)
    except (csv.Error, UnicodeDecodeError) as error:
        raise UserError(f"{path}, row {len(rows) + 1}: {error}") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    if not rows:
        raise UserError(f"{path} contains no questions")
    return rows


def _objects(path: Path, parse: Callable[[dict], Row]) -> list[Row]:
    """The rows of a file of JSON lines, or of one JSON list of objects.

    Raises:
        UserError: the file is missing, or has no rows.
        DataError: see `read_objects`.
    """
    if not path.is_file():
        raise UserError(f"{path} is missing")
    rows = [row for _, row in read_objects(path, parse)]
    if not rows:
        raise UserError(f"{path} contains no questions")
    return rows


def _text(record: dict, *keys: str, empty: bool = False) -> str:
    """The text under a key, or under a path of keys.

    Raises:
        BadRecord: it is missing, not text, or empty although `empty` is false.
    """
    name = ".".join(keys)
    for key in keys:
        if not isinstance(record, dict) or key not in record:
            raise BadRecord(f'the key "{name}" is missing')
        record = record[key]
    if not isinstance(record, str):
        raise BadRecord(f'"{name}" is not text')
    if not empty and not record.strip():
        raise BadRecord(f'"{name}" is empty')
    return record


def _texts(options: object, name: str) -> list[str]:
    if not isinstance(options, list) or len(options) < 2:
        raise BadRecord(f'"{name}" is not a list of two options or more')
    for option in options:
        if not isinstance(option, str) or not option.strip():
            raise BadRecord(f'"{name}" holds {option!r:.40}, which is not text')
    return options


def _labelled(record: dict, question: str) -> Row:
    """A line of OpenBookQA or ARC (AI2's format); `fact1` is not part of the harness's prompt."""
    stem, choices = _text(record, "question", "stem"), record["question"].get("choices")
    if not isinstance(choices, list) or not all(isinstance(choice, dict) for choice in choices):
        raise BadRecord('"question.choices" is not a list of objects')
    texts = _texts([choice.get("text") for choice in choices], "question.choices[].text")
    labels = [_text(choice, "label") for choice in choices]
    key = _text(record, "answerKey").strip()
    if key not in labels:
        raise BadRecord(f'"answerKey" is {key!r:.40}, and the labels are {", ".join(labels)}')
    return {question: stem, "choices": {"text": texts, "label": labels}, "answerKey": key}


def read_openbookqa(path: Path) -> list[Row]:
    return _objects(path, lambda record: _labelled(record, "question_stem"))


def read_arc(path: Path) -> list[Row]:
    return _objects(path, lambda record: _labelled(record, "question"))


def read_hellaswag(path: Path) -> list[Row]:
    def parse(record: dict) -> Row:
        endings, label = _texts(record.get("endings"), "endings"), str(record.get("label"))
        if label not in map(str, range(len(endings))):
            raise BadRecord(f'"label" is {label!r:.40}, and there are {len(endings)} endings')
        texts = {name: _text(record, name, empty=True) for name in ("activity_label", "ctx_a", "ctx_b")}
        return texts | {"endings": endings, "label": label}

    return _objects(path, parse)


def read_sciq(path: Path) -> list[Row]:
    names = ("question", "distractor1", "distractor2", "distractor3", "correct_answer")

    def parse(record: dict) -> Row:
        support = _text(record, "support", empty=True) if "support" in record else ""
        return {name: _text(record, name) for name in names} | {"support": support}

    return _objects(path, parse)


def read_piqa(path: Path) -> list[Row]:
    rows = _objects(path, lambda record: {name: _text(record, name) for name in ("goal", "sol1", "sol2")})
    return [row | {"label": int(label)} for row, label in _labelled_rows(path, rows, ("0", "1"))]


def read_siqa(path: Path) -> list[Row]:
    names = ("context", "question", "answerA", "answerB", "answerC")
    rows = _objects(path, lambda record: {name: _text(record, name) for name in names})
    return [row | {"label": label} for row, label in _labelled_rows(path, rows, ("1", "2", "3"))]


def _labelled_rows(path: Path, rows: list[Row], labels: tuple[str, ...]) -> Iterable[tuple[Row, str]]:
    """The rows with their labels, which are in NAME-labels.lst beside NAME.jsonl.

    Raises:
        UserError: that file is missing, has another number of labels, or holds something else.
    """
    beside = path.with_name(f"{path.stem}-labels.lst")
    if not beside.is_file():
        raise UserError(f"{beside} is missing, which holds the answers to {path.name}")
    try:
        found = beside.read_text(encoding="utf-8-sig").split()
    except UnicodeDecodeError as error:
        raise UserError(f"{beside} is not UTF-8 ({error.reason} at byte {error.start})") from None
    for number, label in enumerate(found, 1):
        if label not in labels:
            raise UserError(f"{beside}, row {number}: {label!r:.40} is not one of {', '.join(labels)}")
    if len(found) != len(rows):
        raise UserError(f"{beside} holds {len(found)} labels, and {path.name} {len(rows)} questions")
    return zip(rows, found, strict=True)


def read_own(path: Path) -> list[Row]:
    """A user's own questions: lines `{"question", "choices": […], "answer": index or letter}`."""

    def parse(record: dict) -> Row:
        question, choices = _text(record, "question"), _texts(record.get("choices"), "choices")
        answer = record.get("answer")
        if isinstance(answer, str) and len(answer.strip()) == 1:
            answer = ord(answer.strip().upper()) - ord("A")
        if not isinstance(answer, int) or isinstance(answer, bool) or not 0 <= answer < len(choices):
            last = chr(ord("A") + len(choices) - 1)
            raise BadRecord(f'"answer" is {record.get("answer")!r:.40}, not 0 to {len(choices) - 1} or A to {last}')
        return {"question": question, "choices": choices, "answer": answer}

    return _objects(path, parse)


READERS = {
    "openbookqa": read_openbookqa,
    "arc_easy": read_arc,
    "arc_challenge": read_arc,
    "hellaswag": read_hellaswag,
    "piqa": read_piqa,
    "siqa": read_siqa,
    "sciq": read_sciq,
}
