"""Time to the first step of a run with --stream, and its peak memory: a large file against a small one.

    python -m benchmarks.stream_start                       20 GB beside 10 MB
    python -m benchmarks.stream_start --size 5GB

Both files are written here, full of lines, and deleted afterwards. Each run is a process of its own: the time is from
its start to its first step, imports included, of a small model, so that the step itself takes next to nothing; the
memory is the peak of the process. They take turns; a figure is the median of the rounds.
"""

import json
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import trainer.start  # noqa: F401  (first of all: what to do where PyTorch, or a home folder, is missing)

from trainer.argument_types import byte_size, non_negative_int, positive_int
from trainer.arguments import ROOT, Parser
from trainer.errors import UserError, run_main

SMALL = 10_000_000  # bytes
WORDS = (
    "the a small robot counts seven yellow birds above green island sea and then reads books about sky water".split()
)
# Windows does not report a process's peak in this way; there the memory is left out.
RUN = """
import runpy, sys
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
try:
    import resource
    used = resource.getrusage(resource.RUSAGE_SELF)
    print("used", used.ru_maxrss * (1 if sys.platform == "darwin" else 1024), used.ru_utime + used.ru_stime)
except ImportError:
    pass
"""


def write_lines(path: Path, size: int) -> None:
    """Write a file of this many bytes, or up to a line more, with lines of 100 to 2,000 characters."""
    numbers = random.Random(0)
    lines = []
    for _ in range(9000):
        text = " ".join(numbers.choices(WORDS, k=numbers.randint(20, 400)))
        lines.append(json.dumps({"text": text}).encode() + b"\n")
    part = b"".join(lines)
    with open(path, "wb") as file:
        for _ in range(size // len(part)):
            file.write(part)
        file.write(part[: part.find(b"\n", size % len(part)) + 1])


def first_step(path: Path, out: Path, arguments: list[str]) -> dict[str, float]:
    """A small model's `run_to_first_step` on a stream."""
    flags = ["--stream", "--data_path", str(path), "--out_dir", str(out)]
    small = ["--dim", "64", "--n_layers", "2", "--batch_size", "8", "--accumulation_steps", "1", "--compile", "0"]
    return run_to_first_step([*flags, *small, *arguments])


def run_to_first_step(arguments: list[str]) -> dict[str, float]:
    """Seconds from the start of pretraining to its first step, CPU seconds of the whole run of one step, and peak
    memory in bytes.

    Raises:
        UserError: the run failed.
    """
    script = str(ROOT / "train_pretrain.py")
    started = time.perf_counter()
    command = [sys.executable, "-c", RUN, script, "--max_steps", "1", "--overwrite", *arguments]
    found = {"cpu": float("nan"), "bytes": float("nan")}
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, encoding="utf-8") as process:
        for line in process.stdout:
            if line.startswith("step 1/"):
                found["seconds"] = time.perf_counter() - started
            elif line.startswith("used"):
                found |= dict(zip(("bytes", "cpu"), map(float, line.split()[1:]), strict=True))
    if process.returncode or "seconds" not in found:
        raise UserError("the run failed: see above")
    return found


def main():
    parser = Parser(__doc__)
    parser.add_argument("--size", type=byte_size, default="20GB", help="size of the large file")
    parser.add_argument("--rounds", type=positive_int, default=3)
    parser.add_argument("--num_workers", type=non_negative_int, default=0, help="worker processes of each run")
    parser.add_argument("--folder", default=None, metavar="DIR", help="where to write (default: the temporary folder)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        paths = {size: Path(folder) / f"{size}.jsonl" for size in (SMALL, args.size)}
        for size, path in paths.items():
            write_lines(path, size)
        own = ["--num_workers", str(args.num_workers)]
        rounds = [
            {size: first_step(path, Path(folder) / "out", own) for size, path in paths.items()}
            for _ in range(args.rounds)
        ]
    medians = {
        size: {name: statistics.median(turn[size][name] for turn in rounds) for name in ("seconds", "cpu", "bytes")}
        for size in paths
    }
    for size, found in medians.items():
        print(
            f"{size / 1e6:>10,.0f} MB: first step after {found['seconds']:.1f} s ({found['cpu']:.1f} s of a core in "
            f"all), {found['bytes'] / 1e6:,.0f} MB at the peak"
        )
    more = medians[args.size]["bytes"] - medians[SMALL]["bytes"]
    print(f"the large file takes {more / 1e6:,.0f} MB more")


if __name__ == "__main__":
    run_main(main)
