"""Every way to teach the demo's model more, measured: preferences, an adapter, a student, thinking. `make demo-all`.

It continues from `make demo`, whose data and weights it uses (and creates if they are missing). Results of an earlier
call are reused, and interrupted training continues where it stopped.
"""

from collections.abc import Callable
from typing import NamedTuple

import _own_python  # noqa: F401  (makes .venv where packages are missing, and goes on there)
import _repo  # noqa: F401  (lets `python scripts/demo_all.py` find the packages)
import torch
from transformers import PreTrainedTokenizerBase

from model import MiniMindLM
from model.model_lora import load_lora
from scripts.demo.exam import Results, identify_training, open_model, run
from scripts.demo.first_model import make_model
from scripts.demo.measures import (
    Opened,
    bits_per_byte,
    facts,
    held_out_loss,
    prefers_the_better,
    problems,
    reasoning_accuracy,
    says_it_is_another,
    sft_loss_change,
)
from scripts.demo.settings import DATA, FROM_TEACHER, OUT, PRETRAIN, REASON, SFT, SIZE, STUDENT, TRAINING
from scripts.report_card.examining import DEMO_EXAMS, remember_exam
from scripts.report_card.making import make_report
from trainer.arguments import Parser
from trainer.errors import run_main
from trainer.weights import read_settings

Measure = Callable[[MiniMindLM, PreTrainedTokenizerBase], float]

# --------------------------------------------------------------------------------------------------------- stages


class Stage(NamedTuple):
    """A training, and its measure before and after; weights are named as in OUT."""

    name: str
    command: tuple[str, ...]  # nothing: `make demo` has done it
    start: str | None  # None: random weights
    end: str
    what: str
    measure: Measure
    form: str = "{:.1%}"
    answers: bool = True  # so that it can be asked for facts
    detail: Callable[[Opened, Opened], str] | None = None  # of start and end: more to say than two numbers
    teacher: str | None = None

    def state(self) -> dict[str, str]:
        """Identifies a training of its weights, and of the weights that it starts from."""
        sources = [name for name in (self.start, self.teacher) if name]
        return {
            "began": "-".join(identify_training(OUT / f"{name}.pth") for name in sources),
            "trained": identify_training(OUT / f"{self.end}.pth"),
        }


TEXTS = "bits per byte, held-out texts"
STAGES = (
    Stage("pretraining", (), None, "pretrain_256", TEXTS, bits_per_byte, "{:.3f}", answers=False),
    Stage("SFT", (), "pretrain_256", "full_sft_256", "facts right, new phrasings", facts),
    Stage(
        "DPO",
        (
            *("train_dpo.py", *SIZE, "--data_path", str(DATA / "dpo.jsonl")),
            *("--eval_path", str(DATA / "eval_dpo.jsonl")),
            *("--epochs", "3", "--batch_size", "4", "--learning_rate", "1e-5"),
        ),
        "full_sft_256",
        "rlhf_256",
        "better answer likelier, new pairs",
        prefers_the_better,
        detail=sft_loss_change,
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
        "nats per token, held-out answers",
        held_out_loss,
        "{:.3f}",
        teacher="full_sft_256",
    ),
    Stage(
        "reasoning",
        ("train_distill_reason.py", *SIZE, "--data_path", str(DATA / "r1_mix_1024.jsonl"), *REASON),
        "rlhf_256",
        "reason_256",
        "answers right, new problems",
        problems,
        detail=reasoning_accuracy,
    ),
)


# ------------------------------------------------------------------------------------------------------- the whole


def opened(weights: str | None, like: str) -> tuple[MiniMindLM, PreTrainedTokenizerBase]:
    """A model and its tokenizer, an adapter merged into its base; without a name a random model of the same size."""
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


def facts_known(name: str) -> float:
    """The share of the demo's facts that a model knows, also stored for the report."""
    exam = "eval_facts.jsonl"
    counts = DEMO_EXAMS[exam].ask(exam, *opened(name, name))
    remember_exam(OUT, name, exam, counts)
    right, asked = map(sum, zip(*counts.values(), strict=True))
    return right / asked


def examined(stage: Stage, known: dict) -> dict:
    """The results of a stage; its start and end are evaluated if they have not been."""
    now = stage.state()
    if known.items() >= now.items():
        return known
    print(f"\nevaluating {stage.name} …", flush=True)
    start, end = (stage.measure(*opened(weights, stage.end)) for weights in (stage.start, stage.end))
    found = {"minutes": read_settings(OUT / f"{stage.end}.pth")["seconds"] / 60, "start": start, "end": end}
    if stage.answers:
        found["facts"] = facts_known(stage.end)
    if stage.detail:
        found["detail"] = stage.detail(opened(stage.start, stage.end), opened(stage.end, stage.end))
    return known | now | found


def table(stages: tuple[Stage, ...], results: dict[str, dict]) -> str:
    """A table with a line per stage: minutes, its measure before and after, and the demo's facts known then."""
    lines = [f"{'stage':<14}{'minutes':>8}  {'measure':<36}{'start':>8}{'end':>8}{'facts':>8}"]
    for stage in stages:
        result = results[stage.name]
        start, end = (stage.form.format(result[when]) for when in ("start", "end"))
        kept = f"{result['facts']:.1%}" if stage.answers else "-"
        lines.append(f"{stage.name:<14}{result['minutes']:>8.1f}  {stage.what:<36}{start:>8}{end:>8}{kept:>8}")
    return "\n".join([*lines, f"{'all':<14}{sum(results[stage.name]['minutes'] for stage in stages):>8.1f}"])


def main():
    Parser(__doc__).parse_args()
    make_model()
    results = Results(OUT / "all.json")
    for stage in STAGES:
        known = results.get(stage.name, {})
        if stage.command:
            begins_from = stage.state()["began"]
            anew = known.get("begins_from", begins_from) != begins_from  # it has been trained again since
            if not anew:
                known = results.keep(stage.name, known | {"begins_from": begins_from})
            run(*stage.command, "--overwrite" if anew else "--resume")
            known = {**known, "begins_from": begins_from}
        results.keep(stage.name, examined(stage, known))
    for stage in STAGES:
        if stage.detail:
            print(f"\n{results[stage.name]['detail']}")
    print(f"\n{table(STAGES, results)}")
    print(f"\nreport: {make_report(OUT)}")


if __name__ == "__main__":
    run_main(main)
