"""Requests for generation, and the pieces that each step emits."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from model.inference.constraint import Constraint


class Token(NamedTuple):
    """A token and, if requested, its log-probability and the most likely tokens at its position, best first.

    Log-probabilities are the model's own, before temperature, penalties, top-k and top-p; None for the first token.
    """

    id: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


class Piece(NamedTuple):
    """The part of an answer that one step adds.

    text: text that is safe to emit: never an incomplete character, nor a possible beginning of a stop string.
    tokens: the tokens that spell it.
    finish_reason: "stop", "length", "timeout", "cancelled" or "error" in the last piece, None before.
    """

    text: str = ""
    tokens: tuple[Token, ...] = ()
    finish_reason: str | None = None


@dataclass(frozen=True, kw_only=True)
class Request:
    """What to generate, and how.

    Args:
        prompt: token ids, at least one.
        max_new_tokens: None = as many as fit; 0 = only prefill the prompt, for its log-probabilities.
        temperature: 0 = greedy, and then top_k, top_p and seed have no effect.
        top_k, top_p: sample among the k most likely (0 = all), and of these the fewest whose probabilities reach p.
        repetition_penalty: over prompt and answer, see `penalise_repetition`; 1 = none.
        frequency_penalty, presence_penalty: over the answer, see `penalise_frequency`; 0 = none.
        eos_token_id: one or several ids that end the answer and are not part of it; None = the tokenizer's, () = none.
        stop: stop strings; the answer is cut before the first one.
        seed: makes sampling reproducible; None = a different answer each time.
        logprobs: return log-probabilities, and those of this many most likely tokens; None = off.
        prompt_logprobs: return them for the prompt too (`Answer.prompt_tokens`).
        timeout: seconds from submission after which the answer is ended.
        embeddings: (prompt, dim), used in place of the prompt's token embeddings: a prompt with images.
        constraint: the form that the answer must have; an answer that satisfies it ends with "stop". None = any text.
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
    constraint: Constraint | None = None
