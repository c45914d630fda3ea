"""Contamination: a question is found by 13 consecutive units, or whole if it has 6 to 12, as a slow search does."""

import pickle
import random
import re

import pytest

from scripts.preparing import contamination
from scripts.preparing.contamination import Evaluation

WORDS = [f"{first}{second}" for first in "b d f g k l m n p r s t".split() for second in "a e i o u ai ou".split()]
HAN = [chr(0x4E00 + number) for number in range(500)]


def evaluation(folder, *questions):
    file = folder / "questions.txt"
    file.write_text("\n".join(questions) + "\n", encoding="utf-8")
    return Evaluation([file])


def found(folder, question, line):
    return evaluation(folder, question).find([line])[0] is not None


def by_hand(question: str, line: str) -> bool:
    """The oracle: units by a regular expression, and every run of them compared."""
    asked, there = (re.findall("[\u4e00-\u9fff]|[a-z0-9]+", text.lower()) for text in (question, line))
    size = min(len(asked), 13)
    runs = {tuple(there[start : start + size]) for start in range(len(there) - size + 1)}
    return size >= 6 and any(tuple(asked[start : start + size]) in runs for start in range(len(asked) - size + 1))


def test_what_is_found_is_what_a_count_by_hand_finds(tmp_path, monkeypatch):
    monkeypatch.setattr(contamination, "BLOCK", 400)
    chance = random.Random(0)

    def drawn(count):
        return " ".join(chance.choice(chance.choice([WORDS, HAN])) for _ in range(count))

    questions = [drawn(chance.randrange(3, 30)) for _ in range(60)]
    lines = []
    for question in questions * 3:
        units = question.split()
        first = chance.randrange(len(units))
        some = units[first : first + chance.choice([5, 6, 12, 13, 14, 30])]
        lines.append(" ".join([drawn(chance.randrange(20)), *some, drawn(chance.randrange(20))]))
    lines += questions
    expected = [any(by_hand(question, line) for question in questions) for line in lines]
    assert [match is not None for match in evaluation(tmp_path, *questions).find(lines)] == expected
    assert 20 < sum(expected) < len(lines) - 20


@pytest.mark.parametrize(
    ("question", "line"),
    [
        ("What is the capital of France?", "they asked WHAT IS  THE\ncapital, of “France”: nobody knew"),
        ("女性生殖腺是哪一个", "请回答：女性生殖腺，是 哪一个？谢谢"),
        ("Ｗｈａｔ is the café of Zoë", "what is the cafe of zoe"),
        ("Ｗｈａｔ is the cafe\u0301 of Zoe", "so: what is the café of zoe!"),
        ("用GPT3写5句话", "用 gpt3 写 5 句话"),
        ("大きなカメラです", "これは大きなｶﾒﾗです"),
    ],
)
def test_case_width_accents_and_punctuation_do_not_matter(tmp_path, question, line):
    assert found(tmp_path, question, line)


@pytest.mark.parametrize(
    ("question", "line"),
    [
        ("What is the capital of France?", "Somewhat is the capital of France"),
        ("What is the capital?", "What is the capital?"),  # 4 units
        ("one two three four five six seven", "one two three four five six and seven"),
    ],
)
def test_what_is_not_the_same_is_not_found(tmp_path, question, line):
    assert not found(tmp_path, question, line)


def test_a_match_names_the_question_and_shows_what_is_shared(tmp_path):
    questions = evaluation(tmp_path, "Too short.", "What is the capital of France?", "")
    assert (questions.questions, questions.too_short) == (2, 1)
    clean, match = questions.find(["nothing", "He said: what is the capital,  of FRANCE?!"])
    assert clean is None
    assert match == (tmp_path / "questions.txt", 2, "what is the capital,  of FRANCE")


def test_units_of_two_lines_are_not_taken_together(tmp_path):
    assert evaluation(tmp_path, "one two three four five six").find(["one two three", "four five six"]) == [None, None]


def test_a_question_is_found_wherever_it_stands_in_a_long_line(tmp_path, monkeypatch):
    monkeypatch.setattr(contamination, "PIECE", 1000)
    monkeypatch.setattr(contamination, "OVERLAP", 100)
    questions = evaluation(tmp_path, "what is the capital of France")
    for before in range(880, 1120):
        assert questions.find(["好" * before + " what is the capital of France " + "好" * 500])[0]


def test_worker_processes_get_it_whole(tmp_path):
    copy = pickle.loads(pickle.dumps(evaluation(tmp_path, "what is the capital of France")))
    assert copy.find(["what is the capital of france"])[0].line == 1


def test_no_lines_and_no_questions(tmp_path):
    assert evaluation(tmp_path, "what is the capital of France").find([]) == []
    assert evaluation(tmp_path, "short").find(["", "short"]) == [None, None]
