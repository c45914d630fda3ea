"""The recipe of DeepSeek-R1 (arXiv:2501.12948, section 2.3) in small: its stages as commands, and what each achieves.

    cold start    SFT on 300 written thoughts and some general chats, from the demo's chat model
    first GRPO    reinforcement learning
    rejection     its right answers in the right format become SFT lines, mixed with general chats
    SFT           of the chat model, on these
    second GRPO   from there

Everything is in `out/demo/r1`, with one folder per stage: no other demo's weights are changed.
"""

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from dataset.rl_dataset import RLDataset
from model.reasoning import majority
from scripts.demo.exam import open_model, read_lines, run
from scripts.demo.settings import DATA, OUT, SIZE
from trainer.files import replacing
from trainer.reward_model import load_reward_model, score_chats
from trainer.rewards import REWARDS, Reply
from trainer.rollouts import Writer, reply_of

R1 = OUT / "r1"
VOTES = 8
LIMIT = 64  # tokens of an answer; those of the cold start have about 30
SIZES = (*SIZE[:4], "--max_seq_len", "160")
GENERAL = 2000  # chats of the demo's SFT among the sampled answers
COLD = (
    *("--packing", "0", "--batch_size", "32", "--accumulation_steps", "1", "--eval_interval", "0"),
    *("--epochs", "4", "--learning_rate", "7e-4", "--optimizer", "muon", "--warmup_iters", "10"),
)
AGAIN = (
    *("--packing", "0", "--batch_size", "48", "--accumulation_steps", "1", "--eval_interval", "0"),
    *("--epochs", "2", "--learning_rate", "1e-3", "--optimizer", "muon", "--warmup_iters", "10"),
)
TRYING = (
    *("--data_path", str(DATA / "rl_math.jsonl"), "--eval_interval", "0", "--max_new_tokens", str(LIMIT)),
    *("--batch_size", "16", "--group_size", "8", "--epochs", "9", "--learning_rate", "3e-5", "--warmup_iters", "5"),
    *("--loss", "dr_grpo", "--log_interval", "5", "--save_interval", "20"),
)
FIRST_STEPS, SECOND_STEPS, ZERO_STEPS = ("180", "60", "30")  # of 128 answers


class Stage(NamedTuple):
    """A training of the recipe: its folder in `R1`, the name of its weights, and its command without --out_dir."""

    folder: str
    written: str
    command: tuple[str, ...]

    def weights(self, root: Path) -> Path:
        return root / self.folder / f"{self.written}_256.pth"


def recipe(root: Path, start: Path, seed: int) -> dict[str, Stage]:
    """The stages in order, by name, each starting from an earlier one's weights under `root`."""
    cold = Stage("cold_start", "reason", ("train_distill_reason.py", *COLD, *_from(start)))
    cold = cold._replace(command=(*cold.command, "--data_path", str(DATA / "rl_cold_start.jsonl")))
    first = Stage("grpo_1", "grpo", ("train_grpo.py", *TRYING, *_from(cold.weights(root)), "--max_steps", FIRST_STEPS))
    again = Stage("sft", "reason", ("train_distill_reason.py", *AGAIN, *_from(start)))
    again = again._replace(command=(*again.command, "--data_path", str(root / "sampled.jsonl")))
    last = Stage("grpo_2", "grpo", ("train_grpo.py", *TRYING, *_from(again.weights(root)), "--max_steps", SECOND_STEPS))
    zero = Stage("zero", "grpo", ("train_grpo.py", *TRYING, *_from(start), "--max_steps", ZERO_STEPS))
    stages = {"cold start": cold, "first GRPO": first, "SFT again": again, "second GRPO": last, "R1-Zero": zero}
    return {name: stage._replace(command=(*stage.command, "--seed", str(seed))) for name, stage in stages.items()}


def _from(weights: Path) -> tuple[str, str]:
    return "--from_weight", str(weights)


def train(stage: Stage, root: Path) -> None:
    """Run a stage, or continue it; nothing if it is finished."""
    run(stage.command[0], *SIZES, *stage.command[1:], "--out_dir", str(root / stage.folder), "--resume")


def sample(stage: Stage, root: Path, seed: int) -> None:
    """Write right answers of a stage's model in the right format, mixed with general chats, as `sampled.jsonl`, and
    pairs of right and wrong answers as `pairs.jsonl`, for the verifier; does nothing if these files exist."""
    together = root / "sampled.jsonl"
    if together.exists():
        return
    kept, pairs = root / "kept.jsonl", root / "pairs.jsonl"
    files = (str(DATA / "rl_math.jsonl"), str(kept), "--pairs", str(pairs), "--overwrite")
    limits = ("--max_new_tokens", str(LIMIT), "--max_seq_len", "160", "--batch_size", "16", "--samples", "4")
    weights = ("--from_weight", str(stage.weights(root)), "--seed", str(seed))
    run("scripts/rejection_sampling.py", *files, *limits, *weights)
    general = random.Random(seed).sample(read_lines(DATA / "sft_mini_512.jsonl"), GENERAL)
    lines = [*read_lines(kept), *general]
    random.Random(seed).shuffle(lines)
    with replacing(together) as temporary:
        temporary.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), encoding="utf-8")


def train_verifier(root: Path, start: Path, seed: int) -> Path:
    """Train a reward model on the pairs written by `sample`."""
    settings = ("--epochs", "2", "--batch_size", "16", "--learning_rate", "3e-4", "--eval_interval", "0")
    data = ("--data_path", str(root / "pairs.jsonl"), *_from(start), "--out_dir", str(root / "verifier"))
    run("train_reward.py", *SIZES, *settings, *data, "--seed", str(seed), "--resume")
    return root / "verifier" / "reward_256.pth"


class Solved(NamedTuple):
    """Shares of solved unseen problems, in the cold start's range and beyond it, and properties of the answers."""

    problems: int  # in range
    form: float
    greedy: float
    votes: float
    verifier: float | None
    beyond: float  # greedy
    beyond_problems: int
    tokens: float  # of a greedy answer, thought included


def examine(weights: Path, verifier: Path | None = None, seed: int = 0, problems: int | None = None) -> Solved:
    """Ask every problem of eval_rl.jsonl, greedy, and those in range VOTES times at temperature 1.

    Args:
        problems: ask only the first N.
    """
    model, tokenizer = open_model(weights)
    data = RLDataset(DATA / "eval_rl.jsonl", tokenizer, 160, False, max_new_tokens=LIMIT)
    kinds = [line["kind"] for line in read_lines(DATA / "eval_rl.jsonl")]
    numbers = [int(number) for number in data.numbers][:problems]
    within = [number for number in numbers if kinds[number] == "story"]
    beyond = [number for number in numbers if kinds[number] != "story"]
    writer = Writer(model, tokenizer, 128, 160, LIMIT)

    def ask(asked: Sequence[int], temperature: float) -> list[Reply]:
        seeds = [seed * 1_000_003 + place for place in range(len(asked))]
        answers = writer.write([data.prompt(number) for number in asked], seeds, temperature)
        return [reply_of(data, number, answer, LIMIT) for number, answer in zip(asked, answers, strict=True)]

    greedy, further = ask(within, 0.0), ask(beyond, 0.0)
    many = ask([number for number in within for _ in range(VOTES)], 1.0)
    groups = [many[first : first + VOTES] for first in range(0, len(many), VOTES)]
    elected = [of_one[[r.text for r in of_one].index(majority([r.text for r in of_one])[0])] for of_one in groups]
    chosen = None
    if verifier is not None:
        judge = load_reward_model(verifier, tokenizer).to(model.device)
        chats = [[*r.question, {"role": "assistant", "content": r.text}] for r in many]
        scores = score_chats(judge, tokenizer, chats, batch_size=128)
        best = [max(range(VOTES), key=lambda i, at=at: scores[at + i]) for at in range(0, len(many), VOTES)]
        chosen = _share("accuracy", [of_one[i] for of_one, i in zip(groups, best, strict=True)])
    return Solved(
        problems=len(within),
        form=_share("format", greedy),
        greedy=_share("accuracy", greedy),
        votes=_share("accuracy", elected),
        verifier=chosen,
        beyond=_share("accuracy", further),
        beyond_problems=len(beyond),
        tokens=sum(len(r.tokens) for r in greedy) / max(1, len(greedy)),
    )


def _share(rule: str, replies: Sequence[Reply]) -> float:
    return sum(REWARDS[rule](reply) for reply in replies) / max(1, len(replies))


def thoughts(weights: Path, count: int = 3) -> list[str]:
    """A model's unedited greedy answers to the first problems of eval_rl.jsonl."""
    model, tokenizer = open_model(weights)
    data = RLDataset(DATA / "eval_rl.jsonl", tokenizer, 160, False, max_new_tokens=LIMIT)
    numbers = [int(number) for number in data.numbers][:count]
    answers = Writer(model, tokenizer, count, 160, LIMIT).write([data.prompt(n) for n in numbers], [0] * count, 0.0)
    return [
        f"> {data.problem(number).chat[-1]['content']}\n{answer.text}"
        for number, answer in zip(numbers, answers, strict=True)
    ]


def table(results: dict[str, dict]) -> str:
    """A table with a line per stage: format and right answers on unseen problems in range, right answers beyond it,
    length, facts, minutes."""
    names = f"{'form':>8}{'greedy':>9}{'8 votes':>9}{'verifier':>10}{'beyond':>9}{'tokens':>8}{'facts':>8}"
    lines = [f"{'':<14}{'minutes':>8}{names}"]
    for name, found in results.items():
        chosen = "-" if found["verifier"] is None else f"{found['verifier']:.1%}"
        shares = (
            f"{found['form']:>8.1%}{found['greedy']:>9.1%}{found['votes']:>9.1%}{chosen:>10}{found['beyond']:>9.1%}"
        )
        lines.append(f"{name:<14}{found['minutes']:>8.1f}{shares}{found['tokens']:>8.1f}{found['facts']:>8.1%}")
    return "\n".join(lines)
