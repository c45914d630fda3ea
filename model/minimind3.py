"""MiniMind-3 (2026), the third generation: a decoder like Qwen3's, under the names that its published files have.

Beside generation 2 (model.py) it normalises queries and keys per head before they are rotated, rotates the pairs
(i, i + head_dim / 2), and its mixture of experts has no shared expert. The forward pass is the same, and so are
generation, cache and packing.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoConfig, AutoModelForCausalLM

from model.attention import GroupedAttention, Segments
from model.config import LMConfig
from model.feed_forward import Router, load_balancing_loss, run_experts
from model.kv_cache import KVCache
from model.model import MiniMindLM
from model.norm import RMSNorm
from model.rope_scaling import MINIMIND3_YARN

OUR_FIELD = {  # of MiniMind-3's names of its sizes
    "hidden_size": "dim",
    "num_hidden_layers": "n_layers",
    "num_attention_heads": "n_heads",
    "num_key_value_heads": "n_kv_heads",
    "intermediate_size": "hidden_dim",
    "moe_intermediate_size": "hidden_dim",
    "rms_norm_eps": "norm_eps",
    "max_position_embeddings": "max_seq_len",
    "num_experts": "n_routed_experts",
    "router_aux_loss_coef": "aux_loss_alpha",
}


def our_fields(sizes: dict) -> dict:
    """Sizes under the names of `LMConfig`, from these or from MiniMind-3's.

    Raises:
        ValueError: one size twice, with two values.
    """
    ours, by = {}, {}
    for name, value in sizes.items():
        if name == "inference_rope_scaling":
            name, value = "rope_scaling", MINIMIND3_YARN if value else None
            if value is None:
                continue
        field = OUR_FIELD.get(name, name)
        if ours.get(field, value) != value:
            raise ValueError(f"{name} {value} and {by[field]} {ours[field]} are the same size: give it once")
        ours[field], by[field] = value, name
    return ours


class MiniMind3Config(LMConfig):
    """Configuration of a MiniMind-3, Dense or MoE.

    Args:
        sizes: fields of `LMConfig`, with MiniMind-3's defaults, or the same by MiniMind-3's own names: hidden_size,
            num_hidden_layers, num_attention_heads, num_key_value_heads, intermediate_size, rms_norm_eps,
            max_position_embeddings, num_experts, router_aux_loss_coef; `inference_rope_scaling`, a switch, is its YaRN
            for 16 times 2,048 positions. Without a `hidden_dim` it is pi times `dim`, rounded up to a multiple of 64.

    Raises:
        ValueError: an invalid value or combination.
    """

    model_type = "minimind3"
    generation = 3

    def __init__(self, **sizes):
        sizes = our_fields(sizes)
        default = {"dim": 768, "n_layers": 8, "n_heads": 8, "n_kv_heads": 4, "norm_eps": 1e-6, "max_seq_len": 32768}
        default |= {"num_experts_per_tok": 1, "n_shared_experts": False, "seq_aux": False, "aux_loss_alpha": 5e-4}
        sizes = default | {name: value for name, value in sizes.items() if value is not None}
        if sizes.get("hidden_dim") is None:
            multiple_of = sizes.get("multiple_of", 64)
            sizes["hidden_dim"] = multiple_of * math.ceil(sizes["dim"] * math.pi / multiple_of)
        super().__init__(**sizes)

    def _check(self) -> None:
        super()._check()
        if self.variant:
            raise ValueError(f"{self.variant} is of generation 2 alone")
        for name, value in (("n_shared_experts", False), ("norm_topk_prob", True), ("seq_aux", False)):
            if getattr(self, name) != value:
                raise ValueError(f"{name} is always {value} in a MiniMind-3")


def apply_rope_to_halves(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate each pair (i, i + head_dim / 2) of x (batch, n, heads, head_dim) by its angle, in fp32."""
    first, second = x.float().chunk(2, -1)  # (batch, n, heads, head_dim / 2) each
    return torch.cat((first * cos - second * sin, first * sin + second * cos), dim=-1).type_as(x)


class MiniMind3Attention(GroupedAttention):
    """Self-attention with normed queries and keys (Henry et al. 2020, arXiv:2010.04245, here by RMSNorm)."""

    def __init__(self, config: LMConfig, layer: int):
        super().__init__(config, layer)
        self.q_proj = nn.Linear(config.dim, config.n_heads * self.head_dim, bias=False)
        self.k_proj = nn.Linear(config.dim, config.n_kv_heads * self.head_dim, bias=False)
        self.v_proj = nn.Linear(config.dim, config.n_kv_heads * self.head_dim, bias=False)
        self.o_proj = nn.Linear(config.n_heads * self.head_dim, config.dim, bias=False)
        self.o_proj.adds_to_residual = True
        self.q_norm = RMSNorm(self.head_dim, config.norm_eps)
        self.k_norm = RMSNorm(self.head_dim, config.norm_eps)

    def forward(
        self, x: Tensor, rope: tuple[Tensor, Tensor], mask: Tensor | Segments | None, cache: KVCache | None
    ) -> Tensor:
        """x (batch, n, dim) -> same shape."""
        per_head = (*x.shape[:2], -1, self.head_dim)
        q = apply_rope_to_halves(self.q_norm(self.q_proj(x).view(per_head)), *rope)  # (batch, n, n_heads, head_dim)
        k = apply_rope_to_halves(self.k_norm(self.k_proj(x).view(per_head)), *rope)  # (batch, n, n_kv_heads, head_dim)
        v = self.v_proj(x).view(per_head)
        return self.o_proj(self.mix(q, k, v, mask, cache))


class MiniMind3FeedForward(nn.Module):
    """SwiGLU: down(silu(gate x) * up x)."""

    def __init__(self, config: LMConfig):
        super().__init__()
        self.gate_proj = nn.Linear(config.dim, config.hidden_dim, bias=False)
        self.up_proj = nn.Linear(config.dim, config.hidden_dim, bias=False)
        self.down_proj = nn.Linear(config.hidden_dim, config.dim, bias=False)
        self.down_proj.adds_to_residual = True

    def forward(self, x: Tensor, non_padding: Tensor | None = None) -> tuple[Tensor, None]:
        """x (..., dim) -> same shape, and None in place of an auxiliary loss."""
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x)), None


class MiniMind3MoE(nn.Module):
    """Each token goes to its top `num_experts_per_tok` experts, whose weights sum to one, also a single one's."""

    def __init__(self, config: LMConfig):
        super().__init__()
        self.k = config.num_experts_per_tok
        self.aux_loss_alpha = config.aux_loss_alpha
        self.experts = nn.ModuleList(MiniMind3FeedForward(config) for _ in range(config.n_routed_experts))
        self.gate = Router(config)

    def forward(self, x: Tensor, non_padding: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """x (batch, n, dim), non_padding (batch, n) bool or None for no padding -> same shape, and the weighted
        auxiliary loss (in training; else None): E sum_i load_i P_i with load_i the assignments per token to expert i,
        which sum to k, P_i its mean probability, over all tokens of the batch that are not padding."""
        batch, n, dim = x.shape
        probabilities = self.gate(x.view(-1, dim))  # (batch * n, experts)
        weights, chosen = probabilities.topk(self.k, dim=-1)  # (batch * n, k) each
        weights = weights / weights.sum(-1, keepdim=True)
        out = run_experts(self.experts, x.view(-1, dim), weights, chosen).view(batch, n, dim)
        if not self.training:
            return out, None
        if non_padding is None:
            non_padding = torch.ones(batch, n, dtype=torch.bool, device=x.device)
        per_token = (probabilities.view(batch, n, -1), chosen.view(batch, n, -1), non_padding)
        return out, self.aux_loss_alpha * self.k * load_balancing_loss(*per_token, per_row=False)


class MiniMind3Block(nn.Module):
    """x + self_attn(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, config: LMConfig, layer: int):
        super().__init__()
        self.input_layernorm = RMSNorm(config.dim, config.norm_eps)
        self.self_attn = MiniMind3Attention(config, layer)
        self.post_attention_layernorm = RMSNorm(config.dim, config.norm_eps)
        self.mlp = MiniMind3MoE(config) if config.use_moe else MiniMind3FeedForward(config)
        self.dropout = nn.Dropout(config.dropout)

    def forward(
        self,
        x: Tensor,
        rope: tuple[Tensor, Tensor],
        mask: Tensor | Segments | None,
        non_padding: Tensor | None,
        cache: KVCache | None,
    ) -> tuple[Tensor, Tensor | None]:
        """x (batch, n, dim) -> same shape, and the layer's auxiliary loss or None."""
        x = x + self.dropout(self.self_attn(self.input_layernorm(x), rope, mask, cache))
        h, aux = self.mlp(self.post_attention_layernorm(x), non_padding)
        return x + self.dropout(h), aux


class MiniMind3Layers(nn.Module):
    """Everything but the output matrix; in the names of a published file its parameters begin with `model`."""

    def __init__(self, config: LMConfig):
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.dim)
        self.layers = nn.ModuleList(MiniMind3Block(config, layer) for layer in range(config.n_layers))
        self.norm = RMSNorm(config.dim, config.norm_eps)


class MiniMind3LM(MiniMindLM):
    """The language model of generation 3; `forward` is that of `MiniMindLM`, which uses the properties below.

    Args:
        config: None = the published 64M dense model.
    """

    config_class = MiniMind3Config
    _no_split_modules = ["MiniMind3Block"]  # noqa: RUF012 - transformers' own convention
    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012
    _keys_to_ignore_on_load_unexpected = None

    def __init__(self, config: MiniMind3Config | None = None):
        super(MiniMindLM, self).__init__(config or MiniMind3Config())  # MiniMindLM's own would make its own parts
        config = self.config
        self.model = MiniMind3Layers(config)
        self.dropout = nn.Dropout(config.dropout)
        self.lm_head = nn.Linear(config.dim, config.vocab_size, bias=False)
        self.mtp = None
        self.gradient_checkpointing = False
        self.post_init()  # initialises by _init_weights and ties lm_head to embed_tokens

    @property
    def tok_embeddings(self) -> nn.Embedding:
        return self.model.embed_tokens

    @property
    def layers(self) -> nn.ModuleList:
        return self.model.layers

    @property
    def norm(self) -> RMSNorm:
        return self.model.norm

    @property
    def output(self) -> nn.Linear:
        return self.lm_head

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        self.model.embed_tokens = value

    def set_output_embeddings(self, value: nn.Linear) -> None:
        self.lm_head = value


AutoConfig.register("minimind3", MiniMind3Config)
AutoModelForCausalLM.register(MiniMind3Config, MiniMind3LM)
