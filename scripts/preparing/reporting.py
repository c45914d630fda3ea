"""The report of a run: on the terminal, and in OUT.report.md."""

from collections import Counter
from pathlib import Path

import numpy as np
import orjson

from scripts.preparing import languages
from scripts.preparing.choosing import cutoff, draw
from scripts.preparing.filters import WHAT
from scripts.preparing.passes import Findings, Preparation
from scripts.preparing.writing import Chosen

SAMPLED = 20_000  # lines whose tokens are counted
ROW_LENGTHS = (256, 512, 1024, 2048)
MOST_SHOWN = 40  # sources, or reasons


class Figures:
    """The figures on the lines that were written.

    Attributes:
        lines, held_out, chars: totals of what was written.
        languages: lines by language.
        lengths: characters of each line, in the order of the chunks.
        tokens: number of tokens in each sampled line; `sampled` says whether these are all lines.
    """

    def __init__(self, run: Preparation, chosen: Chosen):
        which = chosen.train | chosen.held_out
        self.train, self.held_out = int(chosen.train.sum()), int(chosen.held_out.sum())
        self.lines = self.train + self.held_out
        self.languages: Counter = Counter()
        self.chars = 0
        self.bins: Counter = Counter()  # of lengths, by powers of the square root of 2
        tokens, seed = [], run.settings.seed

        def portions():
            for start, end in zip(chosen.starts[:-1], chosen.starts[1:], strict=True):
                numbers = np.flatnonzero(which[start:end])
                yield draw(seed, "tokens", numbers + start), np.ones(len(numbers))

        self.sampled = not run.settings.needs_tokens and self.lines > SAMPLED
        limit = cutoff(portions, SAMPLED) if self.sampled else (1 << 64) - 1
        for chunk, start, end in zip(chosen.chunks, chosen.starts[:-1], chosen.starts[1:], strict=True):
            numbers = np.flatnonzero(which[start:end])
            about = chunk.about()[numbers]
            self.chars += int(about["chars"].sum())
            self.languages.update(
                {languages.NAMES[n]: int(c) for n, c in enumerate(np.bincount(about["language"])) if c}
            )
            self.bins.update((2 * np.log2(np.maximum(1, about["chars"]))).astype(int).tolist())
            if run.settings.needs_tokens:
                tokens.append(about["tokens"])
            else:
                mine = numbers[draw(seed, "tokens", numbers + start) <= np.uint64(limit)]
                tokens.append(_count(chunk.some_lines(mine), run))
        self.tokens = np.concatenate(tokens).astype(np.int64)
        self.all_tokens = round(float(self.tokens.mean()) * self.lines) if len(self.tokens) else 0

    def cut(self, max_seq_len: int) -> float:
        """The share of lines that are longer than a row."""
        return float((self.tokens > max_seq_len).mean())


def _count(lines: list[bytes], run: Preparation) -> np.ndarray:
    from scripts.preparing.token_counts import count_tokens

    return count_tokens(list(map(orjson.loads, lines)), run.settings.stage, run.settings.tokenizer)


def describe(run: Preparation, figures: Figures) -> list[str]:
    """The text printed at the end."""
    found = run.found
    lines = found.total("lines")
    printed = [*shapes_read(found)]
    printed += found.lost
    bad = found.total("bad")
    if bad:
        printed.append(f"bad lines: {_named(bad)}")
    unusable = found.total("unusable")
    if unusable:
        printed.append(f"not usable: {_named(unusable)}")
    removed = found.total("removed") + Counter({name: count for name, count in found.dropped.items() if count})
    if removed:
        printed.append(f"removed: {_named(removed)}")
    if found.boilerplate:
        printed.append(f"lines of boilerplate taken out of documents: {found.boilerplate:,}")
    if masked := found.total("masked"):
        printed.append(f"masked: {_named(masked)}")
    about = "about " if figures.sampled else ""
    held = f", {figures.held_out:,} of them held out" if figures.held_out else ""
    printed.append(
        f"{lines['read']:,} lines read, {figures.lines:,} written{held}: {figures.chars:,} characters, {about}"
        f"{figures.all_tokens:,} tokens"
    )
    return printed


def shapes_read(found: Findings) -> list[str]:
    """A line about each source: the formats of its lines."""
    said = []
    for source in found.sources[:MOST_SHOWN]:
        counts = found.by_source[source.number]
        shapes = counts["shapes"]
        packed = f", {source.compression}" if source.compression else ""
        encoded = f", {source.encoding}" if source.encoding != "utf-8" else ""
        named = ", ".join(f"{shape} ({count:,})" for shape, count in shapes.most_common(6)) or "no known shape"
        if not shapes and not counts["lines"]["read"]:
            named = "nothing to read"
        said.append(f"{source.name} ({source.format}{packed}{encoded}): {named}")
    if len(found.sources) > MOST_SHOWN:
        said.append(f"and {len(found.sources) - MOST_SHOWN:,} more files")
    return said


def _named(counts: Counter) -> str:
    shown = [f"{name} {count:,}" for name, count in counts.most_common(12)]
    return ", ".join(shown) + (f", and {len(counts) - 12} more kinds" if len(counts) > 12 else "")


def write_report(
    run: Preparation, figures: Figures, licences: dict[str, str], folder: Path, command: str
) -> list[Path]:
    """Write OUT.report.md and OUT.report.png in the folder."""
    from scripts.preparing.report_chart import draw_chart

    picture = folder / f"{run.name}.report.png"
    page = folder / f"{run.name}.report.md"
    draw_chart(run.found, figures, picture)
    page.write_text("\n".join(_page(run, figures, licences, picture.name, command)) + "\n", encoding="utf-8")
    return [page, picture]


def _page(run: Preparation, figures: Figures, licences: dict[str, str], picture: str, command: str) -> list[str]:
    settings = run.settings
    made_by = f"For `--stage {settings.stage}`, seed {settings.seed}, made by"
    page = [f"# {run.name}.jsonl", "", made_by, "", "```", command, "```", "", f"![]({picture})", ""]
    page += ["## What is left", "", *_what_is_left(run, figures), ""]
    page += ["## What came in", "", *_what_came_in(run.found, licences), ""]
    page += ["## What was removed", "", *_what_was_removed(run.found)]
    if run.found.examples:
        page += ["", "## Examples", ""]
        for kind, examples in sorted(run.found.examples.items()):
            page += [f"**{escape(kind)}**", ""]
            page += [f"- {escape(file)}, line {line:,}: {escape(text)}" for file, line, text in examples]
            page.append("")
    return page


def _what_is_left(run: Preparation, figures: Figures) -> list[str]:
    tokens = f"{figures.all_tokens:,}"
    if figures.sampled:
        tokens = f"about {tokens} (from {len(figures.tokens):,} lines)"
    rows = [
        ("lines read", f"{run.found.total('lines')['read']:,}"),
        ("lines to train on", f"{figures.train:,}"),
        ("lines held out", f"{figures.held_out:,}"),
        ("characters", f"{figures.chars:,}"),
        ("tokens", tokens),
    ]
    for name, count in figures.languages.most_common():
        rows.append((f"lines in {name}", f"{count:,} ({count / figures.lines:.1%})"))
    median, longest = int(np.median(figures.tokens)), int(figures.tokens.max())
    cut = [(f"{length:,}", f"{figures.cut(length):.2%}") for length in ROW_LENGTHS]
    said = ["", f"Tokens of a line: median {median:,}, longest {longest:,}.", ""]
    return _table(("", ""), rows) + said + _table(("--max_seq_len", "lines that are longer"), cut)


def _what_came_in(found: Findings, licences: dict[str, str]) -> list[str]:
    rows = []
    for source in found.sources[:MOST_SHOWN]:
        counts = found.by_source[source.number]
        shapes = ", ".join(f"{shape} {count:,}" for shape, count in counts["shapes"].most_common(6))
        taken = found.kept_by_source[source.number]
        rows.append(
            (source.name, f"{counts['lines']['read']:,}", shapes, f"{taken:,}", licence_of(source.name, licences))
        )
    said = _table(("source", "lines", "shape", "taken", "licence"), rows)
    if len(found.sources) > MOST_SHOWN:
        said += ["", f"And {len(found.sources) - MOST_SHOWN:,} more."]
    if found.lost:
        said += ["", "Not read to the end:", "", *(f"- {escape(line)}" for line in found.lost)]
    return said


def _what_was_removed(found: Findings) -> list[str]:
    rows = [(f"{name}: {WHAT[name]}", count) for name, count in found.total("removed").most_common()]
    rows += found.dropped.most_common()
    rows += [(f"bad line: {name}", count) for name, count in found.total("bad").most_common(MOST_SHOWN)]
    rows += [(f"not usable: {name}", count) for name, count in found.total("unusable").most_common(MOST_SHOWN)]
    rows = [(name, f"{count:,}") for name, count in rows if count]
    said = _table(("why", "lines"), rows) if rows else ["Nothing."]
    changed = [("normalised", found.total("lines")["normalised"]), ("boilerplate taken out", found.boilerplate)]
    changed += [(f"masked: {name}", count) for name, count in found.total("masked").most_common()]
    if changed := [(name, f"{count:,}") for name, count in changed if count]:
        said += ["", "Changed:", "", *_table(("what", "lines"), changed)]
    return said


def licence_of(name: str, licences: dict[str, str]) -> str:
    """A source's licence according to --source, by its whole name, its file name, or a folder above it."""
    path = Path(name)
    for called in (
        name,
        path.name,
        *(str(parent) for parent in path.parents),
        *(parent.name for parent in path.parents),
    ):
        if called in licences:
            return licences[called]
    return "not said"


def escape(text: object) -> str:
    """Text escaped so that Markdown shows it literally, on one line."""
    shown = " ".join(str(text).split())
    return "".join(f"\\{char}" if char in "\\`*_{}[]<>|#~$" else char for char in shown)


def _table(head: tuple[str, ...], rows: list[tuple]) -> list[str]:
    return [
        "| " + " | ".join(head) + " |",
        "| " + " | ".join("---" for _ in head) + " |",
        *("| " + " | ".join(escape(cell).replace("\\`", "`") for cell in row) + " |" for row in rows),
    ]
