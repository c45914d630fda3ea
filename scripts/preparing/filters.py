"""The filters: each examines a batch of lines and says which to remove."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from scripts.preparing import languages, personal
from scripts.preparing.answers import is_cut_off, is_refusal, thought_fault, turns_fault
from scripts.preparing.characters import Counts
from scripts.preparing.encoding_faults import wrongly_decoded
from scripts.preparing.options import PERSONAL, Settings
from scripts.preparing.stage_records import answers

# In the order in which they look: a line counts for the first that removes it.
WHAT = {
    "broken": "decoded wrongly, replacement or control characters",
    "empty": "empty, or an empty answer",
    "turns": "turns that do not alternate, or repeat",
    "thoughts": "malformed <think> or <answer>",
    "length": "too short or too long",
    "tokens": "too few or too many tokens",
    "language": "in another language",
    "repeated": "n-grams that repeat",
    "runs": "runs of one character",
    "symbols": "mostly symbols",
    "digits": "mostly digits",
    "refusals": "a refusal",
    "cut_off": "an answer that was cut off",
    "personal": "contains personal addresses or numbers",
}


class Batch:
    """A batch of lines, with statistics that several filters need.

    Attributes:
        records: the lines.
        texts: the joined texts of each line.
        broken: the number of wrongly decoded and control characters in each, before normalising.
        counts, languages: statistics of its characters, after normalising.
        tokens: the number of tokens of each line, or None.
        answers: the answers in each line.
    """

    def __init__(self, records: list[dict], texts: list[str], broken: np.ndarray, counts: Counts, tokens=None):
        self.records, self.texts, self.broken, self.counts, self.tokens = records, texts, broken, counts, tokens
        self.languages = languages.weights(texts, counts)
        self.answers = list(map(answers, records))


def count_broken(texts: list[str], counts: Counts) -> np.ndarray:
    """The number of characters in each text that were decoded wrongly, or are control characters."""
    broken = counts.of("broken", "control")
    for number in np.flatnonzero(counts.odd >= 2):
        broken[number] += wrongly_decoded(texts[number])
    return broken


def removed(batch: Batch, settings: Settings) -> np.ndarray:
    """The index in `WHAT` of the first filter that removes each line, -1 if none does."""
    found = np.full(len(batch.records), -1, np.int8)
    for number, name in enumerate(WHAT):
        left = np.flatnonzero(found < 0)
        hits = FILTERS[name](batch, settings, left)
        if hits is not None:
            found[left[hits[left]]] = number
    return found


Hits = np.ndarray | None  # bool (n,), of the lines that are left at least; None: the filter is off


def _each(items: list, left: np.ndarray, is_faulty: Callable[[Any], bool]) -> np.ndarray:
    hits = np.zeros(len(items), bool)
    hits[[number for number in left.tolist() if is_faulty(items[number])]] = True
    return hits


def _any(is_faulty: Callable[[str], bool]) -> Callable[[list[str]], bool]:
    """Extend a test of one answer to several: true if any answer is faulty."""

    def of_several(several: list[str]) -> bool:
        return is_faulty(several[0]) if len(several) == 1 else any(map(is_faulty, several))

    return of_several


def _broken(batch: Batch, settings: Settings, left: np.ndarray) -> Hits:
    return batch.broken > settings.max_broken * batch.counts.chars if settings.max_broken else None


def _empty(batch: Batch, settings: Settings, left: np.ndarray) -> Hits:
    nothing = batch.counts.chars == batch.counts.of("space", "joiner")
    return nothing | _each(batch.answers, left, _any(lambda answer: not answer or answer.isspace()))


def _turns(batch: Batch, settings: Settings, left: np.ndarray) -> Hits:
    if not settings.check_turns:
        return None
    return _each(batch.records, left, lambda record: any(map(turns_fault, chats(record))))


def chats(record: dict) -> Iterator[Sequence[dict]]:
    """The chats in a line."""
    for key in ("conversations", "chosen", "rejected"):
        if key in record:
            yield record[key]


def _thoughts(batch: Batch, settings: Settings, left: np.ndarray) -> Hits:
    if not settings.check_thoughts:
        return None
    required = settings.stage == "reason"
    return _each(batch.answers, left, _any(lambda answer: thought_fault(answer, required)))


def _length(batch: Batch, settings: Settings, left: np.ndarray) -> Hits:
    return _outside(batch.counts.chars, settings.min_chars, settings.max_chars)


def _outside(values: np.ndarray, least: int, most: int) -> np.ndarray:
    return (values < least) | (values > (most or np.iinfo(np.int64).max))


def _tokens(batch: Batch, settings: Settings, left: np.ndarray) -> Hits:
    return None if batch.tokens is None else _outside(batch.tokens, settings.min_tokens, settings.max_tokens)


def _language(batch: Batch, settings: Settings, left: np.ndarray) -> Hits:
    if not settings.language_share:
        return None
    wanted = [languages.NAMES.index(name) for name in settings.languages]
    total = batch.languages.sum(axis=1)
    return (total > 0) & (batch.languages[:, wanted].sum(axis=1) < settings.language_share * total)


def _repeated(batch: Batch, settings: Settings, left: np.ndarray) -> Hits:
    return batch.counts.repeated > settings.max_repeated if settings.max_repeated else None


def _runs(batch: Batch, settings: Settings, left: np.ndarray) -> Hits:
    return batch.counts.runs > settings.max_runs if settings.max_runs else None


def _share_of(kind: str, limit: str) -> Callable[[Batch, Settings, np.ndarray], Hits]:
    def look(batch: Batch, settings: Settings, left: np.ndarray) -> Hits:
        most = getattr(settings, limit)
        solid = batch.counts.chars - batch.counts.of("space")
        return batch.counts.of(kind) > most * solid if most else None

    return look


def _refusals(batch: Batch, settings: Settings, left: np.ndarray) -> Hits:
    if not settings.drop_refusals:
        return None
    if settings.stage in ("pretrain", "tokenizer"):  # an answer may stand anywhere in a text
        return _each(batch.texts, left, is_refusal)
    return _each(batch.answers, left, _any(is_refusal))


def _cut_off(batch: Batch, settings: Settings, left: np.ndarray) -> Hits:
    if not settings.drop_cut_off:
        return None
    return _each(batch.answers, left, _any(is_cut_off))


def _personal(batch: Batch, settings: Settings, left: np.ndarray) -> Hits:
    kinds = [kind for kind in PERSONAL if getattr(settings, kind) == "drop"]
    if not kinds:
        return None
    hits = np.zeros(len(batch.records), bool)
    digits = batch.counts.of("digit")
    for number in left:
        text = batch.texts[number]
        hits[number] = any(
            kind in kinds and personal.find(text, kind) for kind in personal.may_hold(text, digits[number])
        )
    return hits


FILTERS: dict[str, Callable[[Batch, Settings, np.ndarray], Hits]] = {
    "broken": _broken,
    "empty": _empty,
    "turns": _turns,
    "thoughts": _thoughts,
    "length": _length,
    "tokens": _tokens,
    "language": _language,
    "repeated": _repeated,
    "runs": _runs,
    "symbols": _share_of("symbol", "max_symbols"),
    "digits": _share_of("digit", "max_digits"),
    "refusals": _refusals,
    "cut_off": _cut_off,
    "personal": _personal,
}
