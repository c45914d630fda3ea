"""Self-speculation: a model's multi-token modules guess the next tokens, and the model checks them (Gloeckle et al.
2024, arXiv:2404.19737, section 3.2; the check: Leviathan et al. 2023, arXiv:2211.17192).

One pass of the model reads its own next token and the draft after it, and predicts the token after each. The draft is
accepted up to the first wrong token, so the text equals ordinary greedy decoding token for token.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from model.attention import rope_angles
from model.kv_cache import KVCache, build_attention_mask
from model.model import MiniMindLM


@dataclass
class Drafted:
    """A text generated with drafts.

    guessed, right: per module, the number of drafted tokens, and how many of them were accepted (together with all
        earlier tokens of the same draft).
    passes: forward passes of the model; without drafts there is one per token.
    """

    tokens: list[int] = field(default_factory=list)
    guessed: list[int] = field(default_factory=list)
    right: list[int] = field(default_factory=list)
    passes: int = 0


class _Reader:
    """Processes positions of a text and caches their keys and values: the model, or its multi-token module k.

    Module k at position i takes the token at i + k as its input and drafts the one at i + k + 1.
    """

    def __init__(self, model: MiniMindLM, k: int):
        self.model, self.k = model, k
        self.cache: KVCache | None = None
        self.unread: Tensor | None = None  # of a module: (1, positions, dim), the outputs of the one before

    @property
    def length(self) -> int:
        return 0 if self.cache is None else self.cache.length

    def forget_after(self, length: int) -> None:
        self.cache = self.cache.shortened(length)

    def hand(self, h: Tensor) -> None:
        """Pass the hidden states of further positions to a module."""
        self.unread = h if self.unread is None else torch.cat((self.unread, h), dim=1)

    def read_tokens(self, tokens: list[int]) -> tuple[Tensor, list[int]]:
        """Run the model: the next tokens of the text -> their last hidden states (1, n, dim) and the most likely token
        after each."""
        seen: list[Tensor] = []
        hook = self.model.norm.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
        try:
            ids = torch.tensor([tokens], device=self.model.device)
            out = self.model(ids, past_key_values=self.cache, use_cache=True)
        finally:
            hook.remove()
        self.cache = out.past_key_values
        return seen[0], out.logits[0].argmax(-1).tolist()

    def guess(self, ids: list[int]) -> tuple[int, Tensor]:
        """Run a module on the unread positions -> the drafted token and the positions' hidden states (1, n, dim).

        Args:
            ids: the text, followed by the tokens that earlier modules have drafted.
        """
        model, module, start = self.model, self.model.mtp[self.k - 1], self.length
        n = self.unread.size(1)
        positions = torch.arange(start, start + n, device=self.unread.device)
        rope = rope_angles(positions[None], model.config.rope_dim, model.config.rope_theta, model.config.rope_scaling)
        mask = build_attention_mask(positions.new_ones(1, start + n), n) if start and n > 1 else None
        embeddings = None
        if module.sequential:
            later = ids[start + self.k : start + self.k + n]
            embeddings = model.tok_embeddings(torch.tensor([later], device=self.unread.device))
        self.cache = KVCache.extend(self.cache, n, None, None)
        h, _ = module(self.unread, embeddings, rope, mask, cache=self.cache)
        # the last k - 1 places have read guesses, which may prove wrong; without tokens read, all are as they will be
        certain = max(0, n - (self.k - 1)) if module.sequential else n
        self.forget_after(start + certain)
        self.unread = self.unread[:, certain:]
        return int(model.output(module.norm(h[:, -1])).argmax()), h


@torch.inference_mode()
def write_with_drafts(model: MiniMindLM, prompt: list[int], max_new_tokens: int, stop: int | None = None) -> Drafted:
    """Generate greedily with drafts of the model's own modules. The model must be in eval mode.

    Args:
        prompt: token ids, at least one.
        stop: the id that ends the text; None: no such id.

    Raises:
        ValueError: the model has no modules; or prompt, text and drafts take more positions than it has.
    """
    if model.mtp is None:
        raise ValueError("the model has no multi-token modules to draft with: it was trained with mtp_depth 0")
    depth = len(model.mtp)
    if len(prompt) + max_new_tokens + depth > model.config.max_seq_len:
        raise ValueError(f"prompt, text and drafts are longer than the model's {model.config.max_seq_len} positions")
    main, modules = _Reader(model, 0), [_Reader(model, k) for k in range(1, depth + 1)]
    text = Drafted(guessed=[0] * depth, right=[0] * depth)
    h, likeliest = main.read_tokens(prompt)
    ids, text.tokens, text.passes = [*prompt, likeliest[-1]], [likeliest[-1]], 1
    while len(text.tokens) < max_new_tokens and text.tokens[-1] != stop:
        drafts: list[int] = []
        for module in modules:
            module.hand(h)
            guessed, made = module.guess(ids + drafts)
            h = made if model.mtp[0].sequential else h
            drafts.append(guessed)
        h, likeliest = main.read_tokens([ids[-1], *drafts])
        text.passes += 1
        kept = next((i for i, drafted in enumerate(drafts) if drafted != likeliest[i]), depth)
        for k in range(depth):
            text.guessed[k] += 1
            text.right[k] += k < kept
        main.forget_after(len(ids) + kept)
        h = h[:, : kept + 1]
        new = likeliest[: kept + 1][: max_new_tokens - len(text.tokens)]
        if stop in new:
            new = new[: new.index(stop) + 1]
        ids += new
        text.tokens += new
    return text
