"""What a save costs a run: how much longer 100 steps take with a save among them than without.

    python -m benchmarks.save_cost                            the 26M and the 104M shape
    python -m benchmarks.save_cost --rounds 5 --folder /mnt/out

A step is a wait of 60 ms (26M) or 200 ms (104M), as long as a GPU takes for it while the CPU has nothing to do; the
save is the real one, of weights and AdamW's state, written to --folder and flushed. The rounds with and without one
take turns. The first save of a run is told by itself: its memory is new.
"""

import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path

import trainer.start  # noqa: F401  (first of all: what to do where PyTorch, or a home folder, is missing)
import torch

from model import LMConfig, MiniMindLM
from trainer.arguments import Parser, positive_int, training_parser
from trainer.checkpoint import Checkpoint
from trainer.device import pick_device
from trainer.errors import run_main
from trainer.progress import Progress
from trainer.runtime import Runtime
from trainer.schedule import make_optimizer
from trainer.weights import load_tokenizer

STEPS = 100
BAR = 0.02  # of the time of the steps between two saves
SHAPES = {"26M": (512, 8, 0.06), "104M": (768, 16, 0.2)}  # dim, n_layers, seconds a step


def get_args():
    parser = Parser(__doc__)
    parser.add_argument("--rounds", type=positive_int, default=3, help="saves to measure, after the first")
    parser.add_argument("--shapes", nargs="+", choices=tuple(SHAPES), default=list(SHAPES))
    parser.add_argument("--folder", type=Path, metavar="DIR", help="where to save (default: a temporary folder)")
    parser.add_argument("--device", default=None, help="where the weights lie (default: the accelerator, else cpu)")
    return parser.parse_args()


def measure(shape: str, folder: Path, device: torch.device, rounds: int) -> tuple[list[float], list[float], int]:
    """For each save, the first one first: seconds until training may go on, and seconds by which 100 steps took longer
    than without one; and the bytes of a save."""
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

    def take_steps(save: bool) -> tuple[float, float]:
        began, held = time.perf_counter(), 0.0
        for step in range(STEPS):
            time.sleep(pace)
            progress.step += 1
            if save and step == 0:
                asked = time.perf_counter()
                checkpoint.save(model, optimizer, scaler, progress, {})
                held = time.perf_counter() - asked
        return time.perf_counter() - began, held

    progress, until, longer = Progress(), [], []
    for _ in range(rounds + 1):
        with_save, held = take_steps(save=True)
        checkpoint.wait()
        until.append(held)
        longer.append(with_save - take_steps(save=False)[0])
    newest = checkpoint.folder / checkpoint.pointer.read_text(encoding="utf-8")
    size = sum(path.stat().st_size for path in newest.iterdir())
    return until, longer, size


def main():
    args = get_args()
    device = pick_device(args.device)
    folder = Path(tempfile.mkdtemp(prefix="minimind-saves-", dir=args.folder))
    kept = True
    print(f"{STEPS} steps with a save and without, {args.rounds} rounds, on {device}, to {folder}")
    print(
        f"{'':<6}{'save':>9}{'step':>9}{'held up':>11}{'longer: median':>17}{'most':>9}{'of the time':>13}{'first':>9}"
    )
    try:
        for shape in args.shapes:
            (_, *until), (first, *longer), size = measure(shape, folder, device, args.rounds)
            steps = STEPS * SHAPES[shape][2]
            share = statistics.median(longer) / steps
            kept &= share <= BAR
            print(
                f"{shape:<6}{size / 1e6:>6.0f} MB{SHAPES[shape][2] * 1000:>6.0f} ms"
                f"{statistics.median(until) * 1000:>8.0f} ms{statistics.median(longer) * 1000:>14.0f} ms"
                f"{max(longer) * 1000:>6.0f} ms{share:>13.2%}{first * 1000:>6.0f} ms",
                flush=True,
            )
    finally:
        shutil.rmtree(folder)
    print(f"at most {BAR:.0%}: {'yes' if kept else 'NO'}")
    if not kept:
        sys.exit(1)


if __name__ == "__main__":
    run_main(main)
