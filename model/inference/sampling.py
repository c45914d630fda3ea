"""From logits to the next token: penalties, temperature, top-k, top-p."""

from collections.abc import Sequence

import torch
from torch import Tensor

from model.inference.request import Token

WITHOUT_FLOAT64 = ("mps",)  # devices

NUCLEUS = 128  # most likely tokens that top-p tries before it sorts the whole vocabulary

GREEDY_BELOW = 1e-5  # below it only the best token has any probability, and dividing could overflow fp32


def penalise_repetition(logits: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """Penalise tokens that have occurred, as in CTRL (Keskar et al. 2019, arXiv:1909.05858).

    A positive logit is divided by the penalty, a negative one multiplied: both go down.

    Args:
        logits: (batch, vocab); seen: (batch, vocab) bool, True = occurred.
        penalty: 1 changes nothing, more is stricter.
    """
    return torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)


def penalise_frequency(logits: Tensor, counts: Tensor, frequency: float, presence: float) -> Tensor:
    """Penalise tokens of the answer by OpenAI's rule: subtract `frequency` from a logit per occurrence, and `presence`
    once if it has occurred at all.

    Args:
        logits: (batch, vocab); counts: (batch, vocab) float, how often each has been generated.
        frequency, presence: 0 changes nothing; below 0 rewards.
    """
    return logits - frequency * counts - presence * (counts > 0)


def keep_top_k(logits: Tensor, k: int) -> Tensor:
    """Mask all but the k most likely tokens (batch, vocab) (Fan et al. 2018, arXiv:1805.04833); 0 keeps all."""
    if not 0 < k < logits.size(-1):
        return logits
    worst_kept = logits.topk(k).values[:, -1:]
    return logits.masked_fill(logits < worst_kept, float("-inf"))


def keep_top_p(logits: Tensor, p: float) -> Tensor:
    """Mask all but the smallest set of most likely tokens whose probabilities sum to at least p, one at least
    (nucleus sampling, Holtzman et al. 2019, arXiv:1904.09751); 1 keeps all."""
    if p >= 1:
        return logits
    probabilities = logits.softmax(-1)
    best = probabilities.topk(min(NUCLEUS, probabilities.size(-1))).values
    if (best.sum(-1) < p).any():  # rare, and thirty times as slow
        best = probabilities.sort(dim=-1, descending=True).values
    before = best.cumsum(-1) - best  # cumulative probability of the more likely tokens
    kept = (before < p).sum(-1, keepdim=True).clamp(min=1)
    least = best.gather(-1, kept - 1)
    better, equal = probabilities > least, probabilities == least
    equal &= equal.cumsum(-1) <= kept - better.sum(-1, keepdim=True)  # ties: the first ones
    return logits.masked_fill(~(better | equal), float("-inf"))


def sample_from(probabilities: Tensor, generator: torch.Generator | Sequence[torch.Generator] | None) -> Tensor:
    """Sample a token per row, probabilities (batch, vocab) -> (batch,) int64.

    The first token whose cumulative probability exceeds a uniform number (inverse transform sampling): one random
    number per row, where `torch.multinomial` draws one per vocabulary entry and takes ten times as long.

    Args:
        generator: one for all rows, or one per row.
    """
    device = probabilities.device
    where = "cpu" if device.type in WITHOUT_FLOAT64 else device
    cumulative = probabilities.to(where).double().cumsum(-1)
    generators, each = ([generator], len(cumulative)) if not isinstance(generator, Sequence) else (generator, 1)
    # fp32 numbers below 1 end 2^-24 before it, so that the product cannot be rounded up to the whole
    uniform = torch.cat([torch.rand(each, 1, device=device, generator=one) for one in generators]).to(where)
    return torch.searchsorted(cumulative, uniform * cumulative[:, -1:], right=True).squeeze(1).to(device)


def sample_token(
    logits: Tensor,
    temperature: float,
    top_k: int,
    top_p: float,
    generator: torch.Generator | Sequence[torch.Generator] | None,
) -> Tensor:
    """The next token of each row: logits (batch, vocab) -> (batch,) int64. Temperature 0 is greedy."""
    if temperature < GREEDY_BELOW:
        return logits.argmax(-1)
    return sample_from(probabilities(logits, temperature, top_k, top_p), generator)


def probabilities(logits: Tensor, temperature: float, top_k: int, top_p: float) -> Tensor:
    """The next token's distribution: logits (batch, vocab) -> probabilities of that shape; not for temperature 0."""
    return keep_top_p(keep_top_k(logits / temperature, top_k), top_p).softmax(-1)


def with_logprobs(logits: Tensor, tokens: list[int], asked: list[int | None]) -> list[Token]:
    """Each row's token, with its log-probability and the requested number of alternatives: logits (rows, vocab)."""
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
