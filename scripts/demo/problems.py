"""Problems with answers that can be checked, without thoughts, for the demo's reinforcement learning.

`story` is like the reasoning data: three numbers up to 40, one added and one subtracted. The other kinds go beyond it:
`more` numbers, `larger` ones, `units` to be converted, and `two_step` problems with a product.
"""

import random
from collections.abc import Callable, Iterator

NAMES = {"en": ("Tom", "Anna", "Ben", "Lucy", "Sam", "Mia"), "zh": ("小明", "小红", "小刚", "小丽", "小军", "小芳")}
THINGS = {
    "en": ("apples", "books", "coins", "pens", "stones", "cards"),
    "zh": ("苹果", "球", "气球", "梨", "桃子", "杯子"),
}
MORE = {
    "en": "{name} has {a} {thing}, gets {b} more, then {c} more and gives {d} away. How many {thing} are left?",
    "zh": "{name}有{a}个{thing}，得到{b}个，又得到{c}个，送给别人{d}个。还剩多少个{thing}？",
}
LARGER = {
    "en": "{name} has {a} {thing}, gets {b} more and gives {c} away. How many {thing} are left?",
    "zh": "{name}有{a}个{thing}，又得到{b}个，送给别人{c}个。还剩多少个{thing}？",
}
UNITS = (
    {"en": "A rope is {a} m {b} cm long. How many cm is that?", "zh": "一根绳子长{a}米{b}厘米。一共是多少厘米？"},
    {
        "en": "A film takes {a} hours {b} minutes. How many minutes is that?",
        "zh": "一部电影长{a}小时{b}分钟。一共是多少分钟？",
    },
)
PER_UNIT = (100, 60)
TWO_STEP = {
    "en": "{name} buys {a} boxes with {b} {thing} each and gives {c} away. How many {thing} are left?",
    "zh": "{name}买了{a}箱{thing}，每箱{b}个，送给别人{c}个。还剩多少个{thing}？",
}


def _more(rng: random.Random, lang: str) -> tuple[str, int]:
    a, b, c = (rng.randint(2, 20) for _ in range(3))
    d = rng.randint(2, min(30, a + b + c))
    return _told(MORE[lang], rng, lang, a=a, b=b, c=c, d=d), a + b + c - d


def _larger(rng: random.Random, lang: str) -> tuple[str, int]:
    a, b, c = rng.randint(41, 99), rng.randint(2, 99), rng.randint(2, 90)
    c = min(c, a + b)
    return _told(LARGER[lang], rng, lang, a=a, b=b, c=c), a + b - c


def _units(rng: random.Random, lang: str) -> tuple[str, int]:
    which = rng.randrange(2)
    a, b = rng.randint(2, 9), rng.randint(2, PER_UNIT[which] - 1)
    return UNITS[which][lang].format(a=a, b=b), a * PER_UNIT[which] + b


def _two_step(rng: random.Random, lang: str) -> tuple[str, int]:
    a, b = rng.randint(2, 12), rng.randint(2, 12)
    c = rng.randint(1, min(30, a * b))
    return _told(TWO_STEP[lang], rng, lang, a=a, b=b, c=c), a * b - c


def _told(story: str, rng: random.Random, lang: str, **numbers: int) -> str:
    return story.format(name=rng.choice(NAMES[lang]), thing=rng.choice(THINGS[lang]), **numbers)


BEYOND: dict[str, Callable[[random.Random, str], tuple[str, int]]] = {
    "more": _more,
    "larger": _larger,
    "units": _units,
    "two_step": _two_step,
}


def problems_beyond(rng: random.Random, count: int, taken: set[str]) -> Iterator[dict]:
    """`count` problems of each kind of BEYOND, in turn, in both languages; none has a question in `taken`, to which
    they are added."""
    for _ in range(count):
        for kind, make in BEYOND.items():
            lang = rng.choice(("en", "zh"))
            question, answer = make(rng, lang)
            while question in taken:
                question, answer = make(rng, lang)
            taken.add(question)
            yield problem(question, answer, kind, lang)


def problem(question: str, answer: int, kind: str, lang: str) -> dict:
    """A line of an RL file."""
    return {"question": question, "answer": answer, "kind": kind, "lang": lang}
