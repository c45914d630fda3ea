"""Every way to teach the demo's model more, measured: preferences, an adapter, a student, thinking. `make demo-all`.

It goes on from `make demo`, whose data and weights it uses (and makes where they are missing). What is there from an
earlier call is used again, and an interrupted training goes on where it stopped.
"""

import hashlib
import json
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import _repo  # noqa: F401  (lets `python scripts/demo_all.py` find the rooms)
import torch
from transformers import PreTrainedTokenizerBase

from dataset import DPODataset, PretrainDataset, SFTDataset
from model import MiniMindLM
from model.model_lora import load_lora
from model.reasoning import is_well_formed, majority, split_reasoning
from scripts.demo import DATA, OUT, PRETRAIN, SFT, SIZE, TRAINING, make_model
from scripts.examination import answer, open_model, read_lines, run
from scripts.scoring import is_right
from train_dpo import dpo_loss
from trainer.errors import launch
from trainer.evaluation import evaluate
from trainer.files import save_json
from trainer.preference import evaluate_pairs, figures
from trainer.runtime import Runtime
from trainer.weights import read_settings

Opened = tuple[MiniMindLM, PreTrainedTokenizerBase]
Measure = Callable[[MiniMindLM, PreTrainedTokenizerBase], float]
VOTES = 8
SAMPLING = {"temperature": 0.85, "top_p": 0.85}  # as eval_model.py does

# ------------------------------------------------------------------------------------------------------- measures


def share_right(model: MiniMindLM, tokenizer: PreTrainedTokenizerBase, exam: str, max_new_tokens: int = 48) -> float:
    """How many questions of a file it answers right, greedy; thinking does not count."""
    lines = read_lines(DATA / exam)
    replies, _ = answer(model, tokenizer, [line["question"] for line in lines], max_new_tokens=max_new_tokens)
    return count_right(lines, replies) / len(lines)


def count_right(lines: list[dict], replies: list[str]) -> int:
    pairs = zip(lines, replies, strict=True)
    return sum(is_right(split_reasoning(reply)[1], line["answers"]) for line, reply in pairs)


def prefers_the_better(model: MiniMindLM, tokenizer: PreTrainedTokenizerBase) -> float:
    """The share of held-out pairs whose better answer is the more probable."""
    pairs = DPODataset(DATA / "eval_dpo.jsonl", tokenizer, 128)
    measure = partial(figures, loss_function=partial(dpo_loss, beta=0.1), length_normalize=False)
    return evaluate_pairs(model, model, pairs, here(model), 32, measure)["eval_accuracy"]


def held_out_loss(model: MiniMindLM, tokenizer: PreTrainedTokenizerBase) -> float:
    """Nats a token of the answers that SFT keeps aside."""
    rows = SFTDataset(DATA / "eval_sft.jsonl", tokenizer, 128)
    return evaluate(model, rows, tokenizer, here(model), 32)["eval_loss"]


def bits_per_byte(model: MiniMindLM, tokenizer: PreTrainedTokenizerBase) -> float:
    """Of the texts that pretraining keeps aside."""
    rows = PretrainDataset(DATA / "pretrain_hq.jsonl", tokenizer, 128, part="eval")
    return evaluate(model, rows, tokenizer, here(model), 32)["eval_bits_per_byte"]


def here(model: MiniMindLM) -> Runtime:
    return Runtime(model.device, torch.float32)


facts = partial(share_right, exam="eval_facts.jsonl")
says_it_is_another = partial(share_right, exam="eval_lora_identity.jsonl")
problems = partial(share_right, exam="eval_reason.jsonl", max_new_tokens=96)


def price_of_preferring(start: Opened, end: Opened) -> str:
    """What preference learning did to the loss that fine-tuning had brought down."""
    before, after = held_out_loss(*start), held_out_loss(*end)
    return (
        f"DPO: nats a token of the answers that SFT keeps aside {before:.4f} -> {after:.4f} ({after / before - 1:+.1%})"
    )


def thinks(start: Opened, end: Opened) -> str:
    """A thought, and how many of the new problems are right."""
    lines = read_lines(DATA / "eval_reason.jsonl")
    thought = answer(*end, [lines[0]["question"]], max_new_tokens=96)[0][0]
    return f"> {lines[0]['question']}\n{thought}\n\n{solve(*end).told()}"


class Solved(NamedTuple):
    """How many of the held-out problems: in the right form, right at temperature 0, right by majority of VOTES."""

    problems: int
    form: int
    greedy: int
    vote: int

    def told(self) -> str:
        right, by_vote = (with_error(count, self.problems) for count in (self.greedy, self.vote))
        return (
            f"Of {self.problems} new problems: form right {self.form / self.problems:.1%}, "
            f"answer right {right} greedy, {by_vote} by {VOTES} votes"
        )


def with_error(right: int, of: int) -> str:
    """A share with its standard error."""
    share = right / of
    return f"{share:.1%} ± {(share * (1 - share) / of) ** 0.5:.1%}"


def solve(model: MiniMindLM, tokenizer: PreTrainedTokenizerBase) -> Solved:
    """Ask every held-out problem, once greedy and VOTES times with eval_model.py's sampling."""
    lines = read_lines(DATA / "eval_reason.jsonl")
    questions = [line["question"] for line in lines]
    greedy, _ = answer(model, tokenizer, questions, max_new_tokens=96)
    torch.manual_seed(0)
    asked = [question for question in questions for _ in range(VOTES)]
    many, _ = answer(model, tokenizer, asked, 256, max_new_tokens=96, **SAMPLING)
    elected = [majority(many[first : first + VOTES])[0] for first in range(0, len(many), VOTES)]
    form = sum(map(is_well_formed, greedy))
    return Solved(len(lines), form, count_right(lines, greedy), count_right(lines, elected))


# --------------------------------------------------------------------------------------------------------- stages


class Stage(NamedTuple):
    """A training, and what to measure before and after it; weights are named as they lie in OUT."""

    name: str
    command: tuple[str, ...]  # nothing: `make demo` has done it
    start: str | None  # None: random weights
    end: str
    what: str
    measure: Measure
    form: str = "{:.1%}"
    answers: bool = True  # so that it can be asked for facts
    detail: Callable[[Opened, Opened], str] | None = None  # of start and end: more to say than two numbers


TEXTS = "bits a byte, texts kept aside"
STUDENT = ("--dim", "128", "--n_layers", "5", *SIZE[4:])  # a quarter of the teacher's parameters
FROM_TEACHER = ("--teacher_weight", "full_sft_256", "--alpha", "0.5", "--temperature", "2")
REASON = (
    *("--max_seq_len", "256", "--packing", "0", "--batch_size", "48", "--accumulation_steps", "1"),
    *("--epochs", "5", "--learning_rate", "1.5e-3", "--optimizer", "muon", "--warmup_iters", "20"),
)
STAGES = (
    Stage("pretraining", (), None, "pretrain_256", TEXTS, bits_per_byte, "{:.3f}", answers=False),
    Stage("SFT", (), "pretrain_256", "full_sft_256", "facts right, new phrasings", facts),
    Stage(
        "DPO",
        (
            *(
                "train_dpo.py",
                *SIZE,
                "--data_path",
                str(DATA / "dpo.jsonl"),
                "--eval_path",
                str(DATA / "eval_dpo.jsonl"),
            ),
            *("--epochs", "6", "--batch_size", "4", "--learning_rate", "1e-5"),
        ),
        "full_sft_256",
        "rlhf_256",
        "better answer likelier, new pairs",
        prefers_the_better,
        detail=price_of_preferring,
    ),
    Stage(
        "LoRA",
        (
            *("train_lora.py", *SIZE, "--data_path", str(DATA / "lora_identity.jsonl"), "--lora_name", "identity"),
            *("--epochs", "5", "--batch_size", "8", "--learning_rate", "5e-3", "--eval_interval", "0"),
        ),
        "full_sft_256",
        "lora/identity_256",
        "says who it is now, new phrasings",
        says_it_is_another,
    ),
    Stage(
        "student",
        ("train_pretrain.py", *STUDENT, *TRAINING, *PRETRAIN),
        None,
        "pretrain_128",
        TEXTS,
        bits_per_byte,
        "{:.3f}",
        answers=False,
    ),
    Stage(
        "distillation",
        ("train_distillation.py", *STUDENT, *TRAINING, *SFT, "--from_weight", "pretrain", *FROM_TEACHER),
        "pretrain_128",
        "full_dist_128",
        "nats a token, answers kept aside",
        held_out_loss,
        "{:.3f}",
    ),
    Stage(
        "reasoning",
        ("train_distill_reason.py", *SIZE, "--data_path", str(DATA / "r1_mix_1024.jsonl"), *REASON),
        "rlhf_256",
        "reason_256",
        "answers right, new problems",
        problems,
        detail=thinks,
    ),
)


# ------------------------------------------------------------------------------------------------------- the whole


def state_of(weights: str | None) -> str:
    """Tells one training of these weights from another; empty where there is none."""
    about = OUT / f"{weights}.json"
    return hashlib.sha256(about.read_bytes()).hexdigest()[:16] if about.is_file() else ""


def opened(weights: str | None, like: str) -> tuple[MiniMindLM, PreTrainedTokenizerBase]:
    """A model and its tokenizer, an adapter on its base; without a name a random model like another."""
    if weights is not None and weights.startswith("lora/"):
        about = read_settings(OUT / f"{weights}.pth")
        model, tokenizer = open_model(OUT / about["base"])
        load_lora(model, OUT / f"{weights}.pth")
    else:
        model, tokenizer = open_model(OUT / f"{weights or like}.pth")
    if weights is None:
        torch.manual_seed(0)
        model = MiniMindLM(model.config).to(model.device).eval()
    return model, tokenizer


def examined(stage: Stage, known: dict) -> dict:
    """What is known of a stage, its start and its end examined if they have not been."""
    now = {"began": state_of(stage.start), "trained": state_of(stage.end)}
    if known.items() >= now.items():
        return known
    print(f"\nexamining {stage.name} …", flush=True)
    start, end = (stage.measure(*opened(weights, stage.end)) for weights in (stage.start, stage.end))
    found = {"minutes": read_settings(OUT / f"{stage.end}.pth")["seconds"] / 60, "start": start, "end": end}
    if stage.answers:
        found["facts"] = facts(*opened(stage.end, stage.end))
    if stage.detail:
        found["detail"] = stage.detail(opened(stage.start, stage.end), opened(stage.end, stage.end))
    return known | now | found


def table(stages: tuple[Stage, ...], results: dict[str, dict]) -> str:
    """A line a stage: minutes, its own measure before and after, the demo's facts it knows then."""
    lines = [f"{'stage':<14}{'minutes':>8}  {'measure':<36}{'start':>8}{'end':>8}{'facts':>8}"]
    for stage in stages:
        result = results[stage.name]
        start, end = (stage.form.format(result[when]) for when in ("start", "end"))
        kept = f"{result['facts']:.1%}" if stage.answers else "-"
        lines.append(f"{stage.name:<14}{result['minutes']:>8.1f}  {stage.what:<36}{start:>8}{end:>8}{kept:>8}")
    return "\n".join([*lines, f"{'all':<14}{sum(results[stage.name]['minutes'] for stage in stages):>8.1f}"])


def main():
    make_model()
    file = OUT / "all.json"
    results = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}

    def remember(stage: Stage, known: dict) -> dict:
        results[stage.name] = known
        save_json(results, file)
        return known

    for stage in STAGES:
        known = results.get(stage.name, {})
        if stage.command:
            begins_from = state_of(stage.start)
            anew = known.get("begins_from", begins_from) != begins_from  # it has been trained again since
            if not anew:
                known = remember(stage, known | {"begins_from": begins_from})
            run(*stage.command, "--overwrite" if anew else "--resume")
            known = {**known, "begins_from": begins_from}
        remember(stage, examined(stage, known))
    for stage in STAGES:
        if stage.detail:
            print(f"\n{results[stage.name]['detail']}")
    print(f"\n{table(STAGES, results)}")


if __name__ == "__main__":
    launch(main)
