"""The first pass, chunk by chunk: read, recognise, convert, normalise, filter, mask."""

import hashlib
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import orjson

from scripts.preparing import filters, personal
from scripts.preparing.characters import Counts, count
from scripts.preparing.chunks import Chunk, Fault, Row, read_rows
from scripts.preparing.field_map import mapped
from scripts.preparing.normalising import looks_untidy, normalise
from scripts.preparing.options import PERSONAL, Settings
from scripts.preparing.record_shapes import NO_SHAPE, Piece, Unusable, nested_records, recognise
from scripts.preparing.stage_records import build, holders, key_of, texts
from scripts.preparing.work_folder import LINE, CleanChunk, save_array

EXAMPLES = 3  # of what each filter removed, of a chunk
EXAMPLE_CHARS = 160
BATCH_CHARS = 1 << 20  # of lines that are looked at together
LINE_CHARS = 12  # a line of a document that is shorter is not boilerplate


class Findings:
    """What happened to the lines of a chunk, to be added up over all chunks."""

    def __init__(self):
        self.counts: dict[str, Counter] = defaultdict(Counter)
        self.examples: dict[str, list] = defaultdict(list)

    def add(self, kind: str, name: str, row: Row, text: str) -> None:
        """Count something under a name, and keep the first examples."""
        self.counts[kind][name] += 1
        if len(kept := self.examples[f"{kind}: {name}"]) < EXAMPLES:
            kept.append([row.file, row.line, excerpt(text)])

    def as_json(self) -> dict:
        return {"counts": {kind: dict(found) for kind, found in self.counts.items()}, "examples": dict(self.examples)}


def excerpt(text: str) -> str:
    """The beginning of a text on one line, safe to print."""
    shown = "".join(char if char.isprintable() else " " for char in text[: 2 * EXAMPLE_CHARS])
    shown = " ".join(shown.split())[:EXAMPLE_CHARS]
    return shown + ("…" if len(text) > EXAMPLE_CHARS else "")


def clean(chunk: Chunk, settings: Settings, folder: Path) -> str:
    """Clean a chunk into the folder; returns its name there."""
    name = f"{chunk.source.number:06d}-{chunk.number:07d}"
    target = CleanChunk(folder / name)
    if target.is_done():
        return name
    found = Findings()
    lines: list[bytes] = []
    about: list[np.ndarray] = []
    boilerplate: list[np.ndarray] = []
    rows: list[Row] = []
    records: list[dict] = []
    size = 0
    for row in read_rows(chunk):
        found.counts["lines"]["read"] += 1
        for record in _convert(row, settings, found):
            rows.append(row)
            records.append(record)
            size += sum(map(len, texts(record)))
        if size >= BATCH_CHARS:
            _clean_batch(rows, records, settings, found, lines, about, boilerplate)
            rows, records, size = [], [], 0
    _clean_batch(rows, records, settings, found, lines, about, boilerplate)
    entries = np.concatenate(about) if about else np.empty(0, LINE)
    entries["end"] = np.cumsum([len(line) for line in lines]) if lines else 0
    if settings.boilerplate:
        hashes, documents = np.unique(np.concatenate([np.empty(0, np.uint64), *boilerplate]), return_counts=True)
        save_array(folder / f"{name}.lines.npy", np.stack([hashes, documents.astype(np.uint64)]))
    summary = {"source": chunk.source.number, "kept": len(lines), **found.as_json()}
    target.write(lines, entries, summary)
    return name


def _convert(row: Row, settings: Settings, found: Findings) -> list[dict]:
    """The stage's records of a row: one, none if the row cannot be used, or all those that it wraps."""
    if isinstance(row.value, Fault):
        found.add("bad", str(row.value), row, "")
        return []
    try:
        return [build(_piece(row.value, settings, found), settings.stage)]
    except Unusable as reason:
        if str(reason) == NO_SHAPE and (wrapped := nested_records(row.value)):
            return [record for one in wrapped for record in _convert(row._replace(value=one), settings, found)]
        keys = ", ".join(map(str, list(row.value)[:12])) if str(reason) == NO_SHAPE else ""
        name = f"{reason} (keys: {excerpt(keys)})" if keys and len(found.counts["unusable"]) < 20 else str(reason)
        found.add("unusable", name, row, str(row.value))
        return []


def _piece(record: dict, settings: Settings, found: Findings) -> Piece:
    piece = mapped(record, settings.map) if settings.map else recognise(record)
    found.counts["shapes"][piece.shape] += 1
    return piece


def _clean_batch(rows, records, settings: Settings, found: Findings, lines, about, boilerplate) -> None:
    """Add the lines of a batch that pass the filters to `lines`, and their attributes to `about`."""
    if not records:
        return
    whole = ["\n".join(texts(record)) for record in records]
    found.counts["lines"]["characters read"] += sum(map(len, whole))
    counts = count(whole)
    broken = filters.count_broken(whole, counts)
    if settings.normalise and (changed := _normalise(records, whole, counts)):
        found.counts["lines"]["normalised"] += len(changed)
        for number in changed:
            whole[number] = "\n".join(texts(records[number]))
        counts = counts.with_texts(changed, count([whole[number] for number in changed]))
    tokens = None
    if settings.needs_tokens:
        from scripts.preparing.token_counts import count_tokens

        tokens = count_tokens(records, settings.stage, settings.tokenizer)
    batch = filters.Batch(records, whole, broken, counts, tokens)
    removed = filters.removed(batch, settings)
    names = tuple(filters.WHAT)
    for number in np.flatnonzero(removed >= 0):
        found.add("removed", names[removed[number]], rows[number], whole[number])
    left = np.flatnonzero(removed < 0)
    _mask(batch, left, settings, found, rows)
    entries = np.zeros(len(left), LINE)
    entries["chars"] = counts.chars[left]
    entries["line"] = [rows[number].line for number in left]
    entries["language"] = batch.languages[left].argmax(axis=1)
    if tokens is not None:
        entries["tokens"] = tokens[left]
    about.append(entries)
    for number in left:
        lines.append(orjson.dumps(records[number]) + b"\n")
        if settings.boilerplate and "\n" in (text := batch.texts[number]):
            boilerplate.append(np.array(sorted(set(line_hashes(text.split("\n"))) - {0}), np.uint64))


def line_hashes(lines: list[str]) -> list[int]:
    """A 64-bit hash of each stripped line; 0 for lines that are too short to be boilerplate."""
    found = []
    for line in lines:
        line = line.strip()
        if len(line) < LINE_CHARS or line[-1] in ":：":  # who speaks, or a heading
            found.append(0)
        else:
            found.append(
                int.from_bytes(hashlib.blake2b(line.encode("utf-8", "replace"), digest_size=8).digest(), "little")
            )
    return found


def _normalise(records: list[dict], whole: list[str], counts: Counts) -> list[int]:
    """Normalise the texts that need it; returns the numbers of the changed lines."""
    changed = []
    for number, record in enumerate(records):
        held = holders(record)
        if counts.untidy[number]:
            untidy = held
        elif len(held) == 1:
            untidy = held if looks_untidy(whole[number]) else ()
        else:
            untidy = [holder for holder in held if looks_untidy(holder["content"])]
        for holder in untidy:
            key = key_of(holder)
            text = normalise(holder[key])
            if text != holder[key]:
                holder[key] = text
                if not changed or changed[-1] != number:
                    changed.append(number)
    return changed


def _mask(batch: filters.Batch, left: np.ndarray, settings: Settings, found: Findings, rows: list[Row]) -> None:
    """Mask the personal data that the settings name in the remaining lines, and update `batch.texts`."""
    kinds = {kind for kind in PERSONAL if getattr(settings, kind) == "mask"}
    digits = batch.counts.of("digit")
    for number in left if kinds else ():
        text = batch.texts[number]
        for kind in personal.may_hold(text, digits[number]):
            if kind in kinds and personal.find(text, kind):
                masked: Counter = Counter()
                for holder in holders(batch.records[number]):
                    key = key_of(holder)
                    holder[key] = personal.mask(holder[key], kind, masked)
                text = batch.texts[number] = "\n".join(texts(batch.records[number]))
                if masked[kind]:
                    found.add("masked", kind, rows[number], text)
