"""Autoregressive generation, token by token, for a whole batch at once."""

import logging
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from model.inference.sampling import penalise_repetition, sample_token

UNTOLD_LENGTH = 256  # no warning up to this length: only the demo's and the tests' models have rows this short


def warn_beyond_training(config, length: int) -> bool:
    """Warn in the log if a text grows longer than the training rows; returns whether it does."""
    learned = config.learned_positions
    if learned is None or length <= max(learned, UNTOLD_LENGTH):
        return False
    logging.getLogger("minimind").warning(
        f"this text has {length} tokens or more, but the model was trained on rows of {learned}: quality may "
        "drop beyond that (docs/generations.md shows how to scale the positions)"
    )
    return True


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

        The stop token itself is yielded; a finished row continues with `config.pad_token_id`. The stream ends when all
        rows are finished, after `max_new_tokens`, or at the model's `max_seq_len`.

        Args:
            input_ids: (batch, n) int64, padded on either side where rows differ in length.
            attention_mask: (batch, n), 0 = padding; None = no padding.
            temperature: 0 = greedy, and then top_k, top_p and seed have no effect.
            repetition_penalty: over prompt and answer.
            eos_token_id: one or several ids that stop a row; None = `config.eos_token_id`, () = none.
            seed: makes sampling repeatable; None draws from torch's global generator.
            prompt_inputs: further arguments of `forward` for the prefill only (a VLM's images).

        Raises:
            ValueError: immediately, before the first token: a setting out of range, a row without tokens, or a prompt
                that leaves no room in the model's context.
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
            raise ValueError(f"the prompt has {n} tokens: the model takes 1 to {self.config.max_seq_len - 1}")
        non_padding = torch.ones_like(input_ids, dtype=torch.bool) if attention_mask is None else attention_mask.bool()
        if non_padding.shape != input_ids.shape:
            raise ValueError(f"attention_mask {(*non_padding.shape,)} must have the shape of input_ids, {(batch, n)}")
        if not non_padding.any(1).all():
            raise ValueError("a row of the prompt is all padding")

        device = input_ids.device
        if eos_token_id is None:
            eos_token_id = self.config.eos_token_id
        stop_ids = [eos_token_id] if isinstance(eos_token_id, int) else list(eos_token_id)
        stop_ids = torch.tensor(stop_ids, dtype=torch.long, device=device)
        generator = None if seed is None else torch.Generator(device).manual_seed(seed)
        seen = None
        if repetition_penalty != 1:
            seen = torch.zeros(batch, self.config.vocab_size, dtype=torch.long, device=device)
            seen = seen.scatter_add(1, input_ids, non_padding.long()) > 0

        @torch.inference_mode()
        def steps() -> Iterator[Tensor]:
            warned = warn_beyond_training(self.config, n)
            running = torch.ones(batch, dtype=torch.bool, device=device)
            after_last = non_padding.flip(1).int().argmax(1)  # padding after each row's last token
            kept = int(after_last.max()) + 1
            mask = None if non_padding.all() else non_padding  # without one, attention is plain and faster
            out = self(input_ids, mask, use_cache=True, logits_to_keep=kept, **prompt_inputs)
            logits = out.logits[torch.arange(batch, device=device), -1 - after_last]
            for left in reversed(range(min(max_new_tokens, room))):
                logits = logits.float()
                if seen is not None:
                    logits = penalise_repetition(logits, seen, repetition_penalty)
                tokens = sample_token(logits, temperature, top_k, top_p, generator)
                tokens = torch.where(running, tokens, self.config.pad_token_id)
                yield tokens
                warned = warned or warn_beyond_training(self.config, n + min(max_new_tokens, room) - left)
                running &= ~torch.isin(tokens, stop_ids)
                if left == 0 or not running.any():
                    return
                if seen is not None:
                    seen.scatter_(1, tokens[:, None], True)
                out = self(tokens[:, None], past_key_values=out.past_key_values, use_cache=True)
                logits = out.logits[:, -1]

        return steps()

    def generate(self, input_ids: Tensor, attention_mask: Tensor | None = None, **settings) -> Tensor:
        """Prompt and answer, (batch, n + new) int64; settings as in `stream`.

        A row that finishes before the others is padded with `config.pad_token_id`.
        """
        return torch.cat([input_ids, *(t[:, None] for t in self.stream(input_ids, attention_mask, **settings))], dim=1)
