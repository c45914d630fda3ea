"""Multi-head latent attention, MLA (DeepSeek-V2, arXiv:2405.04434, section 2.1): keys and values of all heads are
projected from one small vector per token, the latent, and only this is cached.

    latent  = norm(W_down x)                    (kv_latent_dim)
    k_h     = [W_up,k,h latent; k_rope]         (head_dim + rope_head_dim), k_rope the same for all heads
    v_h     = W_up,v,h latent                   (head_dim)

The latent is not rotated: a rotation between W_up and the query would prevent absorbing W_up. Instead, a separate part
of each query and one key shared by all heads carry the positions ("decoupled RoPE").

A query's product with a key is q_h · W_up,k,h latent = (W_up,k,h^T q_h) · latent. During decoding the matrices are
absorbed in this way: each head's query attends to the latents themselves, which serve as keys and values of a single
head, and W_up,v is applied after the attention. With many queries, as in training, computing the keys is cheaper.
"""

import math

import torch
from torch import Tensor, nn

from model.attention import GroupedAttention, Segments, apply_rope
from model.config import LMConfig
from model.kv_cache import KVCache
from model.norm import RMSNorm


class LatentAttention(GroupedAttention):
    """Self-attention whose cache holds kv_latent_dim + rope_head_dim numbers per token; queries are not compressed, as
    in DeepSeek-V2-Lite."""

    def __init__(self, config: LMConfig, layer: int):
        super().__init__(config, layer)
        heads, self.rope_dim, self.latent_dim = config.n_heads, config.rope_head_dim, config.kv_latent_dim
        self.n_heads = heads
        self.wq = nn.Linear(config.dim, heads * (self.head_dim + self.rope_dim), bias=False)
        self.wkv_down = nn.Linear(config.dim, self.latent_dim + self.rope_dim, bias=False)
        self.latent_norm = RMSNorm(self.latent_dim, config.norm_eps)
        self.wkv_up = nn.Linear(self.latent_dim, heads * 2 * self.head_dim, bias=False)
        self.wo = nn.Linear(heads * self.head_dim, config.dim, bias=False)
        self.wo.adds_to_residual = True

    def forward(
        self, x: Tensor, rope: tuple[Tensor, Tensor], mask: Tensor | Segments | None, cache: KVCache | None
    ) -> Tensor:
        """x (batch, n, dim) -> same shape."""
        batch, n, _ = x.shape
        q, q_rope = self.wq(x).view(batch, n, self.n_heads, -1).split([self.head_dim, self.rope_dim], dim=-1)
        q_rope = apply_rope(q_rope, *rope)  # (batch, n, n_heads, rope_head_dim)
        latent, k_rope = self.wkv_down(x).split([self.latent_dim, self.rope_dim], dim=-1)
        latent = self.latent_norm(latent).type_as(k_rope)
        k_rope = apply_rope(k_rope[:, :, None], *rope)[:, :, 0]  # (batch, n, rope_head_dim)
        if cache is not None:
            latent, k_rope = (t[:, 0] for t in cache.append(self.layer, latent[:, None], k_rope[:, None]))
        attend = self.absorbed if cache is not None and n == 1 else self.expanded
        return self.wo(attend(q, q_rope, latent, k_rope, mask))

    def expanded(
        self, q: Tensor, q_rope: Tensor, latent: Tensor, k_rope: Tensor, mask: Tensor | Segments | None
    ) -> Tensor:
        """Attention over keys and values of every head.

        Args:
            q, q_rope: (batch, n, n_heads, head_dim), not rotated, and (…, rope_head_dim), rotated.
            latent, k_rope: (batch, length, kv_latent_dim) and (…, rope_head_dim).

        Returns:
            (batch, n, n_heads * head_dim).
        """
        k, v = (
            self.wkv_up(latent).unflatten(-1, (self.n_heads, -1)).chunk(2, dim=-1)
        )  # (batch, length, heads, head_dim)
        k_rope = k_rope[:, :, None].expand(-1, -1, self.n_heads, -1)
        return self.mix(torch.cat((q, q_rope), -1), torch.cat((k, k_rope), -1), v, mask, None)

    def absorbed(self, q: Tensor, q_rope: Tensor, latent: Tensor, k_rope: Tensor, mask: Tensor | None) -> Tensor:
        """The same for a single query (n = 1), over the latents themselves."""
        # the identity, sent through the layer, comes out as its matrix, also where an adapter adds to it
        up = self.wkv_up(torch.eye(self.latent_dim, device=q.device, dtype=latent.dtype))
        up_k, up_v = up.unflatten(1, (self.n_heads, 2, -1)).unbind(2)  # (kv_latent_dim, n_heads, head_dim) each
        q = torch.einsum("bnhd,lhd->bnhl", q, up_k)
        keys = torch.cat((latent, k_rope), -1)[:, :, None]  # (batch, length, 1, kv_latent_dim + rope_head_dim)
        q = torch.cat((q, q_rope), -1) * math.sqrt(
            keys.size(-1) / (self.head_dim + self.rope_dim)
        )  # the softmax's scale
        out = self.mix(q, keys, latent[:, :, None], mask, None).unflatten(-1, (self.n_heads, -1))
        return torch.einsum("bnhl,lhd->bnhd", out, up_v).flatten(2)
