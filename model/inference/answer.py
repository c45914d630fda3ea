"""A running request: its tokens so far, its penalties, its limits."""

import hashlib
import time
from collections.abc import Hashable, Iterable, Sequence

import torch
from torch import Tensor

from model.inference.decoder import Decoder
from model.inference.detokenizer import Detokenizer
from model.inference.request import Piece, Request, Token
from model.inference.sampling import penalise_frequency, penalise_repetition


class Answer:
    """A running request and what has been generated so far. Created by `Engine.submit`; treat it as read-only.

    Attributes:
        text, tokens: all pieces, joined.
        finish_reason: None while it is queued or running, see `Piece`.
        prompt_tokens: the prompt with its log-probabilities, after prefill; empty unless requested.
        count: generated tokens, including those that ended it and are not part of its text.
        end_token: the token that ended it; None if something else did.
        reused: prompt tokens that needed no prefill, because a slot already held them.
    """

    def __init__(
        self, request: Request, number: int, eos_token_id: int, token_bytes: Sequence[bytes], decoder: Decoder
    ):
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
        room = decoder.slot_len - len(request.prompt)
        self.limit = room if request.max_new_tokens is None else min(request.max_new_tokens, room)
        eos = eos_token_id if request.eos_token_id is None else request.eos_token_id
        self._ends = {eos} if isinstance(eos, int) else set(eos)
        self._detokenizer = Detokenizer(token_bytes, request.stop)
        self.ids = list(request.prompt)  # prompt and answer
        self.keys = _keys(request)  # of the same length
        self.slot: _Slot | None = None

        self.constrained = request.constraint.begin() if request.constraint else None
        device, vocabulary = decoder.device, (1, decoder.config.vocab_size)
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
        """The number of tokens that the slot has not cached yet: 1 during decoding, the last one."""
        return len(self.ids) - len(self.slot.holds)

    def predicted(self, start: int, n: int) -> list[int]:
        """Which of `ids` to predict when the n tokens from `start` are processed: the next token, and the prompt's."""
        end = start + n
        prompt: Iterable[int] = ()
        if self.request.prompt_logprobs:  # once each, even if new weights prefill the prompt again
            prompt = range(max(start + 1, len(self.prompt_tokens)), min(end + 1, len(self.request.prompt)))
        return [*prompt, end] if end == len(self.ids) and self.limit else [*prompt]

    def penalised(self, logits: Tensor) -> Tensor:
        """logits (1, vocab) after the repetition, frequency and presence penalties."""
        if self.seen is not None:
            logits = penalise_repetition(logits, self.seen, self.request.repetition_penalty)
        if self.counts is not None:
            frequency, presence = self.request.frequency_penalty, self.request.presence_penalty
            logits = penalise_frequency(logits, self.counts, frequency, presence)
        return logits

    def settled(self, token: int) -> int:
        """The token to append when this one was sampled, see `ConstrainedText.settle`."""
        return token if self.constrained is None else self.constrained.settle(token, self.limit - self.count)

    def write(self, token: Token) -> Piece:
        """Append a token; it may be the last."""
        self.ids.append(token.id)
        self.keys.append(token.id)
        self.count += 1
        if token.id in self._ends:
            self.end_token = token
            return self.end(self._reason("stop"))
        if self.seen is not None:
            self.seen[0, token.id] = True
        if self.counts is not None:
            self.counts[0, token.id] += 1
        if self.constrained is not None:
            self.constrained.take(token.id)
        clear = self._detokenizer.push(token)
        if self._detokenizer.stopped or (self.constrained is not None and self.constrained.finished):
            return self.end(self._reason("stop"), *clear)
        if self.count == self.limit:
            return self.end(self._reason("length"), *clear)
        return self._add(*clear)

    def end(self, reason: str, text: str = "", tokens: tuple[Token, ...] = ()) -> Piece:
        """The last piece: text and tokens, and what was held back."""
        rest, last = self._detokenizer.flush()
        reason = "stop" if self._detokenizer.stopped else reason
        return self._add(text + rest, tokens + last, reason)

    def _reason(self, reason: str) -> str:
        """The finish reason: "stop" for an answer that its constraint accepts as complete, even at the token limit."""
        if self.constrained is None or self._detokenizer.stopped:
            return reason
        if self.constrained.whole:
            return "stop"
        return "error" if reason == "stop" else reason  # a grammar that has given up

    def _add(self, text: str, tokens: tuple[Token, ...], reason: str | None = None) -> Piece:
        self.text += text
        self.tokens += tokens
        self.finish_reason = reason
        return Piece(text, tokens, reason)


def _keys(request: Request) -> list[Hashable]:
    """Prefix-cache keys, one per position: ids, or hashes of embeddings, since image tokens all share one id."""
    if request.embeddings is None:
        return list(request.prompt)
    rows = request.embeddings.float().cpu().numpy()
    return [hashlib.blake2b(row.tobytes(), digest_size=16).digest() for row in rows]


class _Slot:
    """A slot of the decoder: its number, what is cached in it, and the answer that it serves."""

    def __init__(self, number: int):
        self.number = number
        self.holds: list[Hashable] = []  # one key per position
        self.answer: Answer | None = None
        self.last_used = 0


def common_prefix_length(a: Sequence[Hashable], b: Sequence[Hashable]) -> int:
    """The length of the longest common prefix of two sequences."""
    # as far as the shorter one goes, hence not strict
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
