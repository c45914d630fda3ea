"""What a model will see of a data file, to check before a long training run: the first samples, and statistics.

    python scripts/inspect_data.py dataset/sft_mini_512.jsonl
    python scripts/inspect_data.py my.jsonl --stage dpo --max_seq_len 1024 --samples 10 --seed 1
    python scripts/inspect_data.py export.json.gz

The samples are built by the same code as in training: with the system prompt, cut where a row ends. Target tokens are
green on a terminal and in ⟦brackets⟧ elsewhere. Control tokens and tags are shown as they are; text that only spells
one has a backslash before it.

Then: sample lengths (--plot draws them), what each --max_seq_len would cut or drop, duplicates, languages and roles.

A file of another shape (json, csv, parquet, ShareGPT, Alpaca, whatever scripts/prepare_data.py reads) is shown as
detected, with the command that converts it; the exit code is 2, because no stage can train on it as it is.

Bad lines are listed. If there are any the exit code is 2, because training would stop at the first, unless
--skip_bad_lines is given, which skips them here as in training.
"""

import os
import re
import sys
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

import _repo  # noqa: F401  (lets `python scripts/inspect_data.py` find the packages)

from trainer.argument_types import BooleanFlag, non_negative_int, positive_int, seed
from trainer.arguments import ROOT, Parser, add_tower_argument
from trainer.errors import UserError, run_main, shown


class Stage(NamedTuple):
    """The dataset class of a stage, and its usual row length in tokens."""

    dataset: str
    max_seq_len: int


STAGES = {
    "pretrain": Stage("PretrainDataset", 512),
    "sft": Stage("SFTDataset", 512),
    "lora": Stage("SFTDataset", 512),
    "distill": Stage("SFTDataset", 512),
    "reason": Stage("SFTDataset", 1024),
    "dpo": Stage("DPODataset", 1024),
    "vlm": Stage("VLMDataset", 640),
}


class Marks(NamedTuple):
    """The marks around targets, and around control tokens that are not targets."""

    learned: tuple[str, str]
    control: tuple[str, str]


BRACKETS = Marks(("⟦", "⟧"), ("", ""))
COLOURS = Marks(("\033[32m", "\033[0m"), ("\033[2m", "\033[0m"))


def get_args():
    parser = Parser(__doc__)
    parser.add_argument("data_path", type=Path, metavar="FILE", help="jsonl file to inspect")
    parser.add_argument(
        "--stage", choices=tuple(STAGES), help="stage that will train on it (default: inferred from its first line)"
    )
    parser.add_argument("--tokenizer", default=None, metavar="DIR", help="tokenizer folder (default: the shipped one)")
    parser.add_argument("--max_seq_len", type=positive_int, help="row length in tokens (default: the stage's)")
    parser.add_argument("--samples", type=non_negative_int, default=3, help="samples to show (pairs for preferences)")
    parser.add_argument("--seed", type=seed, default=None, help="show random samples instead of the first")
    parser.add_argument("--skip_bad_lines", action=BooleanFlag, help="do not fail on bad lines")
    parser.add_argument("--plot", type=Path, default=None, metavar="PNG", help="draw a histogram of sample lengths")
    parser.add_argument("--images_path", default=str(ROOT / "dataset"), metavar="DIR", help="image folder for a VLM")
    add_tower_argument(parser)
    return parser.parse_args()


def guess_stage(path: Path) -> str | None:
    """The stage for lines like the first good one; None if no stage can train on them as they are.

    Raises:
        DataError: the file is missing, empty or unreadable.
    """
    from dataset.jsonl import DataError, JsonlReader, require_data_file
    from dataset.shapes import raw_stage

    require_data_file(path)
    try:
        lines = iter(JsonlReader(path, lambda record, ignored: record, skip_bad_lines=True))
        record = next(lines)
        lines.close()
    except DataError:
        return None
    if raw_stage(record) is not None:
        return None
    if isinstance(record.get("text"), str):
        return "pretrain"
    if "chosen" in record or "rejected" in record:
        return "dpo"
    if record.get("image"):
        return "vlm"
    if "conversations" in record:
        return "reason" if any(sign in str(record) for sign in ("<think>", "reasoning_content")) else "sft"
    return None


def show_raw(path: Path, samples: int) -> None:
    """Print the content of a file of another format.

    Raises:
        UserError: always: the message names the command that converts it, or says that nothing was recognised.
    """
    from dataset.shapes import foreign_file, prepare_command
    from scripts.preparing.inspection import RawLook, show_piece

    look = RawLook(path)
    if not look.shapes:
        with open(path, "rb") as file:
            shape = foreign_file(file.read(512))
        why = f"it is {shape}" if shape else "; ".join([*look.unusable, *look.faults[:1], *look.lost]) or "it is empty"
        raise UserError(f"{path}: no stage can train on it: {why}")
    for number, piece in enumerate(look.examples[:samples], 1):
        print(f"--- record {number}, {piece.shape}\n{show_piece(piece)}\n")
    if look.faults:
        print(f"{look.bad:,} bad lines:", *(f"  {fault}" for fault in look.faults), sep="\n")
    print(*look.describe(), *look.lost, sep="\n")
    raise UserError(f"{path}: no stage can train on it as it is; convert it with: {prepare_command(path, look.stage)}")


def open_stage(stage: str, args, tokenizer):
    """The dataset that the stage would train on; bad lines are left out."""
    import dataset
    from trainer.vision import image_data, open_vision

    if stage == "vlm":
        dataset_class = image_data(args, open_vision(args.vision_model))
    else:
        dataset_class = getattr(dataset, STAGES[stage].dataset)
    return dataset_class(args.data_path, tokenizer, args.max_seq_len or STAGES[stage].max_seq_len, skip_bad_lines=True)


class Spelling:
    """Decodes tokens to text that is safe to print."""

    def __init__(self, tokenizer, marks: Marks):
        from model.tokenizer import token_bytes

        self.marks = marks
        self.bytes = token_bytes(tokenizer)
        self.control = {number: token.content for number, token in tokenizer.added_tokens_decoder.items()}
        self._literal = re.compile("|".join(map(re.escape, (*self.control.values(), *BRACKETS.learned))))

    def write(self, ids: list[int], learned: list[bool], pictures: dict[int, tuple[str, int]]) -> str:
        """The tokens as text, with targets marked.

        Args:
            pictures: each image's name and number of tokens, by the position of its first token.
        """
        runs = []
        for is_learned, run in groupby(self._units(ids, learned, pictures), key=lambda unit: unit[0]):
            text = "".join(self._join(kind, [unit[2] for unit in units], is_learned) for kind, units in _by_kind(run))
            runs.append(f"{self.marks.learned[0]}{text}{self.marks.learned[1]}" if is_learned else text)
        return "".join(runs)

    def _units(self, ids, learned, pictures) -> Iterator[tuple[bool, str, bytes]]:
        place = 0
        while place < len(ids):
            token, places = ids[place], 1
            if place in pictures:
                name, places = pictures[place]
                yield learned[place], "control", f"<image {shown(name)}: {places} places>".encode()
            elif token in self.control:
                yield learned[place], "control", self.control[token].encode()
            else:
                yield learned[place], "text", self.bytes[token]
            place += places

    def _join(self, kind: str, pieces: list[bytes], is_learned: bool) -> str:
        text = b"".join(pieces).decode("utf-8", errors="replace")
        text = "".join(char if char.isprintable() or char in "\n\t" else ascii(char)[1:-1] for char in text)
        if kind == "text":
            return self._literal.sub(r"\\\g<0>", text)
        return text if is_learned else f"{self.marks.control[0]}{text}{self.marks.control[1]}"


def _by_kind(units) -> Iterator[tuple[str, Iterator]]:
    return groupby(units, key=lambda unit: unit[1])


def show_samples(data, spelling: Spelling, count: int, seed: int | None) -> None:
    """Print `count` samples or pairs: the first ones, or randomly drawn ones if there is a seed."""
    import numpy as np

    groups = len(data.pieces.sample) // data.group
    chosen = np.arange(groups)[:count]
    if seed is not None:
        chosen = np.sort(np.random.default_rng(seed).permutation(groups)[:count])
    for group in chosen:
        for side in range(data.group):
            number = int(group) * data.group + side
            ids, labels, _ = data.piece(number)
            learned = labels == ids
            sample, whole = data.pieces.sample[number], data.cache.lengths[data.pieces.sample[number]]
            name = f"{data.unit.removesuffix('s')} {sample // data.group + 1}"
            if data.group == 2:
                name += (", chosen", ", rejected")[side]
            of = f" of {whole:,}" if whole > len(ids) else ""
            print(f"--- {name}: {len(ids):,}{of} tokens, {learned.sum():,} targets")
            text = spelling.write(ids.tolist(), learned.tolist(), locate_pictures(data, sample))
            print(text.removesuffix("\n"), end="\n\n")


def locate_pictures(data, sample: int) -> dict[int, tuple[str, int]]:
    """Each image's name and number of tokens in a sample, by the position of its first token."""
    extra = data.cache.note(sample)
    if not extra:
        return {}
    return {start: (name, data.image_tokens) for start, name in zip(extra["starts"], extra["images"], strict=True)}


def report(data, is_text: bool) -> None:
    """Print training's start-up report, the share of targets, the bad lines, and the lengths of the samples.

    Args:
        is_text: whether the stage splits samples that are longer than a row.
    """
    import numpy as np

    from scripts.preparing.inspection import duplicates, histogram, what_rows_cut

    pieces, lengths = data.pieces, data.cache.lengths
    if data.cache.bad_lines:
        print(f"{data.cache.bad_lines:,} bad lines:")
        print(*(f"  {line}" for line in data.cache.bad_reports), sep="\n")
        if data.cache.bad_lines > len(data.cache.bad_reports):
            print(f"  and {data.cache.bad_lines - len(data.cache.bad_reports):,} more")
    print(data.summary)
    print(f"lines: {len(lengths) // data.group + data.cache.bad_lines:,}")
    learned = sum(int(data.cache.targets(*piece)[1:].sum()) for piece in zip(*pieces, strict=True))
    tokens = int(pieces.length.sum())
    print(f"target tokens: {learned:,} of {tokens:,} ({learned / tokens:.1%})")
    print(f"tokens per sample: median {int(np.median(lengths)):,}, longest {int(lengths.max()):,}")
    every = sum(int(data.cache.targets(sample, 0, n)[1:].sum()) for sample, n in enumerate(lengths))
    if learned < every:
        print(f"lost by cutting and dropping: {every - learned:,} target tokens ({1 - learned / every:.1%})")
    if data.group == 1 and (repeated := duplicates(data.cache)):
        print(f"duplicate samples: {repeated:,}")
    print("samples by tokens:", *histogram(lengths), sep="\n")
    print("samples, by --max_seq_len:", *what_rows_cut(lengths, data.cache.first_target, is_text), sep="\n")


def main():
    args = get_args()
    if args.max_seq_len == 1:
        raise UserError("--max_seq_len must be 2 or more: a row needs an input token and a target")
    from trainer.weights import load_tokenizer  # imported late, so that --help is quick

    stage = args.stage or guess_stage(args.data_path)
    if stage is None:
        show_raw(args.data_path, args.samples)
    tokenizer = load_tokenizer(args.tokenizer)
    data = open_stage(stage, args, tokenizer)
    print(f"{args.data_path} as --stage {stage} reads it ({type(data).__name__})\n")
    colours = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
    show_samples(data, Spelling(tokenizer, COLOURS if colours else BRACKETS), args.samples, args.seed)
    report(data, is_text=stage == "pretrain")
    if stage != "vlm":
        from scripts.preparing.inspection import RawLook

        print(*RawLook(args.data_path).describe()[1:], sep="\n")
    if args.plot:
        from scripts.preparing.inspection import plot_lengths

        plot_lengths(data.cache.lengths, data.max_seq_len, args.plot)
        print(f"drawn: {args.plot}")
    if data.cache.bad_lines and not args.skip_bad_lines:
        raise UserError(
            f"{args.data_path}: {data.cache.bad_lines:,} bad lines, listed above: training stops at the first, "
            "or skips them with --skip_bad_lines"
        )


if __name__ == "__main__":
    run_main(main)
