"""PPO's arithmetic: rewards of single tokens, generalised advantages, clipped losses, and a KL held to a target.

Shapes as in trainer/policy_losses.py: an answer is a row, `mask` (answers, n) bool its tokens, one after another.
"""

import torch
from torch import Tensor

from trainer.runtime import Runtime


def token_rewards(rewards: Tensor, log_ratios: Tensor, mask: Tensor, coefficient: float) -> Tensor:
    """The reward of each token: -coefficient * log(policy / start), and the answer's reward with its last token
    (InstructGPT, Ouyang et al. 2022, arXiv:2203.02155, equation 2, as its reward model is used in PPO).

    Args:
        rewards: (answers,).
        log_ratios: log policy - log start at each token, (answers, n).

    Returns:
        (answers, n), 0 outside the mask.
    """
    last = mask & (mask.flip(1).cumsum(1).flip(1) == 1)
    return (-coefficient * log_ratios).masked_fill(~mask, 0.0) + last * rewards[:, None]


def generalised_advantages(
    rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, decay: float
) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimation (Schulman et al. 2016, arXiv:1506.02438, equation 16):

        A_t = delta_t + gamma decay A_t+1,   delta_t = r_t + gamma V_t+1 - V_t

    Nothing follows an answer: after its last token V and A are 0.

    Args:
        rewards, values: (answers, n).
        decay: its lambda; 0 trusts the critic, 1 trusts the rewards.

    Returns:
        the advantages, and the returns A + V that the critic learns; (answers, n), 0 outside the mask.
    """
    values = values.masked_fill(~mask, 0.0)
    advantages = torch.zeros_like(values)
    following = next_value = values.new_zeros(len(values))
    for t in reversed(range(values.size(1))):
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        following = torch.where(mask[:, t], delta + gamma * decay * following, 0.0)
        advantages[:, t], next_value = following, values[:, t]
    return advantages, (advantages + values).masked_fill(~mask, 0.0)


def whiten(advantages: list[Tensor], masks: list[Tensor], run: Runtime) -> list[Tensor]:
    """The advantages of a step's micro-batches with mean 0 and standard deviation 1 over all tokens of all ranks, which
    must all call it."""
    # on the CPU, as not all devices have float64
    tokens = [values[mask].cpu().double() for values, mask in zip(advantages, masks, strict=True)]
    sums = [(len(values), values.sum().item(), values.square().sum().item()) for values in tokens]
    count, total, squares = run.sums(*map(sum, zip(*sums, strict=True)))
    mean = total / max(1.0, count)
    deviation = max(0.0, squares / max(1.0, count) - mean**2) ** 0.5
    return [(values - mean) / (deviation + 1e-8) for values in advantages]


def clipped_policy_loss(log_probs: Tensor, old: Tensor, advantages: Tensor, mask: Tensor, epsilon: float) -> Tensor:
    """-min(r A, clip(r, 1 - epsilon, 1 + epsilon) A), r = policy / old policy (PPO, Schulman et al. 2017,
    arXiv:1707.06347, equation 7), each (answers, n); 0 outside the mask."""
    ratios = (log_probs - old).masked_fill(~mask, 0.0).exp()
    bounded = ratios.clamp(1 - epsilon, 1 + epsilon)
    return -torch.minimum(ratios * advantages, bounded * advantages).masked_fill(~mask, 0.0)


def clipped_value_loss(values: Tensor, old: Tensor, returns: Tensor, mask: Tensor, epsilon: float) -> Tensor:
    """max((V - R)^2, (clip(V, old V - epsilon, old V + epsilon) - R)^2) / 2: a critic that has moved far from its
    earlier values of these answers learns no more from them (openai/baselines' PPO2; Engstrom et al. 2020,
    arXiv:2005.12729, section 3). Each (answers, n); 0 outside the mask."""
    bounded = torch.minimum(torch.maximum(values, old - epsilon), old + epsilon)
    losses = torch.maximum((values - returns).square(), (bounded - returns).square()) / 2
    return losses.masked_fill(~mask, 0.0)


class AdaptiveKL:
    """The weight of the KL to the reference, adapted to keep the KL near a target: raised when it is above, lowered
    when it is below (Ziegler et al. 2019, arXiv:1909.08593, section 2.2).

    Args:
        coefficient: initial value.
        target: nats per token.
        rate: a step changes it by at most rate / 5 of its size.
    """

    def __init__(self, coefficient: float, target: float, rate: float = 0.1):
        self.coefficient, self.target, self.rate = coefficient, target, rate

    def update(self, kl: float) -> None:
        error = max(-0.2, min(0.2, kl / self.target - 1))
        self.coefficient *= 1 + self.rate * error
