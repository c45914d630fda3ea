"""The whole way in minutes: demo data, pretraining, fine-tuning, an examination. `make demo` runs it.

Everything lies in dataset/demo/ and out/demo/; what is there from an earlier call is used again, and an interrupted
training goes on where it stopped.
"""

import json
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import _repo  # noqa: F401  (lets `python scripts/demo.py` find the rooms)
import torch

from model import MiniMindLM
from model.chat import render_chats
from scripts.scoring import format_table, is_right, nearest_line, tally
from trainer.arguments import ROOT
from trainer.errors import UserError, launch
from trainer.runtime import pick_device
from trainer.weights import load_tokenizer, load_weights, read_settings

DATA, OUT = ROOT / "dataset" / "demo", ROOT / "out" / "demo"
SIZE = ("--dim", "256", "--n_layers", "8", "--max_seq_len", "128", "--out_dir", str(OUT))  # samples are short here
TRAINING = ("--batch_size", "32", "--accumulation_steps", "1", "--warmup_iters", "20", "--optimizer", "muon")
PRETRAIN = ("--data_path", str(DATA / "pretrain_hq.jsonl"), "--epochs", "4", "--learning_rate", "2e-3")
SFT = (
    *("--data_path", str(DATA / "sft_mini_512.jsonl"), "--eval_path", str(DATA / "eval_sft.jsonl")),
    *("--epochs", "3", "--learning_rate", "1.5e-3"),
)
EXAMS = {
    "facts": "Known facts in phrasings that no training line has",
    "identity": "Who it is, likewise",
    "arithmetic": "Sums never seen",
}
SHOWN = ("你是谁？", "中国的首都是哪里？", "Who made you?", "What is the chemical symbol of gold?")


def run(script: str, *arguments: str) -> None:
    """Run a script of the repository; its output is the user's to see.

    Raises:
        UserError: it failed, and has said why.
    """
    print(f"\n$ python {script} {' '.join(arguments)}", flush=True)
    done = subprocess.run([sys.executable, str(ROOT / script), *arguments], check=False)
    if done.returncode:
        raise UserError(f"{script} ended with exit code {done.returncode}; `make demo` goes on from there")


def read_lines(name: str) -> list[dict]:
    return [json.loads(line) for line in (DATA / name).read_text(encoding="utf-8").splitlines()]


@torch.inference_mode()
def answer(model: MiniMindLM, tokenizer, questions: Sequence[str], batch_size: int = 128) -> tuple[list[str], int]:
    """Greedy answers to single questions, and how many ended by themselves with `</s>`."""
    chats = [[{"role": "user", "content": question}] for question in questions]
    prompts = [ids for ids, _ in render_chats(tokenizer, chats, add_generation_prompt=True)]
    replies: list[str] = [""] * len(prompts)
    ended = 0
    by_length = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    for start in range(0, len(by_length), batch_size):
        chosen = by_length[start : start + batch_size]
        width = max(len(prompts[i]) for i in chosen)
        ids = torch.tensor([[0] * (width - len(prompts[i])) + prompts[i] for i in chosen], device=model.device)
        mask = torch.tensor(
            [[0] * (width - len(prompts[i])) + [1] * len(prompts[i]) for i in chosen], device=model.device
        )
        written = model.generate(ids, mask, max_new_tokens=48)[:, width:].tolist()
        for i, tokens in zip(chosen, written, strict=True):
            if tokenizer.eos_token_id in tokens:
                tokens = tokens[: tokens.index(tokenizer.eos_token_id)]
                ended += 1
            replies[i] = tokenizer.decode(tokens)
    return replies, ended


def show_examination(weights: Path) -> dict[str, float]:
    """Ask every held-out question, print what a person wants to see, return the shares."""
    tokenizer = load_tokenizer()
    model = load_weights(weights, None, tokenizer).to(pick_device(None)).eval()
    replies, _ = answer(model, tokenizer, SHOWN)
    print("\nA few answers:")
    for question, reply in zip(SHOWN, replies, strict=True):
        print(f"  > {question}\n    {reply}")

    exams = {exam: read_lines(f"eval_{exam}.jsonl") for exam in EXAMS}
    shares, asked, ended = {}, 0, 0
    for exam, questions in exams.items():
        replies, whole = answer(model, tokenizer, [question["question"] for question in questions])
        counts = tally(questions, replies)
        print(f"\n{EXAMS[exam]} (greedy, exact match):\n{format_table(counts)}")
        shares |= {f"{exam}/{lang}/{kind}": right / of for (lang, kind), (right, of) in counts.items()}
        asked, ended = asked + len(questions), ended + whole
        if exam == "facts":
            show_nearest(questions, replies)
    print(f"\nanswers that ended by themselves: {ended} of {asked} ({ended / asked:.1%})")
    return shares | {"ended": ended / asked}


def show_nearest(questions: Sequence[dict], replies: Sequence[str], count: int = 10) -> None:
    """Print some of the questions, spread over all kinds, each with the training question most like it."""
    trained = [
        turn["content"]
        for line in read_lines("sft_mini_512.jsonl")
        for turn in line["conversations"]
        if turn["role"] == "user"
    ]
    print(f"\n{count} of them, with the nearest question the model was trained on:")
    for i in range(0, len(questions), -(-len(questions) // count)):
        question = questions[i]["question"]
        mark = "right" if is_right(replies[i], questions[i]["answers"]) else "WRONG"
        print(f"  {question}  ->  {replies[i]}  ({mark})\n      nearest: {nearest_line(question, trained)}")


def main():
    started = time.monotonic()
    run("scripts/make_demo_data.py")
    run("train_pretrain.py", *SIZE, *TRAINING, *PRETRAIN, "--resume")
    run("train_full_sft.py", *SIZE, *TRAINING, *SFT, "--resume")
    shares = show_examination(OUT / "full_sft_256.pth")
    (OUT / "accuracy.json").write_text(json.dumps(shares, indent=2) + "\n", encoding="utf-8")
    minutes = sum(read_settings(OUT / f"{name}_256.pth")["seconds"] for name in ("pretrain", "full_sft")) / 60
    print(f"\ntraining took {minutes:.1f} minutes, this call {(time.monotonic() - started) / 60:.1f}")
    print(f"loss curves: {OUT / 'pretrain_256.png'}, {OUT / 'full_sft_256.png'}")
    print("talk to it:  .venv/bin/python eval_model.py --out_dir out/demo --dim 256 --temperature 0")


if __name__ == "__main__":
    launch(main)
