"""Benchmarks by name: the harness's prompts from published files; a model that knows everything scores 100 %."""

from types import SimpleNamespace

import pytest

from scripts.evaluation.controls import position_bias, shuffle_stems
from scripts.evaluation.examination import ask, worded
from scripts.evaluation.results import compare, positions_of, results_of, right_answers, submission
from scripts.evaluation.tasks import BENCHMARKS, FETCHED_ONLY, Exam, open_exams
from tests.conftest import write_jsonl
from tests.scripts.evaluation.fakes import Fake, Guessing, Omniscient
from tests.scripts.evaluation.publisher_files import N, write_all
from trainer.errors import UserError

LOCAL = [name for name in BENCHMARKS if name not in FETCHED_ONLY]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return write_all(tmp_path_factory.mktemp("files"))


def asked_of(files, names, lm, shots=0, split=None, **how):
    exams = list(open_exams(names, files, shots, 0, split))
    return exams, ask(worded(exams, lm, **how), lm)


@pytest.mark.parametrize("name", [*LOCAL, "mine"])
def test_who_knows_everything_scores_100(files, name):
    exams, answers = asked_of(files, [str(files / "mine.jsonl") if name == "mine" else name], Omniscient())
    found = results_of(exams, answers)[name]
    subjects = 2 if name in ("cmmlu", "ceval") else 1
    assert (found["n"], found["acc"], found["stderr"]) == (N * subjects, 1.0, 0.0)
    assert found["p"] < 0.05
    options = {"arc_easy": [3, 4, 5, 3, 4, 5, 3, 4], "siqa": [3], "piqa": [2], "mine": [2]}.get(name, [4])
    assert found["chance"] == pytest.approx(sum(1 / k for k in options) / len(options))


FIRST = "第 0 题？\nA. 1.0\nB. NA\nC. 007\nD. 0, “甲”\n乙\n答案："
WORDED = {  # the first question of each, as in the harness's documentation
    "cmmlu": f"以下是关于农学的单项选择题，请直接给出正确答案的选项。\n\n{FIRST}",
    "ceval": f"以下是中国关于注册会计师的单项选择题，请选出其中的正确答案。\n\n{FIRST}",
    "openbookqa": "Stem 0",
    "arc_easy": "Question: Stem 0\nAnswer:",
    "arc_challenge": "Question: Stem 0\nAnswer:",
    "hellaswag": "Cooking: A pan 0. It",
    "piqa": "Question: Goal 0\nAnswer:",
    "siqa": "Q: Context 0. Why?\nA:",
    "sciq": "\nQuestion: Question 0?\nAnswer:",
}


@pytest.mark.parametrize("name", LOCAL)
def test_questions_are_worded_as_the_harness_has_it(files, name):
    _, answers = asked_of(files, [name], Omniscient())
    assert WORDED[name] in [answer.prompt for answer in answers]


def test_examples_come_from_dev_and_are_the_same_for_every_model(files):
    _, answers = asked_of(files, ["cmmlu"], Omniscient(), shots=2)
    assert answers[5].prompt.count("答案：") == 3
    assert "答案： A\n\n" in answers[5].prompt
    drawn = list(open_exams(["openbookqa"], files, 2, 0))
    first, second = ([answer.prompt for answer in ask(worded(drawn, lm), lm)] for lm in (Omniscient(), Guessing(0)))
    assert first == second
    assert len(set(first)) > 1


@pytest.mark.parametrize(
    ("names", "shots", "told"),
    [
        (["mmlu"], 0, "--tasks mmlu: choose from ceval, cmmlu"),
        (["lambada"], 0, "--tasks lambada: the harness downloads it"),
        (["cmmlu"], 9, "--num_fewshot 9: cmmlu/agronomy has 8 examples beside its questions"),
        (["piqa"], 1, "--num_fewshot 1: piqa has 0 examples"),
    ],
)
def test_what_cannot_be_asked_is_named(files, names, shots, told):
    with pytest.raises(UserError, match=told):
        list(open_exams(names, files, shots, 0))


def test_a_file_of_no_subject_is_named(tmp_path):
    write_all(tmp_path)
    (tmp_path / "cmmlu/test/agronomy.csv").rename(tmp_path / "cmmlu/test/alchemy.csv")
    with pytest.raises(UserError, match=r"cmmlu: the file alchemy.csv matches none of its subjects"):
        list(open_exams(["cmmlu"], tmp_path, 0, 0))


def test_groups_and_subjects_are_scored_apart_and_holm_is_over_subjects(files):
    exams, answers = asked_of(files, ["cmmlu"], Omniscient())
    found = results_of(exams, answers)
    assert list(found) == [
        *("cmmlu", "cmmlu/other", "cmmlu/social sciences", "cmmlu/China-specific"),
        *("cmmlu/agronomy", "cmmlu/ancient_chinese"),
    ]
    assert found["cmmlu/agronomy"]["p_holm"] == pytest.approx(2 * 0.25**N)
    assert "p_holm" not in found["cmmlu"]


def test_a_score_differs_from_chance_for_few_that_guess(files):
    """From files to p; the 1,000 simulations of test_statistics start from scores."""
    exams = list(open_exams(["cmmlu", "arc_easy"], files, 0, 0))
    asked = worded(exams, Omniscient())
    found = [
        results_of(exams, ask(asked, Guessing(seed)))[name]["p"]
        for seed in range(100)
        for name in ("cmmlu", "arc_easy")
    ]
    assert sum(p < 0.05 for p in found) <= 14


class LikesA(Fake):
    def likes(self, request) -> float:
        return float(request.idx == 0)


def test_a_liking_for_a_place_is_seen(files):
    exams, answers = asked_of(files, ["cmmlu"], LikesA())
    found = positions_of(exams, answers)["cmmlu"]
    assert {letter: share["chosen"] for letter, share in found.items()} == {"A": 1, "B": 0, "C": 0, "D": 0}
    assert {letter: share["right"] for letter, share in found.items()} == dict.fromkeys("ABCD", 0.25)
    assert position_bias([0, 1, 1], [0, 0, 1]) == {"A": (1 / 3, 2 / 3), "B": (2 / 3, 1 / 3)}


def test_shuffled_stems_are_all_others_and_options_stay(files):
    exams, plain = asked_of(files, ["cmmlu", "sciq", "siqa"], Omniscient())
    shuffled = ask(worded(exams, Omniscient(), shuffle=3), Omniscient())
    for one, other in zip(plain, shuffled, strict=True):
        assert one.options == other.options
        assert one.target == other.target
        if not one.exam.startswith("siqa"):
            assert one.prompt != other.prompt
    rows = [{"q": n, "o": n} for n in range(20)]
    found = shuffle_stems("x", rows, ("q",), 1)
    assert [row["o"] for row in found] == list(range(20))
    assert sorted(row["q"] for row in found) == list(range(20))
    assert all(row["q"] != row["o"] for row in found)
    with pytest.raises(UserError, match="winogrande has no stem apart from its options"):
        shuffle_stems("winogrande", rows, (), 1)
    with pytest.raises(UserError, match="x has a single question"):
        shuffle_stems("x", rows[:1], ("q",), 1)


@pytest.mark.parametrize("name", LOCAL)
def test_the_whole_of_a_question_is_shuffled(files, name):
    """The same questions in another order; options that are part of the prompt stay in place."""
    _, plain = asked_of(files, [name], Omniscient())
    _, shuffled = asked_of(files, [name], Omniscient(), shuffle=3)
    before, after = ([answer.prompt for answer in answers] for answers in (plain, shuffled))
    if name in ("cmmlu", "ceval"):
        before, after = ([prompt.split("\n")[2] for prompt in prompts] for prompts in (before, after))
    assert sorted(before) == sorted(after)
    assert all(own != other for own, other in zip(before, after, strict=True))


@pytest.mark.parametrize("name", FETCHED_ONLY)
def test_a_question_that_is_one_with_its_options_is_not_shuffled(name):
    exam = Exam(name, SimpleNamespace(doc_iterator=lambda **how: [(0, {"text": "a"}), (1, {"text": "b"})]), ())
    assert [row["text"] for row in exam.rows(None)] == ["a", "b"]
    assert BENCHMARKS[name].stem == exam.stem
    with pytest.raises(UserError, match=f"{name} has no stem"):
        exam.rows(None, 1)


def test_c_evals_test_split_is_answered_for_its_site(files):
    _, answers = asked_of(files, ["ceval"], LikesA(), split="test")
    letters = {str(number): "A" for number in range(N)}
    assert submission(answers) == {"accountant": letters, "logic": letters}


def test_two_models_are_compared_on_the_questions_they_share(files, tmp_path):
    _, knows = asked_of(files, ["cmmlu", "sciq"], Omniscient())
    _, likes = asked_of(files, ["cmmlu"], LikesA())
    first, second = ({"right": right_answers(answers)} for answers in (likes, knows))
    found = compare(first, second)
    assert list(found) == ["cmmlu"]
    assert (found["cmmlu"].n, found["cmmlu"].only_first, found["cmmlu"].only_second) == (2 * N, 0, 12)
    _, fewer = asked_of(files, ["cmmlu"], Omniscient(), limit=3)
    with pytest.raises(UserError, match="no test with the same questions in common"):
        compare(first, {"right": right_answers(fewer)})


def test_a_question_that_is_a_number_is_asked(tmp_path):
    write_jsonl(tmp_path / "n.jsonl", [{"question": "12", "choices": ["right 7", "1.0"], "answer": 0}] * 2)
    _, answers = asked_of(None, [str(tmp_path / "n.jsonl")], Omniscient())
    assert [answer.prompt for answer in answers] == ["12", "12"]
    assert all(answer.right for answer in answers)
