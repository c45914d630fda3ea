"""Speculative decoding (Leviathan et al. 2023, arXiv:2211.17192): several tokens of an answer from one pass.

Decoding reads every weight for one token of an answer. Here cheap guesses of the next tokens, a draft, are processed
along with the last token, and one pass shows for each whether the model would have generated it. The first token that
it would not, and all after it, are dropped and replaced by the model's own token: the answer is the model's, only
sooner.

Drafts come from the text itself (look-up, also called prompt look-up decoding: answers repeat their prompts and
themselves), or from a smaller model. A look-up has no probabilities: its token x is kept with the model's probability
p(x), and otherwise replaced by a sample of p without x. Sampling from p as usual, and keeping the draft as long as it
equals the samples, does exactly this, with the same random numbers as without a draft. A draft model's token, sampled
from its q, is kept with probability min(1, p(x) / q(x)), and otherwise replaced by a sample of max(0, p - q).
"""

import bisect
import weakref
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from model.inference.answer import Answer, _Slot, common_prefix_length
from model.inference.compiled_step import best_time
from model.inference.decoder import TIMED_BEHIND, Decoder, Span
from model.inference.sampling import GREEDY_BELOW, probabilities, sample_from
from model.model import MiniMindLM

NGRAMS = (6, 5, 4, 3, 2)  # lengths of the suffix that is looked up; the longest that is found counts
MODEL_DRAFT = 4  # tokens that a draft model guesses at most
FIRST_DRAFT = 3  # tokens of an answer's first draft; then about twice as many as were kept
TIMED_ROWS = (1, 2, 4, 8, 16, 32, 64)  # tokens of a pass whose time is measured
CREDIT = 1.0  # tokens' worth of time that an answer may lose by drafts before any was kept
CREDIT_PER_TOKEN = 0.03  # and for every token it has
MOST_CREDIT = 4.0  # what was won earlier is not lost on what follows


class Draft(NamedTuple):
    """Guesses of the next tokens, each with the probabilities (1, vocab) that it was sampled from, if it was.

    cost: seconds that the draft and its verification add to a step, as the number of tokens decoded in them.
    """

    tokens: list[int]
    sampled_from: list[Tensor]
    cost: float


def keep_or_replace(
    logits: Tensor,
    temperature: float,
    top_k: int,
    top_p: float,
    generators: Sequence[torch.Generator],
    drafted: int,
    q: Tensor,
) -> Tensor:
    """A token with the distribution of `sample_token` for these logits, and as often as possible the drafted one.

    Args:
        logits: (1, vocab), the model's; with the request's settings they give p.
        drafted: a token sampled from q (1, vocab).

    Returns:
        (1,) int64.
    """
    p = probabilities(logits, temperature, top_k, top_p)
    generator = generators[0]
    uniform = torch.rand(1, device=p.device, generator=generator)
    if uniform * q[0, drafted] < p[0, drafted]:
        return torch.tensor([drafted], device=p.device)
    rest = (p - q).clamp(min=0)
    return sample_from(rest if rest.sum() > 0 else p, generator)  # all of it zero: p is q but for rounding


class Lookup:
    """The last occurrence of each n-gram of a growing text, which suggests how the text may continue."""

    def __init__(self):
        self._behind: dict[tuple[int, ...], int] = {}  # n-gram -> the place after its last occurrence
        self._end = 1  # n-grams that end before this place are in it

    def draft(self, ids: Sequence[int], n: int) -> list[int]:
        """The n tokens after an earlier occurrence of the longest suffix that has one; empty if none has.

        Args:
            ids: the text so far, which begins with that of the previous call.
        """
        for end in range(self._end, len(ids)):  # not the suffix itself
            for length in NGRAMS:
                if length <= end:
                    self._behind[tuple(ids[end - length : end])] = end
        self._end = max(self._end, len(ids))
        for length in NGRAMS:
            found = self._behind.get(tuple(ids[-length:])) if length < len(ids) else None
            if found:
                # beyond the end of the text the repetition continues
                return [ids[found + i % (len(ids) - found)] for i in range(n)]
        return []


class DraftModel:
    """A smaller model with the same vocabulary and its own keys and values.

    Args:
        decoder: its decoder, with a slot for each of the engine's.
        token_budget: maximum tokens per pass when it prefills a prompt.
    """

    def __init__(self, decoder: Decoder, token_budget: int):
        self.decoder = decoder
        self._token_budget = token_budget
        self._holds: dict[_Slot, tuple[Answer, list[int]]] = {}  # the ids, and for whom they were read
        self._numbers: dict[_Slot, int] = {}  # its own ones: the engine's slots change theirs
        self.seconds = best_time(lambda: decoder.predict([Span(0, min(TIMED_BEHIND, decoder.slot_len - 1), [0])], [0]))

    def draft(self, wanted: dict[_Slot, int]) -> dict[_Slot, tuple[list[int], list[Tensor]]]:
        """Draft tokens for each slot's answer, with the probabilities that they were sampled from.

        A greedy answer gets the most likely tokens, as does one with a seed, which is then the same as without drafts.
        """
        texts = {slot: list(slot.answer.ids) for slot in wanted}
        drafts = {slot: ([], []) for slot in wanted}
        for drafted in range(max(wanted.values(), default=0)):
            slots = [slot for slot, n in wanted.items() if drafted < n]
            for slot, logits in zip(slots, self._read([(slot, texts[slot]) for slot in slots]), strict=True):
                request = slot.answer.request
                tokens, sampled_from = drafts[slot]
                if request.temperature < GREEDY_BELOW or request.seed is not None:
                    token = int(logits.argmax())
                else:
                    q = probabilities(logits[None], request.temperature, request.top_k, request.top_p)
                    token = int(sample_from(q, slot.answer.generator))
                    sampled_from.append(q)
                tokens.append(token)
                texts[slot].append(token)
        return drafts

    def _read(self, texts: Sequence[tuple[_Slot, list[int]]]) -> Tensor:
        """The logits (texts, vocab) after each text; only tokens that its slot has not cached yet are processed."""
        last: list[Span] = []
        for slot, ids in texts:
            number = self._numbers.setdefault(slot, len(self._numbers))
            whose, holds = self._holds.get(slot, (slot.answer, []))
            known = max(0, len(holds) - MODEL_DRAFT) if whose is slot.answer else 0  # the rest may have been dropped
            # one token at least is read, for its logits
            start = known + common_prefix_length(holds[known:], ids[known:-1])
            while len(ids) - start > self._token_budget:
                self.decoder.read([Span(number, start, ids[start : start + self._token_budget])])
                start += self._token_budget
            last.append(Span(number, start, ids[start:]))
            self._holds[slot] = (slot.answer, list(ids))
        order = sorted(range(len(last)), key=lambda i: len(last[i].tokens) > 1)
        ends, end = [0] * len(last), 0
        for i in order:
            end += len(last[i].tokens)
            ends[i] = end - 1
        rows = [ends[i] for i in order]
        logits = self.decoder.predict([last[i] for i in order], rows)
        return logits[sorted(range(len(order)), key=order.__getitem__)]


class _Account:
    """The tokens that drafts have saved or cost an answer so far; `next` is the length of the next draft."""

    def __init__(self, most: int):
        self.lookup = Lookup()
        self.balance = CREDIT
        self.next = min(FIRST_DRAFT, most)


class Speculation:
    """Decides whether to draft for an answer, drafts, and verifies the drafts.

    A draft costs time whether it is accepted or not. This time is measured at start; an answer whose drafts are not
    accepted runs out of credit and is decoded as usual, with an occasional attempt.

    Args:
        decoder: the model's.
        most: maximum number of tokens drafted by look-up; 0 = no look-up.
        model: the draft model for when look-up finds nothing.
    """

    def __init__(self, decoder: Decoder, most: int, model: DraftModel | None = None):
        self._most, self.model = most, model
        self._longest = decoder.slot_len if model is None else min(decoder.slot_len, model.decoder.slot_len)
        self._accounts: weakref.WeakKeyDictionary[Answer, _Account] = weakref.WeakKeyDictionary()
        behind = min(TIMED_BEHIND, decoder.slot_len // 2)
        self._seconds = []
        for n in (n for n in TIMED_ROWS if behind + n <= decoder.slot_len):
            span = Span(0, behind, [0] * n)
            self._seconds.append((n, best_time(lambda span=span, n=n: decoder.predict([span], list(range(n))))))
        self._most_rows = self._seconds[-1][0]

    def seconds(self, rows: int) -> float:
        """The seconds of a pass over this many tokens, interpolated or extrapolated linearly from the timed ones."""
        if len(self._seconds) == 1:
            return self._seconds[0][1] * rows
        i = min(max(bisect.bisect_left(self._seconds, (rows, 0.0)), 1), len(self._seconds) - 1)
        (n0, t0), (n1, t1) = self._seconds[i - 1 : i + 1]
        return t0 + (t1 - t0) * (rows - n0) / (n1 - n0)

    def cost(self, writers: int, rows: int, n: int, model_seconds: float = 0.0) -> float:
        """The time that a draft of n tokens adds to a pass, as the number of tokens decoded without it in that time.

        Args:
            writers: the number of answers that decode in this step.
            rows: the number of tokens in the pass so far.
            model_seconds: the time of drafting itself.
        """
        extra = self.seconds(rows + n) - self.seconds(rows) + model_seconds
        return max(0.0, extra) * writers / self.seconds(writers)

    def drafts(self, reading: Iterable[_Slot], room: int) -> dict[_Slot, Draft]:
        """Drafts for some of the slots in a step whose answers decode.

        Args:
            room: the number of tokens that may be added to the step's.
        """
        slots = [slot for slot in reading if slot.answer.unread() == 1]
        found: dict[_Slot, Draft] = {}
        by_model: dict[_Slot, tuple[int, float]] = {}
        rows = len(slots)
        room = min(room, self._most_rows - rows)
        for slot in slots:
            answer = slot.answer
            if not answer.count:
                continue
            account = self._accounts.setdefault(answer, _Account(self._most or MODEL_DRAFT))
            credit = account.balance + CREDIT_PER_TOKEN * answer.count
            left = min(room, answer.limit - answer.count - 1)  # the last one comes with the pass
            n = min(account.next, self._most, left)
            tokens = account.lookup.draft(answer.ids, n) if n > 0 else []
            cost = self.cost(len(slots), rows, n)
            if tokens and cost <= credit:
                found[slot] = Draft(tokens, [], cost)
            elif self.model is not None and answer.request.embeddings is None:
                n = min(account.next, MODEL_DRAFT, left, self._longest - len(answer.ids))
                cost = self.cost(len(slots), rows, n, n * self.model.seconds) if n > 0 else 0.0
                if n <= 0 or cost > credit:
                    continue
                by_model[slot] = (n, cost)
            else:
                continue
            rows, room = rows + n, room - n
        if by_model:
            guesses = self.model.draft({slot: n for slot, (n, _) in by_model.items()})
            found |= {slot: Draft(*guesses[slot], by_model[slot][1]) for slot in by_model}
        return found

    def verify(self, slot: _Slot, draft: Draft, logits: Tensor, predict: Callable[..., None]) -> None:
        """Append the tokens of a draft up to the first that the model would not generate, and the model's own next one.

        Each is chosen as without a draft, so that penalties, log-probabilities and seeds have the same effect.

        Args:
            logits: (tokens of the draft + 1, vocab), after the last token and each of the draft.
            predict: `Engine._predict`, which appends a token.
        """
        answer, kept = slot.answer, 0
        for i in range(len(logits)):
            settings = {}
            if i < len(draft.sampled_from):
                settings["choose"] = partial(keep_or_replace, drafted=draft.tokens[i], q=draft.sampled_from[i])
            predict(logits[i : i + 1], [(answer, len(answer.ids))], **settings)
            if i == len(draft.tokens) or answer.ids[-1] != draft.tokens[i]:
                break
            kept += 1
            if answer.finish_reason:
                break
            slot.holds.append(answer.keys[-1])  # what the pass has read and the answer kept
        account = self._accounts[answer]
        account.balance = min(account.balance + kept - draft.cost, max(MOST_CREDIT, 2 * draft.cost))
        account.next = min(2 * kept + 1, max(self._most, MODEL_DRAFT if self.model else 0))


def make_speculation(
    decoder: Decoder, most: int, draft: MiniMindLM | None, token_budget: int, deterministic: bool, compile: bool
) -> Speculation | None:
    """The `Speculation` for the arguments of an `Engine`; None without drafts.

    Raises:
        ValueError: a draft model of another vocabulary; see `Decoder`.
    """
    if draft is None:
        return Speculation(decoder, most) if most else None
    ours, theirs = decoder.config.vocab_size, draft.config.vocab_size
    if ours != theirs:
        raise ValueError(f"the draft model has a vocabulary of {theirs} tokens, but the model has {ours}")
    longest = min(decoder.slot_len, draft.config.max_seq_len)
    own = Decoder(draft, decoder.slots, longest, decoder.precision, deterministic, compile)
    return Speculation(decoder, most, DraftModel(own, token_budget))
