"""Does reinforcement learning pay off? GRPO against more SFT on the same 300 thoughts, for the same minutes.

    python -m benchmarks.rl_gain --seed 1                 after `make demo`, whose weights and data it uses

One seed per call. Both start from the same cold start. Results of an earlier call are reused, and interrupted training
continues. With the results of several seeds in the folder, their means and spreads are printed.
"""

import json
import math
from statistics import mean, stdev

import trainer.start  # noqa: F401  (first of all: what to do where PyTorch, or a home folder, is missing)

from scripts.demo import trying
from scripts.demo.exam import Results, identify_training
from scripts.demo.measures import with_error
from scripts.demo.settings import DATA, OUT
from trainer.argument_types import positive_int, seed
from trainer.arguments import Parser
from trainer.errors import UserError, run_main
from trainer.weights import read_settings


def more_sft(cold: trying.Stage, root, seconds: float, seed: int) -> trying.Stage:
    """More SFT on the cold start's data, for about this many seconds according to its speed."""
    settings = read_settings(cold.weights(root))
    steps = max(1, math.ceil(seconds / settings["seconds"] * settings["step"]))
    script, *flags = cold.command
    start = ("--from_weight", str(cold.weights(root)), "--data_path", str(DATA / "rl_cold_start.jsonl"))
    length = ("--epochs", str(steps), "--max_steps", str(steps), "--seed", str(seed))
    return trying.Stage("more_sft", "reason", (script, *flags, *start, *length))


def main():
    parser = Parser(__doc__)
    parser.add_argument("--seed", type=seed, default=1)
    parser.add_argument("--problems", type=positive_int, help="ask only the first N unseen problems (default: all)")
    args = parser.parse_args()
    start = OUT / "full_sft_256.pth"
    if not start.exists():
        raise UserError(f"{start} is missing: run make demo to create it")
    folder = OUT / "rl_gain" / identify_training(start)  # other weights, other results
    root = folder / str(args.seed)
    root.mkdir(parents=True, exist_ok=True)
    results = Results(root / "results.json")

    def measured(name: str, stage: trying.Stage) -> dict:
        trying.train(stage, root)
        if name not in results:
            found = trying.examine(stage.weights(root), seed=args.seed, problems=args.problems)
            minutes = read_settings(stage.weights(root))["seconds"] / 60
            results.keep(name, found._asdict() | {"minutes": minutes})
        return results[name]

    stages = trying.recipe(root, start, args.seed)
    measured("cold start", stages["cold start"])
    minutes = measured("GRPO", stages["first GRPO"])["minutes"]
    measured("more SFT", more_sft(stages["cold start"], root, 60 * minutes, args.seed))

    print(f"\nseed {args.seed}, {results['GRPO']['problems']} unseen problems in range")
    for name, found in results.items():
        right = with_error(round(found["greedy"] * found["problems"]), found["problems"])
        further = with_error(round(found["beyond"] * found["beyond_problems"]), max(1, found["beyond_problems"]))
        print(f"{name:<12}{found['minutes']:>6.1f} min  right {right}  beyond {further}  form {found['form']:.1%}")
    seeds = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*/results.json"))]
    if len(seeds) > 1 and all("more SFT" in of_one for of_one in seeds):
        print(f"\n{len(seeds)} seeds, right answers in range, mean ± standard deviation over the seeds")
        for name in results:
            shares = [of_one[name]["greedy"] for of_one in seeds]
            print(f"{name:<12}{mean(shares):>7.1%} ± {stdev(shares):.1%}")


if __name__ == "__main__":
    run_main(main)
