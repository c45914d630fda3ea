"""The contents and wording of a report; `rendering` determines its appearance."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from scripts.evaluation.perplexity import Predicted
from scripts.evaluation.statistics import ALPHA
from scripts.report_card.examining import DEMO_EXAMS
from scripts.report_card.stages_found import Found

NOTHING = "–"


class Cell(NamedTuple):
    """A field of a table.

    share: 0 to 1, drawn as a bar behind the text. chance: likewise, drawn as a tick on it.
    """

    text: str
    share: float | None = None
    chance: float | None = None


@dataclass(frozen=True)
class Section:
    """A heading, an introduction, and one of a table, answers, a picture or points.

    Attributes:
        rows: the first field of each is a model's name.
        answers: (question, [(model, answer)]).
        picture: whether it is the picture of the losses.
        points: (subject, remark).
    """

    title: str
    note: str = ""
    columns: tuple[str, ...] = ()
    rows: list[list[Cell]] = field(default_factory=list)
    answers: list[tuple[str, list[tuple[str, str]]]] = field(default_factory=list)
    picture: bool = False
    points: list[tuple[str, str]] = field(default_factory=list)


def sections(
    stages: list[Found], results: Mapping[str, dict], problems: Mapping[str, str], held_out: str | None, drawn: bool
) -> Iterator[Section]:
    """The sections of the report.

    Args:
        results: {model: {part: result}}, see `examine`; models that were not evaluated are missing.
        problems: {model: the reason why it was not evaluated}.
        held_out: the name of the text that all models predict.
        drawn: whether there is a picture of the losses.
    """
    yield training(stages, results)
    if drawn:
        yield Section("Losses", "Lines: in training. Points: held out.", picture=True)
    if predicted := {name: found["held out"] for name, found in results.items() if "held out" in found}:
        yield predicted_text(predicted, held_out)
    if any(part.startswith("exam ") for found in results.values() for part in found):
        yield exams(results)
    names = dict.fromkeys(part for found in results.values() for part in found if part.startswith("benchmark "))
    for part in names:
        yield benchmark(part.removeprefix("benchmark "), {n: f[part] for n, f in results.items() if part in f})
    if said := {name: found["answers"] for name, found in results.items() if "answers" in found}:
        yield Section("Answers", "Greedy; a pretrained model continues the text.", answers=side_by_side(said))
    if problems:
        yield Section("Not evaluated", points=[*problems.items()])


# -------------------------------------------------------------------------------------------------------- sections


def training(stages: Iterable[Found], results: Mapping[str, dict]) -> Section:
    """Each model's description and training cost, from the json beside it."""
    rows = []
    for found in stages:
        about = found.about
        metrics = about.get("metrics") if isinstance(about.get("metrics"), dict) else {}
        parameters = results.get(found.name, {}).get("parameters", {})
        rows.append(
            [
                Cell(found.name),
                Cell(_large(parameters.get("parameters"))),
                Cell(_large(about.get("step"))),
                Cell(_large(about.get("tokens"))),
                Cell(_time(about.get("seconds"))),
                Cell(_decimal(metrics.get("loss"))),
                Cell(_decimal(metrics.get("eval_loss"))),
                Cell(_data(about)),
            ]
        )
    columns = ("", "parameters", "steps", "tokens", "time", "loss", "held out", "trained on")
    note = "For an adapter, its own parameters. Each stage has its own loss and data, so losses cannot be compared."
    return Section("Training", note, columns, rows)


def predicted_text(found: Mapping[str, dict], title: str | None) -> Section:
    """Bits per byte of one text for all models."""
    predicted = {name: Predicted(**{key: numbers[key] for key in Predicted._fields}) for name, numbers in found.items()}
    worst = max(of.bits_per_byte for of in predicted.values())
    rows = [
        [
            Cell(name),
            Cell(f"{of.bits_per_byte:.3f}", of.bits_per_byte / max(worst, 1e-9)),
            Cell(f"{of.nats_per_token:.3f}"),
        ]
        for name, of in predicted.items()
    ]
    one = next(iter(predicted.values()))
    note = f"{title}: {one.texts:,} texts, {one.bytes:,} bytes. Comparable across tokenizers."
    return Section("Bits per byte", note, ("", "bits per byte", "nats per token"), rows)


def exams(results: Mapping[str, dict]) -> Section:
    """The demo's exams, with a column for each exam and language."""
    columns: dict[tuple[str, str], int] = {}  # how many were asked
    for part in (f"exam {name}" for name in DEMO_EXAMS):
        for found in results.values():
            for lang, (_, asked) in found.get(part, {}).items():
                columns[part, lang] = asked
    rows = []
    for name, found in results.items():
        if any(part in found for part, _ in columns):
            counts = [found.get(part, {}).get(lang) for part, lang in columns]
            rows.append([Cell(name), *(_share(*count) if count else Cell(NOTHING) for count in counts)])
    titles = (f"{DEMO_EXAMS[part.removeprefix('exam ')].title}, {lang} ({n:,})" for (part, lang), n in columns.items())
    note = "Held-out questions of the demo, greedy, right if equal to an accepted answer; number asked in brackets."
    return Section("The demo's tests", note, ("", *titles), rows)


def benchmark(name: str, found: Mapping[str, dict]) -> Section:
    """One benchmark, over all its subjects."""
    rows = []
    for model, scores in found.items():
        of = scores[name]
        p = of["p"]
        rows.append(
            [
                Cell(model),
                Cell(f"{of['acc']:.1%} ± {of['stderr']:.1%}", of["acc"], of["chance"]),
                Cell(NOTHING) if of["acc_norm"] is None else Cell(f"{of['acc_norm']:.1%}"),
                Cell(NOTHING if p is None else f"{p:.2g}{' *' if p < ALPHA else ''}"),
            ]
        )
    one = next(iter(found.values()))[name]
    chance = "" if one["chance"] is None else f" Chance level: {one['chance']:.1%}."
    note = f"{one['n']:,} questions.{chance} p: of chance alone (exact, two-sided); * below {ALPHA}."
    return Section(name, note, ("", "accuracy", "length-normalised", "p"), rows)


def side_by_side(said: Mapping[str, dict[str, str]]) -> list[tuple[str, list[tuple[str, str]]]]:
    """Each question with every model's answer; questions asked of most models first."""
    questions = dict.fromkeys(question for answers in said.values() for question in answers)
    asked = [(question, [(n, a[question]) for n, a in said.items() if question in a]) for question in questions]
    return sorted(asked, key=lambda pair: -len(pair[1]))


# --------------------------------------------------------------------------------------------------------- numbers


def _share(right: int, asked: int) -> Cell:
    return Cell(f"{right / asked:.1%}", right / asked)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _large(value: object) -> str:
    """1234 -> "1,234"; 7281920 -> "7.28 M"."""
    if not _is_number(value):
        return NOTHING
    for size, letter in ((1e9, "B"), (1e6, "M")):
        if value >= size:
            return f"{value / size:,.2f} {letter}"
    return f"{value:,.0f}"


def _decimal(value: object) -> str:
    return f"{value:.4f}" if _is_number(value) else NOTHING


def _time(seconds: object) -> str:
    if not _is_number(seconds):
        return NOTHING
    if seconds < 60:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.1f} min" if seconds < 3600 else f"{seconds / 3600:.1f} h"


def _data(about: Mapping[str, object]) -> str:
    """The names of the files that a model was trained on: one, or those of a mixture."""
    mix = about.get("mix")
    files = [part[0] for part in mix if isinstance(part, list) and part] if isinstance(mix, list) else []
    names = [Path(file).name for file in (files or [about.get("data_path")]) if isinstance(file, str)]
    return ", ".join(names) or NOTHING
