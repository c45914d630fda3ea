"""The whole DeepSeek-R1 recipe with the demo's model: cold start, GRPO, rejection sampling, SFT, GRPO. `make demo-r1`.

It continues from `make demo`, whose data and weights it uses (and creates if they are missing), and writes only to
out/demo/r1. Results of an earlier call are reused; interrupted training continues where it stopped. Finally GRPO from
the chat model, which has never seen a thought (R1-Zero), is run for comparison.
"""

import _repo  # noqa: F401  (lets `python scripts/demo_r1.py` find the packages)

from scripts.demo import trying
from scripts.demo.exam import Results, identify_training, open_model
from scripts.demo.first_model import make_model
from scripts.demo.measures import facts
from scripts.demo.settings import OUT
from trainer.argument_types import seed
from trainer.arguments import Parser
from trainer.errors import run_main
from trainer.weights import read_settings


def main():
    parser = Parser(__doc__)
    parser.add_argument("--seed", type=seed, default=42)
    args = parser.parse_args()
    make_model()
    start = OUT / "full_sft_256.pth"
    root = trying.R1 / f"{identify_training(start)}_{args.seed}"  # other weights or another seed, another recipe
    root.mkdir(parents=True, exist_ok=True)
    results = Results(root / "results.json")
    verifier = None

    def remember(name: str, weights, minutes: float) -> None:
        if name not in results:
            print(f"\nevaluating {name} …", flush=True)
            found = trying.examine(weights, verifier)._asdict()
            results.keep(name, found | {"minutes": minutes, "facts": facts(*open_model(weights))})

    remember("chat model", start, read_settings(start)["seconds"] / 60)
    stages = trying.recipe(root, start, args.seed)
    for name, stage in stages.items():
        if name == "SFT again":
            trying.sample(stages["first GRPO"], root, args.seed)
            verifier = trying.train_verifier(root, start, args.seed)
        trying.train(stage, root)
        weights = stage.weights(root)
        remember(name, weights, read_settings(weights)["seconds"] / 60)
    for name in ("cold start", "second GRPO"):
        print(f"\nThree thoughts, {name}:\n" + "\n\n".join(trying.thoughts(stages[name].weights(root))))
    print(f"\n{trying.table(results)}")
    print(f"\nreward and length over steps: {stages['first GRPO'].weights(root).with_suffix('.png')}")


if __name__ == "__main__":
    run_main(main)
