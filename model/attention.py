"""Rotary positions and causal grouped-query attention, also within the segments of a packed row."""

import itertools
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.config import LMConfig
from model.kv_cache import KVCache
from model.rope_scaling import scale_frequencies


def rope_angles(
    position_ids: Tensor, head_dim: int, theta: float, scaling: dict | None = None
) -> tuple[Tensor, Tensor]:
    """Cosine and sine of the rotary embedding (Su et al. 2021, arXiv:2104.09864).

    Recomputed from the positions on every call: a few hundred values per token, and no table in the model's state.

    Args:
        position_ids: (batch, n) int64.
        scaling: for texts longer than the training rows, see `model.rope_scaling`; None: none.

    Returns:
        Two fp32 tensors (batch, n, 1, head_dim / 2).
    """
    pair = torch.arange(0, head_dim, 2, device=position_ids.device, dtype=torch.float32)  # (head_dim / 2,)
    frequencies = theta ** (-pair / head_dim)
    factor = 1.0
    if scaling:
        frequencies, factor = scale_frequencies(frequencies, theta, scaling)
    angles = position_ids[:, :, None, None].float() * frequencies  # (batch, n, 1, head_dim / 2)
    return angles.cos() * factor, angles.sin() * factor


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate each pair (2i, 2i+1) of x (batch, n, heads, head_dim) by its angle, in fp32."""
    even, odd = x.float().unflatten(-1, (-1, 2)).unbind(-1)  # (batch, n, heads, head_dim / 2) each
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1).flatten(-2).type_as(x)


def attention_by_hand(
    q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0, is_causal: bool = False
) -> Tensor:
    """softmax(q k^T / sqrt(d)) v, as written in "Attention is all you need" (arXiv:1706.03762).

    Same arguments and result as `F.scaled_dot_product_attention`.

    Args:
        q: (batch, heads, n, head_dim); k, v: (batch, heads, length, head_dim).
        attn_mask: bool, broadcastable to (batch, heads, n, length), True = attend; None = all.
        is_causal: instead of a mask: query i attends to keys 0..i.

    Returns:
        (batch, heads, n, head_dim).
    """
    if is_causal:
        attn_mask = torch.ones(q.size(2), k.size(2), dtype=torch.bool, device=q.device).tril()
    scores = (q @ k.transpose(-2, -1)).float() / math.sqrt(q.size(-1))  # (batch, heads, n, length)
    if attn_mask is not None:
        scores = scores.masked_fill(~attn_mask, float("-inf"))
    weights = F.dropout(scores.softmax(-1), dropout_p)
    return weights.type_as(v) @ v


class Segments:
    """The lengths of a batch's samples in order, row by row; a run of padding counts as one.

    On a CPU, attention within each sample costs the sum of their squared lengths; whole rows with a mask cost the sum
    of the rows' squared lengths.
    """

    def __init__(self, lengths: list[int]):
        self.lengths = lengths

    @classmethod
    @torch.compiler.disable
    def of(cls, segment_ids: Tensor) -> "Segments | None":
        """From segments (batch, n) as in `build_attention_mask`; None if there is padding in the middle of a sample."""
        first = F.pad(segment_ids[:, 1:] != segment_ids[:, :-1], (1, 0), value=True)
        rows, places = first.nonzero(as_tuple=True)
        named = [pair for pair in zip(rows.tolist(), segment_ids[rows, places].tolist(), strict=True) if pair[1]]
        if len(set(named)) < len(named):
            return None
        starts = (rows * segment_ids.size(1) + places).tolist()
        return cls([end - start for start, end in itertools.pairwise([*starts, segment_ids.numel()])])


class GroupedAttention(nn.Module):
    """Causal attention; `n_heads / n_kv_heads` query heads share a key/value head (arXiv:2305.13245).

    Subclasses compute the queries, keys and values of the tokens, and project the result of the attention.
    """

    def __init__(self, config: LMConfig, layer: int):
        super().__init__()
        self.layer = layer
        self.head_dim = config.head_dim
        self.dropout = config.dropout
        self.attend = F.scaled_dot_product_attention if config.flash_attn else attention_by_hand

    def mix(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | Segments | None, cache: KVCache | None) -> Tensor:
        """q (batch, n, n_heads, head_dim); k, v (batch, n, n_kv_heads, head_dim) -> (batch, n, n_heads * head_dim)."""
        batch, n = q.shape[:2]
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))  # (batch, heads, n, head_dim)
        if cache is not None:
            k, v = cache.append(self.layer, k, v)  # (batch, n_kv_heads, length, head_dim)
        attend = self._attend_by_segment if isinstance(mask, Segments) else self._attend
        out = attend(q, k, v, mask)  # (batch, n_heads, n, head_dim)
        return out.transpose(1, 2).reshape(batch, n, -1)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        """q (batch, n_heads, n, head_dim); k, v (batch, n_kv_heads, length, head_dim) -> shape of q.

        mask None means causal; the queries are then either all positions or only the last one.
        """
        dropout = self.dropout if self.training else 0.0
        if q.size(2) == 1:  # group the queries that share a key head: no copy of the cache for each
            grouped = q.view(q.size(0), k.size(1), -1, q.size(3))  # (batch, n_kv_heads, group, head_dim)
            out = self.attend(grouped, k, v, attn_mask=mask, dropout_p=dropout)
            return out.reshape(*q.shape[:3], -1)
        groups = q.size(1) // k.size(1)
        k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
        return self.attend(q, k, v, attn_mask=mask, dropout_p=dropout, is_causal=mask is None)

    @torch.compiler.disable  # the samples' lengths are data-dependent: no static graph
    def _attend_by_segment(self, q: Tensor, k: Tensor, v: Tensor, samples: Segments) -> Tensor:
        """Causal `_attend`, one sample at a time, in fp32: for short samples this halves the time on a CPU."""
        rows, groups = (q.size(0), q.size(2)), q.size(1) // k.size(1)
        k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
        one_row = (t.transpose(0, 1).flatten(1, 2)[None].float() for t in (q, k, v))  # (1, heads, batch * n, head_dim)
        parts = (t.split(samples.lengths, dim=2) for t in one_row)
        dropout = self.dropout if self.training else 0.0
        with torch.autocast(q.device.type, enabled=False):
            outs = [self.attend(*qkv, dropout_p=dropout, is_causal=True) for qkv in zip(*parts, strict=True)]
        out = torch.cat(outs, dim=2)[0]  # (n_heads, batch * n, head_dim)
        return out.unflatten(1, rows).transpose(0, 1).type_as(q)


class Attention(GroupedAttention):
    """The self-attention of a MiniMind2."""

    def __init__(self, config: LMConfig, layer: int):
        super().__init__(config, layer)
        self.wq = nn.Linear(config.dim, config.n_heads * self.head_dim, bias=False)
        self.wk = nn.Linear(config.dim, config.n_kv_heads * self.head_dim, bias=False)
        self.wv = nn.Linear(config.dim, config.n_kv_heads * self.head_dim, bias=False)
        self.wo = nn.Linear(config.n_heads * self.head_dim, config.dim, bias=False)
        self.wo.adds_to_residual = True

    def forward(
        self, x: Tensor, rope: tuple[Tensor, Tensor], mask: Tensor | Segments | None, cache: KVCache | None
    ) -> Tensor:
        batch, n, _ = x.shape
        q = apply_rope(self.wq(x).view(batch, n, -1, self.head_dim), *rope)  # (batch, n, n_heads, head_dim)
        k = apply_rope(self.wk(x).view(batch, n, -1, self.head_dim), *rope)  # (batch, n, n_kv_heads, head_dim)
        v = self.wv(x).view(batch, n, -1, self.head_dim)
        return self.wo(self.mix(q, k, v, mask, cache))
