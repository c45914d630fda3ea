"""Chats in which a model calls tools, in both languages: the content of the demo's tool_mix.jsonl.

Every result is the tool's real one. Some questions need no tool, some two, and some calls fail.
"""

import datetime
import json
import random
from collections.abc import Iterator

from scripts.demo.world import Relation
from scripts.tool_use.builtin import SYLLABLES, UNITS, registry_of, table

ALL = registry_of(["all"])
TOOLS = {schema["function"]["name"]: schema for schema in ALL.schemas}
KNOWN = 150  # entries of the table that are asked for; the others are for an examination
WEEKDAYS = dict(
    zip(
        ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"),
        (f"星期{day}" for day in "一二三四五六日"),
        strict=True,
    )
)
SUMS = {
    "en": ("What is {x}?", "Calculate {x}.", "How much is {x}?"),
    "zh": ("{x} 等于多少？", "请计算 {x}。", "{x} 是多少？"),
}
SUM_IS = {"en": "The result is {r}.", "zh": "结果是 {r}。"}
NO_SUM = {"en": "That cannot be calculated: nothing can be divided by zero.", "zh": "这无法计算：不能除以零。"}
DAYS = {
    "en": ("What day of the week is {d}?", "Which weekday is {d}?"),
    "zh": ("{d} 是星期几？", "请问 {d} 是星期几？"),
}
DAY_IS = {"en": "{d} is a {w}.", "zh": "{d} 是{w}。"}
LATER = {"en": ("What is the date {n} days after {d}?",), "zh": ("{d} 之后 {n} 天是几号？",)}
LATER_IS = {"en": "It is {d}, a {w}.", "zh": "是 {d}，{w}。"}
UNIT = {
    "en": ("How many {t} are {v} {f}?", "Convert {v} {f} to {t}."),
    "zh": ("{v} {f} 是多少 {t}？", "把 {v} {f} 换算成 {t}。"),
}
UNIT_IS = {"en": "{v} {f} are {r} {t}.", "zh": "{v} {f} 是 {r} {t}。"}
STOCK = {
    "en": ("How many {x} are in stock?", "What does the table say about {x}?"),
    "zh": ("{x} 的库存是多少？", "表里 {x} 有多少？"),
}
STOCK_IS = {"en": "There are {r} {x} in stock.", "zh": "{x} 的库存是 {r}。"}
NO_STOCK = {"en": "There is no {x} in the table.", "zh": "表里没有 {x}。"}
BOTH = {"en": "How many {x} and how many {y} are in stock?", "zh": "{x} 和 {y} 的库存各是多少？"}
BOTH_ARE = {"en": "There are {r} {x} and {s} {y} in stock.", "zh": "{x} 的库存是 {r}，{y} 的库存是 {s}。"}
MORE = {"en": "If {n} more {x} arrive, how many are in stock then?", "zh": "再到货 {n} 个 {x}，库存一共是多少？"}
MORE_ARE = {"en": "Then there are {r} {x} in stock.", "zh": "那么 {x} 的库存一共是 {r}。"}


class Talk:
    """A chat under construction: its turns, with the tools' real results."""

    def __init__(self, question: str):
        self.turns: list[dict] = [{"role": "user", "content": question}]
        self._calls = 0

    def call(self, *calls: tuple[str, dict]) -> list[str]:
        """Let the assistant call tools; returns their results."""
        ids = [f"call_{self._calls + n}" for n in range(1, len(calls) + 1)]
        self._calls += len(calls)
        functions = [{"name": name, "arguments": json.dumps(given, ensure_ascii=False)} for name, given in calls]
        made = [{"id": i, "type": "function", "function": f} for i, f in zip(ids, functions, strict=True)]
        self.turns.append({"role": "assistant", "content": "", "tool_calls": made})
        results = [ALL.call(*call) for call in calls]
        self.turns += [
            {"role": "tool", "tool_call_id": i, "content": text} for i, text in zip(ids, results, strict=True)
        ]
        return results

    def answer(self, text: str) -> None:
        self.turns.append({"role": "assistant", "content": text})


def tool_talks(rng: random.Random, count: int, world: list[Relation]) -> list[dict]:
    """This many lines of an SFT file, each with the tools that may be called in it."""
    kinds = (_sum, _sum, _sum, _weekday, _later, _units, _stock, _stock, _no_stock, _no_sum, _both, _more, _fact, _fact)
    lines = []
    for _ in range(count):
        talk, needed = rng.choice(kinds)(rng, rng.choice(("en", "zh")), world)
        others = [name for name in TOOLS if name not in needed]
        listed = [*needed, *rng.sample(others, rng.randint(0 if needed else 1, 2 if len(needed) < 2 else 1))]
        lines.append({"tools": [TOOLS[name] for name in rng.sample(listed, len(listed))], "conversations": talk.turns})
    return lines


def _number(rng: random.Random) -> int:
    """A number larger than those in the demo's arithmetic without tools, which has files of its own."""
    return rng.randint(101, 10 ** rng.randint(3, 5))


def _sum(rng, lang, world) -> tuple[Talk, list[str]]:
    parts = [str(_number(rng))]
    for _ in range(rng.randint(1, 2)):
        parts += [rng.choice("+-*/"), str(_number(rng))]
    expression = " ".join(parts)
    talk = Talk(rng.choice(SUMS[lang]).format(x=expression))
    (result,) = talk.call(("calculator", {"expression": expression}))
    talk.answer(SUM_IS[lang].format(r=result))
    return talk, ["calculator"]


def _no_sum(rng, lang, world) -> tuple[Talk, list[str]]:
    expression = f"{_number(rng)} / 0"
    talk = Talk(rng.choice(SUMS[lang]).format(x=expression))
    talk.call(("calculator", {"expression": expression}))
    talk.answer(NO_SUM[lang])
    return talk, ["calculator"]


def _date(rng: random.Random) -> str:
    return (datetime.date(1950, 1, 1) + datetime.timedelta(days=rng.randrange(40_000))).isoformat()


def _day(weekday: str, lang: str) -> str:
    return weekday if lang == "en" else WEEKDAYS[weekday]


def _weekday(rng, lang, world) -> tuple[Talk, list[str]]:
    date = _date(rng)
    talk = Talk(rng.choice(DAYS[lang]).format(d=date))
    (result,) = talk.call(("calendar", {"date": date}))
    talk.answer(DAY_IS[lang].format(d=date, w=_day(result.split()[1], lang)))
    return talk, ["calendar"]


def _later(rng, lang, world) -> tuple[Talk, list[str]]:
    date, days = _date(rng), rng.randint(2, 400)
    talk = Talk(rng.choice(LATER[lang]).format(d=date, n=days))
    (result,) = talk.call(("calendar", {"date": date, "days": days}))
    then, weekday = result.split()
    talk.answer(LATER_IS[lang].format(d=then, w=_day(weekday, lang)))
    return talk, ["calendar"]


def _units(rng, lang, world) -> tuple[Talk, list[str]]:
    old, new = rng.sample(list(rng.choice(list(UNITS.values()))), 2)
    value = rng.choice((rng.randint(2, 999), rng.randint(11, 999) / 10))
    talk = Talk(rng.choice(UNIT[lang]).format(v=value, f=old, t=new))
    (result,) = talk.call(("convert_units", {"value": value, "from_unit": old, "to_unit": new}))
    talk.answer(UNIT_IS[lang].format(v=value, f=old, t=new, r=result))
    return talk, ["convert_units"]


def _names() -> list[str]:
    return list(table())[:KNOWN]


def _stock(rng, lang, world) -> tuple[Talk, list[str]]:
    name = rng.choice(_names())
    talk = Talk(rng.choice(STOCK[lang]).format(x=name))
    (result,) = talk.call(("look_up", {"name": name}))
    talk.answer(STOCK_IS[lang].format(x=name, r=result))
    return talk, ["look_up"]


def _missing(rng: random.Random) -> Iterator[str]:
    while True:
        name = "".join(rng.choice(SYLLABLES) for _ in range(3))
        if name not in table():
            yield name


def _no_stock(rng, lang, world) -> tuple[Talk, list[str]]:
    name = next(_missing(rng))
    talk = Talk(rng.choice(STOCK[lang]).format(x=name))
    talk.call(("look_up", {"name": name}))
    talk.answer(NO_STOCK[lang].format(x=name))
    return talk, ["look_up"]


def _both(rng, lang, world) -> tuple[Talk, list[str]]:
    one, other = rng.sample(_names(), 2)
    talk = Talk(BOTH[lang].format(x=one, y=other))
    results = talk.call(("look_up", {"name": one}), ("look_up", {"name": other}))
    talk.answer(BOTH_ARE[lang].format(x=one, y=other, r=results[0], s=results[1]))
    return talk, ["look_up"]


def _more(rng, lang, world) -> tuple[Talk, list[str]]:
    name, more = rng.choice(_names()), rng.randint(101, 999)
    talk = Talk(MORE[lang].format(x=name, n=more))
    (found,) = talk.call(("look_up", {"name": name}))
    (result,) = talk.call(("calculator", {"expression": f"{found} + {more}"}))
    talk.answer(MORE_ARE[lang].format(x=name, r=result))
    return talk, ["look_up", "calculator"]


def _fact(rng, lang, world) -> tuple[Talk, list[str]]:
    """A question that the model answers without a call, although tools are listed."""
    relation = rng.choice([relation for relation in world if relation.lang == lang])
    x, (y, *_) = rng.choice(relation.rows)
    talk = Talk(rng.choice(relation.asked).format(x=x))
    talk.answer(y + ("。" if lang == "zh" else "."))
    return talk, []
