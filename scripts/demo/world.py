"""A small world of true facts in two languages, read from world.json, and phrasings of questions about each."""

import json
from pathlib import Path
from typing import NamedTuple

WORLD = json.loads(Path(__file__).with_name("world.json").read_text(encoding="utf-8"))


class Relation(NamedTuple):
    """One kind of fact in one language.

    In phrasings `{x}` is the subject of the question and `{y}` the answer; if there are two subjects, as for units,
    they are `{x[0]}` and `{x[1]}`.

    rows: the subject and the accepted answers, the one used in training first.
    asked, held_out: questions for training, and for the exam only.
    stated: sentences for pretraining.
    """

    kind: str
    lang: str
    rows: list[tuple[str | tuple[str, str], tuple[str, ...]]]
    asked: tuple[str, ...]
    held_out: tuple[str, ...]
    stated: tuple[str, ...]


class Identity(NamedTuple):
    """Questions on the model's identity, in training and held-out phrasings, and the first accepted answer."""

    lang: str
    asked: tuple[str, ...]
    held_out: tuple[str, ...]
    answer: str


def relations() -> list[Relation]:
    """Every relation of the world, English and Chinese."""
    return [
        Relation(
            entry["kind"],
            entry["lang"],
            [(tuple(x) if isinstance(x, list) else x, tuple(answers)) for x, *answers in entry["rows"]],
            *(tuple(entry[name]) for name in ("asked", "held_out", "stated")),
        )
        for entry in WORLD["relations"]
    ]


def identities(name_en: str, maker_en: str, name_zh: str, maker_zh: str) -> list[Identity]:
    """The identity questions, for MiniMind or for the identity that an adapter gives it."""
    names = {"en": {"name": name_en, "maker": maker_en}, "zh": {"name": name_zh, "maker": maker_zh}}
    return [
        Identity(
            entry["lang"],
            tuple(entry["asked"]),
            tuple(entry["held_out"]),
            entry["answer"].format(**names[entry["lang"]]),
        )
        for entry in WORLD["identities"]
    ]
