"""A policy's log-probabilities in rows of answers, and the metrics of a reinforcement-learning step."""

import torch
from torch import Tensor, nn

from model.loss import target_mask
from trainer.preference import token_log_probs
from trainer.runtime import Runtime, Totals

LEARNING_METRICS = ("loss", "kl", "entropy", "clipped")


def spread(values: Tensor, mask: Tensor) -> Tensor:
    """Put values (target tokens,) at their tokens' places: mask (answers, n) bool -> (answers, n), 0 elsewhere."""
    return values.new_zeros(mask.shape).masked_scatter(mask, values)


@torch.no_grad()
def reference_log_probs(
    frozen: nn.Module, batch: dict[str, Tensor], labels: Tensor, mask: Tensor, temperature: float
) -> Tensor:
    """log p of each answer's tokens under the frozen reference, (answers, n), 0 outside the mask."""
    logits = frozen(**batch, logits_to_keep=target_mask(labels)).logits
    return spread(token_log_probs(logits / temperature, labels), mask)


@torch.no_grad()
def token_entropies(logits: Tensor) -> Tensor:
    """The entropy of each prediction in nats: logits (tokens, vocab) -> (tokens,) fp32."""
    log_probs = logits.float().log_softmax(-1)
    return -(log_probs.exp() * log_probs).sum(-1)


@torch.no_grad()
def learning_sums(loss: Tensor, logits: Tensor, clipped: Tensor, kl: Tensor | None = None) -> Tensor:
    """LEARNING_METRICS of a micro-batch, each summed over its target tokens, (4,) fp32.

    Args:
        loss: the micro-batch's share of the step's loss, a scalar.
        logits: of the target tokens, (target tokens, vocab).
        clipped: how many tokens were clipped, a scalar.
        kl: the penalty of each token, 0 outside the mask, (answers, n); None: no penalty in the loss.
    """
    kl = torch.zeros_like(loss) if kl is None else kl.sum()
    return torch.stack([value.float() for value in (loss, kl, token_entropies(logits).sum(), clipped)])


def step_values(
    learned: Tensor, written: dict[str, float], totals: Totals, updates: int, seconds: float, run: Runtime
) -> dict[str, float]:
    """The metrics of a step over all ranks, which must all call it.

    Args:
        learned: `learning_sums`, added up over this rank's micro-batches and all updates.
        written: sums over this rank's answers, see `Rollouts.write`.
        seconds: the duration of the updates.

    Returns:
        loss, reward and reward_NAME (means over answers), kl, entropy, clipped (over tokens), length (tokens per
        answer), finished (share of answers that ended by themselves), no_signal (share of groups with equal rewards),
        resampled (groups replaced), writing_seconds and learning_seconds (of the slowest rank).
    """
    names = list(written)
    sums = dict(zip((*LEARNING_METRICS, *names), run.sums(*learned.tolist(), *written.values()), strict=True))
    slowest = [max(times) for times in zip(*run.gather((written["writing_seconds"], seconds)), strict=True)]
    answers, groups = max(1.0, sums.pop("answers")), max(1.0, sums.pop("groups"))
    values = {"loss": sums.pop("loss") / updates}
    for name, value in sums.items():
        if name in LEARNING_METRICS:
            values[name] = value / updates / max(1.0, totals.target_tokens)
        elif name == "no_signal":
            values[name] = value / groups
        elif name == "resampled":
            values[name] = value
        elif name != "writing_seconds":
            values[name] = value / answers
    return values | {"writing_seconds": round(slowest[0], 3), "learning_seconds": round(slowest[1], 3)}
