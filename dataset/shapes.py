"""Recognising files and lines of other formats, and what to do about them."""

import json
import re
from pathlib import Path

MAGIC = (  # first bytes of binary files; a prefix of another one comes after it
    (b"\x1f\x8b", "gzip-compressed: unpack it first (gunzip)"),
    (b"\x28\xb5\x2f\xfd", "zstd-compressed: unpack it first (zstd -d)"),
    (b"\xfd7zXZ\x00", "xz-compressed: unpack it first (xz -d)"),
    (b"BZh", "bzip2-compressed: unpack it first (bunzip2)"),
    (b"PK\x03\x04", "a zip archive (or an Excel file): unpack it first, and convert it to one JSON object per line"),
    (b"PAR1", 'a parquet file: convert it to jsonl first (datasets.Dataset.from_parquet("…").to_json("….jsonl"))'),
    (b"ARROW1", 'an Arrow file: convert it to jsonl first (datasets.Dataset.from_file("…").to_json("….jsonl"))'),
    (
        b"\xff\xff\xff\xff",
        'an Arrow file: convert it to jsonl first (datasets.Dataset.from_file("…").to_json("….jsonl"))',
    ),
    (b"version https://git-lfs", "only a Git LFS pointer: fetch the file itself (git lfs pull)"),
    (b"\xff\xfe", "UTF-16 text: save it as UTF-8 (iconv -f UTF-16 -t UTF-8)"),
    (b"\xfe\xff", "UTF-16 text: save it as UTF-8 (iconv -f UTF-16 -t UTF-8)"),
    (b"{\x00", "UTF-16 text: save it as UTF-8 (iconv -f UTF-16LE -t UTF-8)"),
    (b"\x00{", "UTF-16 text: save it as UTF-8 (iconv -f UTF-16BE -t UTF-8)"),
)
HEAD_BYTES = 512  # of a file that are enough to tell
JSON_ARRAY = re.compile(rb"\[\s*(\{|$)")
UNPACK_ARRAY = "write one JSON object per line instead (jq -c '.[]')"
ASKED = ("instruction", "prompt", "question", "query", "input", "inputs")  # as other data sets name them
ANSWERED = ("completion", "response", "answer", "output", "targets")
READ_BY_PREPARING = ("compressed by", "a parquet file", "one JSON array", "UTF-16 text")
COLUMN = re.compile(r'"?\w[\w .-]{0,39}"?')


def foreign_file(head: bytes) -> str | None:
    """The format of a file without JSON lines, from its first bytes: "a parquet file: …"; None if it may have them."""
    for magic, shape in MAGIC:
        if head.startswith(magic):
            return shape
    text = head.removeprefix(b"\xef\xbb\xbf").lstrip()
    if JSON_ARRAY.match(text):
        return f"one JSON array: {UNPACK_ARRAY}"
    if text[:9].lower() == b"<!doctype" or text[:5].lower() == b"<html":
        return "a web page: download the file itself, not the page that shows it"
    return None


def foreign_first_line(path: Path, line: bytes) -> str | None:
    """The apparent format of a file whose first line is not a JSON object."""
    text = line.decode("utf-8", errors="replace").strip()
    if text == "{":
        return "JSON spread over several lines; write one object per line (jq -c .)"
    if text[:1] in ("{", "[", '"', ""):
        return None
    for name, separator in (("tsv", "\t"), ("csv", ",")):
        columns = text.split(separator)
        if path.suffix == f".{name}" or (len(columns) > 1 and all(map(COLUMN.fullmatch, columns))):
            return f"a {name} table; write each row as a JSON object on its own line"
    return 'plain text; a line must be one JSON object, {"text": "…"} for pretraining'


def foreign_turn(turn: dict) -> str | None:
    """The foreign format of a chat turn, and what to do, by its keys; None if it is not recognised."""
    if "content" not in turn and {"from", "value"} <= turn.keys():
        return 'ShareGPT format: rename "from" to "role" (human: user, gpt: assistant) and "value" to "content"'
    speaker = next((key for key in ("from", "speaker", "author") if key in turn), None)
    if speaker and "role" not in turn:  # by turns it might be somebody else's
        return f'the key for the speaker is "role", not "{speaker}"'
    return None


def recognise_shape(record: dict) -> str | None:
    """The format of a JSON object, one of ours or another, and what to do with it; None if it is not clear.

    Only for objects that a stage could not read: the message says which stage or keys they need.
    """
    turns = next((record[key] for key in ("conversations", "conversation", "messages") if key in record), None)
    first = turns[0] if isinstance(turns, list) and turns else None
    keys = record.keys()
    if isinstance(first, dict) and (shape := foreign_turn(first)):
        return shape
    if "messages" in keys:
        return 'OpenAI format: rename "messages" to "conversations"'
    if "conversation" in keys:
        return 'rename "conversation" to "conversations"'
    if {"instruction", "output"} <= keys:
        return 'Alpaca format: make instruction and input a user turn of "conversations", output an assistant turn'
    if {"prompt", "completion", "label"} <= keys:
        return 'KTO format, which no stage supports: use those with a true "label" as chats'
    if {"chosen", "rejected"} <= keys:
        return "a preference pair, for train_dpo.py"
    if "conversations" in keys:
        return "a chat, for train_full_sft.py"
    if "text" in keys:
        return "plain text, for train_pretrain.py"
    asked = next((key for key in ASKED if key in keys), None)
    if asked and any(key in keys for key in ANSWERED):
        name = f"an {asked}" if asked[0] == "i" else f"a {asked}"
        return f'{name} with its answer: make them a user and an assistant turn of "conversations"'
    return None


def prepare_command(path: Path, stage: str) -> str:
    """The command that converts a file of another format."""
    out = path.with_name(f"{path.name.split('.')[0]}_ours.jsonl")
    return f"python scripts/prepare_data.py {path} --stage {stage} --out {out}"


def file_advice(path: Path, shape: str) -> str:
    """The addition to `foreign_file`'s description: the command that converts the file to our format, if any."""
    if not shape.startswith(READ_BY_PREPARING):
        return ""
    return f"; or convert it with: {prepare_command(path, 'pretrain|sft|dpo|reason')}"


def line_advice(path: Path, line: bytes) -> str:
    """The same for a line that a stage could not read: the command for its format if it is not ours."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return ""
    stage = raw_stage(record) if isinstance(record, dict) else None
    return f"; convert such lines with: {prepare_command(path, stage)}" if stage else ""


def raw_stage(record: dict) -> str | None:
    """The stage that could train on a record of another format after conversion; None for our own formats."""
    asked = any(key in record for key in ASKED)
    if {"chosen", "rejected"} <= record.keys():
        return "dpo" if "prompt" not in record and asked else None
    turns = next((record[key] for key in ("conversations", "conversation", "messages") if key in record), None)
    if isinstance(turns, list) and turns and isinstance(turns[0], dict):
        ours = "conversations" in record and not foreign_turn(turns[0])
        return None if ours else "sft"
    return "sft" if asked and any(key in record for key in ANSWERED) else None
