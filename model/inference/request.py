"""What to generate and how, and what each step gives out."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor


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
        eos_token_id: one or several ids that end the answer and are not part of it; None = the tokenizer's, () = none.
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
