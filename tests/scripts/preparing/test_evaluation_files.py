"""Evaluation files: the questions in each format, and one line for a file that cannot be read."""

import json

import pytest

from dataset.jsonl import DataError
from scripts.preparing.evaluation_files import read_questions
from trainer.errors import UserError


def written(folder, name, content):
    file = folder / name
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    return file


def asked(file):
    return [(line, question) for _, line, question in read_questions([file])]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("cmmlu.csv", '\ufeff,Question,A,B,C,D,Answer\n0,"Who, then?",a,b,c,d,A\n1,Why?,a,b,c,d,B\n'),
        ("ceval.csv", 'id,question,A,B,C,D\r\n0,"Who, then?",a,b,c,d\r\n1,Why?,a,b,c,d\r\n'),
        ("table.tsv", "question\tanswer\nWho, then?\tI\nWhy?\tno\n"),
        ("lines.txt", "Who, then?\nWhy?\n"),
        ("list.json", json.dumps([{"question": "Who, then?"}, {"question": "Why?"}])),
        ("lines.jsonl", '{"question": "Who, then?"}\n{"question": "Why?"}\n'),
    ],
)
def test_questions_with_their_lines(tmp_path, name, content):
    expected = [(1, "Who, then?"), (2, "Why?")]
    assert asked(written(tmp_path, name, content)) == expected


@pytest.mark.parametrize(
    ("record", "questions"),
    [
        ({"id": 1, "question": {"stem": "Who?", "choices": []}, "answerKey": "A"}, ["Who?"]),
        ({"question_stem": "Who?", "choices": {}}, ["Who?"]),
        ({"ctx": "A man sits", "ctx_a": "A man", "ctx_b": "sits", "endings": []}, ["A man sits"]),
        ({"goal": "Boil an egg", "sol1": "x", "sol2": "y"}, ["Boil an egg"]),
        ({"context": "Jo fell.", "question": "Why?"}, ["Jo fell.\nWhy?"]),
        ({"instruction": "Add", "input": "1 2", "output": "3"}, ["Add\n1 2"]),
        ({"text": "A held-out line"}, ["A held-out line"]),
        ({"conversations": [{"content": "Hi"}, {"content": "Yes?"}, {"content": "Why?"}]}, ["Hi", "Why?"]),
        ({"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Yes?"}]}, ["Hi"]),
        ({"messages": [{"role": "system", "content": "Be"}, {"role": "user", "content": "Hi"}]}, ["Hi"]),
        ({"chosen": [{"role": "user", "content": "Hi"}], "rejected": []}, ["Hi"]),
    ],
)
def test_what_is_asked_in_a_record(tmp_path, record, questions):
    file = written(tmp_path, "questions.jsonl", json.dumps(record) + "\n")
    assert [question for _, question in asked(file)] == questions


def test_all_files_of_a_folder(tmp_path):
    written(tmp_path, "cmmlu/test/b.csv", "question\nWhy?\n")
    written(tmp_path, "cmmlu/dev/a.csv", "question\nWho?\n")
    written(tmp_path, "cmmlu/README.md", "nothing")
    found = list(read_questions([tmp_path / "cmmlu"]))
    assert [(file.name, question) for file, _, question in found] == [("a.csv", "Who?"), ("b.csv", "Why?")]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", "number,answer\n1,2\n", "a.csv, row 0: the header has none of question"),
        ("a.csv", b"question\n\xff\n", "a.csv is not UTF-8"),
        ("a.json", "[1, 2", "a.json is not valid JSON"),
        ("a.json", '[{"question": "Who?"}, 3]', "a.json, row 2: not a JSON object"),
        ("a.json", '[{"number": "Who?"}]', r"a.json, row 1: no question under a known key.*\['number'\]"),
        ("a.jsonl", '{"question": "Who?"}\n{"number": 1}\n', "a.jsonl, line 2: no question under a known key"),
        ("a.docx", "x", "a.docx is not a file of questions"),
        ("none/a.md", "x", "none has no file of questions"),
    ],
)
def test_what_cannot_be_read_is_told_in_one_line(tmp_path, name, content, message):
    file = written(tmp_path, name, content)
    with pytest.raises((UserError, DataError), match=message) as told:
        list(read_questions([file if file.parent == tmp_path else file.parent]))
    assert "\n" not in str(told.value)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(UserError, match=r"gone.csv is missing"):
        list(read_questions([tmp_path / "gone.csv"]))
