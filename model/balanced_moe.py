"""Experts balanced without an auxiliary loss (Wang et al. 2024, arXiv:2408.15664; DeepSeek-V3, arXiv:2412.19437,
section 2.1.2), whose gradient would interfere with the language model's own.

Each expert has a bias, which is added to its score only when a token's experts are chosen: their outputs are weighted
by the unbiased scores. After each step the bias of experts that received more than the mean number of tokens is lowered
by a small fixed amount, and that of the others raised (`trainer.balancing`). Scores are sigmoids, as in V3: unlike
those of a softmax they do not compete, so a bias means the same for every expert.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from model.config import LMConfig
from model.feed_forward import MoEFeedForward, Router, run_experts


class BiasedRouter(Router):
    """Scores the routed experts by sigmoids, in fp32, and chooses by score and bias.

    Attributes:
        expert_bias: (n_routed_experts,) fp32, a buffer, saved with the weights.
        load: (n_routed_experts,) int64, tokens that each expert received in training since this was set to None.
    """

    def __init__(self, config: LMConfig):
        super().__init__(config)
        self.register_buffer("expert_bias", torch.zeros(config.n_routed_experts))
        self.load: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        """x (tokens, dim) -> scores (tokens, n_routed_experts) fp32."""
        with torch.autocast(x.device.type, enabled=False):
            return F.linear(x.float(), self.weight.float()).sigmoid()

    @torch.compiler.disable  # how many tokens are not padding is data-dependent: no static graph
    def count(self, chosen: Tensor, non_padding: Tensor | None) -> None:
        """Add the chosen experts (batch, n, k) to the load; non_padding (batch, n) bool or None for no padding."""
        chosen = chosen if non_padding is None else chosen[non_padding]
        load = torch.bincount(chosen.flatten(), minlength=len(self.expert_bias))
        self.load = load if self.load is None else self.load + load


class BalancedMoE(MoEFeedForward):
    """Each token goes to its `num_experts_per_tok` experts with the highest score and bias, and to a shared one."""

    def __init__(self, config: LMConfig):
        super().__init__(config)
        self.gate = BiasedRouter(config)

    def forward(self, x: Tensor, non_padding: Tensor | None) -> tuple[Tensor, None]:
        """x (batch, n, dim), non_padding (batch, n) bool or None for no padding -> same shape, and None instead of an
        auxiliary loss."""
        batch, n, dim = x.shape
        tokens = x.reshape(-1, dim)
        scores = self.gate(tokens)  # (tokens, experts)
        chosen = (scores.detach() + self.gate.expert_bias).topk(self.k, dim=-1).indices  # (tokens, k)
        weights = scores.gather(1, chosen)
        if self.norm_topk_prob and self.k > 1:
            weights = weights / weights.sum(-1, keepdim=True)
        if self.training:
            self.gate.count(chosen.view(batch, n, -1), non_padding)
        out = run_experts(self.experts, tokens, weights, chosen).view(batch, n, dim)
        return (out if self.shared_experts is None else out + self.shared_experts(x)[0]), None
