"""A block's weights in the form that the inference decoder takes, for both generations.

The decoder rotates the pairs (2i, 2i + 1), as generation 2 does. Generation 3 rotates (i, i + head_dim / 2), so the
rows of each head of its q and k, and the weights of their norms, are reordered: this does not change the norms, nor,
since queries and keys are reordered alike, their products.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from model.balanced_moe import BalancedMoE
from model.feed_forward import MoEFeedForward
from model.inference.cached_heads import absorb, effective_weight
from model.latent_attention import LatentAttention
from model.minimind3 import MiniMind3Block, MiniMind3MoE
from model.model import MiniMindBlock
from model.norm import RMSNorm
from model.weight_layouts import interleaved


class Parts(NamedTuple):
    """The weights of a block, with any adapter merged.

    qkv: (rows, dim) each. qk_norm: (n_heads + n_kv_heads, head_dim), a row per head; None in generation 2; of latent
    attention the latent's norm, and the matrices are absorbed. router: (experts, dim), None in a dense block, and
    router_bias (experts,) or None. experts: for each, its two input matrices and its output matrix; a
    shared one is the last.
    """

    attention_norm: RMSNorm
    qkv: tuple[Tensor, ...]
    wo: Tensor
    qk_norm: Tensor | None
    ffn_norm: RMSNorm
    router: Tensor | None
    experts: list[tuple[tuple[Tensor, Tensor], Tensor]]
    router_bias: Tensor | None = None


def parts_of_block(block: MiniMindBlock | MiniMind3Block) -> Parts:
    """The weights of a block."""
    return _parts_of_3(block) if isinstance(block, MiniMind3Block) else _parts_of_2(block)


def _parts_of_2(block: MiniMindBlock) -> Parts:
    attention, feed_forward = block.attention, block.feed_forward
    if isinstance(attention, LatentAttention):
        qkv, wo, norm = absorb(attention)
    else:
        qkv = tuple(map(effective_weight, (attention.wq, attention.wk, attention.wv)))
        wo, norm = effective_weight(attention.wo), None
    router, experts = None, [feed_forward]
    if isinstance(feed_forward, MoEFeedForward):
        shared = feed_forward.shared_experts
        router, experts = feed_forward.gate.weight, [*feed_forward.experts, *([] if shared is None else [shared])]
    matrices = [((effective_weight(e.w1), effective_weight(e.w3)), effective_weight(e.w2)) for e in experts]
    bias = feed_forward.gate.expert_bias if isinstance(feed_forward, BalancedMoE) else None
    return Parts(block.attention_norm, qkv, wo, norm, block.ffn_norm, router, matrices, bias)


def _parts_of_3(block: MiniMind3Block) -> Parts:
    attention, mlp = block.self_attn, block.mlp
    head_dim = attention.head_dim
    q, k, v = map(effective_weight, (attention.q_proj, attention.k_proj, attention.v_proj))
    heads = (q.size(0) // head_dim, k.size(0) // head_dim)
    qkv = (interleaved(q, heads[0]), interleaved(k, heads[1]), v)
    norms = [
        interleaved(norm.weight.detach()[:, None], 1).T.expand(count, -1)
        for norm, count in zip((attention.q_norm, attention.k_norm), heads, strict=True)
    ]
    router, experts = (mlp.gate.weight, [*mlp.experts]) if isinstance(mlp, MiniMind3MoE) else (None, [mlp])
    matrices = [
        ((effective_weight(e.gate_proj), effective_weight(e.up_proj)), effective_weight(e.down_proj)) for e in experts
    ]
    wo = effective_weight(attention.o_proj)
    return Parts(block.input_layernorm, qkv, wo, torch.cat(norms), block.post_attention_layernorm, router, matrices)
