"""Many answers at once: requests join and leave a running batch at any step (continuous batching: Orca, Yu et al., OSDI
2022). A step reads one token for each answer that is being written, and a piece of the prompts that wait.

    engine = Engine(model, tokenizer)
    for piece in engine.stream(Request(prompt=ids, temperature=0.7, seed=1)):
        print(piece.text, end="")
"""

import contextlib
import hashlib
import itertools
import logging
import math
import queue
import threading
import time
from collections import defaultdict, deque
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from model.generation import choose, penalise_frequency, penalise_repetition
from model.inference import Decoder, Span
from model.model import MiniMindLM
from model.tokenizer import StreamDecoder, token_bytes

WORTH_WAITING_FOR = 64  # tokens at the start of a prompt that another request is reading just now


class Token(NamedTuple):
    """A token, and where asked for its log-probability and the likeliest tokens in its place, best first.

    The probabilities are the model's own, before temperature, penalties, top-k and top-p; None where nothing precedes.
    """

    id: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


class Piece(NamedTuple):
    """What a step adds to an answer.

    text: what is clear by now: never half a character, nor what may yet turn out to be a stop string.
    tokens: those that spell it.
    finish_reason: at the end "stop", "length", "timeout", "cancelled" or "error", before it None.
    """

    text: str = ""
    tokens: tuple[Token, ...] = ()
    finish_reason: str | None = None


@dataclass(frozen=True, kw_only=True)
class Request:
    """What to write, and how.

    Args:
        prompt: token ids, one at least.
        max_new_tokens: None = as many as there is room for; 0 = only read the prompt, for its log-probabilities.
        temperature: 0 = greedy, and then top_k, top_p and seed have no effect.
        top_k, top_p: sample among the k likeliest (0 = all), of these among the fewest that reach the probability p.
        repetition_penalty: over prompt and answer, see `penalise_repetition`; 1 = none.
        frequency_penalty, presence_penalty: over the answer, see `penalise_frequency`; 0 = none.
        eos_token_id: one or several ids that end the answer and are no part of it; None = the tokenizer's, () = none.
        stop: texts that end the answer; it is cut before the first of them.
        seed: makes sampling repeatable; None = another answer each time.
        logprobs: give log-probabilities, and those of the so many likeliest tokens; None = do not.
        prompt_logprobs: give them for the prompt too (`Answer.prompt_tokens`).
        timeout: seconds from submission after which the answer ends where it is.
        embeddings: (prompt, dim), read in place of the prompt's token embeddings: a prompt with images.
    """

    prompt: Sequence[int]
    max_new_tokens: int | None = None
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    eos_token_id: int | Sequence[int] | None = None
    stop: Sequence[str] = ()
    seed: int | None = None
    logprobs: int | None = None
    prompt_logprobs: bool = False
    timeout: float | None = None
    embeddings: Tensor | None = None


class Answer:
    """A request on its way, and what was written so far. Made by `Engine.submit`; read it, never write.

    Attributes:
        text, tokens: all pieces, joined.
        finish_reason: None while it waits or is written, see `Piece`.
        prompt_tokens: the prompt with its log-probabilities, once it is read; empty unless asked for.
        count: tokens written, those included that ended it and are no part of its text.
        end_token: the one of these that is its end; None where something else ended it.
        reused: tokens of the prompt that were not read, since a slot held them already.
    """

    def __init__(self, request: Request, engine: "Engine", number: int):
        self.request = request
        self.number = number
        self.text = ""
        self.tokens: list[Token] = []
        self.finish_reason: str | None = None
        self.prompt_tokens = [Token(request.prompt[0])] if request.prompt_logprobs else []
        self.count = 0
        self.end_token: Token | None = None
        self.reused = 0
        self.end_by: str | None = None  # a finish_reason, for the next step to act on
        self.deadline = None if request.timeout is None else time.monotonic() + request.timeout
        room = engine.decoder.slot_len - len(request.prompt)
        self.limit = room if request.max_new_tokens is None else min(request.max_new_tokens, room)
        eos = engine.eos_token_id if request.eos_token_id is None else request.eos_token_id
        self._ends = {eos} if isinstance(eos, int) else set(eos)
        self._spelling = _Spelling(engine.token_bytes, request.stop)
        self.ids = list(request.prompt)  # prompt and answer
        self.keys = _keys(request)  # of the same length
        self.slot: _Slot | None = None

        device, vocabulary = engine.decoder.device, (1, engine.decoder.config.vocab_size)
        self.generator = torch.Generator(device) if request.temperature > 0 else None
        if self.generator is not None:
            self.generator.seed() if request.seed is None else self.generator.manual_seed(request.seed % 2**63)
        self.seen = self.counts = None
        if request.repetition_penalty != 1:
            self.seen = torch.zeros(vocabulary, dtype=torch.bool, device=device)
            self.seen[0, self.ids] = True
        if request.frequency_penalty or request.presence_penalty:
            self.counts = torch.zeros(vocabulary, device=device)

    def unread(self) -> int:
        """How many tokens the slot does not hold yet: 1 while the answer is written, the last one."""
        return len(self.ids) - len(self.slot.holds)

    def predicted(self, start: int, n: int) -> list[int]:
        """Which of `ids` are asked for when those from `start` on are read, n of them: the next one, the prompt's."""
        end = start + n
        prompt: Iterable[int] = ()
        if self.request.prompt_logprobs:  # once each, also where new weights read the prompt again
            prompt = range(max(start + 1, len(self.prompt_tokens)), min(end + 1, len(self.request.prompt)))
        return [*prompt, end] if end == len(self.ids) and self.limit else [*prompt]

    def penalised(self, logits: Tensor) -> Tensor:
        """logits (1, vocab) after the penalties for what was written."""
        if self.seen is not None:
            logits = penalise_repetition(logits, self.seen, self.request.repetition_penalty)
        if self.counts is not None:
            frequency, presence = self.request.frequency_penalty, self.request.presence_penalty
            logits = penalise_frequency(logits, self.counts, frequency, presence)
        return logits

    def write(self, token: Token) -> Piece:
        """Put a token behind the others; it may be the last."""
        self.ids.append(token.id)
        self.keys.append(token.id)
        self.count += 1
        if token.id in self._ends:
            self.end_token = token
            return self.end("stop")
        if self.seen is not None:
            self.seen[0, token.id] = True
        if self.counts is not None:
            self.counts[0, token.id] += 1
        clear = self._spelling.push(token)
        if self._spelling.stopped:
            return self.end("stop", *clear)
        if self.count == self.limit:
            return self.end("length", *clear)
        return self._add(*clear)

    def end(self, reason: str, text: str = "", tokens: tuple[Token, ...] = ()) -> Piece:
        """The last piece: text and tokens, and what was held back."""
        rest, last = self._spelling.flush()
        reason = "stop" if self._spelling.stopped else reason
        return self._add(text + rest, tokens + last, reason)

    def _add(self, text: str, tokens: tuple[Token, ...], reason: str | None = None) -> Piece:
        self.text += text
        self.tokens += tokens
        self.finish_reason = reason
        return Piece(text, tokens, reason)


def _keys(request: Request) -> list[Hashable]:
    """What tells one prompt from another, place by place: ids, or embeddings, since the ids of images are all alike."""
    if request.embeddings is None:
        return list(request.prompt)
    rows = request.embeddings.float().cpu().numpy()
    return [hashlib.blake2b(row.tobytes(), digest_size=16).digest() for row in rows]


class _Spelling:
    """From tokens to text: whole characters only, cut before the first stop string."""

    def __init__(self, table: Sequence[bytes], stop: Sequence[str]):
        self._decoder = StreamDecoder(table)
        self._stop = tuple(stop)
        self._held = ""  # text that may become a stop string
        self._tokens: deque[tuple[int, int, Token]] = deque()  # not given out yet; where their text begins and ends
        self._given = 0  # characters given out
        self.stopped = False

    def push(self, token: Token) -> tuple[str, tuple[Token, ...]]:
        """The text that is clear with this token, and the tokens it is the end of."""
        text = self._decoder.push(token.id)
        start = self._given + len(self._held)
        end = start + (len(text) or 1)  # half a character is a part of the one to come
        self._held += text
        self._tokens.append((start, end, token))
        return self._give(self._clear())

    def flush(self) -> tuple[str, tuple[Token, ...]]:
        """What is left at the end."""
        if self.stopped:
            return "", ()
        self._held += self._decoder.flush()
        length = self._clear()
        if self.stopped:
            return self._give(length)
        text, tokens = self._give(len(self._held))
        return text, (*tokens, *(token for _, _, token in self._tokens))

    def _clear(self) -> int:
        """How many characters of the held ones are certain to stay."""
        found = [place for stop in self._stop if (place := self._held.find(stop)) >= 0]
        if found:
            self.stopped = True
            return min(found)
        begun = range(max(0, len(self._held) - max(map(len, self._stop), default=1) + 1), len(self._held))
        return next((i for i in begun if any(s.startswith(self._held[i:]) for s in self._stop)), len(self._held))

    def _give(self, length: int) -> tuple[str, tuple[Token, ...]]:
        text, self._held = self._held[:length], self._held[length:]
        self._given += length
        tokens = []
        while self._tokens:
            start, end, token = self._tokens[0]
            if end > self._given and not (self.stopped and start < self._given):  # the one that is cut still counts
                break
            tokens.append(token)
            self._tokens.popleft()
        return text, tuple(tokens)


class _Slot:
    """What the decoder's slot `number` holds, and for whom."""

    def __init__(self, number: int):
        self.number = number
        self.holds: list[Hashable] = []  # one key a position
        self.answer: Answer | None = None
        self.last_used = 0


class Engine:
    """Writes many answers at once with one model. Not for several threads; see `EngineThread`.

    A prompt is read once: what an earlier request left in a slot is used again by one that begins alike (the next turn
    of a chat, a further choice for the same prompt). In fp32 an answer is the same alone and in company.

    Args:
        model: Dense, MoE or VLM, with or without a LoRA adapter; the engine keeps a snapshot of its weights, not the
            model itself.
        tokenizer: its tokenizer.
        slots: answers written at the same time; further requests wait.
        slot_len: longest prompt and answer together; None = the model's `max_seq_len`.
        token_budget: tokens that a step reads at most. Long prompts are read in several steps, so that those whose
            answers are being written do not wait for them.
        dtype: of the weights, float32 or bfloat16; None = as they are.
    """

    def __init__(
        self,
        model: MiniMindLM,
        tokenizer: PreTrainedTokenizerFast,
        slots: int = 16,
        slot_len: int | None = None,
        token_budget: int = 256,
        dtype: torch.dtype | None = None,
    ):
        if slots < 1 or token_budget < 1:
            raise ValueError(f"an engine needs slots and a token_budget from 1 on, not {slots} and {token_budget}")
        self.decoder = Decoder(model, slots, slot_len or model.config.max_seq_len, dtype)
        self.token_bytes = token_bytes(tokenizer)
        self.eos_token_id = tokenizer.eos_token_id
        self.token_budget = token_budget
        self._slots = [_Slot(number) for number in range(slots)]
        self._waiting: deque[Answer] = deque()
        self._news: list[tuple[Answer, Piece]] = []  # what no step has returned yet
        self._numbers = itertools.count()
        self._steps = 0

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
        """Whether the request can be done.

        Raises:
            ValueError: a setting out of its range, or a prompt that leaves no room for an answer; one line.
        """
        r, vocabulary = request, self.decoder.config.vocab_size
        if len(r.prompt) == 0:
            raise ValueError("the prompt is empty")
        if not all(0 <= token < vocabulary for token in r.prompt):
            raise ValueError(f"the prompt holds a token id that is not among 0 to {vocabulary - 1}")
        if len(r.prompt) + (r.max_new_tokens != 0) > self.decoder.slot_len:
            raise ValueError(
                f"the prompt has {len(r.prompt)} tokens, and with an answer {self.decoder.slot_len} are possible"
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
        return Answer(request, self, next(self._numbers))

    def enqueue(self, answer: Answer) -> None:
        """Let `step` write the answer."""
        self._waiting.append(answer)

    def submit(self, request: Request) -> Answer:
        """`prepare` and `enqueue`."""
        answer = self.prepare(request)
        self.enqueue(answer)
        return answer

    def refresh(self, model: MiniMindLM) -> None:
        """Go on with the weights that the model has now: all answers to come, and the rest of those on their way.

        Nothing that the old weights computed is used again; the next steps read what was written so far once more.

        Raises:
            ValueError: see `Decoder.refresh`.
        """
        for slot in self._slots:
            slot.holds = []
        self.decoder.refresh(model)

    def cancel(self, answer: Answer, reason: str = "cancelled") -> None:
        """End an answer where it is; the next step begins by giving its slot to a request that waits."""
        answer.end_by = answer.end_by or reason

    def stream(self, request: Request) -> Iterator[Piece]:
        """The pieces of one answer as they are written; other requests advance with it. Closing it early cancels.

        Raises:
            ValueError: see `check`; at once, before the first piece.
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
        """Write the answers to all requests, as many at once as there are slots.

        Raises:
            ValueError: see `check`; before anything is written.
        """
        answers = [self.prepare(request) for request in requests]
        for answer in answers:
            self.enqueue(answer)
        while any(answer.finish_reason is None for answer in answers):
            self.step()
        return answers

    # ------------------------------------------------------------------------------------------------ a step

    def step(self) -> list[tuple[Answer, Piece]]:
        """Read the next tokens of all requests that have a slot, and choose a token for each that has read its last.

        Returns:
            what was added to which answer; an answer's last piece has its `finish_reason`.

        Raises:
            Exception: whatever failed. By then every request has ended, with "error" unless it had already, and the
                next step returns these ends, together with the pieces that the failed one had made.
        """
        try:
            self._advance()
        except BaseException:
            self.abandon()
            raise
        news, self._news = self._news, []
        return news

    def _advance(self) -> None:
        self._steps += 1
        self._end_early()
        self._admit()
        self._close_ranks()
        slots = self._readers()
        if not slots:
            return
        spans = [self._span(slot, n) for slot, n in slots.items()]
        hidden = self.decoder.read(spans)

        rows, predicted, first = [], [], 0  # hidden states that predict a token: whose, and which of its ids
        for (slot, n), span in zip(slots.items(), spans, strict=True):
            slot.holds += slot.answer.keys[span.start : span.start + n]
            places = slot.answer.predicted(span.start, n)
            rows += [first + place - span.start - 1 for place in places]
            predicted += [(slot.answer, place) for place in places]
            first += n
        if rows:
            logits = self.decoder.logits(hidden if len(rows) == len(hidden) else hidden[rows])
            self._predict(logits, predicted)
        for slot in slots:
            if slot.answer.limit == 0 and not slot.answer.unread():
                self._news.append((slot.answer, slot.answer.end("length")))
            if slot.answer.finish_reason:
                self._release(slot)

    def _end_early(self) -> None:
        """End what was cancelled and what is out of time."""
        now = time.monotonic()
        for answer in [*self._waiting, *(slot.answer for slot in self._slots if slot.answer)]:
            if answer.deadline is not None and now >= answer.deadline:
                self.cancel(answer, "timeout")
            if answer.end_by:
                self._news.append((answer, answer.end(answer.end_by)))
                self._release(answer.slot) if answer.slot else self._waiting.remove(answer)

    def abandon(self) -> None:
        """End everything with "error", after a step that failed: what the slots hold is not to be trusted.

        The next step returns the ends.
        """
        answers = [*self._waiting, *(slot.answer for slot in self._slots if slot.answer)]
        self._waiting.clear()
        for slot in self._slots:
            if slot.answer:
                self._release(slot)
            slot.holds = []
        self._news += [(answer, answer.end("error")) for answer in answers if answer.finish_reason is None]

    def computes(self) -> bool:
        """Whether the device still does; after some errors a GPU refuses everything until the process ends."""
        try:
            return int(torch.ones(1, device=self.decoder.device).sum()) == 1
        except RuntimeError:
            return False

    def _release(self, slot: _Slot) -> None:
        """Free a slot; what it holds stays, in case that a prompt begins alike."""
        slot.answer.slot, slot.answer, slot.last_used = None, None, self._steps

    def _admit(self) -> None:
        """Give free slots to requests that wait, in their order; none waits for a slot that it could have."""
        for answer in list(self._waiting) if self.running < len(self._slots) else ():
            free = [slot for slot in self._slots if slot.answer is None]
            if not free:
                return
            most = 0 if answer.request.prompt_logprobs else len(answer.ids) - 1  # the last one's prediction is needed
            prompt = answer.keys[:most]
            reused, best = max(((_alike(slot.holds, prompt), slot) for slot in self._slots), key=lambda pair: pair[0])
            others = (slot.answer.keys for slot in self._slots if slot.answer and slot.answer.unread() > 1)
            if max((_alike(keys, prompt) for keys in others), default=0) > reused + WORTH_WAITING_FOR:
                continue  # in a moment it need not be read twice
            slot = min(free, key=lambda slot: slot.last_used)
            if best in free and 2 * reused >= len(best.holds):
                slot = best
            elif reused:
                self.decoder.copy(best.number, slot.number, reused)
            slot.holds = best.holds[:reused]
            slot.answer, answer.slot, answer.reused = answer, slot, reused
            self._waiting.remove(answer)

    def _close_ranks(self) -> None:
        """Writers lie in a range of slots that one attention covers: see that more than half of them write."""
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

    def _readers(self) -> dict[_Slot, int]:
        """The slots that read now, and how many tokens; those of one token come first.

        Answers that are being written have one each; the rest of the budget goes to prompts, the first come first.
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

    def _span(self, slot: _Slot, n: int) -> Span:
        """The next n tokens for a slot."""
        start, answer = len(slot.holds), slot.answer
        embeddings = answer.request.embeddings
        if embeddings is not None:
            embeddings = embeddings[start : start + n] if start < len(embeddings) else None
        return Span(slot.number, start, answer.ids[start : start + n], embeddings)

    def _predict(self, logits: Tensor, predicted: list[tuple[Answer, int]]) -> None:
        """Choose the tokens to be written, and note what was asked about those of prompts.

        Args:
            logits: (rows, vocab) fp32.
            predicted: for each row the answer, and the place in its `ids` that the row is about.
        """
        tokens = [answer.ids[place] if place < len(answer.ids) else None for answer, place in predicted]
        penalised = logits
        alike = defaultdict(list)  # rows by how their token is chosen
        for row in [row for row, token in enumerate(tokens) if token is None]:
            answer = predicted[row][0]
            alike[answer.request.temperature, answer.request.top_k, answer.request.top_p].append(row)
            if answer.seen is not None or answer.counts is not None:
                penalised = logits.clone() if penalised is logits else penalised
                penalised[row] = answer.penalised(logits[row : row + 1])
        for settings, rows in alike.items():
            of_rows = penalised if len(rows) == len(logits) else penalised[rows]
            chosen = choose(of_rows, *settings, [predicted[row][0].generator for row in rows])
            for row, token in zip(rows, chosen.tolist(), strict=True):
                tokens[row] = token
        facts = self._facts(logits, tokens, [answer.request.logprobs for answer, _ in predicted])
        for (answer, place), token in zip(predicted, facts, strict=True):
            if place < len(answer.ids):
                answer.prompt_tokens.append(token)
            else:
                self._news.append((answer, answer.write(token)))

    def _facts(self, logits: Tensor, tokens: list[int], asked: list[int | None]) -> list[Token]:
        """Each row's token, where asked with its log-probability and the so many likeliest: logits (rows, vocab)."""
        facts = [Token(token) for token in tokens]
        rows = [row for row, best in enumerate(asked) if best is not None]
        if rows:
            logprobs = logits[rows].log_softmax(-1)
            chosen = torch.tensor([[tokens[row]] for row in rows], device=logits.device)
            best = logprobs.topk(max(asked[row] for row in rows))
            columns = (logprobs.gather(1, chosen)[:, 0].tolist(), best.indices.tolist(), best.values.tolist())
            for row, logprob, ids, values in zip(rows, *columns, strict=True):
                top = zip(ids[: asked[row]], values[: asked[row]], strict=True)
                facts[row] = Token(tokens[row], logprob, tuple(top))
        return facts


def _is_count(value: object) -> bool:
    return isinstance(value, int) and value >= 0


def _alike(a: Sequence[Hashable], b: Sequence[Hashable]) -> int:
    """How many items two sequences have in common at their start."""
    # as far as the shorter one goes, hence not strict
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


class EngineThread:
    """An engine at work in a thread of its own; everything here may be called from any other.

    A step that fails (no memory, say) ends all answers it was to serve with the finish_reason "error", is logged, and
    the engine goes on with what comes next.

    Attributes:
        broken: a step failed, and since then the device computes nothing any more, as a GPU does after some errors.
    """

    def __init__(self, engine: Engine):
        self.engine = engine
        self.broken = False
        self._calls: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._deliver: dict[Answer, Callable[[Piece], None]] = {}
        self._closing = self._closed = False
        self._thread = threading.Thread(target=self._work, name="engine", daemon=True)
        self._thread.start()

    def submit(self, request: Request, deliver: Callable[[Piece], None]) -> Answer:
        """Queue a request; once the thread is closed it ends at once, "cancelled".

        Args:
            deliver: called with each piece, in the engine's thread, which waits for it: hand it on and return.

        Raises:
            ValueError: see `Engine.check`.
        """
        answer = self.engine.prepare(request)

        def begin() -> None:
            self._deliver[answer] = deliver
            if self._closing:
                self._hand_over(answer, answer.end("cancelled"))
            else:
                self.engine.enqueue(answer)

        self._call(begin)
        return answer

    def cancel(self, answer: Answer, reason: str = "cancelled") -> None:
        """End an answer where it is, within a step; its last piece says the reason."""
        self._call(lambda: self.engine.cancel(answer, reason))

    def refresh(self, model: MiniMindLM) -> None:
        """`Engine.refresh` between two steps; returns when it is done. Not from a `deliver`, which would wait for ever.

        Raises:
            ValueError: see `Decoder.refresh`.
        """
        done: Future[None] = Future()

        def refresh() -> None:
            try:
                done.set_result(self.engine.refresh(model))
            except BaseException as error:  # the caller's to handle
                done.set_exception(error)

        self._call(refresh)
        done.result()

    def close(self) -> None:
        """Cancel what runs, and end the thread."""

        def end() -> None:
            self._closing = True

        self._call(end)
        if threading.current_thread() is not self._thread:  # which a `deliver`, or a finalizer, may run in
            self._thread.join()

    def _call(self, call: Callable[[], None]) -> None:
        """Let the engine's thread call this before its next step."""
        self._calls.put(call)
        if self._closed:
            self._call_the_rest()

    def _call_the_rest(self) -> None:
        """What was asked too late for the thread's loop; each by whoever comes first, the thread or who asked."""
        with contextlib.suppress(queue.Empty):
            while True:
                self._calls.get_nowait()()

    def _work(self) -> None:
        while not self._closing:
            if self._deliver and self._calls.empty():
                self._step()
            else:
                self._calls.get()()  # waits while there is nothing to write
        for answer in self._deliver:
            self.engine.cancel(answer)
        self._step()
        self._closed = True
        self._call_the_rest()

    def _step(self) -> None:
        try:
            news = self.engine.step()
        except Exception:  # whatever it is, those who wait must hear of it
            logging.getLogger(__name__).exception("a step of the engine failed")
            self.broken = not self.engine.computes()
            news = self.engine.step()  # nothing is left to be done; this gives the ends
        for answer, piece in news:
            self._hand_over(answer, piece)

    def _hand_over(self, answer: Answer, piece: Piece) -> None:
        deliver = self._deliver.pop(answer) if piece.finish_reason else self._deliver[answer]
        try:
            deliver(piece)
        except BaseException:  # one reader's failure is not the others', not even a SystemExit
            logging.getLogger(__name__).exception("nobody takes an answer any more")
            self.engine.cancel(answer)
