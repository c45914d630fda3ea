"""The configuration of a MiniMind: every hyperparameter of its architecture."""

import math

from transformers import PretrainedConfig

from model.rope_scaling import checked_scaling

VARIANTS = {  # fields, and their values; the first is the plain decoder's
    "attention": ("gqa", "mla"),
    "balance": ("loss", "bias"),
    "mtp_depth": (0, 1, 2),
    "mtp": ("sequential", "parallel"),
}


class LMConfig(PretrainedConfig):
    """Configuration of the Dense and the MoE decoder.

    Args:
        dim: width of the residual stream.
        n_layers, n_heads, n_kv_heads: depth, query heads, key/value heads (grouped-query attention).
        vocab_size: rows of the embedding, which is tied to the output matrix.
        hidden_dim: width of the feed-forward; None derives it from `dim` (2/3 of 4 dim, rounded up to `multiple_of`).
        norm_eps: epsilon of RMSNorm.
        max_seq_len: the context length, not the row length in training.
        rope_theta: base of the rotary position embedding.
        dropout: applied to attention weights and to what each block adds to the residual stream, in training only.
        flash_attn: fused attention; False uses the readable reference implementation.
        use_moe: a mixture of experts in place of the dense feed-forward; the fields below apply only then.
        num_experts_per_tok: routed experts per token (top-k).
        n_routed_experts: routed experts per layer.
        n_shared_experts: whether one more expert sees every token.
        scoring_func: how the router scores; only 'softmax' (with `balance` 'bias' it is a sigmoid).
        aux_loss_alpha: weight of the load-balancing loss.
        seq_aux: balance each row separately, then average; otherwise balance the whole batch.
        norm_topk_prob: normalise the top-k routing weights to sum to one.
        rope_scaling: for texts longer than the training rows, a dict as in `model.rope_scaling`; None: none.
        trained_seq_len: the longest row that it was trained on; None: unknown. `max_seq_len` may be larger.
        attention: 'gqa', or 'mla', as in `model.latent_attention`; the two fields below apply only to that.
        kv_latent_dim: width of the latent that keys and values are made of; None: 2 head sizes.
        rope_head_dim: the part of a query, and the key that all heads share, that is rotated; None: half a head size.
        shared_width: width of the shared expert in routed ones; DeepSeek calls this the number of shared experts.
        balance: what keeps experts evenly loaded, 'loss' (see `aux_loss_alpha`) or 'bias', as in `model.balanced_moe`.
        mtp_depth: further tokens that are predicted in training, as in `model.multi_token`; 0: none.
        mtp: the kind of their modules, 'sequential' or 'parallel'.

    Raises:
        ValueError: an invalid value or combination.
    """

    model_type = "minimind"
    generation = 2
    rope_scaling = None  # an attribute like any other: transformers' own is a property that keeps it elsewhere
    attribute_map = {  # noqa: RUF012 - the names under which transformers, peft and DeepSpeed look these up
        "hidden_size": "dim",
        "num_hidden_layers": "n_layers",
        "num_attention_heads": "n_heads",
        "num_key_value_heads": "n_kv_heads",
        "intermediate_size": "hidden_dim",
        "max_position_embeddings": "max_seq_len",
    }

    auto_map = {}  # noqa: RUF012 - empty: trl looks for it on every model that is not part of transformers

    def __init__(
        self,
        dim: int = 512,
        n_layers: int = 8,
        n_heads: int = 8,
        n_kv_heads: int = 2,
        vocab_size: int = 6400,
        hidden_dim: int | None = None,
        multiple_of: int = 64,
        norm_eps: float = 1e-5,
        max_seq_len: int = 8192,
        rope_theta: float = 1e6,
        dropout: float = 0.0,
        flash_attn: bool = True,
        use_moe: bool = False,
        num_experts_per_tok: int = 2,
        n_routed_experts: int = 4,
        n_shared_experts: bool = True,
        scoring_func: str = "softmax",
        aux_loss_alpha: float = 0.1,
        seq_aux: bool = True,
        norm_topk_prob: bool = True,
        rope_scaling: dict | None = None,
        trained_seq_len: int | None = None,
        attention: str = "gqa",
        kv_latent_dim: int | None = None,
        rope_head_dim: int | None = None,
        shared_width: int = 1,
        balance: str = "loss",
        mtp_depth: int = 0,
        mtp: str = "sequential",
        **kwargs,
    ):
        if hidden_dim is None:
            hidden_dim = multiple_of * math.ceil(int(2 / 3 * 4 * dim) / multiple_of)
        self.dim = dim
        self.n_layers = n_layers
        self.n_heads = n_heads
        self.n_kv_heads = n_kv_heads
        self.vocab_size = vocab_size
        self.hidden_dim = hidden_dim
        self.multiple_of = multiple_of
        self.norm_eps = norm_eps
        self.max_seq_len = max_seq_len
        self.rope_theta = rope_theta
        self.dropout = dropout
        self.flash_attn = flash_attn
        self.use_moe = use_moe
        self.num_experts_per_tok = num_experts_per_tok
        self.n_routed_experts = n_routed_experts
        self.n_shared_experts = bool(n_shared_experts)
        self.scoring_func = scoring_func
        self.aux_loss_alpha = aux_loss_alpha
        self.seq_aux = seq_aux
        self.norm_topk_prob = norm_topk_prob
        self.rope_scaling = checked_scaling(rope_scaling)
        self.trained_seq_len = trained_seq_len
        self.attention = attention
        head_dim = dim // max(1, n_heads)
        self.kv_latent_dim = kv_latent_dim or 2 * head_dim
        self.rope_head_dim = rope_head_dim or 2 * (head_dim // 4) or 2
        self.shared_width = shared_width
        self.balance = balance
        self.mtp_depth = mtp_depth
        self.mtp = mtp
        self._check()
        kwargs.pop("head_dim", None)  # which a folder of MiniMind-3's own has, and which follows from two others
        super().__init__(
            **{"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "tie_word_embeddings": True} | kwargs
        )

    def _check(self) -> None:
        for name in (
            "dim",
            "n_layers",
            "n_heads",
            "n_kv_heads",
            "vocab_size",
            "hidden_dim",
            "max_seq_len",
            "shared_width",
        ):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} {getattr(self, name)} must be at least 1")
        if self.dim % self.n_heads or (self.dim // self.n_heads) % 2:
            raise ValueError(f"dim {self.dim} must be n_heads {self.n_heads} times an even head size")
        if self.n_heads % self.n_kv_heads:
            raise ValueError(f"n_heads {self.n_heads} must be a multiple of n_kv_heads {self.n_kv_heads}")
        if self.scoring_func != "softmax":
            raise ValueError(f"scoring_func must be 'softmax', not {self.scoring_func!r}")
        for name, values in VARIANTS.items():
            if getattr(self, name) not in values:
                raise ValueError(f"{name} must be one of {', '.join(map(str, values))}, not {getattr(self, name)}")
        if self.rope_head_dim % 2:
            raise ValueError(f"rope_head_dim {self.rope_head_dim} must be even")
        if self.balance == "bias" and not self.use_moe:
            raise ValueError("balance 'bias' is for a mixture of experts: use_moe is off")
        if self.use_moe and not 0 < self.num_experts_per_tok <= self.n_routed_experts:
            raise ValueError(
                f"num_experts_per_tok {self.num_experts_per_tok} must be between 1 and "
                f"n_routed_experts {self.n_routed_experts}"
            )

    @property
    def learned_positions(self) -> int | None:
        """The number of positions that training covers: the trained length, or what `rope_scaling` extends it to.

        None: not known.
        """
        scaling = self.rope_scaling or {}
        stretched = scaling.get("factor", 0) * scaling.get("original_max_position_embeddings", 0)
        return int(max(self.trained_seq_len or 0, stretched)) or None

    @property
    def head_dim(self) -> int:
        return self.dim // self.n_heads

    @property
    def rope_dim(self) -> int:
        """The number of dimensions of a head that are rotated."""
        return self.rope_head_dim if self.attention == "mla" else self.head_dim

    @property
    def variant(self) -> str | None:
        """The features that neither MiniMind2 nor MiniMind-3 has, in words, for errors; None: there are none."""
        named = [
            f"{name} {getattr(self, name)}" for name, values in VARIANTS.items() if getattr(self, name) != values[0]
        ]
        if self.shared_width > 1:
            named.append(f"shared_width {self.shared_width}")
        return ", ".join(named) or None
