"""What thinking adds: the demo's reasoning model against one trained on the answers only.

    python -m benchmarks.reasoning_gain                  after `make demo-all`, whose weights and data it uses

Both start from the same weights and see the same problems in the same batches for the same steps; the second with
train_full_sft.py and answers without the thinking. Both are asked new problems, greedy and by majority of 8 samples.
"""

import copy
import json

import trainer.start  # noqa: F401  (first of all: what to do where PyTorch, or a home folder, is missing)

from model.reasoning import split_reasoning
from scripts.demo.exam import identify_training, open_model, read_lines, run
from scripts.demo.measures import VOTES, Solved, solve, with_error
from scripts.demo.settings import DATA, OUT, REASON, SIZE
from trainer.arguments import Parser
from trainer.errors import UserError, run_main
from trainer.weights import read_settings


def without_thinking(lines: list[dict]) -> list[dict]:
    """The same chats, with each answer reduced to the text between its answer tags."""
    lines = copy.deepcopy(lines)
    for line in lines:
        for turn in line["conversations"]:
            if turn["role"] == "assistant":
                turn["content"] = split_reasoning(turn["content"])[1]
    return lines


def main():
    Parser(__doc__).parse_args()
    for weights in (OUT / "rlhf_256.pth", OUT / "reason_256.pth"):
        if not weights.exists():
            raise UserError(f"{weights} is missing: run make demo-all to create it")
    out = OUT / "reasoning_gain" / identify_training(OUT / "rlhf_256.pth")  # another start, another comparison
    out.mkdir(parents=True, exist_ok=True)
    data = out / "answers_alone.jsonl"
    lines = without_thinking(read_lines(DATA / "r1_mix_1024.jsonl"))
    data.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), encoding="utf-8")
    start = ("--from_weight", str(OUT / "rlhf_256.pth"))
    run("train_full_sft.py", *SIZE, *REASON, "--out_dir", str(out), "--data_path", str(data), *start, "--resume")

    models = {"thinks first": OUT / "reason_256.pth", "answers alone": out / "full_sft_256.pth"}
    steps = {read_settings(weights)["step"] for weights in models.values()}
    if len(steps) > 1:
        raise UserError(f"the two were trained for {sorted(steps)} steps: make demo-all again, and remove {out}")
    solved: dict[str, Solved] = {name: solve(*open_model(weights)) for name, weights in models.items()}

    print(
        f"\n{next(iter(solved.values())).problems} new problems, both trained for {steps.pop()} steps on the same ones"
    )
    print(f"{'model':<15}{'form right':>12}{'right, greedy':>18}{f'right, {VOTES} votes':>18}")
    for name, of in solved.items():
        right, by_vote = (with_error(count, of.problems) for count in (of.greedy, of.vote))
        print(f"{name:<15}{of.form / of.problems:>12.1%}{right:>18}{by_vote:>18}")


if __name__ == "__main__":
    run_main(main)
