"""Fault injection: random faults of every kind in every stage, and what each one cost.

    python -m benchmarks.faults --rounds 200
    python -m benchmarks.faults --rounds 20 --seed 7 --kind power

Each round injects one fault, in separate processes: a process is killed, a file is damaged, the disk fills, … Then an
intact state must exist, --resume must continue, and the final weights must be, bit for bit, those of the same run
undisturbed (on the CPU, in fp32). Kinds take turns, stages are drawn. The exit code is 1 if anything was lost.
"""

import random
import signal
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import trainer.start  # noqa: F401  (first of all: what to do where PyTorch, or a home folder, is missing)

from trainer.argument_types import positive_int, seed
from trainer.arguments import Parser
from trainer.errors import UserError, run_main


def get_args():
    parser = Parser(__doc__)
    parser.add_argument("--rounds", type=positive_int, default=60, help="how many faults")
    parser.add_argument("--seed", type=seed, default=0, help="another seed: other instants, places and stages")
    parser.add_argument("--kind", metavar="TEXT", help="only kinds with this in their name")
    return parser.parse_args()


def print_table(rounds: Sequence[tuple[str, str, int | None]]) -> None:
    """Print a table of rounds, each (kind, stage, steps lost, or None if the run did not survive)."""
    print(f"\n{'fault':<52}{'tried':>6}{'survived':>10}{'steps lost: mean':>18}{'most':>6}")
    for name in [*dict.fromkeys(kind for kind, _, _ in rounds), None]:
        lost = [each for kind, _, each in rounds if name in (None, kind)]
        survived = [each for each in lost if each is not None]
        mean, most = (f"{sum(survived) / len(survived):.1f}", max(survived)) if survived else ("-", "-")
        print(f"{name or 'all':<52}{len(lost):>6}{len(survived):>10}{mean:>18}{most:>6}")


def main():
    args = get_args()
    if not hasattr(signal, "SIGKILL"):
        raise UserError("the faults are signals and limits that this system does not have: run it on Linux or macOS")
    from benchmarks.fault_injection.disturbed import BrokenPromise, Laboratory
    from benchmarks.fault_injection.kinds import KINDS
    from benchmarks.fault_injection.processes import Forked
    from benchmarks.fault_injection.small_stages import SAVE_INTERVAL, STAGES, STEPS, make_world

    kinds = [kind for kind in KINDS if (args.kind or "") in kind.name]
    if not kinds:
        raise UserError(f"--kind {args.kind}: none of {', '.join(kind.name for kind in KINDS)}")
    rng, rounds = random.Random(args.seed), []
    with tempfile.TemporaryDirectory(prefix="minimind-faults-") as folder:
        laboratory = Laboratory(make_world(Path(folder) / "world"), Path(folder), Forked)
        for number in range(args.rounds):
            kind, stage = kinds[number % len(kinds)], rng.choice(STAGES)
            try:
                lost = laboratory.disturb(kind, stage, random.Random(rng.random()))
                told = f"{lost} steps lost"
            except BrokenPromise as broken:
                lost, told = None, f"LOST: {broken}"
            rounds.append((kind.name, stage.script, lost))
            print(f"{number + 1:>4}  {kind.name}, {stage.script}: {told}", flush=True)
    print(f"\n{len({stage for _, stage, _ in rounds})} stages, runs of {STEPS} steps, saved every {SAVE_INTERVAL}")
    print_table(rounds)
    if any(lost is None for _, _, lost in rounds):
        sys.exit(1)


if __name__ == "__main__":
    run_main(main)
