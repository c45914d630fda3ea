"""Published files become rows of text; a malformed one is reported in one line with file and row."""

import re

import pytest

from dataset.jsonl import DataError
from scripts.evaluation import task_files
from scripts.evaluation.task_files import read_letters, read_own, read_splits, read_subjects
from tests.conftest import write_jsonl
from tests.scripts.evaluation.publisher_files import N, labelled, write_all
from trainer.errors import UserError

HEADER = ",Question,A,B,C,D,Answer\n"


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return write_all(tmp_path_factory.mktemp("files"))


def test_options_stay_the_text_they_are(files):
    row = read_subjects("cmmlu", files, ("dev", "test"), "test")["agronomy"]["test"][3]
    assert row == {"Question": "第 3 题？", "A": "1.0", "B": "NA", "C": "007", "D": "3, “甲”\n乙", "Answer": "D"}


def test_a_subject_has_its_splits_by_either_name(files):
    subjects = read_subjects("ceval", files, ("dev", "val"), "val")
    assert {name: {split: len(rows) for split, rows in splits.items()} for name, splits in subjects.items()} == {
        "accountant": {"dev": 5, "val": N},
        "logic": {"dev": 5, "val": N},
    }


def test_questions_whose_answers_are_kept_back_are_read(files):
    assert len(read_subjects("ceval", files, ("dev", "test"), "test")["logic"]["test"]) == N


@pytest.mark.parametrize("name", list(task_files.FILES))
def test_every_benchmark_is_found_in_its_folder(files, name):
    needed = "validation" if name in ("hellaswag", "piqa", "siqa") else "test"
    assert len(read_splits(name, files, needed)[needed]) == N


def test_a_folder_may_be_that_of_the_benchmark_itself(files):
    assert read_splits("piqa", files / "piqa", "validation") == read_splits("piqa", files, "validation")


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("", "row 0: the header lacks Question, A, B, C, D, Answer"),
        (",Question,A,B,C,Answer\n", "row 0: the header lacks D"),
        (HEADER, "contains no questions"),
        (HEADER + "0,Q,a,b,c,d,A\n1,Q,a,b,c,A\n", "row 2: 6 fields, and the header has 7"),
        (HEADER + "0,Q,a,b,c,d,A,more\n", "row 1: 8 fields, and the header has 7"),
        (HEADER + "0, ,a,b,c,d,A\n", "row 1: the question is empty"),
        (HEADER + "0,Q,a,b,c,d,E\n", "row 1: the answer is 'E', not A, B, C or D"),
        (HEADER + '0,Q,"a,b,c,d,E\n', "row 1: unexpected end of data"),
    ],
)
def test_a_malformed_table_is_named_with_its_row(tmp_path, content, told):
    path = tmp_path / "agronomy.csv"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(UserError, match=f"^{re.escape(str(path))}.*{re.escape(told)}"):
        read_letters(path, capitals=True)


def test_a_table_that_is_not_utf_8_is_named(tmp_path):
    path = tmp_path / "agronomy.csv"
    path.write_bytes((HEADER + "0,题,a,b,c,d,A\n").encode("gbk"))
    with pytest.raises(UserError, match="row 1: 'utf-8' codec"):
        read_letters(path, capitals=True)


OWN = {"question": "Q", "choices": ["x", "y"], "answer": 0}
SOCIAL = {"context": "C", "question": "Q", "answerA": "a", "answerB": "b", "answerC": "c"}


@pytest.mark.parametrize(
    ("read", "record", "told"),
    [
        (read_own, OWN | {"question": ""}, '"question" is empty'),
        (read_own, {"choices": ["x", "y"]}, 'the key "question" is missing'),
        (read_own, OWN | {"choices": ["x"]}, '"choices" is not a list of two options or more'),
        (read_own, OWN | {"choices": ["x", 1.0]}, '"choices" holds 1.0, which is not text'),
        (read_own, OWN | {"answer": 2}, '"answer" is 2, not 0 to 1 or A to B'),
        (read_own, OWN | {"answer": "C"}, "\"answer\" is 'C', not 0 to 1 or A to B"),
        (read_own, OWN | {"answer": True}, '"answer" is True'),
        (task_files.read_arc, labelled(0) | {"answerKey": "Z"}, "\"answerKey\" is 'Z', and the labels are A, B, C, D"),
        (task_files.read_arc, {"question": {"stem": "Q"}, "answerKey": "A"}, '"question.choices" is not a list'),
        (task_files.read_arc, {"question": "Q"}, 'the key "question.stem" is missing'),
        (task_files.read_hellaswag, {"endings": ["a", "b"], "label": 2}, "\"label\" is '2', and there are 2 endings"),
        (task_files.read_sciq, {"question": "Q"}, 'the key "distractor1" is missing'),
        (task_files.read_piqa, {"goal": "G", "sol1": "a"}, 'the key "sol2" is missing'),
        (task_files.read_siqa, SOCIAL | {"answerC": " "}, '"answerC" is empty'),
    ],
)
def test_a_malformed_line_is_named(tmp_path, read, record, told):
    path = write_jsonl(tmp_path / "x.jsonl", [record])
    with pytest.raises(DataError, match=f"^{re.escape(str(path))}, line 1: {re.escape(told)}"):
        read(path)


def test_a_malformed_entry_of_a_list_is_named(tmp_path):
    path = tmp_path / "test.json"
    path.write_text('[{"question": "Q"}]', encoding="utf-8")
    with pytest.raises(DataError, match='row 1: the key "distractor1" is missing'):
        task_files.read_sciq(path)
    path.write_text("[1", encoding="utf-8")
    with pytest.raises(DataError, match="is not valid JSON"):
        task_files.read_sciq(path)


@pytest.mark.parametrize(
    ("labels", "told"),
    [
        (None, "dev-labels.lst is missing"),
        ("1\n", "dev-labels.lst holds 1 labels, and dev.jsonl 2 questions"),
        ("1\n2\n3\n", "dev-labels.lst holds 3 labels, and dev.jsonl 2 questions"),
        ("1\n0\n", "dev-labels.lst, row 2: '0' is not one of 1, 2, 3"),
    ],
)
def test_labels_that_do_not_fit_are_named(tmp_path, labels, told):
    path = write_jsonl(tmp_path / "dev.jsonl", [SOCIAL, SOCIAL])
    if labels is not None:
        (tmp_path / "dev-labels.lst").write_text(labels, encoding="utf-8")
    with pytest.raises(UserError, match=re.escape(told)):
        task_files.read_siqa(path)


def test_what_is_missing_is_named(tmp_path):
    with pytest.raises(UserError, match=r"--data_dir .*nowhere is not a folder"):
        read_splits("piqa", tmp_path / "nowhere", "validation")
    with pytest.raises(UserError, match=r"piqa: no valid.jsonl or dev.jsonl in"):
        read_splits("piqa", tmp_path, "validation")
    with pytest.raises(UserError, match=r"cmmlu: no test/\*.csv in"):
        read_subjects("cmmlu", tmp_path, ("dev", "test"), "test")
    with pytest.raises(UserError, match=r"mine.jsonl is missing"):
        read_own(tmp_path / "mine.jsonl")
