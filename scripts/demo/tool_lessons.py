"""`make demo-tools`: training data on tools for the demo's chat model, and an exam on using them."""

import json
import random
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from model.chat import render_chats
from model.inference.request import Request
from model.inference.scheduler import Engine
from model.tool_calls import CALL_BEGIN, split_calls
from scripts.demo.exam import open_model, read_lines
from scripts.demo.scoring import is_right
from scripts.demo.settings import DATA, OUT, SIZE
from scripts.demo.tool_talks import ALL, KNOWN, STOCK, SUMS, TOOLS, tool_talks
from scripts.demo.world import relations
from scripts.tool_use.builtin import table
from scripts.tool_use.react import act
from trainer.files import replacing

TOOLS_OUT = OUT / "tools"
TALKS, GENERAL = 8000, 3000  # lines with tools, and of the demo's SFT without
SIZES = (*SIZE[:4], "--max_seq_len", "512")
LEARNING = (
    *("--batch_size", "8", "--accumulation_steps", "1", "--epochs", "2", "--eval_interval", "0"),
    *("--learning_rate", "1e-3", "--optimizer", "muon", "--warmup_iters", "20"),
)
EACH = 500  # questions of a kind and language
LIMIT = 96  # tokens of an answer
SLOTS = 64
MOST_CALLS = 4


class Question(NamedTuple):
    """kind: "sum", "look-up" or "fact"; tools: names of the listed tools, empty for an answer without tools."""

    lang: str
    kind: str
    text: str
    answers: Sequence[str]
    tools: tuple[str, ...]


class Asked(NamedTuple):
    """The outcome of a question."""

    right: bool
    called: bool
    calls: int  # that it wrote…
    valid: int  # …and that could be read, and named a listed tool


def write_lessons(path: Path, seed: int, talks: int = TALKS, general: int = GENERAL) -> None:
    """Write the training lines, mixed with the demo's general chats; does nothing if the file exists."""
    if path.exists():
        return
    rng = random.Random(seed)
    lines = tool_talks(rng, talks, relations())
    chats = read_lines(DATA / "sft_mini_512.jsonl")
    lines += rng.sample(chats, min(general, len(chats)))
    rng.shuffle(lines)
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        temporary.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), encoding="utf-8")


def questions(seed: int, each: int = EACH) -> list[Question]:
    """Sums with numbers and operators beyond those of training, things that were never looked up there, and the demo's
    held-out facts, with listed tools that they do not need."""
    rng = random.Random(f"examination {seed}")
    asked = []
    facts = read_lines(DATA / "eval_facts.jsonl")
    unseen = list(table())[KNOWN:]
    for lang in ("en", "zh"):
        for _ in range(each):
            expression = str(rng.randint(10**5, 10**9))
            for _ in range(rng.randint(2, 4)):  # the lessons have one or two operators, and six digits at most
                expression += f" {rng.choice('+-*/')} {rng.randint(10**5, 10**9)}"
            text = rng.choice(SUMS[lang]).format(x=expression)
            result = ALL.call("calculator", {"expression": expression})
            asked.append(Question(lang, "sum", text, (result,), _listed(rng, "calculator")))
        for place in range(each):
            name = unseen[place % len(unseen)]
            text = rng.choice(STOCK[lang]).format(x=name)
            asked.append(Question(lang, "look-up", text, (str(table()[name]),), _listed(rng, "look_up")))
        of_lang = [line for line in facts if line["lang"] == lang]
        for line in rng.sample(of_lang, min(each, len(of_lang))):
            names = tuple(rng.sample(list(TOOLS), rng.randint(1, 3)))
            asked.append(Question(lang, "fact", line["question"], line["answers"], names))
    return asked


def _listed(rng: random.Random, needed: str) -> tuple[str, ...]:
    others = rng.sample([name for name in TOOLS if name != needed], rng.randint(0, 2))
    return tuple(rng.sample([needed, *others], len(others) + 1))


def examine(weights: Path, asked: Sequence[Question], with_tools: bool = True) -> list[Asked]:
    """Ask every question, greedy, many at a time, running the tools that are called."""
    model, tokenizer = open_model(weights)
    engine = Engine(model, tokenizer, slots=SLOTS, slot_len=1024, token_budget=1024)
    talks: list[list[dict[str, Any]]] = [[{"role": "user", "content": question.text}] for question in asked]
    tallies = [Asked(False, False, 0, 0)] * len(asked)
    going = list(range(len(asked)))
    for turn in range(MOST_CALLS + 1):
        chats = [_with_tools(talks[i], asked[i]) if with_tools else talks[i] for i in going]
        prompts = [ids for ids, _ in render_chats(tokenizer, chats, add_generation_prompt=True)]
        answers = engine.run(Request(prompt=ids, max_new_tokens=LIMIT) for ids in prompts)
        on = []
        for i, answer in zip(going, answers, strict=True):
            text, calls = split_calls(answer.text)
            if not with_tools or not calls or turn == MOST_CALLS:
                tallies[i] = _ended(tallies[i], asked[i], answer.text)
                continue
            written = answer.text.count(CALL_BEGIN)
            valid = sum(call["name"] in asked[i].tools for call in calls)
            before = tallies[i]
            tallies[i] = before._replace(called=True, calls=before.calls + written, valid=before.valid + valid)
            talks[i].append({"role": "assistant", "content": text, "tool_calls": calls})
            talks[i] += [{"role": "tool", "content": ALL.call(c["name"], c["arguments"])} for c in calls]
            on.append(i)
        going = on
        if not going:
            break
    return tallies


def _with_tools(talk: list[dict], question: Question) -> list[dict]:
    return [talk[0] | {"tools": [TOOLS[name]["function"] for name in question.tools]}, *talk[1:]]


def _ended(tally: Asked, question: Question, text: str) -> Asked:
    """Add a final answer to the tally: a fact must match as a whole, a number must be among those in the answer."""
    if question.kind == "fact":
        right = is_right(text, question.answers)
    else:
        right = question.answers[0] in re.findall(r"-?\d+(?:\.\d+)?(?:e[+-]\d+)?", text)
    broken = text.count(CALL_BEGIN)  # a call that could not be read, or one too many
    return tally._replace(right=right, called=tally.called or broken > 0, calls=tally.calls + broken)


def summary(asked: Sequence[Question], found: Sequence[Asked]) -> dict[str, dict[str, float]]:
    """Shares by language: of right answers of each kind, of facts with a needless call, and of valid calls (1 if there
    are no calls)."""
    shares: dict[str, dict[str, float]] = {}
    for lang in sorted({question.lang for question in asked}):
        of_lang = [pair for pair in zip(asked, found, strict=True) if pair[0].lang == lang]
        row = {}
        for kind in ("sum", "look-up", "fact"):
            of_kind = [tally for question, tally in of_lang if question.kind == kind]
            row[kind] = sum(tally.right for tally in of_kind) / max(1, len(of_kind))
            if kind == "fact":
                row["needless"] = sum(tally.called for tally in of_kind) / max(1, len(of_kind))
        calls = sum(tally.calls for _, tally in of_lang)
        row["valid"] = sum(tally.valid for _, tally in of_lang) / calls if calls else 1.0
        shares[lang] = row
    return shares


def table_of(results: dict[str, dict[str, dict[str, float]]]) -> str:
    """A table with a line per model and language."""
    columns = {"sum": "sums", "look-up": "look-ups", "fact": "facts", "needless": "needless", "valid": "valid"}
    lines = [f"{'':<26}" + "".join(f"{name:>10}" for name in columns.values())]
    for name, by_lang in results.items():
        for lang, row in by_lang.items():
            lines.append(f"{name:<22}{lang:<4}" + "".join(f"{row[column]:>10.1%}" for column in columns))
    return "\n".join(lines)


def conversation(weights: Path, texts: Sequence[str]) -> str:
    """A few questions with the calls made for them, and the greedy answers."""
    model, tokenizer = open_model(weights)
    engine = Engine(model, tokenizer, slots=1, slot_len=1024)
    lines = []
    for text in texts:
        first = {"role": "user", "content": text, "tools": [tool["function"] for tool in ALL.schemas]}

        def ask(talk: list[dict]) -> dict:
            ((ids, _),) = render_chats(tokenizer, [talk], add_generation_prompt=True)
            said, calls = split_calls(engine.run([Request(prompt=ids, max_new_tokens=LIMIT)])[0].text)
            return {"role": "assistant", "content": said, "tool_calls": calls}

        lines.append(f"> {text}")
        said = act(ask, [first], ALL, MOST_CALLS, lambda call, result: lines.append(f"  [{call} = {result}]"))
        lines.append(f"  {said[-1]['content']}")
    return "\n".join(lines)
