"""Statistics of a file for scripts/inspect_data.py: formats, languages, roles, lengths, duplicates."""

import hashlib
import itertools
from collections import Counter
from pathlib import Path

import numpy as np

from scripts.preparing import languages
from scripts.preparing.characters import count
from scripts.preparing.chunks import Fault, cut_into_chunks, read_rows
from scripts.preparing.cleaning import excerpt
from scripts.preparing.record_shapes import Piece, Unusable, nested_records, recognise
from scripts.preparing.sources import find_sources

LOOKED_AT = 20_000  # lines
MOST_FAULTS = 20
ROW_LENGTHS = (256, 512, 1024, 2048, 4096)
BAR = 40  # characters of the longest bar


class RawLook:
    """A summary of the first lines of a file of any format.

    Attributes:
        format: such as "parquet" or "jsonl, gzip".
        lines: the number of lines examined.
        shapes, roles, languages, unusable: their counts.
        faults: "line 3: reason" of the first bad lines; `bad` is their number.
        examples: the first recognised records.
        stage: the stage that could train on most of them.
    """

    def __init__(self, path: Path):
        (source,) = find_sources([str(path)])
        self.format = ", ".join(
            filter(None, (source.format, source.compression, source.encoding.removeprefix("utf-8")))
        )
        self.lost: list[str] = []
        self.shapes: Counter = Counter()
        self.roles: Counter = Counter()
        self.unusable: Counter = Counter()
        self.languages: Counter = Counter()
        self.stages: Counter = Counter()
        self.faults: list[str] = []
        self.bad = self.lines = 0
        self.examples: list[Piece] = []
        texts = []
        rows = (row for chunk in cut_into_chunks(source, "document", self.lost) for row in read_rows(chunk))
        for row in itertools.islice(rows, LOOKED_AT):
            self.lines += 1
            if isinstance(row.value, Fault):
                self.bad += 1
                if len(self.faults) < MOST_FAULTS:
                    self.faults.append(f"line {row.line}: {row.value}")
                continue
            for record in nested_records(row.value) or [row.value]:
                try:
                    self._add(recognise(record), texts)
                except Unusable as reason:
                    self.unusable[f"{reason} (keys: {excerpt(', '.join(map(str, record)))})"] += 1
        weights = languages.weights(texts, count(texts)) if texts else np.empty((0, 3))
        for number, lines in enumerate(np.bincount(weights.argmax(axis=1), minlength=3)):
            if lines:
                self.languages[languages.NAMES[number]] = int(lines)

    def _add(self, piece: Piece, texts: list[str]) -> None:
        self.shapes[piece.shape] += 1
        if len(self.examples) < 100:
            self.examples.append(piece)
        turns = (piece.turns or []) + (piece.chosen or []) + (piece.rejected or [])
        self.roles.update(turn["role"] for turn in turns)
        said = piece.text if piece.text is not None else "\n".join(turn["content"] for turn in turns)
        texts.append(said)
        if piece.text is not None:
            self.stages["pretrain"] += 1
        elif piece.chosen is not None:
            self.stages["dpo"] += 1
        else:
            self.stages["reason" if "<think>" in said else "sft"] += 1

    @property
    def stage(self) -> str:
        """The stage that could train on the most lines; "pretrain" if no line was recognised."""
        return self.stages.most_common(1)[0][0] if self.stages else "pretrain"

    def describe(self) -> list[str]:
        """The summary as lines to print."""
        first = f" (the first {LOOKED_AT:,})" if self.lines == LOOKED_AT else ""
        said = [f"format: {self.format}", f"lines looked at: {self.lines:,}{first}"]
        for name in ("shapes", "roles", "languages"):
            if counts := getattr(self, name):
                said.append(f"{name}: {', '.join(f'{what} {number:,}' for what, number in counts.most_common(8))}")
        said += [f"not usable: {why}: {number:,}" for why, number in self.unusable.most_common(8)]
        return said


def show_piece(piece: Piece) -> str:
    """A record as it was recognised, safe to print."""
    if piece.text is not None:
        return excerpt(piece.text)
    said = [f"  {turn['role']}: {excerpt(turn['content'])}" for turn in piece.turns or []]
    for name, turns in (("chosen", piece.chosen), ("rejected", piece.rejected)):
        said += [f"  {name}, {turn['role']}: {excerpt(turn['content'])}" for turn in turns or []]
    return "\n".join(said)


def histogram(lengths: np.ndarray) -> list[str]:
    """A histogram of samples by tokens, in steps of a factor of two, as bars to print."""
    steps = np.floor(np.log2(np.maximum(1, lengths))).astype(int)
    counts = np.bincount(steps)
    said = []
    for step in range(int(np.flatnonzero(counts)[0]), len(counts)):
        bar = "█" * int(np.ceil(BAR * counts[step] / counts.max()))
        said.append(f"  {1 << step:>7,} to {(2 << step) - 1:>7,} {counts[step]:>9,} {bar}")
    return said


def what_rows_cut(lengths: np.ndarray, first_target: np.ndarray, is_text: bool) -> list[str]:
    """For each --max_seq_len the number of longer samples, what happens to them, and how many are dropped.

    Args:
        lengths: number of tokens in each sample.
        first_target: index of each sample's first target token.
        is_text: whether long samples are split, so that nothing is lost.
    """
    said = []
    for row in ROW_LENGTHS:
        longer = int((lengths > row).sum())
        if is_text:
            said.append(f"  {row:>5,}: {longer:,} split, none lost")
        else:
            dropped = int((first_target >= np.minimum(lengths, row)).sum())
            lost = int(np.maximum(0, lengths - np.maximum(row, first_target)).sum())
            said.append(f"  {row:>5,}: {longer - dropped:,} cut, {dropped:,} dropped, {lost:,} tokens lost")
        if not longer:
            break
    return said


def duplicates(cache) -> int:
    """The number of samples in a `TokenCache` that repeat an earlier one token by token."""
    seen: set[bytes] = set()
    for sample, length in enumerate(cache.lengths):
        seen.add(hashlib.blake2b(cache.ids(sample, 0, length).tobytes(), digest_size=12).digest())
    return len(cache) - len(seen)


def plot_lengths(lengths: np.ndarray, row: int, path: Path) -> None:
    """Draw the histogram as a PNG."""
    from matplotlib.figure import Figure

    from trainer.files import replacing

    figure = Figure(figsize=(7, 4), layout="constrained")
    panel = figure.subplots()
    panel.hist(lengths, bins=np.geomspace(1, max(2, lengths.max() + 1), 50), color="#2a7f62")
    panel.axvline(row, color="#b5523b", linewidth=1)
    panel.annotate(f"--max_seq_len {row:,}", (row, 1), xycoords=("data", "axes fraction"), ha="center", fontsize=8)
    panel.set(xscale="log", xlabel="tokens of a sample", ylabel="samples")
    panel.spines[["top", "right"]].set_visible(False)
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=110)
