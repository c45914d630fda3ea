"""The reward of an answer: small rules, chosen by name and weighted, or the user's own function.

    --rewards format:0.2 accuracy:1 my_rewards:politeness:0.5

A rule takes a `Reply` and returns a number. DeepSeek-R1 (arXiv:2501.12948, section 2.2) was trained by the first two,
and by the share of the thought that is in the question's language.
"""

import importlib
import math
import operator
import re
from collections.abc import Callable, Sequence
from typing import NamedTuple

from model.reasoning import TAGS, is_well_formed
from trainer.answer_check import is_right_answer
from trainer.errors import UserError

WHOLE = re.compile(r"\s*<think>(?P<thought>.*?)</think>\s*<answer>(?P<answer>.*?)</answer>\s*", re.DOTALL)
CHINESE = re.compile("[\u3400-\u9fff]")
LATIN = re.compile("[A-Za-z]")
NUMBER = re.compile(r"\d+")
EQUATION = re.compile(r"(\d+) *([-+*×]) *(\d+) *= *(\d+)")
OPERATIONS = {"+": operator.add, "-": operator.sub, "*": operator.mul, "×": operator.mul}
NGRAM = 4  # tokens; a repetition is one of these that occurred before


class Reply(NamedTuple):
    """An answer to be scored.

    question: the chat that it answers, a list of {"role", "content"}, ending with the user's.
    text: the model's text, including tags.
    expected: the right answer from the data.
    tokens: its ids, without the end token.
    finished: whether it ended by itself, not at the length limit.
    limit: its maximum number of tokens.
    """

    question: Sequence[dict]
    text: str
    expected: str
    tokens: Sequence[int]
    finished: bool
    limit: int


Reward = Callable[[Reply], float]


def split_strictly(text: str) -> tuple[str, str] | None:
    """The thought and the answer of a text with one of each, in this order, each tag once and nothing outside; a text
    without tags is an answer without a thought. None for anything else, which could hide a second answer."""
    if not any(tag in text for tag in TAGS):
        return "", text
    found = WHOLE.fullmatch(text)
    if found is None or any(text.count(tag) != 1 for tag in TAGS):
        return None
    return found["thought"].strip(), found["answer"]


def format_reward(reply: Reply) -> float:
    """1 for a finished answer in exactly the form of model/reasoning.py, with a non-empty thought; else 0."""
    parts = split_strictly(reply.text)
    return float(reply.finished and is_well_formed(reply.text) and parts is not None and bool(parts[0]))


def accuracy_reward(reply: Reply) -> float:
    """1 if the answer is the expected one, by `is_right_answer`; else 0.

    Only the text between the answer tags counts, so that several answers, an answer in the thought, repeated tags, or
    tags around an empty thought get nothing.
    """
    parts = split_strictly(reply.text)
    if parts is None or not reply.finished or (not parts[0] and TAGS[0] in reply.text):
        return 0.0
    return float(is_right_answer(parts[1], reply.expected))


def length_reward(reply: Reply) -> float:
    """0 up to three quarters of the length limit, from there down to -1 at the limit: the soft punishment of overlong
    answers in DAPO (Yu et al. 2025, arXiv:2503.14476, equation 13); an answer that was cut off gets -1."""
    if not reply.finished:
        return -1.0
    buffer = max(1.0, reply.limit / 4)
    return -min(1.0, max(0.0, (len(reply.tokens) - (reply.limit - buffer)) / buffer))


def repetition_reward(reply: Reply) -> float:
    """Minus the share of n-grams of tokens that occurred before: 0 without repetition, near -1 in a loop."""
    ngrams = [tuple(reply.tokens[i : i + NGRAM]) for i in range(len(reply.tokens) - NGRAM + 1)]
    return len(set(ngrams)) / len(ngrams) - 1 if ngrams else 0.0


def language_reward(reply: Reply) -> float:
    """The share of the letters that are in the question's language, Chinese or Latin script; 1 without any letters."""
    question = reply.question[-1]["content"]
    text = re.sub("|".join(TAGS), "", reply.text)
    chinese, latin = len(CHINESE.findall(text)), len(LATIN.findall(text))
    if chinese + latin == 0:
        return 1.0
    return (chinese if CHINESE.search(question) else latin) / (chinese + latin)


def steps_reward(reply: Reply) -> float:
    """The share of the thought's equations that are sound: true, not a repetition, and with numbers from the question
    or an earlier equation; 0 without an equation.

    A process reward (Lightman et al. 2023, arXiv:2305.20050) by rule: if whole solutions are rarely right, it shows
    which steps were.
    """
    parts = split_strictly(reply.text)
    equations = EQUATION.findall(parts[0]) if parts else []
    known, seen, sound = set(NUMBER.findall(reply.question[-1]["content"])), set(), 0
    for equation in equations:
        a, sign, b, result = equation
        given = a in known and b in known and equation not in seen
        sound += given and OPERATIONS[sign](int(a), int(b)) == int(result)
        seen.add(equation)
        if given:
            known.add(result)
    return sound / max(1, len(equations))


REWARDS: dict[str, Reward] = {
    "format": format_reward,
    "accuracy": accuracy_reward,
    "length": length_reward,
    "repetition": repetition_reward,
    "language": language_reward,
    "steps": steps_reward,
}


class WeighedReward(NamedTuple):
    """A rule with its name in the metrics, and its weight in the sum."""

    name: str
    weight: float
    rule: Reward


def read_rewards(parts: Sequence[str]) -> list[WeighedReward]:
    """The rewards that --rewards names: `name:weight`, `module:function:weight`, or either without a weight (then 1).

    Raises:
        UserError: there is no such rule, module or function; a weight that is not a number; a rule named twice.
    """
    rewards = []
    for part in parts:
        name, weight = _name_and_weight(part)
        rule = REWARDS.get(name) or _own_rule(name)
        rewards.append(WeighedReward(name.rpartition(":")[2], weight, rule))
    names = [reward.name for reward in rewards]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise UserError(f"--rewards names {twice} twice: give its weight once")
    return rewards


def _name_and_weight(part: str) -> tuple[str, float]:
    name, _, last = part.rpartition(":")
    try:
        weight = float(last)
    except ValueError:
        return part, 1.0
    if not name or not math.isfinite(weight):
        raise UserError(f"--rewards {part}: give NAME:WEIGHT, such as accuracy:1")
    return name, weight


def _own_rule(name: str) -> Reward:
    module, _, function = name.rpartition(":")
    if not module:
        known = ", ".join(REWARDS)
        raise UserError(f"--rewards {name}: choose from {known}, or give your own rule as MODULE:FUNCTION:WEIGHT")
    try:
        rule = getattr(importlib.import_module(module), function, None)
    except ImportError as error:
        raise UserError(f"--rewards {name}: {module} cannot be imported ({error}); is it beside the script?") from error
    if not callable(rule):
        raise UserError(f"--rewards {name}: {module} has no function {function}")
    return rule


def judge(reply: Reply, rewards: Sequence[WeighedReward]) -> list[float]:
    """The reward of each rule, not yet weighted.

    Raises:
        UserError: a rule returns something that is not a finite number.
    """
    values = []
    for name, _, rule in rewards:
        value = rule(reply)
        if not isinstance(value, int | float) or not math.isfinite(value):
            raise UserError(f"the reward {name} gave {value!r:.40} for {reply.text[:60]!r}: it must be a finite number")
        values.append(float(value))
    return values
