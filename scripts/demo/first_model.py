"""The first model of the demo: training it, and testing it on held-out questions."""

import json
import math
import time
from collections.abc import Sequence
from pathlib import Path

from scripts.demo.exam import answer, open_model, read_lines, run
from scripts.demo.scoring import format_table, is_right, nearest_line, tally
from scripts.demo.settings import DATA, OUT, PRETRAIN, SFT, SIZE, TRAINING
from scripts.report_card.examining import by_language, remember_exam
from trainer.weights import read_settings

EXAMS = {
    "facts": "Known facts in unseen phrasings",
    "identity": "Who it is, likewise",
    "arithmetic": "Unseen sums",
}
SHOWN = ("你是谁？", "中国的首都是哪里？", "Who made you?", "What is the chemical symbol of gold?")


def show_examination(weights: Path) -> dict[str, float]:
    """Ask every held-out question, print a summary, and return the shares of right answers."""
    model, tokenizer = open_model(weights)
    replies, _ = answer(model, tokenizer, SHOWN)
    print("\nA few answers:")
    for question, reply in zip(SHOWN, replies, strict=True):
        print(f"  > {question}\n    {reply}")

    exams = {exam: read_lines(DATA / f"eval_{exam}.jsonl") for exam in EXAMS}
    shares, asked, ended = {}, 0, 0
    for exam, questions in exams.items():
        replies, whole = answer(model, tokenizer, [question["question"] for question in questions])
        counts = tally(questions, replies)
        print(f"\n{EXAMS[exam]} (greedy, exact match):\n{format_table(counts)}")
        remember_exam(weights.parent, weights.stem, f"eval_{exam}.jsonl", by_language(counts))
        shares |= {f"{exam}/{lang}/{kind}": right / of for (lang, kind), (right, of) in counts.items()}
        asked, ended = asked + len(questions), ended + whole
        if exam == "facts":
            show_nearest(questions, replies)
    print(f"\nanswers that ended with </s>:  {ended} of {asked} ({ended / asked:.1%})")
    return shares | {"ended": ended / asked}


def show_nearest(questions: Sequence[dict], replies: Sequence[str], count: int = 10) -> None:
    """Print some of the questions, spread over all kinds, each with the most similar training question."""
    trained = [
        turn["content"]
        for line in read_lines(DATA / "sft_mini_512.jsonl")
        for turn in line["conversations"]
        if turn["role"] == "user"
    ]
    print(f"\n{count} of them, with the nearest question the model was trained on:")
    for i in range(0, len(questions), math.ceil(len(questions) / count)):
        question = questions[i]["question"]
        mark = "right" if is_right(replies[i], questions[i]["answers"]) else "WRONG"
        print(f"  {question}  ->  {replies[i]}  ({mark})\n      nearest: {nearest_line(question, trained)}")


def make_model() -> None:
    """Make the data, pretrain and fine-tune, as far as results are missing."""
    run("scripts/make_demo_data.py")
    run("train_pretrain.py", *SIZE, *TRAINING, *PRETRAIN, "--resume")
    run("train_full_sft.py", *SIZE, *TRAINING, *SFT, "--resume")


def run_demo() -> None:
    """Train the model if it is missing, test it, and report the time."""
    started = time.monotonic()
    make_model()
    shares = show_examination(OUT / "full_sft_256.pth")
    (OUT / "accuracy.json").write_text(json.dumps(shares, indent=2) + "\n", encoding="utf-8")
    minutes = sum(read_settings(OUT / f"{name}_256.pth")["seconds"] for name in ("pretrain", "full_sft")) / 60
    print(f"\ntraining took {minutes:.1f} minutes, this call {(time.monotonic() - started) / 60:.1f}")
    print(f"loss curves: {OUT / 'pretrain_256.png'}, {OUT / 'full_sft_256.png'}")
    print("chat with it:   .venv/bin/python eval_model.py --out_dir out/demo --dim 256 --temperature 0")
