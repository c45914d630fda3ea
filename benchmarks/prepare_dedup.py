"""Recall and precision of deduplication: planted near-duplicates among 200,000 lines, questions inside longer lines.

    python -m benchmarks.prepare_dedup
    python -m benchmarks.prepare_dedup --lines 20000 --planted 200 --workers 1

Lines are drawn, half of them Chinese and half English, of 10 to some 1,000 characters: words by Zipf's law, so that
common phrases are shared. A planted line is a copy with 1 to 10 % of its characters replaced, inserted or deleted.
Recall is of planted pairs of which one line is dropped. Precision is of dropped lines, by an independently
computed Levenshtein distance to the kept line.
"""

import itertools
import random
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import trainer.start  # noqa: F401  (first of all: what to do where PyTorch, or a home folder, is missing)
import numpy as np
from rapidfuzz.distance import Levenshtein

from scripts.preparing.contamination import Evaluation
from scripts.preparing.near_duplicates import find_near_duplicates
from scripts.preparing.shingles import signatures
from trainer.argument_types import positive_int, seed
from trainer.arguments import Parser
from trainer.errors import run_main

CHUNK = 10_000  # lines
CHINESE = [chr(code) for code in range(0x4E00, 0x4E00 + 3000)]
LATIN = "abcdefghijklmnopqrstuvwxyz "


class Language:
    """A language whose words follow Zipf's law."""

    def __init__(self, words: list[str], space: str, letters: list[str] | str):
        self.words, self.space, self.letters = words, space, letters
        self.weights = list(itertools.accumulate(1 / rank for rank in range(1, len(words) + 1)))

    def line(self, chance: random.Random, shortest: int = 10) -> str:
        size, found = shortest + int(chance.lognormvariate(4, 1)) % 1000, ""
        while len(found) < size:
            found += self.space + chance.choices(self.words, cum_weights=self.weights)[0]
        return found.strip()

    def edited(self, text: str, share: float, chance: random.Random) -> str:
        found = list(text)
        for _ in range(max(1, int(share * len(text)))):
            place, how = chance.randrange(len(found)), chance.randrange(3)
            found[place : place + (how < 2)] = [] if how == 0 else [chance.choice(self.letters)]
        return "".join(found)


def languages(chance: random.Random) -> list[Language]:
    chinese = ["".join(chance.choices(CHINESE, k=chance.choice([1, 2, 2, 3]))) for _ in range(8000)]
    english = ["".join(chance.choices(LATIN[:-1], k=chance.randint(2, 9))) for _ in range(8000)]
    return [Language(chinese, "", CHINESE), Language(english, " ", LATIN)]


class Lines:
    """The texts of all lines in a file, by number."""

    def __init__(self, path: Path, lines: list[str]):
        encoded = [line.encode() for line in lines]
        self.path = path
        path.write_bytes(b"".join(encoded))
        np.save(path.with_suffix(".npy"), np.cumsum([0, *map(len, encoded)]))

    def read(self, numbers) -> list[str]:
        offsets, found = np.load(self.path.with_suffix(".npy"), mmap_mode="r"), []
        with open(self.path, "rb") as file:
            for number in numbers:
                file.seek(int(offsets[number]))
                found.append(file.read(int(offsets[number + 1] - offsets[number])).decode())
        return found


def save_signatures(job: tuple[Path, list[str]]) -> Path:
    path, lines = job
    np.save(path, signatures(lines))
    return path


def near_duplicates(args, folder: Path, chance: random.Random) -> None:
    spoken = languages(chance)
    originals = [(language, language.line(chance)) for language, _ in zip(itertools.cycle(spoken), range(args.lines))]
    copies = [
        (number, originals[number][0].edited(originals[number][1], chance.uniform(0.01, 0.10), chance))
        for number in chance.sample(range(len(originals)), args.planted)
    ]
    order = list(range(len(originals) + len(copies)))
    chance.shuffle(order)
    lines = [""] * len(order)
    for place, line in zip(order, [line for _, line in originals] + [line for _, line in copies], strict=True):
        lines[place] = line
    pairs = [(order[number], order[len(originals) + copy]) for copy, (number, _) in enumerate(copies)]
    size = sum(len(line.encode()) for line in lines) / 1e6
    texts = Lines(folder / "lines", lines)
    with ProcessPoolExecutor(args.workers, get_context("spawn")) as pool:
        list(pool.map(abs, range(args.workers)))  # the processes have begun
        started = time.perf_counter()
        jobs = [(folder / f"{start}.npy", lines[start : start + CHUNK]) for start in range(0, len(lines), CHUNK)]
        files = list(pool.map(save_signatures, jobs))
        sampled = time.perf_counter()
        dropped, kept = find_near_duplicates(files, texts, args.near_dup, folder / "work", pool=pool)
        done = time.perf_counter()
    gone = set(dropped.tolist())
    found = sum(bool({one, other} & gone) for one, other in pairs)
    right = sum(
        Levenshtein.distance(lines[one], lines[other]) <= (1 - args.near_dup) * max(len(lines[one]), len(lines[other]))
        for one, other in zip(dropped.tolist(), kept.tolist(), strict=True)
    )
    print(f"{len(lines):,} lines, {size:.1f} MB, {args.workers} processes")
    print(f"  recall     {found / len(pairs):.2%} of {len(pairs):,} planted")
    print(f"  precision  {right / max(len(gone), 1):.2%} of {len(gone):,} dropped")
    print(f"  {size / (sampled - started):.1f} MB/s sampled, {size / (done - started):.1f} MB/s in all")


def contamination(args, folder: Path, chance: random.Random) -> None:
    spoken = languages(chance)
    # 8 Chinese characters, and 60 English ones or 7 words, are 6 units or more: none is too short to be looked for
    questions = [spoken[number % 2].line(chance, (8, 60)[number % 2]) for number in range(args.questions)]
    (folder / "questions.txt").write_text("\n".join(questions) + "\n", encoding="utf-8")
    clean = [spoken[number % 2].line(chance) for number in range(20 * len(questions))]
    lines = [f"{clean[2 * n]}\n{question}\n{clean[2 * n + 1]}" for n, question in enumerate(questions)]
    evaluation = Evaluation([folder / "questions.txt"])
    started = time.perf_counter()
    found = evaluation.find(lines + clean)
    seconds = time.perf_counter() - started
    size = sum(len(line.encode()) for line in lines + clean) / 1e6
    held = sum(match is not None for match in found[: len(lines)])
    false = sum(match is not None for match in found[len(lines) :])
    print(f"{len(questions):,} questions inside longer lines, {len(clean):,} lines without")
    print(f"  {held:,} found, {false:,} lines that hold one by chance, {size / seconds:.1f} MB/s in one process")


def main():
    parser = Parser(__doc__)
    parser.add_argument("--lines", type=positive_int, default=200_000)
    parser.add_argument("--planted", type=positive_int, default=2000)
    parser.add_argument("--questions", type=positive_int, default=500)
    parser.add_argument("--near_dup", type=float, default=0.8)
    parser.add_argument("--workers", type=positive_int, default=2)
    parser.add_argument("--seed", type=seed, default=0)
    args = parser.parse_args()
    if args.planted > args.lines:
        parser.error("--planted is more than --lines")
    with tempfile.TemporaryDirectory() as folder:
        near_duplicates(args, Path(folder), random.Random(args.seed))
        contamination(args, Path(folder), random.Random(args.seed))


if __name__ == "__main__":
    run_main(main)
