"""What a save costs a run: how much longer 100 steps take with a save than without.

    python -m benchmarks.save_cost                            the 26M and the 104M shape
    python -m benchmarks.save_cost --rounds 5 --folder /mnt/out

A step is a wait of 60 ms (26M) or 200 ms (104M), the time a GPU takes for it while the CPU is idle; the save is the
real one, of weights and AdamW's state, written to --folder and flushed. Rounds with and without a save alternate. The
first save of a run is reported separately, because it allocates its memory.
"""

import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import trainer.start  # noqa: F401  (first of all: what to do where PyTorch, or a home folder, is missing)
import torch

from model import LMConfig, MiniMindLM
from trainer.argument_types import positive_int
from trainer.arguments import Parser, training_parser
from trainer.checkpoint import Checkpoint
from trainer.device import pick_device
from trainer.errors import run_main
from trainer.progress import Progress
from trainer.runtime import Runtime
from trainer.schedule import make_optimizer
from trainer.weights import load_tokenizer

STEPS = 100
BAR = 0.02  # of the time of the steps between two saves
SHAPES = {"26M": (512, 8, 0.06), "104M": (768, 16, 0.2)}  # dim, n_layers, seconds per step


def get_args():
    parser = Parser(__doc__)
    parser.add_argument("--rounds", type=positive_int, default=3, help="saves to measure, after the first")
    parser.add_argument("--shapes", nargs="+", choices=tuple(SHAPES), default=list(SHAPES))
    parser.add_argument("--folder", type=Path, metavar="DIR", help="where to save (default: a temporary folder)")
    parser.add_argument("--device", default=None, help="device of the weights (default: the accelerator, else cpu)")
    return parser.parse_args()


class Cost(NamedTuple):
    """The cost of one save, in seconds."""

    held_up: float  # until training continues
    computing: float  # of that, on the CPU: other programs on the machine make the rest
    longer: float  # that 100 steps took than without a save


def measure(shape: str, folder: Path, device: torch.device, rounds: int) -> tuple[list[Cost], int]:
    """The cost of each save, in order, and the bytes of one."""
    dim, n_layers, pace = SHAPES[shape]
    args = training_parser("", data_path="", batch_size=1, learning_rate=1e-4).parse_args(
        ["--out_dir", str(folder), "--dim", str(dim), "--n_layers", str(n_layers), "--overwrite"]
    )
    tokenizer = load_tokenizer()
    config = LMConfig(dim=dim, n_layers=n_layers, vocab_size=len(tokenizer))
    model = MiniMindLM(config).to(device)
    optimizer, scaler = make_optimizer(model, args), torch.amp.GradScaler(device.type, enabled=False)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()  # from here on it has its moments
    checkpoint = Checkpoint(args, "save_cost", config, tokenizer, Runtime(device, torch.float32))

    def take_steps(save: bool) -> Cost:
        held, computing, began = 0.0, 0.0, time.perf_counter()
        for step in range(STEPS):
            time.sleep(pace)
            progress.step += 1
            if save and step == 0:
                asked, used = time.perf_counter(), time.thread_time()
                checkpoint.save(model, optimizer, scaler, progress, {})
                held, computing = time.perf_counter() - asked, time.thread_time() - used
        return Cost(held, computing, time.perf_counter() - began)

    progress, costs = Progress(), []
    for _ in range(rounds + 1):
        cost = take_steps(save=True)
        checkpoint.wait()
        costs.append(cost._replace(longer=cost.longer - take_steps(save=False).longer))
    newest = checkpoint.folder / checkpoint.pointer.read_text(encoding="utf-8")
    size = sum(path.stat().st_size for path in newest.iterdir())
    return costs, size


def main():
    args = get_args()
    device = pick_device(args.device)
    folder = Path(tempfile.mkdtemp(prefix="minimind-saves-", dir=args.folder))
    kept = True
    print(f"{STEPS} steps with a save and without, {args.rounds} rounds, on {device}, to {folder}")
    print("medians; the first save of a run by itself")
    columns = ("held up", "on the CPU", "100 steps longer by", "of their time", "first held up")
    print(f"{'':<6}{'save':>8}{'step':>8}" + "".join(f"{name:>{len(name) + 3}}" for name in columns))
    try:
        for shape in args.shapes:
            (first, *costs), size = measure(shape, folder, device, args.rounds)
            held_up, computing, longer = (statistics.median(column) for column in zip(*costs, strict=True))
            pace = SHAPES[shape][2]
            share = longer / (STEPS * pace)
            kept &= share <= BAR
            told = (held_up, computing, longer, share, first.held_up)
            cells = [f"{each:.2%}" if each is share else f"{each * 1000:.0f} ms" for each in told]
            row = "".join(f"{cell:>{len(name) + 3}}" for cell, name in zip(cells, columns, strict=True))
            print(f"{shape:<6}{size / 1e6:>5.0f} MB{pace * 1000:>5.0f} ms{row}", flush=True)
    finally:
        shutil.rmtree(folder)
    print(f"at most {BAR:.0%}: {'yes' if kept else 'NO'}")
    if not kept:
        sys.exit(1)


if __name__ == "__main__":
    run_main(main)
