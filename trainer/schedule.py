"""The learning-rate schedule and the optimizer."""

import math
import re

import torch
from torch import nn

from trainer.adamw8bit import AdamW8bit
from trainer.muon import Muon


def cosine_schedule(step: int, total_steps: int, warmup: int, peak: float) -> float:
    """The learning rate of optimizer step `step` (0-based).

    Linear from peak / warmup up to peak, then half a cosine down to a tenth of it at the last step
    (Loshchilov & Hutter 2017, arXiv:1608.03983).
    """
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = min(1.0, (step - warmup) / max(1, total_steps - 1 - warmup))
    return peak * (0.1 + 0.45 * (1 + math.cos(math.pi * progress)))


def wsd_schedule(step: int, total_steps: int, warmup: int, peak: float, decay: float = 0.2) -> float:
    """The learning rate of optimizer step `step` (0-based): warm-up, stable, decay.

    Linear from peak / warmup up to peak (Hu et al. 2024, arXiv:2404.06395), and in the last `decay` of the steps down
    to almost 0, by 1 - sqrt(progress) (Hägele et al. 2024, arXiv:2405.18392).
    """
    if step < warmup:
        return peak * (step + 1) / warmup
    cooling = max(1, round(decay * total_steps))
    return peak * (1 - math.sqrt(min(1.0, max(0, step - (total_steps - cooling)) / cooling)))


def set_learning_rate(optimizer, rate: float) -> None:
    """Give every parameter group the rate (Muon's is in AdamW's units, see `make_optimizer`)."""
    for group in optimizer.param_groups:
        group["lr"] = rate


class OptimizerPair:
    """Two optimizers that look like one: Muon for the hidden matrices, AdamW for the rest."""

    def __init__(self, *optimizers: torch.optim.Optimizer):
        self.optimizers = optimizers

    @property
    def param_groups(self) -> list[dict]:
        return [group for optimizer in self.optimizers for group in optimizer.param_groups]

    def step(self) -> None:
        for optimizer in self.optimizers:
            optimizer.step()

    def zero_grad(self, set_to_none: bool = True) -> None:
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none)

    def state_dict(self) -> dict:
        return {str(i): optimizer.state_dict() for i, optimizer in enumerate(self.optimizers)}

    def load_state_dict(self, state: dict) -> None:
        for i, optimizer in enumerate(self.optimizers):
            optimizer.load_state_dict(state[str(i)])


def make_optimizer(model: nn.Module, args, weight_decay: float = 0.1, **muon_options):
    """The optimizer of all trainable parameters, as --optimizer and --learning_rate say.

    AdamW (Loshchilov & Hutter 2019, arXiv:1711.05101), fused, decays matrices only. --optimizer muon hands the
    matrices between embedding and output to Muon, whose update is scaled so that one learning rate serves both;
    adamw8bit is AdamW with its moments in 8 bits.

    Args:
        muon_options: of `Muon`, in place of its defaults.
    """
    muon = args.optimizer == "muon"
    trainable = {key: p for key, p in model.named_parameters() if p.requires_grad}
    hidden = [p for key, p in trainable.items() if p.dim() == 2 and _is_hidden(key)]
    others = [p for p in trainable.values() if all(p is not h for h in hidden)]
    matrices = [p for p in others if p.dim() >= 2]
    vectors = [p for p in others if p.dim() < 2]
    adamw_matrices = matrices if muon else matrices + hidden
    groups = [
        {"params": params, "weight_decay": decay}
        for params, decay in ((adamw_matrices, weight_decay), (vectors, 0.0))
        if params
    ]
    optimizers = []
    if muon and hidden:
        optimizers.append(Muon(hidden, args.learning_rate, weight_decay=weight_decay, **muon_options))
    if groups and args.optimizer == "adamw8bit":
        optimizers.append(AdamW8bit(groups, args.learning_rate))
    elif groups:
        optimizers.append(torch.optim.AdamW(groups, lr=args.learning_rate, betas=(0.9, 0.95), fused=True))
    return optimizers[0] if len(optimizers) == 1 else OptimizerPair(*optimizers)


def _is_hidden(key: str) -> bool:
    """Whether a matrix belongs to a block and not to a router, whose rows are not directions of a hidden state."""
    return bool(re.match(r"(model\.)?layers\.", key)) and ".gate." not in key
