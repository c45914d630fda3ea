"""The strongest plain peer: the same decoder, optimised only for speed.

Queries, keys and values come from one matrix product, gate and up from another; norms are `nn.RMSNorm`; attention is
causal over whole rows, across samples; the loss is part of the graph. It has no padding, no sample boundaries, no cache
and no published parameter names.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model import LMConfig


class BareBlock(nn.Module):
    """A pre-norm block of two fused products each for attention and SwiGLU."""

    def __init__(self, config: LMConfig):
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = config.n_heads, config.n_kv_heads, config.head_dim
        self.attention_norm = nn.RMSNorm(config.dim, config.norm_eps)
        self.qkv = nn.Linear(config.dim, (self.heads + 2 * self.kv_heads) * self.head_dim, bias=False)
        self.out = nn.Linear(self.heads * self.head_dim, config.dim, bias=False)
        self.ffn_norm = nn.RMSNorm(config.dim, config.norm_eps)
        self.gate_up = nn.Linear(config.dim, 2 * config.hidden_dim, bias=False)
        self.down = nn.Linear(config.hidden_dim, config.dim, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """x (batch, n, dim); cos, sin (n, head_dim / 2) -> shape of x."""
        batch, n, _ = x.shape
        heads = self.qkv(self.attention_norm(x)).view(batch, n, -1, self.head_dim).transpose(1, 2)
        q, k, v = heads.split((self.heads, self.kv_heads, self.kv_heads), dim=1)
        groups = self.heads // self.kv_heads
        k, v = rotate(k, cos, sin).repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
        mixed = F.scaled_dot_product_attention(rotate(q, cos, sin), k, v, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).reshape(batch, n, -1))
        gate, up = self.gate_up(self.ffn_norm(x)).chunk(2, dim=-1)
        return x + self.down(F.silu(gate) * up)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions on the halves of each head, x (batch, heads, n, head_dim): cheaper than interleaved pairs."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, first * sin + second * cos), dim=-1).type_as(x)


class BareModel(nn.Module):
    """The decoder; its forward is the mean loss of rows that follow each other in one long text."""

    def __init__(self, config: LMConfig, n: int):
        super().__init__()
        self.embedding = nn.Embedding(config.vocab_size, config.dim)
        self.blocks = nn.ModuleList(BareBlock(config) for _ in range(config.n_layers))
        self.norm = nn.RMSNorm(config.dim, config.norm_eps)
        for parameter in self.parameters():
            if parameter.dim() == 2:
                nn.init.normal_(parameter, std=0.02)
        pair = torch.arange(0, config.head_dim, 2) / config.head_dim
        angles = torch.outer(torch.arange(n).float(), config.rope_theta**-pair)
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)

    def forward(self, ids: Tensor, targets: Tensor) -> Tensor:
        """ids, targets (batch, n) int64, each target the next token -> scalar, nats per token."""
        x = self.embedding(ids)
        for block in self.blocks:
            x = block(x, self.cos, self.sin)
        logits = F.linear(self.norm(x), self.embedding.weight)
        return F.cross_entropy(logits.float().flatten(0, 1), targets.flatten())
