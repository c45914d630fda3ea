"""Log-likelihoods of many continuations of many texts; common prefixes are prefilled once."""

import itertools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch

from model import MiniMindLM
from model.inference.answer import common_prefix_length
from model.inference.decoder import Decoder, Span

WORTH_SHARING = 16  # tokens: a shorter beginning is read anew with each text
BATCH_TOKENS = 1024  # that one pass reads, or little more: fills the cores, and fits their caches
LOGIT_ROWS = 1024  # of the vocabulary's width that exist at once


class Question(NamedTuple):
    """A context and its continuations, each of at least one token."""

    context: list[int]
    continuations: list[list[int]]


class Likelihood(NamedTuple):
    """A continuation's sum of token log-probabilities, in nats, and whether every token is the most likely one."""

    logprob: float
    greedy: bool


class Likelihoods:
    """Processes questions with one model: a context only once for all its continuations, and a common prefix of
    neighbouring contexts (in the order of their tokens), such as a subject's few-shot examples, only once for all.

    Args:
        model: see `Decoder`.
        batch_size: concurrent questions.
    """

    def __init__(self, model: MiniMindLM, batch_size: int):
        self.model = model
        self.batch_size = batch_size
        self._decoder: Decoder | None = None
        self._held: list[int] = []  # tokens at the beginning of the first `_holders` slots
        self._holders = 0

    def of(self, questions: Sequence[Question]) -> Iterator[tuple[int, list[Likelihood]]]:
        """Yield (number of the question, the likelihoods of its continuations), in the order of processing.

        Raises:
            ValueError: context and continuation without its last token are longer than the model's `max_seq_len`.
        """
        longest = self.model.config.max_seq_len
        texts = [question for question in questions if _room(question) <= longest]
        numbers = [number for number, question in enumerate(questions) if _room(question) <= longest]
        for number, question in enumerate(questions):
            if _room(question) > longest:  # not all continuations at once
                single = [Question(question.context, [continuation]) for continuation in question.continuations]
                if max(map(_room, single)) > longest:
                    raise ValueError(f"a text of {max(map(_room, single))} tokens: the model takes {longest}")
                yield number, [found for _, (found,) in sorted(self.of(single))]
        if not texts:
            return
        decoder = self._decoder_with_room(max(map(_room, texts)))
        order = sorted(range(len(texts)), key=lambda i: texts[i].context)
        contexts = [texts[i].context for i in order]
        for first, last, shared in runs(contexts):
            for begin, end in _batches([_room(texts[i]) - shared for i in order[first:last]], self.batch_size):
                batch = order[first + begin : first + end]
                self._hold(decoder, contexts[first][:shared], len(batch))
                found = self._read(decoder, [texts[i] for i in batch], shared)
                yield from zip((numbers[i] for i in batch), found, strict=True)

    def _decoder_with_room(self, room: int) -> Decoder:
        if self._decoder is None or self._decoder.slot_len < room:
            slot_len = min(self.model.config.max_seq_len, max(512, 1 << (room - 1).bit_length()))
            self._decoder = None  # its memory first
            self._decoder = Decoder(self.model, self.batch_size, slot_len)
            self._held, self._holders = [], 0
        return self._decoder

    def _hold(self, decoder: Decoder, beginning: list[int], slots: int) -> None:
        """Prefill these tokens into each of the first `slots` slots."""
        same = common_prefix_length(self._held, beginning)
        if same < len(beginning):
            for start in range(same, len(beginning), BATCH_TOKENS):
                decoder.read([Span(0, start, beginning[start : min(start + BATCH_TOKENS, len(beginning))])])
            self._holders = 1
        self._held = beginning
        for slot in range(self._holders, slots):
            decoder.copy(0, slot, len(beginning))
        self._holders = max(self._holders, slots)

    def _read(self, decoder: Decoder, batch: list[Question], start: int) -> list[list[Likelihood]]:
        """One pass over contexts, whose first `start` tokens are cached, and over their continuations."""
        spans = [
            Span(slot, start, question.context[start:], branches=[ids[:-1] for ids in question.continuations])
            for slot, question in enumerate(batch)
        ]
        spans.sort(key=lambda span: len(span.all_tokens()) > 1)  # as `Decoder.read` wants them
        hidden = decoder.read(spans)

        rows, targets, first = {}, {}, 0  # of each slot, for each continuation
        for span in spans:
            last = first + len(span.tokens) - 1
            first += len(span.tokens)
            rows[span.slot], targets[span.slot] = [], []
            for ids in batch[span.slot].continuations:
                rows[span.slot].append([last, *range(first, first + len(ids) - 1)])
                targets[span.slot].append(ids)
                first += len(ids) - 1
        pairs = [
            (row, target)
            for slot in range(len(batch))
            for places, ids in zip(rows[slot], targets[slot], strict=True)
            for row, target in zip(places, ids, strict=True)
        ]
        logprobs, greedy = zip(*_logprobs(decoder, hidden, pairs), strict=True)
        found, at = [], 0
        for question in batch:
            found.append([])
            for ids in question.continuations:
                these = slice(at, at + len(ids))
                found[-1].append(Likelihood(sum(logprobs[these]), all(greedy[these])))
                at += len(ids)
        return found


def _room(question: Question) -> int:
    """The number of tokens to process for a question: the last of each continuation is only predicted."""
    return len(question.context) + sum(len(ids) - 1 for ids in question.continuations)


def _logprobs(decoder: Decoder, hidden: torch.Tensor, pairs: list[tuple[int, int]]) -> list[tuple[float, bool]]:
    """For each (row of `hidden`, token): the token's log-probability, and whether it is the most likely one."""
    needed = sorted({row for row, _ in pairs})
    place = {row: i for i, row in enumerate(needed)}
    found: list[tuple[float, bool] | None] = [None] * len(pairs)
    order = sorted(range(len(pairs)), key=lambda i: pairs[i][0])
    at = 0
    for begin in range(0, len(needed), LOGIT_ROWS):
        rows = needed[begin : begin + LOGIT_ROWS]
        logits = decoder.logits(hidden[rows])
        these = []
        while at < len(order) and pairs[order[at]][0] <= rows[-1]:
            these.append(order[at])
            at += 1
        which = torch.tensor([place[pairs[i][0]] - begin for i in these], device=logits.device)
        tokens = torch.tensor([pairs[i][1] for i in these], device=logits.device)
        logprobs = logits[which, tokens] - logits.logsumexp(-1)[which]
        likeliest = logits.argmax(-1)[which] == tokens
        for i, value, greedy in zip(these, logprobs.tolist(), likeliest.tolist(), strict=True):
            found[i] = (value, greedy)
    return found


def runs(contexts: Sequence[list[int]]) -> Iterator[tuple[int, int, int]]:
    """Split sorted contexts where the common prefix of neighbours changes much: at a new subject with other examples.

    Yields:
        (first, one past the last, length of their common prefix; never a whole context, 0 if it does not pay).
    """
    n = len(contexts)
    shared = [min(common_prefix_length(a, b), len(a) - 1, len(b) - 1) for a, b in itertools.pairwise(contexts)]
    first = 0
    while first < n:
        last, common = first + 1, len(contexts[first]) - 1
        while last < n:
            new = min(common, shared[last - 1])
            less = last > first + 1 and common >= WORTH_SHARING and 2 * new < common
            more = last < n - 1 and shared[last] > 2 * max(new, WORTH_SHARING)
            if less or (more and shared[last - 1] < shared[last]):
                break
            last, common = last + 1, new
        alone = last == first + 1
        yield first, last, 0 if alone or common < WORTH_SHARING else common
        first = last


def _batches(sizes: list[int], most: int) -> Iterator[tuple[int, int]]:
    """(first, one past the last) of consecutive texts that form a batch; `sizes` are in tokens."""
    first, tokens = 0, 0
    for i, size in enumerate(sizes):
        if i > first and (i - first == most or tokens + size > BATCH_TOKENS):
            yield first, i
            first, tokens = i, 0
        tokens += size
    if sizes:
        yield first, len(sizes)
