"""Many answers at once: requests join and leave a running batch at any step (continuous batching: Orca, Yu et al., OSDI
2022). A step decodes one token for each running answer, and prefills a part of the waiting prompts.

    engine = Engine(model, tokenizer)
    for piece in engine.stream(Request(prompt=ids, temperature=0.7, seed=1)):
        print(piece.text, end="")
"""

import itertools
import math
import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from model.generation import warn_beyond_training
from model.inference.answer import Answer, _Slot, common_prefix_length
from model.inference.constraint import only_allowed
from model.inference.decoder import Decoder, Span
from model.inference.matrices import Precision
from model.inference.request import Piece, Request
from model.inference.sampling import sample_token, with_logprobs
from model.inference.speculation import Draft, make_speculation
from model.model import MiniMindLM
from model.tokenizer import token_bytes

SHARED_PREFIX_MIN = 64  # tokens of a prompt worth waiting for while another request prefills them


class Engine:
    """Generates many answers at once with one model. Not thread-safe; see `EngineThread`.

    Prefixes are cached: a slot's contents from an earlier request are reused by one with the same prefix (the next turn
    of a chat, another choice for the same prompt). In fp32 an answer does not depend on the rest of the batch.

    Args:
        model: Dense, MoE or VLM, with or without a LoRA adapter; the engine keeps a snapshot of its weights, not the
            model itself.
        tokenizer: its tokenizer.
        slots: maximum number of concurrent answers; further requests wait.
        slot_len: maximum length of prompt and answer together; None = the model's `max_seq_len`.
        token_budget: maximum tokens per step. Long prompts are prefilled in chunks, so that running answers do not
            wait for them.
        dtype: of the weights, torch.float32, torch.bfloat16, "int8" or "int4"; None = as they are.
        deterministic: one kernel of each matrix for any number of answers; False = the fastest for each, timed now. In
            fp32 an answer may then differ from the same answer alone where two tokens are equally likely to 1e-4.
        compile: decode a single running answer by a compiled step if that is faster; takes seconds.
        speculate: maximum number of tokens drafted by looking up how the text continued before; 0 = none. An answer
            stays the same (in fp32), and comes sooner where it repeats its prompt or itself; see
            `model.inference.speculation`.
        draft: a smaller model of the same vocabulary that drafts where look-up finds nothing; `refresh` does not change
            it. An answer without a seed may then differ, with the same distribution.

    Raises:
        ValueError: a setting out of range; a draft model of another vocabulary; see `Decoder`.
    """

    def __init__(
        self,
        model: MiniMindLM,
        tokenizer: PreTrainedTokenizerFast,
        slots: int = 16,
        slot_len: int | None = None,
        token_budget: int = 256,
        dtype: Precision | None = None,
        deterministic: bool = True,
        compile: bool = False,
        speculate: int = 0,
        draft: MiniMindLM | None = None,
    ):
        if slots < 1 or token_budget < 1 or speculate < 0:
            raise ValueError(
                f"slots and token_budget must be at least 1, speculate 0, not {slots}, {token_budget} and {speculate}"
            )
        slot_len = slot_len or model.config.max_seq_len
        self.decoder = Decoder(model, slots, slot_len, dtype, deterministic, compile)
        self.token_bytes = token_bytes(tokenizer)
        self.eos_token_id = tokenizer.eos_token_id
        self.token_budget = token_budget
        self._slots = [_Slot(number) for number in range(slots)]
        self._waiting: deque[Answer] = deque()
        self._news: list[tuple[Answer, Piece]] = []  # not yet returned by a step
        self._numbers = itertools.count()
        self._steps = 0
        self._warned = False  # that a text outgrows those trained on
        self.speculation = make_speculation(self.decoder, speculate, draft, token_budget, deterministic, compile)

    @property
    def waiting(self) -> int:
        """Requests that have no slot yet."""
        return len(self._waiting)

    @property
    def running(self) -> int:
        """Requests that have one."""
        return sum(slot.answer is not None for slot in self._slots)

    # ------------------------------------------------------------------------------------------------ for callers

    def check(self, request: Request) -> None:
        """Validate a request.

        Raises:
            ValueError: a setting out of range, or a prompt that leaves no room for an answer; one line.
        """
        r, vocabulary = request, self.decoder.config.vocab_size
        if len(r.prompt) == 0:
            raise ValueError("the prompt is empty")
        if not all(0 <= token < vocabulary for token in r.prompt):
            raise ValueError(f"the prompt contains a token id outside 0 to {vocabulary - 1}")
        if len(r.prompt) + (r.max_new_tokens != 0) > self.decoder.slot_len:
            raise ValueError(
                f"the prompt has {len(r.prompt)} tokens, but prompt and answer together may have "
                f"{self.decoder.slot_len}"
            )
        for name, ok in (
            ("max_new_tokens", r.max_new_tokens is None or _is_count(r.max_new_tokens)),
            ("temperature", 0 <= r.temperature < math.inf),
            ("top_k", _is_count(r.top_k)),
            ("top_p", 0 < r.top_p <= 1),
            ("repetition_penalty", 0 < r.repetition_penalty < math.inf),
            ("frequency_penalty", math.isfinite(r.frequency_penalty)),
            ("presence_penalty", math.isfinite(r.presence_penalty)),
            ("stop", not isinstance(r.stop, str) and all(isinstance(text, str) and text for text in r.stop)),
            ("logprobs", r.logprobs is None or (_is_count(r.logprobs) and r.logprobs <= vocabulary)),
            ("prompt_logprobs", not r.prompt_logprobs or r.logprobs is not None),
            ("timeout", r.timeout is None or r.timeout >= 0),
            ("embeddings", r.embeddings is None or r.embeddings.shape == (len(r.prompt), self.decoder.config.dim)),
        ):
            if not ok:
                raise ValueError(f"{name} cannot be {getattr(r, name)!r:.80}")

    def prepare(self, request: Request) -> Answer:
        """An answer yet to be queued; may be called from any thread.

        Raises:
            ValueError: see `check`.
        """
        self.check(request)
        return Answer(request, next(self._numbers), self.eos_token_id, self.token_bytes, self.decoder)

    def enqueue(self, answer: Answer) -> None:
        """Queue the answer for `step`."""
        self._waiting.append(answer)

    def submit(self, request: Request) -> Answer:
        """`prepare` and `enqueue`."""
        answer = self.prepare(request)
        self.enqueue(answer)
        return answer

    def refresh(self, model: MiniMindLM) -> None:
        """Switch to the model's current weights, for all future answers and the rest of the running ones.

        Nothing computed with the old weights is reused; the next steps prefill the running answers again.

        Raises:
            ValueError: see `Decoder.refresh`.
        """
        for slot in self._slots:
            slot.holds = []
        self.decoder.refresh(model)

    def cancel(self, answer: Answer, reason: str = "cancelled") -> None:
        """End an answer where it is; the next step first gives its slot to a waiting request."""
        answer.end_by = answer.end_by or reason

    def stream(self, request: Request) -> Iterator[Piece]:
        """The pieces of one answer as it is generated; other requests advance with it. Closing it early cancels.

        Raises:
            ValueError: see `check`; immediately, before the first piece.
        """
        answer = self.submit(request)

        def pieces() -> Iterator[Piece]:
            try:
                while answer.finish_reason is None:
                    yield from (piece for other, piece in self.step() if other is answer)
            finally:
                self.cancel(answer)

        return pieces()

    def run(self, requests: Iterable[Request]) -> list[Answer]:
        """Generate the answers to all requests, as many at once as there are slots.

        Raises:
            ValueError: see `check`; before anything is generated.
        """
        answers = [self.prepare(request) for request in requests]
        for answer in answers:
            self.enqueue(answer)
        while any(answer.finish_reason is None for answer in answers):
            self.step()
        return answers

    # ------------------------------------------------------------------------------------------------ a step

    def step(self) -> list[tuple[Answer, Piece]]:
        """Prefill or decode the next tokens of all requests in slots, and sample a token for each that is caught up.

        Returns:
            (answer, piece) for everything that was added; an answer's last piece has its `finish_reason`.

        Raises:
            Exception: whatever failed. By then every unfinished request has ended with "error"; the next step returns
                these last pieces, together with those of the failed step.
        """
        try:
            self._advance()
        except BaseException:
            self.abandon()
            raise
        outputs, self._news = self._news, []
        return outputs

    def _advance(self) -> None:
        self._steps += 1
        self._end_early()
        self._admit()
        self._compact_slots()
        reading = self._plan_prefills()
        if not reading:
            return
        drafts: dict[_Slot, Draft] = {}
        if self.speculation is not None:
            drafts = self.speculation.drafts(reading, self.token_budget - sum(reading.values()))
        slots = sorted(reading, key=drafts.__contains__)  # those with a draft come last
        spans = [self._span(slot, reading[slot], drafts.get(slot)) for slot in slots]
        longest = max(span.start + n for span, n in zip(spans, map(reading.get, slots), strict=True))
        self._warned = self._warned or warn_beyond_training(self.decoder.config, longest)
        rows, predicted, first = [], [], 0  # tokens whose successor is predicted: of which answer, which of its ids
        for slot, span in zip(slots, spans, strict=True):
            n = len(span.tokens)
            slot.holds += slot.answer.keys[span.start : span.start + n]  # of a draft nothing yet
            places = range(span.start + 1, span.start + n + 1)
            if slot not in drafts:
                places = slot.answer.predicted(span.start, n)
                predicted += [(slot.answer, place) for place in places]
            rows += [first + place - span.start - 1 for place in places]
            first += n
        logits = self.decoder.predict(spans, rows)
        if predicted:
            self._predict(logits[: len(predicted)], predicted)
        at = len(predicted)
        for slot in slots[len(slots) - len(drafts) :]:
            draft = drafts[slot]
            self.speculation.verify(slot, draft, logits[at : at + len(draft.tokens) + 1], self._predict)
            at += len(draft.tokens) + 1
        for slot in slots:
            if slot.answer.limit == 0 and not slot.answer.unread():
                self._news.append((slot.answer, slot.answer.end("length")))
            if slot.answer.finish_reason:
                self._release(slot)

    def _end_early(self) -> None:
        """End the answers that were cancelled or have timed out."""
        now = time.monotonic()
        for answer in [*self._waiting, *(slot.answer for slot in self._slots if slot.answer)]:
            if answer.deadline is not None and now >= answer.deadline:
                self.cancel(answer, "timeout")
            if answer.end_by:
                self._news.append((answer, answer.end(answer.end_by)))
                self._release(answer.slot) if answer.slot else self._waiting.remove(answer)

    def abandon(self) -> None:
        """End everything with "error" after a failed step: the slots' contents can no longer be trusted.

        The next step returns the last pieces.
        """
        answers = [*self._waiting, *(slot.answer for slot in self._slots if slot.answer)]
        self._waiting.clear()
        for slot in self._slots:
            if slot.answer:
                self._release(slot)
            slot.holds = []
        self._news += [(answer, answer.end("error")) for answer in answers if answer.finish_reason is None]

    def computes(self) -> bool:
        """Whether the device still works; after some errors a GPU rejects everything until the process ends."""
        try:
            return int(torch.ones(1, device=self.decoder.device).sum()) == 1
        except RuntimeError:
            return False

    def _release(self, slot: _Slot) -> None:
        """Free a slot; its contents stay cached in case a later prompt shares the prefix."""
        slot.answer.slot, slot.answer, slot.last_used = None, None, self._steps

    def _admit(self) -> None:
        """Assign free slots to waiting requests, in order; one whose prefix is still being prefilled waits for it."""
        for answer in list(self._waiting) if self.running < len(self._slots) else ():
            free = [slot for slot in self._slots if slot.answer is None]
            if not free:
                return
            most = 0 if answer.request.prompt_logprobs else len(answer.ids) - 1  # the last token's prediction is needed
            prompt = answer.keys[:most]
            reused, best = max(
                ((common_prefix_length(slot.holds, prompt), slot) for slot in self._slots), key=lambda pair: pair[0]
            )
            others = (slot.answer.keys for slot in self._slots if slot.answer and slot.answer.unread() > 1)
            if max((common_prefix_length(keys, prompt) for keys in others), default=0) > reused + SHARED_PREFIX_MIN:
                continue  # wait, so that it is not prefilled twice
            slot = min(free, key=lambda slot: slot.last_used)
            if best in free and 2 * reused >= len(best.holds):
                slot = best
            elif reused:
                self.decoder.copy(best.number, slot.number, reused)
            slot.holds = best.holds[:reused]
            slot.answer, answer.slot, answer.reused = answer, slot, reused
            self._waiting.remove(answer)

    def _compact_slots(self) -> None:
        """Keep at least half of the range of decoding slots in use, because one attention call covers all of it."""
        writers = [slot for slot in self._slots if slot.answer and slot.answer.unread() == 1]
        if not writers:
            return
        first, last = writers[0].number, writers[-1].number
        hole = next((slot for slot in self._slots[first:last] if slot.answer is None), None)
        if hole and last - first + 1 > 2 * len(writers):
            moved, to = writers[-1], hole.number
            self.decoder.swap(last, to, max(len(moved.holds), len(hole.holds)))
            self._slots[last], self._slots[to] = hole, moved
            moved.number, hole.number = to, last

    def _plan_prefills(self) -> dict[_Slot, int]:
        """How many tokens each slot processes in this step; slots with one token come first.

        Each decoding answer takes one token; the rest of the budget goes to prompts, first come, first served.
        """
        unread = {slot: slot.answer.unread() for slot in self._slots if slot.answer}
        reading = {slot: n for slot, n in unread.items() if n == 1}
        budget = max(1, self.token_budget - len(reading))
        for slot in sorted(unread.keys() - reading.keys(), key=lambda slot: slot.answer.number):
            reading[slot] = min(unread[slot], budget)
            budget -= reading[slot]
            if not budget:
                break
        return dict(sorted(reading.items(), key=lambda item: item[1] > 1))

    def _span(self, slot: _Slot, n: int, draft: Draft | None) -> Span:
        """The next n tokens of a slot, followed by its draft."""
        start, answer = len(slot.holds), slot.answer
        embeddings = answer.request.embeddings
        if embeddings is not None:
            embeddings = embeddings[start : start + n] if start < len(embeddings) else None
        drafted = draft.tokens if draft else []
        return Span(slot.number, start, answer.ids[start : start + n] + drafted, embeddings)

    def _predict(
        self, logits: Tensor, predicted: list[tuple[Answer, int]], choose: Callable[..., Tensor] = sample_token
    ) -> None:
        """Sample the next tokens, and record the requested log-probabilities of prompt tokens.

        Args:
            logits: (rows, vocab) fp32.
            predicted: the answer of each row, and the index in its `ids` of the token that the row predicts.
            choose: `sample_token` or a replacement.
        """
        tokens = [answer.ids[place] if place < len(answer.ids) else None for answer, place in predicted]
        adjusted = logits
        alike = defaultdict(list)  # rows by how their token is chosen
        for row in [row for row, token in enumerate(tokens) if token is None]:
            answer = predicted[row][0]
            alike[answer.request.temperature, answer.request.top_k, answer.request.top_p].append(row)
            if answer.seen is not None or answer.counts is not None:
                adjusted = logits.clone() if adjusted is logits else adjusted
                adjusted[row] = answer.penalised(logits[row : row + 1])
        constrained = [row for rows in alike.values() for row in rows if predicted[row][0].constrained is not None]
        if constrained:
            adjusted = logits.clone() if adjusted is logits else adjusted
            texts = [predicted[row][0].constrained for row in constrained]
            adjusted[constrained] = only_allowed(adjusted[constrained], texts)
        for settings, rows in alike.items():
            of_rows = adjusted if len(rows) == len(logits) else adjusted[rows]
            chosen = choose(of_rows, *settings, [predicted[row][0].generator for row in rows])
            for row, token in zip(rows, chosen.tolist(), strict=True):
                tokens[row] = predicted[row][0].settled(token)
        facts = with_logprobs(logits, tokens, [answer.request.logprobs for answer, _ in predicted])
        for (answer, place), token in zip(predicted, facts, strict=True):
            if place < len(answer.ids):
                answer.prompt_tokens.append(token)
            else:
                self._news.append((answer, answer.write(token)))


def _is_count(value: object) -> bool:
    return isinstance(value, int) and value >= 0
