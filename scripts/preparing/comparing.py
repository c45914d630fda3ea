"""The second pass, chunk by chunk: removes lines that many documents share, and prepares the comparison."""

import math
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import orjson

from scripts.preparing.cleaning import excerpt, line_hashes
from scripts.preparing.exact_duplicates import exact_keys
from scripts.preparing.options import Settings
from scripts.preparing.shingles import signatures
from scripts.preparing.stage_records import questions, whole_text
from scripts.preparing.work_folder import LINE, CleanChunk, save_array, write_whole

HASHES_AT_ONCE = 1 << 23
EXAMPLES = 3


class Comparison(NamedTuple):
    """The settings that a process needs to prepare a chunk's comparison."""

    work: Path
    settings: Settings
    boilerplate: Path | None  # the hashes of the lines to remove, sorted; None if there are none

    def chunk(self, name: str) -> CleanChunk:
        """The chunk after this pass."""
        return CleanChunk(self.work / ("final" if self.boilerplate else "clean") / name)


def find_boilerplate(files: list[Path], least: int) -> np.ndarray:
    """The hashes of lines that occur in at least this many documents, sorted.

    Only a share of the hashes, by their last bits, is in memory at a time.

    Args:
        files: for each chunk uint64 (2, n): hashes, and the number of its documents with each.
    """
    total = sum(np.load(file, mmap_mode="r").shape[1] for file in files)
    shares = 1 << max(0, math.ceil(total / HASHES_AT_ONCE) - 1).bit_length()
    found = [np.empty(0, np.uint64)]
    for share in range(shares):
        parts = [np.empty((2, 0), np.uint64)]
        for file in files:
            part = np.load(file)
            parts.append(part[:, part[0] & np.uint64(shares - 1) == share])
        hashes, documents = np.concatenate(parts, axis=1)
        hashes, index = np.unique(hashes, return_inverse=True)
        found.append(hashes[np.bincount(index, documents, minlength=len(hashes)) >= least])
    return np.sort(np.concatenate(found))


def prepare(job: Comparison, name: str) -> str:
    """Write a chunk's keys; returns its name."""
    done = job.work / "keys" / f"{name}.json"
    if done.exists():
        return name
    summary: dict = {"boilerplate": 0, "emptied": 0, "examples": [], "contaminated": []}
    if job.boilerplate:
        records = _without_boilerplate(job, name, summary)
    else:
        records = list(map(orjson.loads, job.chunk(name).lines()))
    whole = list(map(whole_text, records))
    keys = job.work / "keys"
    if job.settings.exact_dup:
        save_array(keys / f"{name}.exact.npy", exact_keys(whole))
    if job.settings.near_dup:
        save_array(keys / f"{name}.near.npy", signatures(whole))
    if job.settings.near_dup_questions:
        save_array(keys / f"{name}.questions.npy", signatures(list(map(questions, records))))
    if job.settings.against:
        for number, match in enumerate(evaluation(job.settings.against).find(whole)):
            if match is not None:
                shown = excerpt(whole[number])
                summary["contaminated"].append([number, str(match.file), match.line, excerpt(match.shared), shown])
    write_whole(done, orjson.dumps(summary))
    return name


@cache
def evaluation(files: tuple[str, ...]):
    """The questions of the evaluation files, read once per process."""
    from scripts.preparing.contamination import Evaluation  # here, since it brings PyTorch

    return Evaluation([Path(file) for file in files])


def _without_boilerplate(job: Comparison, name: str, summary: dict) -> list[dict]:
    """Write the chunk's texts again, without the lines that many documents share, as a new chunk."""
    source = CleanChunk(job.work / "clean" / name)
    known = np.load(job.boilerplate, mmap_mode="r")
    about = source.about()
    records, lines, kept = [], [], []
    for number, line in enumerate(source.lines()):
        record = orjson.loads(line)
        if "\n" in record["text"]:
            parts = record["text"].split("\n")
            hashes = np.array(line_hashes(parts), np.uint64)
            places = np.minimum(np.searchsorted(known, hashes), len(known) - 1)
            hits = (known[places] == hashes) & (hashes != 0)
            if hits.any():
                summary["boilerplate"] += int(hits.sum())
                if len(summary["examples"]) < EXAMPLES:
                    summary["examples"].append([int(about["line"][number]), excerpt(parts[int(np.argmax(hits))])])
                left = [part for part, hit in zip(parts, hits, strict=True) if not hit]
                record["text"] = "\n".join(left).strip("\n")
                if len(record["text"].strip()) < max(1, job.settings.min_chars):
                    summary["emptied"] += 1
                    continue
                line = orjson.dumps(record)
                about["chars"][number] = len(record["text"])
        records.append(record)
        lines.append(line + b"\n")
        kept.append(number)
    about = about[kept] if kept else np.empty(0, LINE)
    about["end"] = np.cumsum([len(line) for line in lines]) if lines else 0
    job.chunk(name).write(lines, about, source.summary())
    return records
