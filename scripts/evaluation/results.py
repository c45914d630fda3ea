"""From answers to results: scores of benchmarks, groups and subjects, and question-wise comparison of two models."""

import hashlib
import itertools
import json
from collections.abc import Iterable, Sequence
from pathlib import Path

from scripts.evaluation.controls import position_bias
from scripts.evaluation.examination import Answer
from scripts.evaluation.statistics import Paired, holm, mcnemar, score
from scripts.evaluation.tasks import Exam
from trainer.errors import UserError

Results = dict[str, dict]  # by "benchmark", "benchmark/group" or "benchmark/subject"


def results_of(exams: Sequence[Exam], answers: Iterable[Answer]) -> Results:
    """{name: {"n", "acc", "acc_norm", "stderr", "chance", "p"}}, see `Score`; subjects also have "p_holm", adjusted for
    all subjects of the benchmark."""
    by_exam: dict[str, list[Answer]] = {exam.name: [] for exam in exams}
    for answer in answers:
        by_exam[answer.exam].append(answer)
    results = {}
    for benchmark, its_exams in itertools.groupby(exams, key=lambda exam: exam.benchmark):
        its_exams = list(its_exams)
        results[benchmark] = _scored([answer for exam in its_exams for answer in by_exam[exam.name]])
        groups = dict.fromkeys(group for exam in its_exams for group in exam.groups)
        for group in groups:
            of_group = [answer for exam in its_exams if group in exam.groups for answer in by_exam[exam.name]]
            results[f"{benchmark}/{group}"] = _scored(of_group)
        subjects = {exam.name: _scored(by_exam[exam.name]) for exam in its_exams if exam.subject}
        adjusted = holm([found["p"] for found in subjects.values()])
        for (name, found), p in zip(subjects.items(), adjusted, strict=True):
            results[name] = found | {"p_holm": p}
    return results


def _scored(answers: list[Answer]) -> dict:
    normed = [answer.right_norm for answer in answers] if all(answer.options for answer in answers) else None
    return score([answer.right for answer in answers], normed, [len(answer.options) for answer in answers])._asdict()


def positions_of(exams: Sequence[Exam], answers: Sequence[Answer]) -> dict[str, dict]:
    """{benchmark: {letter: {"chosen", "right"}}}, for benchmarks with options."""
    found = {}
    for benchmark in dict.fromkeys(exam.benchmark for exam in exams):
        names = {exam.name for exam in exams if exam.benchmark == benchmark}
        these = [answer for answer in answers if answer.exam in names and answer.options]
        if these:
            shares = position_bias([answer.chosen for answer in these], [answer.target for answer in these])
            found[benchmark] = {letter: share._asdict() for letter, share in shares.items()}
    return found


def right_answers(answers: Iterable[Answer]) -> dict[str, dict]:
    """The input of `compare`: for each exam, which questions were answered correctly, "0110…", and their hash."""
    found = {}
    for name, these in itertools.groupby(answers, key=lambda answer: answer.exam):
        these = list(these)
        questions = hashlib.sha256("".join(answer.row for answer in these).encode()).hexdigest()[:16]
        found[name] = {"questions": questions, "right": "".join(str(int(answer.right)) for answer in these)}
    return found


def submission(answers: Iterable[Answer]) -> dict[str, dict[str, str]]:
    """{subject: {number: letter}}, the format of C-Eval's site."""
    found: dict[str, dict[str, str]] = {}
    for answer in answers:
        found.setdefault(answer.exam.partition("/")[2], {})[str(answer.number)] = "ABCD"[answer.chosen]
    return found


def read_results(path: Path) -> dict[str, dict]:
    """{model: its results in an --output file}.

    Raises:
        UserError: the file is missing, or of another kind.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        models = content.get("models") or {path.stem: content}
        if not all(model["right"].values() and model["results"] for model in models.values()):
            raise ValueError("it is empty")
    except (OSError, ValueError, LookupError, AttributeError, TypeError) as error:
        raise UserError(f"{path} is not a file written by --output ({error!r:.80})") from None
    return models


def compare(first: dict, second: dict) -> dict[str, Paired]:
    """McNemar's test of two models for each common benchmark, on the common questions.

    Raises:
        UserError: they have none in common.
    """
    pairs: dict[str, tuple[list[bool], list[bool]]] = {}
    for name, asked in first["right"].items():
        if second["right"].get(name, {}).get("questions") == asked["questions"]:
            both = pairs.setdefault(name.partition("/")[0], ([], []))
            for side, answered in zip(both, (asked, second["right"][name]), strict=True):
                side += [digit == "1" for digit in answered["right"]]
    if not pairs:
        raise UserError(
            "--compare: the two have no test with the same questions in common (--limit, --control, files?)"
        )
    return {name: mcnemar(*both) for name, both in pairs.items()}
