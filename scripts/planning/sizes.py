"""A model's exact numbers of parameters and floating-point operations."""

from typing import NamedTuple

from model import LMConfig


class Parameters(NamedTuple):
    """Numbers of a model's parameters.

    embedding: vocabulary times width, which the output matrix shares.
    attention: the four projections of all layers.
    feed_forward: of all layers; in a mixture of experts all experts and the routers.
    norms: the weights of all RMSNorms.
    """

    embedding: int
    attention: int
    feed_forward: int
    norms: int

    @property
    def total(self) -> int:
        return sum(self)


def count_parameters(config: LMConfig) -> Parameters:
    """The parameters of a model, from its shapes: see model/attention.py and model/feed_forward.py."""
    kv_dim = config.n_kv_heads * config.head_dim
    experts = config.n_routed_experts + config.n_shared_experts if config.use_moe else 1
    router = config.n_routed_experts * config.dim if config.use_moe else 0
    return Parameters(
        embedding=config.vocab_size * config.dim,
        attention=config.n_layers * 2 * config.dim * (config.dim + kv_dim),
        feed_forward=config.n_layers * (experts * 3 * config.dim * config.hidden_dim + router),
        norms=(2 * config.n_layers + 1) * config.dim,
    )


def count_active(config: LMConfig) -> int:
    """The parameters that a token uses: in a mixture of experts those of its routed experts and the shared one."""
    if not config.use_moe:
        return count_parameters(config).total
    idle = config.n_routed_experts - config.num_experts_per_tok
    return count_parameters(config).total - config.n_layers * idle * 3 * config.dim * config.hidden_dim


def count_tensors(config: LMConfig) -> int:
    """The number of a model's parameter tensors; the output matrix is the embedding."""
    experts = config.n_routed_experts + config.n_shared_experts if config.use_moe else 1
    return 2 + config.n_layers * (2 + 4 + 3 * experts + config.use_moe)


def forward_flops(config: LMConfig, n: int, logits: bool = True) -> int:
    """Floating-point operations of one row of `n` tokens, forward: two for each multiply-and-add of a matrix product.

    2 per token and parameter of each matrix, with the embedding counted once, as the output matrix (Kaplan et al. 2020,
    arXiv:2001.08361, section 2.1), and 4 n^2 dim per layer for q k^T and weights v, over all n^2 pairs (Chowdhery et
    al. 2022, arXiv:2204.02311, appendix B; a causal kernel that skips the upper half does half of these).

    Args:
        logits: False leaves out the output matrix, which recomputed blocks do not need.
    """
    matrices = count_active(config) - count_parameters(config).norms
    if not logits:
        matrices -= count_parameters(config).embedding
    return 2 * n * matrices + config.n_layers * 4 * n * n * config.dim


def training_flops(config: LMConfig, n: int, checkpointing: bool = False) -> int:
    """Floating-point operations of one row of `n` tokens, forward and backward.

    The backward pass of a matrix product is two products of the same size, so the total is three times `forward_flops`.
    With gradient checkpointing (Chen et al. 2016, arXiv:1604.06174) the blocks run forward once more; a dense one
    without its last product, whose result is not needed.
    """
    again = 0
    if checkpointing:
        unneeded = 0 if config.use_moe else 2 * n * config.dim * config.hidden_dim
        again = forward_flops(config, n, logits=False) - config.n_layers * unneeded
    return 3 * forward_flops(config, n) + again
