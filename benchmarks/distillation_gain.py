"""What a teacher is worth: a student with a quarter of its parameters, trained with and without it for the same steps.

    python -m benchmarks.distillation_gain               after `make demo-all`, whose weights and data it uses
    python -m benchmarks.distillation_gain --epochs 1

Both start from the same pretrained student and see the same batches in the same order; each seed is another order. What
is measured: nats a token of the answers that SFT keeps aside, and facts right in phrasings never seen, greedy.
"""

from statistics import mean, stdev

from scripts.demo_measures import facts, held_out_loss
from scripts.demo_settings import FROM_TEACHER, OUT, SFT, STUDENT, TRAINING
from scripts.examination import open_model, run
from trainer.arguments import Parser, positive
from trainer.errors import UserError, launch
from trainer.weights import read_settings

TRAININGS = {  # how each is trained, and what it writes
    "without": (("train_full_sft.py",), "full_sft_128"),
    "with": (("train_distillation.py", *FROM_TEACHER), "full_dist_128"),
}


def main():
    parser = Parser(__doc__)
    parser.add_argument("--seeds", type=positive, default=3, help="how many: 1, 2, 3, …")
    parser.add_argument("--epochs", default=SFT[SFT.index("--epochs") + 1], help="(default: the demo's)")
    args = parser.parse_args()
    start, teacher = OUT / "pretrain_128.pth", OUT / "full_sft_256.pth"
    for weights in (start, teacher):
        if not weights.exists():
            raise UserError(f"{weights} is missing: make demo-all makes it")

    results: dict[str, list[tuple[float, float]]] = {name: [] for name in TRAININGS}
    for seed in range(1, args.seeds + 1):
        for name, ((script, *flags), written) in TRAININGS.items():
            out = OUT / "distillation_gain" / f"{name}_{seed}_{args.epochs}"
            common = (*STUDENT, *TRAINING, *SFT, "--epochs", args.epochs, "--out_dir", str(out), "--seed", str(seed))
            taught = ("--teacher_weight", str(teacher)) if flags else ()
            run(script, *common, *flags, *taught, "--from_weight", str(start), "--resume")
            model = open_model(out / f"{written}.pth")
            results[name].append((held_out_loss(*model), facts(*model)))
            steps = read_settings(out / f"{written}.pth")["step"]

    print(f"\n{args.seeds} seeds, {steps} steps each, from {start.name}, teacher {teacher.name}")
    print(f"{'teacher':<10}{'nats a token kept aside':>26}{'facts right':>20}")
    for name, measured in results.items():
        loss, right = zip(*measured, strict=True)
        print(f"{name:<10}{spread(loss, '.4f'):>26}{spread([100 * share for share in right], '.1f'):>19}%")


def spread(values, form: str) -> str:
    """Mean and, of several, standard deviation."""
    return f"{mean(values):{form}}" + (f" ± {stdev(values):{form}}" if len(values) > 1 else "")


if __name__ == "__main__":
    launch(main)
