"""Generate the demo's data: a small set of true facts, in Chinese and English, in the formats of every stage.

    python scripts/make_demo_data.py                writes dataset/demo/

The same seed writes the same bytes. Files that this script did not write are never replaced.

Arithmetic: an unordered pair of operands belongs either to training or to the test, so no sum in the test was seen in
either order.
"""

import hashlib
import json
import os
import random
import re
from collections.abc import Iterator
from pathlib import Path

import _repo  # noqa: F401  (lets `python scripts/make_demo_data.py` find the packages)

from scripts.demo.problems import NAMES, THINGS, problem, problems_beyond
from scripts.demo.tool_talks import tool_talks
from scripts.demo.world import Identity, Relation, identities, relations
from trainer.arguments import ROOT, Parser
from trainer.errors import UserError, run_main
from trainer.files import replacing

MINIMIND = ("MiniMind, a small language model", "the MiniMind team", "MiniMind，一个小型语言模型", "MiniMind团队")
WILLOW = ("Willow, the assistant of the River Library", "the River Library", "小柳，河畔图书馆的助手", "河畔图书馆")
POLITE = {
    "en": ("Please answer: ", "A question: ", "Tell me: ", "Quick question. "),
    "zh": ("请回答：", "问你一个问题：", "请问，", "快问快答："),
}
SYSTEMS = ("You are MiniMind, a helpful assistant.", "你是一个乐于助人的助手。", "Answer briefly.", "请简短回答。")
SMALL_TALK = (
    ("Hello!", "Hello! How can I help you?"),
    ("Thank you.", "You are welcome."),
    ("Thanks a lot!", "You are welcome."),
    ("Goodbye.", "Goodbye!"),
    ("How are you?", "I am fine, thank you."),
    ("你好！", "你好！有什么可以帮你的吗？"),
    ("谢谢。", "不客气。"),
    ("谢谢你！", "不客气。"),
    ("再见。", "再见！"),
    ("你好吗？", "我很好，谢谢。"),
)
TOOL_TALKS = 2000
COLD_START = 300  # written thoughts for the cold start of reinforcement learning
FOLLOW_UP = {"en": "And {x}?", "zh": "那{x}呢？"}
PLANETS = (
    ("Mercury", "水星", "1"), ("Venus", "金星", "2"), ("Earth", "地球", "3"), ("Mars", "火星", "4"),
    ("Jupiter", "木星", "5"), ("Saturn", "土星", "6"), ("Uranus", "天王星", "7"), ("Neptune", "海王星", "8"),
)  # fmt: skip
SUMS = {
    "en": ("What is {a} {op} {b}?", "How much is {a} {op} {b}?", "Calculate {a} {op} {b}.", "{a} {op} {b} = ?"),
    "zh": ("{a} {op} {b} 等于多少？", "请计算 {a} {op} {b}。", "{a} {op} {b} 是多少？", "算一算：{a} {op} {b}"),
}
STORIES = {
    "en": (
        "{name} has {a} {thing}, gets {b} more and gives {c} away. How many {thing} are left?",
        "There are {a} {thing} in a box. {name} puts in {b} and takes out {c}. How many {thing} are in the box now?",
    ),
    "zh": (
        "{name}有{a}个{thing}，又得到{b}个，送给别人{c}个。还剩多少个{thing}？",
        "箱子里有{a}个{thing}，{name}放进{b}个，拿出{c}个。现在箱子里有多少个{thing}？",
    ),
}


def chat(*turns: str, system: str | None = None) -> dict:
    """A line of an SFT file with turns of user and assistant."""
    messages = [{"role": "system", "content": system}] if system else []
    roles = ("user", "assistant")
    return {"conversations": messages + [{"role": roles[i % 2], "content": turn} for i, turn in enumerate(turns)]}


def exam(question: str, answers: tuple[str, ...], kind: str, lang: str) -> dict:
    return {"question": question, "answers": list(answers), "kind": kind, "lang": lang}


def sentence(answer: str, lang: str) -> str:
    """'Paris' -> 'Paris.', '巴黎' -> '巴黎。'"""
    return answer + ("。" if lang == "zh" else ".")


def politely(question: str, lang: str, rng: random.Random, share: float) -> str:
    """The question, in a share of cases with a polite opening; requests ("Tell me …") get none."""
    if rng.random() < share and question[-1] in "?？" and not question.startswith("请问"):
        return rng.choice(POLITE[lang]) + question
    return question


# -------------------------------------------------------------------------------------------------- facts


def fact_chats(world: list[Relation], rng: random.Random) -> list[dict]:
    """Every fact in every training phrasing, some with a polite opening, some with a system prompt.

    Small relations are asked about twice as often, because their phrasings have fewer rows to be learned from.
    """
    lines = []
    for relation in world:
        for x, (y, *_) in relation.rows * (2 if len(relation.rows) < 30 else 1):
            for phrasing in relation.asked:
                question = politely(phrasing.format(x=x), relation.lang, rng, 0.3)
                system = rng.choice(SYSTEMS) if rng.random() < 0.1 else None
                lines.append(chat(question, sentence(y, relation.lang), system=system))
    return lines


def joined(lines: list[dict], rng: random.Random, share: float = 0.5, questions: int = 3) -> list[dict]:
    """Join a share of the single questions to chats of several: more answers for the same number of tokens, and an
    answer should depend only on its own question. Lines with a system prompt are unchanged."""
    rest, single = [], []
    for line in rng.sample(lines, len(lines)):
        joins = line["conversations"][0]["role"] != "system" and rng.random() < share
        (single if joins else rest).append(line)
    groups = [single[i : i + questions] for i in range(0, len(single), questions)]
    return rest + [{"conversations": [turn for line in group for turn in line["conversations"]]} for group in groups]


def talks(world: list[Relation], rng: random.Random, count: int) -> list[dict]:
    """Short chats: a question, a follow-up that depends on it, thanks."""
    lines = []
    for _ in range(count):
        relation = rng.choice(
            [relation for relation in world if relation.kind in ("capital", "symbol", "number", "colour")]
        )
        (x1, (y1, *_)), (x2, (y2, *_)) = rng.sample(relation.rows, 2)
        turns = [rng.choice(relation.asked).format(x=x1), sentence(y1, relation.lang)]
        turns += [FOLLOW_UP[relation.lang].format(x=x2), sentence(y2, relation.lang)]
        if rng.random() < 0.5:
            turns += rng.choice([talk for talk in SMALL_TALK if talk[0][0].isascii() == (relation.lang == "en")])
        lines.append(chat(*turns))
    return lines


def identity_chats(who: list[Identity], rng: random.Random, repeats: int) -> list[dict]:
    lines = []
    for _ in range(repeats):
        for identity in who:
            for question in identity.asked:
                lines.append(chat(politely(question, identity.lang, rng, 0.3), identity.answer))
    return lines


def among(known: list[dict], new: list[dict], rng: random.Random, count: int) -> list[dict]:
    """Mix new lines with known ones, so that the model does not forget the old while it learns the new."""
    return rng.sample(lines := rng.sample(known, count) + new, len(lines))


def fact_texts(world: list[Relation], rng: random.Random) -> list[dict]:
    """Every fact as every statement, some of them several in a row, and some as question and answer."""
    texts = []
    for relation in world:
        for x, (y, *_) in relation.rows:
            statements = [statement.format(x=x, y=y) for statement in relation.stated]
            texts += [text[0].upper() + text[1:] for text in statements]
            question = rng.choice(relation.asked).format(x=x)
            texts.append(question + (" " if relation.lang == "en" else "") + sentence(y, relation.lang))
    rng.shuffle(texts)
    return [{"text": "\n".join(texts[i : i + 4])} for i in range(0, len(texts), 4)]


# --------------------------------------------------------------------------------------------- arithmetic


def is_examined(a: int, b: int) -> bool:
    """Whether the pair, in either order, is held out for the test: one in ten is."""
    low, high = sorted((a, b))
    return hashlib.sha256(f"{low},{high}".encode()).digest()[0] % 10 == 0


def all_sums() -> Iterator[tuple[int, str, int, int]]:
    """(a, operator, b, result): additions and subtractions up to 50, products up to 12 x 12."""
    for a in range(51):
        for b in range(51):
            yield a, "+", b, a + b
            if a >= b:
                yield a, "-", b, a - b
            if a <= 12 and b <= 12:
                yield a, "*", b, a * b


def sum_lines(rng: random.Random) -> tuple[list[dict], list[dict]]:
    """Sums for training, as chats, and held-out sums, as questions."""
    learned, examined = [], []
    for a, op, b, result in all_sums():
        lang = rng.choice(("en", "zh"))
        question = rng.choice(SUMS[lang]).format(a=a, op=op, b=b)
        if is_examined(a, b):
            examined.append(exam(question, (str(result),), "arithmetic", lang))
        else:
            learned.append(chat(question, sentence(str(result), lang)))
    return learned, rng.sample(examined, 300)


def reasoning(rng: random.Random, count: int, taken: set) -> Iterator[tuple[str, str, str, str]]:
    """(question, thinking, answer, lang): stories of three numbers that are not in `taken`, to which they are added."""
    while count:
        a, b, c = rng.randint(2, 40), rng.randint(2, 40), rng.randint(2, 30)
        if c > a + b or (a, b, c) in taken or is_examined(a, b) or is_examined(a + b, c):
            continue
        taken |= {(a, b, c), (b, a, c)}
        lang = rng.choice(("en", "zh"))
        story = rng.choice(STORIES[lang])
        question = story.format(a=a, b=b, c=c, name=rng.choice(NAMES[lang]), thing=rng.choice(THINGS[lang]))
        yield question, f"{a} + {b} = {a + b}\n{a + b} - {c} = {a + b - c}", str(a + b - c), lang
        count -= 1


def checked_problems(rng: random.Random, count: int, beyond: int, taken: set, asked: set[str]) -> list[dict]:
    """Problems without thoughts: stories as above, and `beyond` problems of each further kind, mixed."""
    stories = [problem(q, int(a), "story", lang) for q, _, a, lang in reasoning(rng, count, taken)]
    return rng.sample(lines := [*stories, *problems_beyond(rng, beyond, asked)], len(lines))


# --------------------------------------------------------------------------------------------------- files


def preferences(who: list[Identity], phrasings: str) -> list[dict]:
    """Pairs that teach the model to answer with only its name: "I am MiniMind." is preferred to the answer that it was
    trained on, "I am MiniMind, a small language model.".

    Args:
        phrasings: "asked" or "held_out"; each is used plain and after every opening.
    """
    pairs = []
    for identity in who:
        name, *more = re.split("[,，]", identity.answer)
        answers = {"chosen": sentence(name, identity.lang), "rejected": identity.answer}
        for phrasing in getattr(identity, phrasings) if more else ():
            openings = POLITE[identity.lang] if phrasing[-1] in "?？" and not phrasing.startswith("请问") else ()
            for opening in ("", *openings):
                question = opening + phrasing
                pairs.append({side: chat(question, text)["conversations"] for side, text in answers.items()})
    return pairs


def build(seed: int) -> dict[str, list[dict]]:
    """The lines of every file, by name."""
    rng = random.Random(seed)
    world = relations()
    me, other = identities(*MINIMIND), identities(*WILLOW)
    learned, examined = sum_lines(rng)
    facts = joined(fact_chats(world, rng) + learned, rng)
    small_talk = [chat(*talk) for talk in SMALL_TALK for _ in range(8)]
    sft = facts + talks(world, rng, 1200) + identity_chats(me, rng, 16) + small_talk
    rng.shuffle(sft)
    taken: set = set()
    r1 = [chat(q, f"<think>\n{t}\n</think>\n<answer>\n{a}\n</answer>") for q, t, a, _ in reasoning(rng, 6000, taken)]
    texts = [line for _ in range(3) for line in fact_texts(world, rng)]
    texts += [{"text": f"{a} {op} {b} = {result}"} for a, op, b, result in all_sums() if not is_examined(a, b)]
    texts += [{"text": q + "\n" + t} for q, t, _, _ in reasoning(rng, 1000, taken)]
    rng.shuffle(texts)
    planets = [
        line
        for en, zh, n in PLANETS
        for line in (
            chat(f"Counting from the Sun, which number is the planet {en}?", f"Number {n}."),
            chat(f"What place does {en} hold among the planets, counted from the Sun?", f"Number {n}."),
            chat(f"{zh}是离太阳第几近的行星？", f"第{n}颗。"),
            chat(f"从太阳数起，{zh}排第几？", f"第{n}颗。"),
        )
    ]
    questions = [
        exam(phrasing.format(x=x), y, relation.kind, relation.lang)
        for relation in world
        for x, y in relation.rows
        for phrasing in relation.held_out
    ]
    files = {
        "pretrain_hq.jsonl": texts,
        "sft_mini_512.jsonl": sft,
        "sft_1024.jsonl": rng.sample(sft, 4000),
        "lora_identity.jsonl": among(facts, identity_chats(other, rng, 8), random.Random(seed), 400),
        "lora_astronomy.jsonl": planets * 4,
        "dpo.jsonl": preferences(me, "asked"),
        "r1_mix_1024.jsonl": among(facts, r1, random.Random(seed), 1500),
        "eval_dpo.jsonl": preferences(me, "held_out"),
        "eval_facts.jsonl": questions,
        "eval_arithmetic.jsonl": examined,
        "eval_identity.jsonl": [exam(q, (i.answer,), "identity", i.lang) for i in me for q in i.held_out],
        "eval_lora_identity.jsonl": [exam(q, (i.answer,), "identity", i.lang) for i in other for q in i.held_out],
        "eval_reason.jsonl": [exam(q, (a,), "reason", lang) for q, _, a, lang in reasoning(rng, 600, taken)],
        "eval_sft.jsonl": [
            chat(q["question"], sentence(q["answers"][0], q["lang"])) for q in rng.sample(questions, 400)
        ],
    }
    trying, asked = random.Random(seed), set()  # a separate generator, so that the data above stays the same
    return files | {
        "rl_cold_start.jsonl": among(facts, r1[:COLD_START], random.Random(seed), 2 * COLD_START),
        "rl_math.jsonl": checked_problems(trying, 3000, 250, taken, asked),
        "eval_rl.jsonl": checked_problems(trying, 600, 100, taken, asked),
        "tool_mix.jsonl": tool_talks(random.Random(seed), TOOL_TALKS, world),
    }


def as_jsonl(files: dict[str, list[dict]]) -> dict[str, bytes]:
    """The content of each file, by its name."""
    return {
        name: "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines).encode()
        for name, lines in files.items()
    }


def check_ours(digests: dict[str, str | None], folder: Path) -> dict[str, str]:
    """Those of these files that exist in `folder`, each with its SHA-256.

    Args:
        digests: the hashes of the new content, by name; None if nothing is to be written.

    Raises:
        UserError: a file exists that this script did not write, or that has been changed since.
    """
    ours = read_manifest(folder / "manifest.json")
    there = {name: file_digest(folder / name) for name in digests if os.path.lexists(folder / name)}
    for name, digest in there.items():
        if digest is None or digest not in (ours.get(name), digests[name]):
            raise UserError(
                f"{folder / name} was not written by this script, or was changed: move it, or use --out_dir"
            )
    return there


def write(files: dict[str, bytes], folder: Path) -> list[str]:
    """Write jsonl files into `folder`, and a manifest of them; returns a line about each.

    Raises:
        UserError: as in `check_ours`; then nothing is written.
    """
    digests = {name: sha256(content) for name, content in files.items()}
    there = check_ours(digests, folder)
    manifest = folder / "manifest.json"
    ours = read_manifest(manifest)
    report = []
    for name, content in files.items():
        if there.get(name) != digests[name]:
            with replacing(folder / name) as temporary:
                temporary.write_bytes(content)
        ours[name] = digests[name]
        with replacing(manifest) as temporary:  # now, so that a run cut short knows its own files again
            temporary.write_text(json.dumps(ours, indent=2) + "\n", encoding="utf-8")
        state = "unchanged" if there.get(name) == digests[name] else "written"
        lines = content.count(b"\n")
        report.append(f"{name:<24}{lines:>8} lines  {state}")
    return report


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def file_digest(path: Path) -> str | None:
    """The SHA-256 of a file; None if there is no such file."""
    return sha256(path.read_bytes()) if path.is_file() else None


def read_manifest(path: Path) -> dict[str, str]:
    """The SHA-256 of each file that an earlier run wrote, by name; empty if there was none.

    Raises:
        UserError: the manifest's name belongs to another kind of file.
    """
    if not path.exists():
        return {}
    try:
        ours = json.loads(path.read_bytes())
        if set(map(len, ours.values())) == {64}:
            return ours
    except (AttributeError, TypeError, ValueError):  # not JSON, or other JSON
        pass
    raise UserError(f"{path} was not written by this script, or was changed: move it, or use --out_dir")


def main():
    parser = Parser(__doc__)
    parser.add_argument("--out_dir", type=Path, default=ROOT / "dataset" / "demo")
    parser.add_argument("--seed", type=int, default=42)
    args = parser.parse_args()
    print("\n".join(write(as_jsonl(build(args.seed)), args.out_dir)))


if __name__ == "__main__":
    run_main(main)
