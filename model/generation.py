"""Writing: from logits to tokens, one at a time, for a whole batch at once."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

WITHOUT_FLOAT64 = ("mps",)  # devices
NUCLEUS = 128  # as many likely tokens as top-p looks at before it sorts the vocabulary
GREEDY_BELOW = 1e-5  # a temperature that leaves the best token alone, and might divide beyond what fp32 can hold


def penalise_repetition(logits: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """Make tokens that occurred less likely, by CTRL's rule (Keskar et al. 2019, arXiv:1909.05858).

    A positive logit is divided by the penalty, a negative one multiplied: both go down.

    Args:
        logits: (batch, vocab); seen: (batch, vocab) bool, True = occurred.
        penalty: 1 changes nothing, more is stricter.
    """
    return torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)


def penalise_frequency(logits: Tensor, counts: Tensor, frequency: float, presence: float) -> Tensor:
    """Make tokens of the answer less likely, by OpenAI's rule: each time one occurred costs `frequency` nats of its
    logit, having occurred at all costs `presence`.

    Args:
        logits: (batch, vocab); counts: (batch, vocab) float, how often each was written.
        frequency, presence: 0 changes nothing; below 0 rewards.
    """
    return logits - frequency * counts - presence * (counts > 0)


def keep_top_k(logits: Tensor, k: int) -> Tensor:
    """Only the k best tokens (batch, vocab) stay possible (Fan et al. 2018, arXiv:1805.04833); 0 keeps all."""
    if not 0 < k < logits.size(-1):
        return logits
    worst_kept = logits.topk(k).values[:, -1:]
    return logits.masked_fill(logits < worst_kept, float("-inf"))


def keep_top_p(logits: Tensor, p: float) -> Tensor:
    """Only the fewest best tokens whose probabilities reach p together stay possible, one at least
    (nucleus sampling, Holtzman et al. 2019, arXiv:1904.09751); 1 keeps all."""
    if p >= 1:
        return logits
    probabilities = logits.softmax(-1)
    best = probabilities.topk(min(NUCLEUS, probabilities.size(-1))).values
    if (best.sum(-1) < p).any():  # rare, and thirty times as slow
        best = probabilities.sort(dim=-1, descending=True).values
    before = best.cumsum(-1) - best  # what better tokens reach without this one
    kept = (before < p).sum(-1, keepdim=True).clamp(min=1)
    least = best.gather(-1, kept - 1)
    better, equal = probabilities > least, probabilities == least
    equal &= equal.cumsum(-1) <= kept - better.sum(-1, keepdim=True)  # of equal ones the first
    return logits.masked_fill(~(better | equal), float("-inf"))


def draw(probabilities: Tensor, generator: torch.Generator | Sequence[torch.Generator] | None) -> Tensor:
    """A token for each row by its probabilities, (batch, vocab) -> (batch,) int64.

    The first token whose cumulative probability exceeds a uniform number (inverse transform sampling): one random
    number a row, where `torch.multinomial` takes one for each token of the vocabulary and ten times as long.

    Args:
        generator: of all rows, or one for each.
    """
    device = probabilities.device
    where = "cpu" if device.type in WITHOUT_FLOAT64 else device
    cumulative = probabilities.to(where).double().cumsum(-1)
    generators, each = ([generator], len(cumulative)) if not isinstance(generator, Sequence) else (generator, 1)
    # fp32 numbers below 1 end 2^-24 before it, so that the product cannot be rounded up to the whole
    uniform = torch.cat([torch.rand(each, 1, device=device, generator=one) for one in generators]).to(where)
    return torch.searchsorted(cumulative, uniform * cumulative[:, -1:], right=True).squeeze(1).to(device)


def choose(
    logits: Tensor,
    temperature: float,
    top_k: int,
    top_p: float,
    generator: torch.Generator | Sequence[torch.Generator] | None,
) -> Tensor:
    """The next token of each row: logits (batch, vocab) -> (batch,) int64. Temperature 0 takes the best one."""
    if temperature < GREEDY_BELOW:
        return logits.argmax(-1)
    logits = keep_top_p(keep_top_k(logits / temperature, top_k), top_p)
    return draw(logits.softmax(-1), generator)


class TextGeneration:
    """`generate` and `stream` for a model whose `forward` takes and returns a cache."""

    def stream(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        *,
        max_new_tokens: int = 512,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        repetition_penalty: float = 1.0,
        eos_token_id: int | Sequence[int] | None = None,
        seed: int | None = None,
        **prompt_inputs: Tensor,
    ) -> Iterator[Tensor]:
        """Yield the new tokens of all rows, (batch,) int64, step by step.

        The stop token itself is yielded; a row that has stopped goes on with `config.pad_token_id`, and the stream
        ends when all have, after `max_new_tokens`, or where the model's `max_seq_len` ends.

        Args:
            input_ids: (batch, n) int64, padded on either side where rows differ in length.
            attention_mask: (batch, n), 0 = padding; None = nothing is.
            temperature: 0 = greedy, and then top_k, top_p and seed have no effect.
            repetition_penalty: over prompt and answer.
            eos_token_id: one or several ids that stop a row; None = `config.eos_token_id`, () = none.
            seed: makes sampling repeatable; None draws from torch's global generator.
            prompt_inputs: what else `forward` takes with the prompt, and only then (a VLM's images).

        Raises:
            ValueError: at once, before the first token: a setting out of its range, a row without a token, or a prompt
                that fills the model already.
        """
        for name, value, ok in (
            ("max_new_tokens", max_new_tokens, max_new_tokens > 0),
            ("temperature", temperature, temperature >= 0),
            ("top_k", top_k, top_k >= 0),
            ("top_p", top_p, 0 < top_p <= 1),
            ("repetition_penalty", repetition_penalty, repetition_penalty > 0),
        ):
            if not ok:
                raise ValueError(f"{name} cannot be {value}")
        batch, n = input_ids.shape
        room = self.config.max_seq_len - n
        if n == 0 or room < 1:
            raise ValueError(f"a prompt of {n} tokens: the model takes 1 to {self.config.max_seq_len - 1}")
        real = torch.ones_like(input_ids, dtype=torch.bool) if attention_mask is None else attention_mask.bool()
        if real.shape != input_ids.shape:
            raise ValueError(f"attention_mask {(*real.shape,)} must be as input_ids, {(batch, n)}")
        if not real.any(1).all():
            raise ValueError("a row of the prompt is nothing but padding")

        device = input_ids.device
        if eos_token_id is None:
            eos_token_id = self.config.eos_token_id
        stop_ids = [eos_token_id] if isinstance(eos_token_id, int) else list(eos_token_id)
        stop_ids = torch.tensor(stop_ids, dtype=torch.long, device=device)
        generator = None if seed is None else torch.Generator(device).manual_seed(seed)
        seen = None
        if repetition_penalty != 1:
            seen = torch.zeros(batch, self.config.vocab_size, dtype=torch.long, device=device)
            seen = seen.scatter_add(1, input_ids, real.long()) > 0

        @torch.inference_mode()
        def steps() -> Iterator[Tensor]:
            running = torch.ones(batch, dtype=torch.bool, device=device)
            after_last = real.flip(1).int().argmax(1)  # padding behind each row's last token
            kept = int(after_last.max()) + 1
            mask = None if real.all() else real  # without one, attention is plain and faster
            out = self(input_ids, mask, use_cache=True, logits_to_keep=kept, **prompt_inputs)
            logits = out.logits[torch.arange(batch, device=device), -1 - after_last]
            for left in reversed(range(min(max_new_tokens, room))):
                logits = logits.float()
                if seen is not None:
                    logits = penalise_repetition(logits, seen, repetition_penalty)
                tokens = choose(logits, temperature, top_k, top_p, generator)
                tokens = torch.where(running, tokens, self.config.pad_token_id)
                yield tokens
                running &= ~torch.isin(tokens, stop_ids)
                if left == 0 or not running.any():
                    return
                if seen is not None:
                    seen.scatter_(1, tokens[:, None], True)
                out = self(tokens[:, None], past_key_values=out.past_key_values, use_cache=True)
                logits = out.logits[:, -1]

        return steps()

    def generate(self, input_ids: Tensor, attention_mask: Tensor | None = None, **settings) -> Tensor:
        """Prompt and answer, (batch, n + new) int64; settings as for `stream`.

        A row that stopped before the others is filled with `config.pad_token_id`.
        """
        return torch.cat([input_ids, *(t[:, None] for t in self.stream(input_ids, attention_mask, **settings))], dim=1)
