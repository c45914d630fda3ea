"""scripts/prepare_data.py on generated text: MB/s, peak memory, and runs that are killed.

    python -m benchmarks.prepare_speed                              # 200 MB: cleaning, then with near-deduplication
    python -m benchmarks.prepare_speed --megabytes 5000 --only near # peak memory on 5 GB
    python -m benchmarks.prepare_speed --megabytes 60 --only kill   # killed at 10 random instants: the same bytes

Half of the lines are Chinese, half English, about 400 bytes each, in unique sentences; one in a hundred has something
for a filter to find. MB are 10^6 bytes of input. Peak memory is the sum over all processes of what each
has for itself, and its share of shared memory (PSS on Linux; not reported elsewhere).
"""

import hashlib
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

from trainer.argument_types import positive_int, seed
from trainer.arguments import Parser
from trainer.errors import run_main

ROOT = Path(__file__).resolve().parent.parent
HAN = [chr(0x4E00 + number * 7) for number in range(2500)]
SYLLABLES = "ba co di fen ga hol in ka lum mer no per qua rin sa tor un ver wes yo".split()
DIRT = ("Ã¤Â½Â Ã¥Â¥Â½ï¼Œ", "As an AI language model, I cannot help. ", "!!!!!!!! " * 40, "again and again " * 60)
KILLS = 10


def get_args():
    parser = Parser(__doc__)
    parser.add_argument("--megabytes", type=positive_int, default=200, help="size of the input")
    parser.add_argument("--workers", type=positive_int, default=os.cpu_count())
    parser.add_argument(
        "--only", choices=("clean", "near", "kill"), help="run one measurement only (default: the first two)"
    )
    parser.add_argument("--folder", help="working folder (default: a temporary one)")
    parser.add_argument("--seed", type=seed, default=0)
    return parser.parse_args()


def make_text(path: Path, megabytes: int, seed: int) -> None:
    """Write lines of random sentences until the file has this many bytes."""
    rng = random.Random(seed)
    words = ["".join(rng.choices(SYLLABLES, k=rng.randint(2, 4))) for _ in range(20_000)]
    size = number = 0
    with open(path, "wb") as file:
        while size < megabytes * 1_000_000:
            if number % 2:
                text = "".join("".join(rng.choices(HAN, k=rng.randint(8, 24))) + "，。"[n % 2] for n in range(8))
            else:
                text = ". ".join(" ".join(rng.choices(words, k=rng.randint(5, 14))).capitalize() for _ in range(5))
            if number % 100 == 0:
                text = rng.choice(DIRT) + text
            line = f'{{"text": "{text}"}}\n'.encode()
            file.write(line)
            size += len(line)
            number += 1


def command(source: Path, out: Path, workers: int, *flags: str) -> list[str]:
    script = str(ROOT / "scripts" / "prepare_data.py")
    return [
        sys.executable,
        script,
        str(source),
        "--stage",
        "pretrain",
        "--out",
        str(out),
        "--workers",
        str(workers),
        *flags,
    ]


class PeakMemory(threading.Thread):
    """Watches a process and its descendants; `peak` is in bytes, 0 if the system does not report it."""

    def __init__(self, pid: int):
        super().__init__(daemon=True)
        self.pid, self.peak, self.running = pid, 0, True

    def run(self) -> None:
        while self.running:
            self.peak = max(self.peak, sum(map(_own_memory, _tree(self.pid))))
            time.sleep(0.2)


def _tree(pid: int) -> list[int]:
    try:
        below = Path(f"/proc/{pid}/task/{pid}/children").read_text(encoding="utf-8").split()
    except OSError:
        return []
    return [pid, *(found for child in below for found in _tree(int(child)))]


def _own_memory(pid: int) -> int:
    try:
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text(encoding="utf-8").splitlines():
            if line.startswith("Pss:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return 0


def measure(name: str, source: Path, folder: Path, workers: int, *flags: str) -> None:
    """The time, speed and memory of one whole run, as a line."""
    start = time.monotonic()
    process = subprocess.Popen(
        command(source, folder / f"{name}.jsonl", workers, *flags), stdout=subprocess.PIPE, text=True, encoding="utf-8"
    )
    memory = PeakMemory(process.pid)
    memory.start()
    printed, _ = process.communicate()
    memory.running = False
    seconds = time.monotonic() - start
    if process.returncode:
        sys.exit(f"{name}: exit code {process.returncode}\n{printed}")
    size = source.stat().st_size / 1e6
    peak = f"peak memory {memory.peak / 2**20:,.0f} MiB"
    print(f"{name}: {size:,.0f} MB in {seconds:,.1f} s, {size / seconds:.1f} MB/s, {peak}")
    print("  " + printed.replace("\n", "\n  ").rstrip(), flush=True)


def digest(folder: Path) -> str:
    """A hash of all jsonl files in a folder, including their names."""
    found = hashlib.sha256()
    for path in sorted(folder.glob("*.jsonl")):
        found.update(path.name.encode() + path.read_bytes())
    return found.hexdigest()[:16]


def kill_often(source: Path, folder: Path, workers: int, seed: int) -> None:
    """Compare an undisturbed run with one that is killed repeatedly: both must write the same bytes."""
    for name in ("peace", "killed"):
        (folder / name).mkdir()
    start = time.monotonic()
    subprocess.run(command(source, folder / "peace" / "x.jsonl", workers), check=True, stdout=subprocess.DEVNULL)
    seconds = time.monotonic() - start
    rng = random.Random(seed)
    killed = 0
    for number in range(KILLS):
        # Instants all over the run: an attempt continues from the previous one, so each gets a little further
        patience = rng.uniform(0.05, 0.95) * seconds * (number + 1) / KILLS
        process = subprocess.Popen(
            command(source, folder / "killed" / "x.jsonl", workers),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        try:
            process.wait(patience)
            print(f"  attempt {number + 1} ended by itself before {patience:.1f} s")
            break
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL if hasattr(signal, "SIGKILL") else signal.SIGTERM)
            process.wait()
            killed += 1
            print(f"  killed after {patience:.1f} s", flush=True)
    subprocess.run(
        command(source, folder / "killed" / "x.jsonl", workers, "--overwrite"), check=True, stdout=subprocess.DEVNULL
    )
    one, other = digest(folder / "peace"), digest(folder / "killed")
    print(f"killed {killed} times: {'the same bytes' if one == other else 'OTHER BYTES'} ({one}, {other})")
    if one != other:
        sys.exit(1)


def main():
    args = get_args()
    folder = Path(args.folder or tempfile.mkdtemp(prefix="minimind-prepare-"))
    folder.mkdir(parents=True, exist_ok=True)
    source = folder / "source.jsonl"
    try:
        make_text(source, args.megabytes, args.seed)
        if args.only in (None, "clean"):
            measure("clean", source, folder, args.workers, "--near_dup", "0")
        if args.only in (None, "near"):
            measure("near", source, folder, args.workers)
        if args.only == "kill":
            kill_often(source, folder, args.workers, args.seed)
    finally:
        if not args.folder:
            shutil.rmtree(folder)


if __name__ == "__main__":
    run_main(main)
