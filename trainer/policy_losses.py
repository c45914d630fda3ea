"""Losses of a policy on its own answers: advantages within a group, five clipped objectives, a KL estimate.

Shapes: an answer is a row; n is the length of the rows less one, since a token is predicted one position earlier.
`mask` (answers, n) bool says which of these predictions are an answer's tokens. Log-probabilities are in nats, fp32
(answers, n), anything outside the mask.

An objective returns each token's loss (answers, n) and its weight (answers, n), which is 0 outside the mask, so that

    loss = sum_t weight_t * (loss_t + beta * kl_t)

summed over all micro-batches and ranks of a step is the paper's loss.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor


class Clip(NamedTuple):
    """How far a ratio may be below and above 1 before it is clipped."""

    low: float
    high: float


class Share(NamedTuple):
    """The size of a step on all ranks together: answers, their tokens, and the maximum length of an answer."""

    answers: float
    tokens: float
    limit: int


def group_advantages(rewards: Tensor, scale: bool = True) -> Tensor:
    """The advantage of each answer over the others to its question: (r - mean) / (std + 1e-4) within each group
    (GRPO, Shao et al. 2024, arXiv:2402.03300, section 4.1.2).

    A group of equal rewards has advantages of exactly 0.

    Args:
        rewards: (groups, size).
        scale: divide by the standard deviation; without it (Dr. GRPO, Liu et al. 2025, arXiv:2503.20783, section 3.1)
            a question that is almost always or almost never solved has no more weight than others.

    Returns:
        the shape of `rewards`.
    """
    advantages = rewards - rewards.mean(1, keepdim=True)
    if scale and rewards.size(1) > 1:
        advantages = advantages / (rewards.std(1, keepdim=True) + 1e-4)
    return advantages.masked_fill(without_signal(rewards)[:, None], 0.0)


def without_signal(rewards: Tensor) -> Tensor:
    """Which groups give no signal because all their rewards are equal: rewards (groups, size) -> (groups,) bool."""
    return (rewards == rewards[:, :1]).all(1)


def kl_estimate(log_probs: Tensor, reference: Tensor) -> Tensor:
    """The k3 estimator of KL(policy || reference) at each sampled token: exp(d) - d - 1, d = log reference - log policy
    (Schulman, joschu.net/blog/kl-approx.html, 2020; GRPO's equation 4). Never negative.

    Args and returns: (answers, n).
    """
    difference = reference - log_probs
    return difference.exp() - difference - 1


# ------------------------------------------------------------------------------------------------- objectives


def grpo_loss(
    log_probs: Tensor, old: Tensor, advantages: Tensor, mask: Tensor, share: Share, clip: Clip
) -> tuple[Tensor, Tensor]:
    """-min(r A, clip(r) A), r = policy / old policy at each token; mean over an answer's tokens, then over answers
    (GRPO, Shao et al. 2024, arXiv:2402.03300, equation 3).

    Args:
        log_probs: of the policy being trained; old: of the policy that sampled the answers, without gradient.
        advantages: (answers,).
    """
    return _clipped(_ratios(log_probs, old, mask), advantages, clip), _per_answer(mask) / share.answers


def dr_grpo_loss(
    log_probs: Tensor, old: Tensor, advantages: Tensor, mask: Tensor, share: Share, clip: Clip
) -> tuple[Tensor, Tensor]:
    """As `grpo_loss`, summed over tokens and divided by a fixed length, the limit: dividing by an answer's own length
    prefers long wrong answers to short ones (Dr. GRPO, Liu et al. 2025, arXiv:2503.20783, section 3.2). It goes with
    advantages that are not scaled."""
    return _clipped(_ratios(log_probs, old, mask), advantages, clip), mask / (share.answers * share.limit)


def dapo_loss(
    log_probs: Tensor, old: Tensor, advantages: Tensor, mask: Tensor, share: Share, clip: Clip
) -> tuple[Tensor, Tensor]:
    """As `grpo_loss`, the mean over all tokens of the step: each token counts the same, whatever the length of its
    answer (DAPO, Yu et al. 2025, arXiv:2503.14476, equation 8). It goes with a clip that is wider above than below."""
    return _clipped(_ratios(log_probs, old, mask), advantages, clip), mask / share.tokens


def gspo_loss(
    log_probs: Tensor, old: Tensor, advantages: Tensor, mask: Tensor, share: Share, clip: Clip
) -> tuple[Tensor, Tensor]:
    """-min(s A, clip(s) A) with one ratio per answer, s = (policy / old policy of the whole answer) ^ (1 / its length)
    (GSPO, Zheng et al. 2025, arXiv:2507.18071, equations 5 and 7)."""
    losses = _clipped(_answer_ratios(log_probs, old, mask), advantages, clip)  # (answers, 1)
    return losses.expand_as(log_probs), _per_answer(mask) / share.answers


def cispo_loss(
    log_probs: Tensor, old: Tensor, advantages: Tensor, mask: Tensor, share: Share, clip: Clip
) -> tuple[Tensor, Tensor]:
    """-min(r, 1 + high) A log policy, the ratio without gradient: no token's gradient is ever dropped, only its weight
    is bounded; mean over all tokens (CISPO, MiniMax-M1 2025, arXiv:2506.13585, equations 4 and 5, which also have no
    lower bound)."""
    weights = _ratios(log_probs, old, mask).detach().clamp(max=1 + clip.high)
    losses = -weights * advantages[:, None] * log_probs.masked_fill(~mask, 0.0)
    return losses, mask / share.tokens


def _ratios(log_probs: Tensor, old: Tensor, mask: Tensor) -> Tensor:
    """policy / old policy of each token, 1 outside the mask."""
    return (log_probs - old).masked_fill(~mask, 0.0).exp()


def _answer_ratios(log_probs: Tensor, old: Tensor, mask: Tensor) -> Tensor:
    """The geometric mean of an answer's ratios, (answers, 1)."""
    return ((log_probs - old).masked_fill(~mask, 0.0) * _per_answer(mask)).sum(1, keepdim=True).exp()


def _clipped(ratios: Tensor, advantages: Tensor, clip: Clip) -> Tensor:
    """The loss of PPO (Schulman et al. 2017, arXiv:1707.06347, equation 7): ratios (answers, n or 1)."""
    bounded = ratios.clamp(1 - clip.low, 1 + clip.high)
    return -torch.minimum(ratios * advantages[:, None], bounded * advantages[:, None])


def _per_answer(mask: Tensor) -> Tensor:
    """The weight of each token: 1 / length of its answer, 0 outside the mask."""
    return mask / mask.sum(1, keepdim=True).clamp(min=1)


Objective = Callable[[Tensor, Tensor, Tensor, Tensor, Share, Clip], tuple[Tensor, Tensor]]


class Variant(NamedTuple):
    """A choice of --loss: the objective, its paper's clip, and the rest of its recipe."""

    objective: Objective
    clip: Clip
    scale: bool = True  # advantages by the standard deviation
    resample: int = 0  # how often a question whose group has no signal is replaced


LOSSES = {
    "grpo": Variant(grpo_loss, Clip(0.2, 0.2)),
    "dr_grpo": Variant(dr_grpo_loss, Clip(0.2, 0.2), scale=False),
    "dapo": Variant(dapo_loss, Clip(0.2, 0.28), resample=3),
    "gspo": Variant(gspo_loss, Clip(3e-4, 4e-4)),
    "cispo": Variant(cispo_loss, Clip(1.0, 4.0)),
}


@torch.no_grad()
def clipped_tokens(
    log_probs: Tensor, old: Tensor, advantages: Tensor, mask: Tensor, clip: Clip, loss: str = "grpo"
) -> Tensor:
    """The number of tokens whose ratio is beyond the clip on the side of their advantage, so that they have no gradient
    (with cispo: a bounded weight), fp32 scalar. With gspo it is all tokens of an answer or none.

    Args:
        advantages: of each answer, (answers,), or of each token, (answers, n).
    """
    advantages = advantages[:, None] if advantages.dim() == 1 else advantages
    ratios = (_answer_ratios if loss == "gspo" else _ratios)(log_probs, old, mask)
    above = (ratios > 1 + clip.high) & (advantages > 0)
    below = (ratios < 1 - clip.low) & (advantages < 0)
    return ((above | below) & mask).sum().float()
