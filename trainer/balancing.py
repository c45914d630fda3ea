"""Balancing experts by their biases, see `model.balanced_moe`; the same with accumulation and several processes."""

import torch
from torch import nn

from model.balanced_moe import BiasedRouter
from trainer.parallel import plain_model
from trainer.runtime import Runtime


@torch.no_grad()
def balance_experts(model: nn.Module, rate: float, run: Runtime) -> float:
    """Lower the bias of experts that had more than the mean of the step's tokens, and raise that of the others, by
    `rate` (Wang et al. 2024, arXiv:2408.15664, algorithm 1). All ranks must call it, after each step.

    Returns:
        the largest violation of all layers: the excess of the fullest expert's tokens over the mean, relative to it.
    """
    routers = [module for module in plain_model(model).modules() if isinstance(module, BiasedRouter)]
    routers = [router for router in routers if router.load is not None]  # multi-token modules may not be trained
    counted = torch.stack([router.load for router in routers])  # (layers, experts)
    loads = torch.tensor(run.sums(*counted.flatten().tolist()), dtype=torch.float64).view(counted.shape)
    above = loads / loads.mean(1, keepdim=True).clamp(min=1) - 1  # the mean, as a part of it
    for router, more in zip(routers, above, strict=True):
        router.expert_bias -= rate * torch.sign(more).to(router.expert_bias)
        router.load = None
    return above.max().item()
