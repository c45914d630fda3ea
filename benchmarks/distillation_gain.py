"""What a teacher adds: a student with a quarter of its parameters, trained with and without it for the same steps.

    python -m benchmarks.distillation_gain               after `make demo-all`, whose weights and data it uses
    python -m benchmarks.distillation_gain --lines 1200 --epochs 20

Run it with many lines and with few: a teacher helps most where the student has seen little data. Both start from the
same pretrained student and see the same batches in the same order; each seed gives another order. Measured: nats per
token on SFT's held-out answers, and the share of facts right in unseen phrasings, greedy.
"""

from pathlib import Path

import trainer.start  # noqa: F401  (first of all: what to do where PyTorch, or a home folder, is missing)

from benchmarks.comparison.training_runs import spread
from scripts.demo.exam import identify_training, open_model, run
from scripts.demo.measures import facts, held_out_loss
from scripts.demo.settings import DATA, FROM_TEACHER, OUT, SFT, STUDENT, TRAINING
from trainer.argument_types import positive_int
from trainer.arguments import Parser
from trainer.errors import UserError, run_main
from trainer.files import replacing
from trainer.weights import read_settings

TRAININGS = {  # the command of each, and the name of its weights
    "without": (("train_full_sft.py",), "full_sft_128"),
    "with": (("train_distillation.py", *FROM_TEACHER), "full_dist_128"),
}


def main():
    parser = Parser(__doc__)
    parser.add_argument("--seeds", type=positive_int, default=3, help="how many: 1, 2, 3, …")
    parser.add_argument("--epochs", default=SFT[SFT.index("--epochs") + 1], help="(default: the demo's)")
    parser.add_argument("--lines", type=positive_int, help="train on only the first N of the demo's SFT lines")
    args = parser.parse_args()
    start, teacher = OUT / "pretrain_128.pth", OUT / "full_sft_256.pth"
    for weights in (start, teacher):
        if not weights.exists():
            raise UserError(f"{weights} is missing: run make demo-all to create it")
    data = DATA / "sft_mini_512.jsonl"
    if args.lines:
        data = first_lines(data, args.lines, OUT / "distillation_gain" / f"first_{args.lines}.jsonl")

    # other weights, other results
    folder = OUT / "distillation_gain" / f"{identify_training(start)}-{identify_training(teacher)}"
    results: dict[str, list[tuple[float, float]]] = {name: [] for name in TRAININGS}
    for seed in range(1, args.seeds + 1):
        for name, ((script, *flags), written) in TRAININGS.items():
            out = folder / f"{name}_{seed}_{args.epochs}_{args.lines or 'all'}"
            common = (*STUDENT, *TRAINING, *SFT, "--data_path", str(data), "--epochs", args.epochs)
            common += ("--out_dir", str(out), "--seed", str(seed))
            taught = ("--teacher_weight", str(teacher)) if flags else ()
            run(script, *common, *flags, *taught, "--from_weight", str(start), "--resume")
            model = open_model(out / f"{written}.pth")
            results[name].append((held_out_loss(*model), facts(*model)))
            steps = read_settings(out / f"{written}.pth")["step"]

    print(f"\n{args.seeds} seeds, {steps} steps each, from {start.name}, teacher {teacher.name}")
    print(f"{'teacher':<10}{'held-out nats per token':>26}{'facts right':>20}")
    for name, measured in results.items():
        loss, right = zip(*measured, strict=True)
        print(f"{name:<10}{spread(loss, '.4f'):>26}{spread([100 * share for share in right], '.1f'):>19}%")


def first_lines(file: Path, count: int, to: Path) -> Path:
    """Write the first lines of a file to another.

    Raises:
        UserError: the file has fewer.
    """
    with open(file, encoding="utf-8") as source:
        lines = source.readlines()
    if count > len(lines):
        raise UserError(f"--lines {count}: {file} has {len(lines)}")
    to.parent.mkdir(parents=True, exist_ok=True)
    with replacing(to) as temporary:
        temporary.write_text("".join(lines[:count]), encoding="utf-8")
    return to


if __name__ == "__main__":
    run_main(main)
