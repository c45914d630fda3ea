"""Files of other formats are named as what they are, by training and by scripts/inspect_data.py alike."""

import bz2
import gzip
import json
import lzma
import struct
import zipfile

import pytest

from dataset.jsonl import DataError, JsonlReader
from dataset.records import parse_chat, parse_pair, parse_question, parse_text

CHAT = {"conversations": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]}
LINE = json.dumps(CHAT)
LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"


def zipped(path):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a.jsonl", LINE)


def parquet(path):
    path.write_bytes(b"PAR1" + struct.pack("<16I", *range(16)) + b"PAR1")


CONTAINERS = {
    "gzip-compressed: unpack it first (gunzip)": lambda path: path.write_bytes(gzip.compress(LINE.encode())),
    "xz-compressed: unpack it first (xz -d)": lambda path: path.write_bytes(lzma.compress(LINE.encode())),
    "bzip2-compressed: unpack it first (bunzip2)": lambda path: path.write_bytes(bz2.compress(LINE.encode())),
    "zstd-compressed: unpack it first (zstd -d)": lambda path: path.write_bytes(b"\x28\xb5\x2f\xfd\x04\x00"),
    "a zip archive (or an Excel file): unpack it first": zipped,
    "a parquet file: convert it to jsonl first": parquet,
    "an Arrow file: convert it to jsonl first": lambda path: path.write_bytes(b"ARROW1\x00\x00"),
    "UTF-16 text: save it as UTF-8": lambda path: path.write_text(LINE, encoding="utf-16"),
    "UTF-16 text: save it as UTF-8 ": lambda path: path.write_text(LINE, encoding="utf-16-be"),
    "UTF-16 text: save it as UTF-8 (": lambda path: path.write_text(LINE, encoding="utf-16-le"),
    "one JSON array: write one JSON object per line instead": lambda path: path.write_text(json.dumps([CHAT])),
    "one JSON array: write": lambda path: path.write_text(json.dumps([CHAT, CHAT], indent=2)),
    "one JSON array": lambda path: path.write_text(f"\ufeff[\r\n{LINE},\r\n{LINE}\r\n]", encoding="utf-8"),
    "a web page: download the file itself": lambda path: path.write_text("\n<!DOCTYPE html><html>"),
    "only a Git LFS pointer": lambda path: path.write_text(LFS),
}


@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize("shape", CONTAINERS)
def test_a_file_that_has_no_lines_is_told_whether_or_not_bad_lines_are_skipped(tmp_path, shape, skip):
    CONTAINERS[shape](path := tmp_path / "data.jsonl")
    with pytest.raises(DataError) as error:
        list(JsonlReader(path, parse_chat, skip))
    assert str(error.value).startswith(f"{path} is {shape}")
    assert "\n" not in str(error.value)


FIRST_LINES = [
    ("data.jsonl", json.dumps(CHAT, indent=2), "JSON spread over several lines; write one object per line"),
    ("data.csv", "Frage; Antwort\n1; 2", "a csv table; write each row as a JSON object"),
    ("data.jsonl", "question,right answer\n1,2", "a csv table; write each row as a JSON object"),
    ("data.jsonl", "question\tanswer\n1\t2", "a tsv table; write each row as a JSON object"),
    ("data.txt", "Once upon a time, there was\na king", "plain text; a line must be one JSON object"),
]


@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize(("name", "content", "shape"), FIRST_LINES)
def test_what_the_first_line_shows_of_a_file_is_told(tmp_path, name, content, shape, skip):
    (path := tmp_path / name).write_text(content)
    with pytest.raises(DataError) as error:
        list(JsonlReader(path, parse_text, skip))
    assert "line 1: not valid JSON (" in str(error.value)
    assert f"; the file seems to be {shape}" in str(error.value)
    assert ("has no valid line; " in str(error.value)) == skip


def test_a_first_line_that_is_bad_can_be_skipped(tmp_path):
    for bad in ("# a comment", "text,label", "{", '["text"]', '"text"'):
        (path := tmp_path / "data.jsonl").write_text(f'{bad}\n{{"text": "a"}}\n')
        reader = JsonlReader(path, parse_text, skip_bad_lines=True)
        assert list(reader) == ["a"]
        assert reader.bad_lines == 1


@pytest.mark.parametrize("bad", ['{"text": "a"', '{"text", "a"}', '["text",', '"text', ""])
def test_a_first_line_that_begins_as_json_is_not_called_something_else(tmp_path, bad):
    (path := tmp_path / "data.jsonl").write_text(f'{bad}\n{{"text": "a"}}\n')
    with pytest.raises(DataError, match="line 1: ") as error:
        list(JsonlReader(path, parse_text))
    assert "seems to be" not in str(error.value)


SHAREGPT = 'ShareGPT format: rename "from" to "role" (human: user, gpt: assistant) and "value" to "content"'
FOREIGN = [
    (parse_chat, {"messages": CHAT["conversations"]}, 'OpenAI format: rename "messages" to "conversations"'),
    (parse_chat, {"conversations": [{"from": "human", "value": "Hi"}]}, SHAREGPT),
    (parse_chat, {"messages": [{"from": "human", "value": "Hi"}]}, SHAREGPT),
    (parse_chat, {"instruction": "Add", "input": "2 2", "output": "4"}, "Alpaca format: make instruction and input a"),
    (parse_chat, {"conversation": CHAT["conversations"]}, 'rename "conversation" to "conversations"'),
    (parse_chat, {"prompt": "p", "completion": "c"}, "a prompt with its answer: make them a user and"),
    (parse_chat, {"prompt": "p", "response": "c"}, "a prompt with its answer: make them a user and"),
    (parse_chat, {"question": "p", "answer": "c"}, "a question with its answer: make them a user and"),
    (parse_chat, {"instruction": "p", "context": "", "response": "c"}, "an instruction with its answer: make them"),
    (parse_chat, {"input": "p", "output": "c"}, "an input with its answer: make them"),
    (parse_chat, {"prompt": "p", "completion": "c", "label": False}, "KTO format, which no stage"),
    (parse_chat, {"prompt": "p", "chosen": "c", "rejected": "r"}, "a preference pair, for train_dpo.py"),
    (parse_chat, {"text": "t"}, "plain text, for train_pretrain.py"),
    (parse_text, CHAT, "a chat, for train_full_sft.py"),
    (parse_text, {"instruction": "Add", "output": "4"}, "Alpaca format"),
    (parse_pair, CHAT, "a chat, for train_full_sft.py"),
    (parse_question, {"messages": CHAT["conversations"]}, "OpenAI format"),
    (parse_text, {"body": "t"}, None),
]


@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize(("parse", "record", "shape"), FOREIGN)
def test_a_line_of_another_shape_is_told_by_name(tmp_path, parse, record, shape, skip):
    (path := tmp_path / "data.jsonl").write_text(json.dumps(record) + "\n")
    with pytest.raises(DataError, match="line 1: ") as error:
        list(JsonlReader(path, parse, skip))
    assert ("(this is" in str(error.value)) == (shape not in (None, SHAREGPT) or "messages" in record)
    assert shape is None or shape in str(error.value)
