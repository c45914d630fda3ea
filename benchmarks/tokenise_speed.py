"""Tokenising speed with tiktoken and with the tokenizers library, from a jsonl file to its cache; both must agree.

    python -m benchmarks.tokenise_speed --data_dir DIR      pretrain_hq.jsonl, sft_mini_512.jsonl, dpo.jsonl in DIR

Both take turns, round after round: a figure is the median of the rounds, a ratio the median of each round's own. The
time covers what the first start of training waits for: reading, checking, rendering, encoding and writing. Below each
file: the part that is not the tokenizer's, and the SHA-256 of the ids, which is the same both ways.
"""

import hashlib
import math
import os
import shutil
import statistics
import tempfile
import time
from pathlib import Path

import trainer.start  # noqa: F401  (first of all: what to do where PyTorch, or a home folder, is missing)

from dataset import DPODataset, PretrainDataset, SFTDataset
from dataset.jsonl import JsonlReader
from dataset.lm_dataset import RowDataset
from model import fast_bpe
from trainer.argument_types import positive_int
from trainer.arguments import Parser
from trainer.errors import UserError, run_main
from trainer.weights import load_tokenizer

FILES = {"pretrain_hq.jsonl": PretrainDataset, "sft_mini_512.jsonl": SFTDataset, "dpo.jsonl": DPODataset}
LONG_CHARS = {"tokenizers": math.inf, "tiktoken": fast_bpe.LONG_CHARS}  # where tiktoken begins


def tokenise(kind: type[RowDataset], path: Path, tokenizer, by: str) -> tuple[float, float, str]:
    """Build a file's cache; returns the seconds, the CPU seconds of all cores, and the hash of the ids."""
    fast_bpe.LONG_CHARS = LONG_CHARS[by]
    started, computed = time.perf_counter(), time.process_time()
    cache = kind(path, tokenizer, 512).cache
    taken = time.perf_counter() - started, time.process_time() - computed
    ids = hashlib.sha256((cache.folder / "tokens.bin").read_bytes()).hexdigest()
    shutil.rmtree(path.parent / ".cache")
    return *taken, ids


def main():
    parser = Parser(__doc__)
    parser.add_argument("--data_dir", type=Path, required=True, metavar="DIR", help="folder of the files")
    parser.add_argument("--tokenizer", default=None, metavar="DIR", help="tokenizer folder (default: the shipped one)")
    parser.add_argument("--rounds", type=positive_int, default=3)
    args = parser.parse_args()
    tokenizer = load_tokenizer(args.tokenizer)
    print(f"{os.cpu_count()} cores, {args.rounds} rounds, {tokenizer.name_or_path}")
    if fast_bpe.fast_bpe(tokenizer.backend_tokenizer) is None:
        raise UserError(f"--tokenizer {args.tokenizer} is a tokenizer that tiktoken cannot reproduce")
    for name, kind in FILES.items():
        source = args.data_dir / name
        if not source.is_file():
            raise UserError(f"{source} is missing: --data_dir names the folder that has it")
        with tempfile.TemporaryDirectory() as folder:
            path = Path(shutil.copy(source, folder))
            size = path.stat().st_size / 1e6
            rounds = [{by: tokenise(kind, path, tokenizer, by) for by in LONG_CHARS} for _ in range(args.rounds)]
            started = time.perf_counter()
            for _ in JsonlReader(path, kind.parse):
                pass
            reading = time.perf_counter() - started
        print(f"{name}, {size:.1f} MB")
        for by in LONG_CHARS:
            seconds, of_cores = (statistics.median(turn[by][n] for turn in rounds) for n in (0, 1))
            print(f"  {by:<12}{size / seconds:>6.1f} MB/s  {of_cores:.1f} seconds of a core")
        faster = [[turn["tokenizers"][n] / turn["tiktoken"][n] for turn in rounds] for n in (0, 1)]
        print(f"  {statistics.median(faster[0]):.1f} x as fast, {statistics.median(faster[1]):.1f} x less work")
        print(f"  reading and checking the lines alone: {size / reading:.1f} MB/s")
        hashes = {found[2] for turn in rounds for found in turn.values()}
        print(f"  ids: {'DIFFERENT' if len(hashes) > 1 else hashes.pop()}")


if __name__ == "__main__":
    run_main(main)
