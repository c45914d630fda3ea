"""SwiGLU, dense or as a mixture of experts with a router."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.config import LMConfig


class FeedForward(nn.Module):
    """SwiGLU: w2(silu(w1 x) * w3 x) (Shazeer 2020, arXiv:2002.05202)."""

    def __init__(self, config: LMConfig, times: int = 1):
        """A network `times` as wide as the configuration's `hidden_dim`."""
        super().__init__()
        hidden_dim = times * config.hidden_dim
        self.w1 = nn.Linear(config.dim, hidden_dim, bias=False)
        self.w2 = nn.Linear(hidden_dim, config.dim, bias=False)
        self.w2.adds_to_residual = True
        self.w3 = nn.Linear(config.dim, hidden_dim, bias=False)

    def forward(self, x: Tensor, non_padding: Tensor | None = None) -> tuple[Tensor, None]:
        """x (..., dim) -> same shape, and None instead of a mixture of experts' auxiliary loss."""
        return self.w2(F.silu(self.w1(x)) * self.w3(x)), None


class Router(nn.Module):
    """Scores the routed experts for each token, in fp32 even under autocast: a rounding error could reroute a token."""

    def __init__(self, config: LMConfig):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(config.n_routed_experts, config.dim))

    def forward(self, x: Tensor) -> Tensor:
        """x (tokens, dim) -> probabilities (tokens, n_routed_experts) fp32."""
        with torch.autocast(x.device.type, enabled=False):
            return F.linear(x.float(), self.weight.float()).softmax(-1)


def load_balancing_loss(probabilities: Tensor, chosen: Tensor, non_padding: Tensor, per_row: bool) -> Tensor:
    """sum_i f_i P_i: minimal when every expert gets the same share (Fedus et al. 2021, arXiv:2101.03961;
    per row as in DeepSeek-V2, arXiv:2405.04434).

    f_i is expert i's share of the assignments times the number of experts, P_i its mean probability.

    Args:
        probabilities: (batch, n, experts) fp32.
        chosen: (batch, n, k) int64, the experts each token was routed to.
        non_padding: (batch, n) bool; padding does not count.
        per_row: balance each row separately and average over those that are not all padding, else over the whole batch.

    Returns:
        fp32 scalar; 0 if everything is padding.
    """
    experts = probabilities.size(-1)
    non_padding = non_padding[..., None].float()  # (batch, n, 1)
    assigned = F.one_hot(chosen, experts).sum(-2)  # (batch, n, experts)
    # Elementwise products and sums: autocast would run a matmul in half precision, which cannot count.
    counts = (non_padding * assigned).sum(1)  # (batch, experts)
    mass = (non_padding * probabilities).sum(1)  # (batch, experts)
    tokens = non_padding.sum(1)  # (batch, 1)
    if not per_row:
        counts, mass, tokens = counts.sum(0, keepdim=True), mass.sum(0, keepdim=True), tokens.sum(0, keepdim=True)
    at_least_one = tokens.clamp(min=1)
    losses = (counts / (at_least_one * chosen.size(-1)) * experts * (mass / at_least_one)).sum(-1)
    return losses.sum() / (tokens > 0).sum().clamp(min=1)


@torch.compiler.disable  # the tokens per expert are data-dependent: no static graph
def run_experts(experts: nn.ModuleList, x: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
    """Weighted sum of the chosen experts' outputs: sort the (token, choice) pairs by expert, run each expert once,
    undo the sort.

    x (tokens, dim); weights, chosen (tokens, k) -> (tokens, dim). An expert without tokens runs on an empty tensor:
    its gradient is zero rather than None, as DDP expects.
    """
    k = chosen.size(1)
    order = chosen.flatten().argsort(stable=True)
    counts = torch.bincount(chosen.flatten(), minlength=len(experts)).tolist()
    batches = x[order // k].split(counts)
    outs = torch.cat([expert(tokens)[0] for expert, tokens in zip(experts, batches, strict=True)])  # by expert
    back = torch.empty_like(order).scatter_(0, order, torch.arange(order.numel(), device=order.device))
    return (outs[back].view(-1, k, x.size(1)) * weights[..., None].type_as(outs)).sum(1)


class MoEFeedForward(nn.Module):
    """Each token goes to its top `num_experts_per_tok` experts, and to a shared one."""

    def __init__(self, config: LMConfig):
        super().__init__()
        self.k = config.num_experts_per_tok
        self.norm_topk_prob = config.norm_topk_prob
        self.aux_loss_alpha = config.aux_loss_alpha
        self.seq_aux = config.seq_aux
        self.experts = nn.ModuleList(FeedForward(config) for _ in range(config.n_routed_experts))
        self.gate = Router(config)
        self.shared_experts = FeedForward(config, config.shared_width) if config.n_shared_experts else None

    def forward(self, x: Tensor, non_padding: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """x (batch, n, dim), non_padding (batch, n) bool or None for no padding -> same shape, and the weighted
        auxiliary loss (in training; else None)."""
        batch, n, dim = x.shape
        tokens = x.reshape(-1, dim)  # (tokens, dim), tokens = batch * n
        probabilities = self.gate(tokens)  # (tokens, experts)
        weights, chosen = probabilities.topk(self.k, dim=-1)  # (tokens, k) each
        if self.norm_topk_prob and self.k > 1:
            weights = weights / weights.sum(-1, keepdim=True)
        out = run_experts(self.experts, tokens, weights, chosen).view(batch, n, dim)
        if self.shared_experts is not None:
            out = out + self.shared_experts(x)[0]
        if not self.training:
            return out, None
        if non_padding is None:
            non_padding = torch.ones(batch, n, dtype=torch.bool, device=x.device)
        aux = load_balancing_loss(
            probabilities.view(batch, n, -1), chosen.view(batch, n, -1), non_padding, self.seq_aux
        )
        return out, self.aux_loss_alpha * aux
