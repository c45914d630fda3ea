"""Teach the demo's chat model to call tools: a calculator, a calendar, unit conversion and a table. `make demo-tools`.

It continues from the data and weights of `make demo` (which it makes if they are missing) and writes only to
out/demo/tools, where results of an earlier call are used again. A table at the end shows what the tools are worth:
unseen sums and lookups with and without tools, factual questions with a needless call, and the share of valid calls.
"""

import _repo  # noqa: F401  (lets `python scripts/demo_tools.py` find the packages)

from scripts.demo import tool_lessons
from scripts.demo.exam import Results, identify_training, run
from scripts.demo.first_model import make_model
from scripts.demo.settings import OUT
from trainer.argument_types import seed
from trainer.arguments import Parser
from trainer.errors import run_main
from trainer.weights import read_settings

SHOWN = ("What is 48213 * 7731?", "How many kaluno are in stock?", "北京是哪个国家的首都？", "2024-02-29 是星期几？")


def main():
    parser = Parser(__doc__)
    parser.add_argument("--seed", type=seed, default=42)
    args = parser.parse_args()
    make_model()
    start = OUT / "full_sft_256.pth"
    root = tool_lessons.TOOLS_OUT / f"{identify_training(start)}_{args.seed}"  # other weights or seed, another lesson
    lessons, weights = root / "lessons.jsonl", root / "full_sft_256.pth"
    tool_lessons.write_lessons(lessons, args.seed)
    flags = ("--data_path", str(lessons), "--from_weight", str(start), "--out_dir", str(root), "--seed", str(args.seed))
    run("train_full_sft.py", *tool_lessons.SIZES, *tool_lessons.LEARNING, *flags, "--resume")

    results = Results(root / "results.json")
    asked = tool_lessons.questions(args.seed)
    for name, examined, with_tools in (
        ("chat model, no tools", start, False),
        ("then, in its head", weights, False),
        ("then, with tools", weights, True),
    ):
        if name not in results:
            print(f"\nevaluating {name} …", flush=True)
            found = tool_lessons.examine(examined, asked, with_tools)
            results.keep(name, tool_lessons.summary(asked, found))
    print(f"\nA conversation:\n{tool_lessons.conversation(weights, SHOWN)}")
    print(f"\nUnseen questions, greedy:\n{tool_lessons.table_of(results)}")
    print(f"training took {read_settings(weights)['seconds'] / 60:.1f} minutes")
    print(f"talk to it:   .venv/bin/python eval_model.py --out_dir {root} --dim 256 --temperature 0 --tools all")


if __name__ == "__main__":
    run_main(main)
