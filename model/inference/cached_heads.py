"""The cached row of a token in a decoder: keys and values of the heads, or with latent attention only the latent.

The decoder computes queries and the cached row with one matrix, `qkv` (tokens, queries, then the cached row), lets
`place` apply the positions, stores the cached rows, and attends to the keys and values that `split` returns.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from model.config import LMConfig
from model.latent_attention import LatentAttention
from model.model_lora import LoRALinear


class CachedHeads:
    """Keys and values of n_kv_heads heads.

    Attributes:
        row: shape of a token's cached row in a layer, (2, n_kv_heads, head_dim): keys, then values.
        q_width: width of all heads' queries together.
    """

    def __init__(self, config: LMConfig):
        self.row = (2, config.n_kv_heads, config.head_dim)
        self.q_width = config.n_heads * config.head_dim
        self._rotated = self.q_width + config.n_kv_heads * config.head_dim
        self._eps = config.norm_eps

    def place(self, qkv: Tensor, rope: Tensor, norm: Tensor | None) -> None:
        """Rotate queries and keys in place, in generation 3 after norming them.

        Args:
            qkv: (tokens, width) fp32.
            rope: (tokens, 1, head_dim / 2) complex; a rotation is a product of complex numbers.
            norm: (n_heads + n_kv_heads, head_dim), a row per head.
        """
        if norm is not None:
            heads = qkv[:, : self._rotated].unflatten(1, norm.shape)  # (tokens, heads of q and k, head_dim)
            heads.copy_(F.rms_norm(heads, heads.shape[-1:], eps=self._eps).mul_(norm))
        pairs = (len(qkv), -1, self.row[2] // 2, 2)
        torch.view_as_complex(qkv[:, : self._rotated].view(pairs)).mul_(rope)

    def split(self, cached: Tensor) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """(2, n_layers, …, head_dim) -> keys and values of each layer."""
        k, v = (kv.unbind(0) for kv in cached)
        return k, v


class CachedLatents(CachedHeads):
    """Latents, see `model.latent_attention`, with absorbed matrices: one head, whose values are part of its keys.

    row: (1, 1, kv_latent_dim + rope_head_dim).
    """

    def __init__(self, config: LMConfig):
        super().__init__(config)
        self._latent = config.kv_latent_dim
        width = config.kv_latent_dim + config.rope_head_dim
        self.row, self.q_width = (1, 1, width), config.n_heads * width

    def place(self, qkv: Tensor, rope: Tensor, norm: Tensor) -> None:
        """Norm the latent and rotate the ends of queries and key, in place; norm: (kv_latent_dim,)."""
        heads = qkv.view(len(qkv), -1, self.row[2])  # (tokens, n_heads + 1, width)
        latent = heads[:, -1, : self._latent]
        latent.copy_(F.rms_norm(latent, norm.shape, norm, self._eps))
        ends = heads[:, :, self._latent :]
        rotated = torch.view_as_complex(ends.unflatten(-1, (-1, 2)).contiguous()) * rope
        ends.copy_(torch.view_as_real(rotated).flatten(-2))

    def split(self, cached: Tensor) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """(1, n_layers, …, width) -> keys and values of each layer."""
        return cached[0].unbind(0), cached[0, ..., : self._latent].unbind(0)


def cached_heads(config: LMConfig) -> CachedHeads:
    return (CachedLatents if config.attention == "mla" else CachedHeads)(config)


class Absorbed(NamedTuple):
    """Latent attention's matrices, with the up-projections absorbed.

    qkv: (n_heads * width, dim), each head's query as it meets the cached row, and (width, dim) for that row.
    wo: (dim, n_heads * kv_latent_dim). norm: (kv_latent_dim,), the latent's.
    """

    qkv: tuple[Tensor, Tensor]
    wo: Tensor
    norm: Tensor


@torch.no_grad()
def absorb(attention: LatentAttention) -> Absorbed:
    """The matrices in fp32. The query's includes the softmax scale, which is that of the original head size."""
    heads, latent, end = attention.n_heads, attention.latent_dim, attention.rope_dim
    wq, down, up, wo = map(effective_weight, (attention.wq, attention.wkv_down, attention.wkv_up, attention.wo))
    up_k, up_v = up.float().view(heads, 2, -1, latent).unbind(1)  # (heads, head_dim, kv_latent_dim) each
    head_dim = up_k.size(1)
    q, q_end = wq.float().view(heads, head_dim + end, -1).split([head_dim, end], dim=1)
    q = torch.cat((up_k.transpose(1, 2) @ q, q_end), dim=1) * math.sqrt((latent + end) / (head_dim + end))
    wo = torch.einsum("ohd,hdl->ohl", wo.float().view(len(wo), heads, head_dim), up_v).flatten(1)
    return Absorbed((q.flatten(0, 1), down.float()), wo, attention.latent_norm.weight.detach())


def effective_weight(linear: torch.nn.Linear) -> Tensor:
    """The weight (out, in), including an adapter's update."""
    return (linear.effective_weight() if isinstance(linear, LoRALinear) else linear.weight).detach()
