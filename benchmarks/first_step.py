"""Time to the first training step: at the first start, which tokenizes and compiles, and at later starts.

    python -m benchmarks.first_step --data_path ../shared/data/pretrain_hq.jsonl
    python -m benchmarks.first_step --data_path ../shared/data/pretrain_hq.jsonl -- --compile 1 --batch_size 8

The time runs from the start of the process to its first step, imports included; CPU time is summed over the cores. The
first start has a fresh copy of the data and an empty compile cache. Flags after -- are passed to train_pretrain.py.
"""

import os
import shutil
import tempfile
from pathlib import Path

import trainer.start  # noqa: F401  (first of all: what to do where PyTorch, or a home folder, is missing)

from benchmarks.stream_start import run_to_first_step
from trainer.argument_types import positive_int
from trainer.arguments import Parser
from trainer.errors import UserError, run_main


def get_args():
    parser = Parser(__doc__)
    parser.add_argument("--data_path", type=Path, required=True, help="pretraining texts, jsonl")
    parser.add_argument("--starts", type=positive_int, default=3, help="how many starts, one after another")
    parser.add_argument("flags", nargs="*", help="further flags of train_pretrain.py, after --")
    return parser.parse_args()


def main():
    args = get_args()
    if not args.data_path.is_file():
        raise UserError(f"--data_path {args.data_path} is missing")
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / args.data_path.name
        shutil.copyfile(args.data_path, data)
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(Path(folder) / "compiled")
        flags = ["--data_path", str(data), "--out_dir", str(Path(folder) / "out"), *args.flags]
        for number in range(1, args.starts + 1):
            found = run_to_first_step(flags)
            print(f"start {number}: first step after {found['seconds']:.1f} s ({found['cpu']:.1f} s CPU time)")


if __name__ == "__main__":
    run_main(main)
