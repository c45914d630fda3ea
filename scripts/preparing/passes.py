"""The passes in order; each continues from an earlier run's results in the work folder."""

import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import orjson
from tqdm import tqdm

from scripts.preparing import cleaning, comparing
from scripts.preparing.chunks import Chunk, cut_into_chunks
from scripts.preparing.exact_duplicates import find_exact_duplicates
from scripts.preparing.near_duplicates import find_near_duplicates
from scripts.preparing.options import Settings
from scripts.preparing.sources import Source, find_sources
from scripts.preparing.work_folder import CleanChunk, LineTexts, WorkFolder, identify, save_array
from scripts.preparing.worker_pool import WorkerPool
from scripts.preparing.writing import Chosen, LineFiles, choose, write_lines
from trainer.errors import UserError, print_notice
from trainer.files import move

EXAMPLES = 5  # of each kind, in the report


@dataclass
class Findings:
    """The findings of all passes, for the report.

    Attributes:
        sources: the sources, each with its counts: {"shapes": Counter, "removed": Counter, …}.
        lost: a line about each file that could not be read to its end.
        examples: removed texts as (file, line, text), by "removed: name".
        dropped: the number of lines dropped after cleaning, by reason.
        notes: further remarks as (name, text).
    """

    sources: list[Source]
    by_source: dict[int, dict[str, Counter]] = field(default_factory=lambda: defaultdict(lambda: defaultdict(Counter)))
    lost: list[str] = field(default_factory=list)
    examples: dict[str, list] = field(default_factory=lambda: defaultdict(list))
    dropped: Counter = field(default_factory=Counter)
    kept_by_source: Counter = field(default_factory=Counter)
    boilerplate: int = 0

    def total(self, kind: str) -> Counter:
        """The counts of a kind, over all sources."""
        return sum((counts[kind] for counts in self.by_source.values()), Counter())


class Preparation:
    """One run of prepare_data.py.

    Args:
        inputs: files, folders and patterns; empty with a --mix.
        out: the file to write; its work folder is beside it.
    """

    def __init__(
        self, inputs: list[str], out: Path, settings: Settings, workers: int, device: str | None, overwrite: bool
    ):
        self.settings, self.out, self.device = settings, out, device
        self.sources = all_sources(inputs, settings)
        self.name = out.name.removesuffix(".jsonl")
        self.found = Findings(self.sources)
        self.pool = WorkerPool(workers)
        if settings.against:
            comparing.evaluation(settings.against)  # so that faults of these files are reported now
        self.work_path = out.with_name(f"{self.name}.work")
        others = [*settings.against, *([settings.ppl_model] if settings.ppl_model else [])]
        identity = identify(self.sources, asdict(settings), [name for name in others if Path(name).is_file()])
        self._check_targets(identity, overwrite)
        self.work = WorkFolder(self.work_path, identity)
        if self.work.goes_on:
            print_notice(f"{self.work_path}: continuing an earlier run that stopped here")
        elif self.work.other:
            print_notice(f"{self.work_path}: left by a run with other settings or inputs; starting over")

    def _check_targets(self, identity: dict, overwrite: bool) -> None:
        """Refuse to replace existing files without --overwrite, unless this run was interrupted while placing them."""
        there = [path for path in self.targets() if path.exists()]
        if not there or overwrite:
            return
        settings = self.work_path / "settings.json"
        placing = self.work_path / "placing.json"
        if (
            placing.exists()
            and settings.exists()
            and orjson.loads(settings.read_bytes()) == orjson.loads(orjson.dumps(identity))
        ):
            return
        raise UserError(f"{there[0]} already exists: use --overwrite to replace it, or choose another --out")

    def targets(self) -> list[Path]:
        """The files of this name that exist or may be written."""
        shard = re.compile(rf"{re.escape(self.name)}-\d{{5}}\.jsonl")
        parent = self.out.parent
        shards = sorted(path for path in parent.iterdir() if shard.fullmatch(path.name)) if parent.is_dir() else []
        beside = [parent / f"{self.name}.{end}" for end in ("jsonl", "val.jsonl", "report.md", "report.png")]
        return beside[:2] + shards + beside[2:]

    def clean(self) -> None:
        """Pass 1: every chunk of every source, cleaned."""
        done = self.work.done("clean")
        folder = self.work.path / "clean"
        if done is None:
            lost: list[str] = []
            job = partial(cleaning.clean, settings=self.settings, folder=folder)
            names = list(self._shown("cleaning", self.pool.map(job, self._chunks(lost, folder))))
            done = {"chunks": [name for name in names if name], "lost": lost}
            self.work.note("clean", done)
        self.chunks = done["chunks"]
        self.found.lost = done["lost"]
        for name in self.chunks:
            self._add(CleanChunk(folder / name).summary())

    def _chunks(self, lost: list[str], folder: Path) -> Iterator[Chunk]:
        """All chunks; those already done come without their data."""
        for source in self.sources:
            for chunk in cut_into_chunks(source, self.settings.text_unit, lost):
                name = f"{source.number:06d}-{chunk.number:07d}"
                yield chunk._replace(data=None) if CleanChunk(folder / name).is_done() else chunk

    def _shown(self, what: str, results: Iterator, total: int | None = None) -> Iterator:
        """The results, with a progress bar on a terminal."""
        return tqdm(results, desc=what, unit=" chunks", disable=None, total=total, leave=False)

    def _add(self, summary: dict) -> None:
        counts = self.found.by_source[summary["source"]]
        for kind, found in summary["counts"].items():
            counts[kind].update(found)
        counts["lines"]["cleaned"] += summary["kept"]
        for kind, examples in summary["examples"].items():
            room = EXAMPLES - len(self.found.examples[kind])
            self.found.examples[kind] += examples[: min(room, 1 if len(self.chunks) > EXAMPLES else room)]

    def compare(self) -> None:
        """Passes 2 to 4: shared lines are removed, then duplicates and contaminated lines are dropped."""
        settings, folder = self.settings, self.work.path
        boilerplate = None
        if settings.boilerplate and self.chunks:
            boilerplate = folder / "boilerplate.npy"
            if not boilerplate.exists():
                files = [folder / "clean" / f"{name}.lines.npy" for name in self.chunks]
                save_array(boilerplate, comparing.find_boilerplate(files, settings.boilerplate))
            boilerplate = boilerplate if len(np.load(boilerplate, mmap_mode="r")) else None
        job = comparing.Comparison(folder, settings, boilerplate)
        results = self.pool.map(partial(comparing.prepare, job), self.chunks)
        for _ in self._shown("comparing", results, len(self.chunks)):
            pass
        self.cleaned = [job.chunk(name) for name in self.chunks]
        self.starts = [0]
        for chunk in self.cleaned:
            self.starts.append(self.starts[-1] + len(chunk.about()))
        self.kept = np.ones(self.starts[-1], bool)
        for name, start in zip(self.chunks, self.starts, strict=False):
            self._add_comparison(name, start)
        if settings.exact_dup and self.chunks:
            dropped, repeats = find_exact_duplicates([folder / "keys" / f"{name}.exact.npy" for name in self.chunks])
            self._drop("exact duplicates", dropped, repeats)
        for what, threshold, key, text_of in (
            ("near duplicates", settings.near_dup, "near", "whole_text"),
            ("near duplicates by the question", settings.near_dup_questions, "questions", "questions"),
        ):
            if threshold and self.chunks:
                self._drop_near(what, threshold, key, text_of)

    def _drop_near(self, what: str, threshold: float, key: str, text_of: str) -> None:
        saved = self.work.path / f"{key}.npy"
        if not saved.exists():
            dropped, repeats = find_near_duplicates(
                [self.work.path / "keys" / f"{name}.{key}.npy" for name in self.chunks],
                LineTexts(tuple(self.cleaned), tuple(self.starts), text_of),
                threshold,
                self.work.path / f"{key}.work",
                dropped=np.flatnonzero(~self.kept),
                pool=self.pool.executor,
            )
            save_array(saved, np.stack([dropped, repeats]))
        self._drop(what, *np.load(saved))

    def _add_comparison(self, name: str, start: int) -> None:
        """Count the findings of a chunk's comparison, and drop its contaminated lines."""
        summary = orjson.loads((self.work.path / "keys" / f"{name}.json").read_bytes())
        source = self.sources[int(name.partition("-")[0])]
        self.found.boilerplate += summary["boilerplate"]
        if summary["emptied"]:
            self.found.dropped["nothing left but boilerplate"] += summary["emptied"]
        for line, text in summary["examples"]:
            self._example("removed lines: boilerplate", source.name, line, text)
        about = self.cleaned[self.chunks.index(name)].about() if summary["contaminated"] else None
        for number, file, line, shared, text in summary["contaminated"]:
            self.kept[start + number] = False
            self.found.dropped["contaminated"] += 1
            self._example(
                "dropped: contaminated",
                source.name,
                int(about["line"][number]),
                f"{text} ({file}, line {line}: {shared})",
            )

    def _example(self, kind: str, file: str, line: int, text: str) -> None:
        if len(self.found.examples[kind]) < EXAMPLES:
            self.found.examples[kind].append([file, line, text])

    def _drop(self, why: str, dropped: np.ndarray, repeats: np.ndarray | None = None) -> None:
        """Drop lines, and report some as examples."""
        left = self.kept[dropped]
        self.found.dropped[why] += int(left.sum())
        self.kept[dropped] = False
        shown = np.flatnonzero(left)
        texts = LineTexts(tuple(self.cleaned), tuple(self.starts), "whole_text")
        for place in shown[:: max(1, len(shown) // EXAMPLES)][:EXAMPLES]:
            line = int(dropped[place])
            file, number = self.origin(line)
            (text,) = texts.read([line])
            text = cleaning.excerpt(text)
            if repeats is not None:
                other_file, other = self.origin(int(repeats[place]))
                (other_text,) = texts.read([int(repeats[place])])
                text = f"{text} ↔ {cleaning.excerpt(other_text)} ({other_file}, line {other})"
            self._example(f"dropped: {why}", file, number, text)

    def origin(self, line: int) -> tuple[str, int]:
        """The source of a cleaned line, and its number there."""
        place = int(np.searchsorted(self.starts, line, side="right")) - 1
        source = self.sources[int(self.chunks[place].partition("-")[0])]
        return source.name, int(self.cleaned[place].about()["line"][line - self.starts[place]])

    def judge(self) -> None:
        """The optional pass: drop the lines that a model predicts worst."""
        if self.settings.ppl_model:
            from scripts.preparing.quality import worst_lines

            dropped = worst_lines(self.cleaned, self.starts, self.kept, self.settings, self.device, self.work)
            self._drop(f"highest perplexity under {self.settings.ppl_model}", dropped)

    def write(self) -> Chosen:
        """Pass 5: choose, shuffle and write into the work folder."""
        groups = [self.sources[int(name.partition("-")[0])].group for name in self.chunks]
        if not self.kept.any():
            raise UserError(self._nothing_left())
        chosen = choose(self.cleaned, groups, self.kept, self.settings)
        self.found.dropped["not taken, by --mix or --max_lines"] += int(
            self.kept.sum() - (chosen.train | chosen.held_out).sum()
        )
        folder = self.work.path / "out"
        folder.mkdir(exist_ok=True)
        for path in folder.iterdir():
            path.unlink()
        files = LineFiles(folder, self.name, self.settings.shard_lines)
        write_lines(chosen, chosen.train, self.settings, files, self.work.path / "buckets")
        self.written = files.close()
        if chosen.held_out.any():
            files = LineFiles(folder, f"{self.name}.val")
            write_lines(chosen, chosen.held_out, self.settings, files, self.work.path / "buckets")
            self.written += files.close()
        for name, start, end in zip(self.chunks, self.starts[:-1], self.starts[1:], strict=True):
            taken = int((chosen.train | chosen.held_out)[start:end].sum())
            self.found.kept_by_source[int(name.partition("-")[0])] += taken
        return chosen

    def _nothing_left(self) -> str:
        read = self.found.total("lines")["read"]
        reasons = (
            self.found.total("bad") + self.found.total("unusable") + self.found.total("removed") + self.found.dropped
        )
        most = "; ".join(f"{name}: {count:,}" for name, count in reasons.most_common(4) if count)
        return f"of {read:,} lines nothing is left ({most or '; '.join(self.found.lost) or 'there were none'})"

    def place(self, report: Callable[[Path], list[Path]]) -> list[Path]:
        """Move the written files and the report to their final place, and remove those of an earlier run."""
        written = self.written + report(self.work.path / "out")
        self.work.note("placing", {})
        self.out.parent.mkdir(parents=True, exist_ok=True)
        new = [self.out.parent / path.name for path in written]
        for path, target in zip(written, new, strict=True):
            move(path, target)
        for old in self.targets():
            if old not in new and old.exists():  # of an earlier run with more shards, or with lines held out
                old.unlink()
        self.work.remove()
        return new


def all_sources(inputs: list[str], settings: Settings) -> list[Source]:
    """The sources in order: the inputs, or the parts of --mix.

    Raises:
        UserError: there are none.
    """
    if not settings.mix:
        return find_sources(inputs)
    sources: list[Source] = []
    for group, (name, _) in enumerate(settings.mix):
        sources += find_sources([name], group, len(sources))
    return sources
