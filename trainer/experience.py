"""PPO's computations on answers before training on them, and the optimizer state that contains its critic."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from model.actor_critic import CRITIC
from model.loss import IGNORE_INDEX, target_mask
from trainer.advantages import AdaptiveKL, generalised_advantages, token_rewards, whiten
from trainer.policy_losses import kl_estimate
from trainer.policy_measures import reference_log_probs, spread
from trainer.preference import token_log_probs
from trainer.runtime import Runtime


class Experience(NamedTuple):
    """The values computed for a micro-batch of answers before the updates, each (answers, n)."""

    log_probs: Tensor
    values: Tensor
    advantages: Tensor
    returns: Tensor


class WithCritic:
    """An optimizer whose state also holds the critic and the KL's coefficient: they are saved in the resume folder,
    while the weights that are published are the policy's alone."""

    def __init__(self, optimizer, model: nn.Module, kl: AdaptiveKL):
        self.optimizer, self.critic, self.kl = optimizer, model.get_submodule(CRITIC.rstrip(".")), kl

    @property
    def param_groups(self) -> list[dict]:
        return self.optimizer.param_groups

    def step(self) -> None:
        self.optimizer.step()

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.optimizer.zero_grad(set_to_none)

    def state_dict(self) -> dict:
        critic = {key: value.detach().cpu().clone() for key, value in self.critic.state_dict().items()}
        return {"optimizer": self.optimizer.state_dict(), "critic": critic, "kl_coefficient": self.kl.coefficient}

    def load_state_dict(self, state: dict) -> None:
        self.optimizer.load_state_dict(state["optimizer"])
        self.critic.load_state_dict(state["critic"])
        self.kl.coefficient = state["kl_coefficient"]


def answers_alone(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """A micro-batch without the columns with one number per answer, which the model does not take."""
    return {name: tensor for name, tensor in batch.items() if name not in ("rewards", "advantages")}


@torch.no_grad()
def gather_experience(
    model: nn.Module, frozen: nn.Module, batches: Sequence[dict[str, Tensor]], coefficient: float, args, run: Runtime
) -> tuple[list[Experience], float]:
    """Log-probabilities, values, advantages and returns of the answers before the updates, and the KL to the reference
    in nats per token; all ranks must call it."""
    found, masks, kl = [], [], 0.0
    for batch in batches:
        batch = run.to_device(batch)
        rewards, inputs = batch["rewards"], answers_alone(batch)
        labels = inputs.pop("labels")
        mask = labels[:, 1:] != IGNORE_INDEX
        with run.autocast():
            out, values = model(**inputs, logits_to_keep=target_mask(labels))
            log_probs = spread(token_log_probs(out.logits / args.temperature, labels), mask)
            reference = reference_log_probs(frozen, inputs, labels, mask, args.temperature)
        values = spread(values, mask)
        earned = token_rewards(rewards, log_probs - reference, mask, coefficient)
        advantages, returns = generalised_advantages(earned, values, mask, args.gamma, args.gae_lambda)
        kl += (kl_estimate(log_probs, reference) * mask).sum().item()
        found.append(Experience(log_probs, values, advantages, returns))
        masks.append(mask)
    white = whiten([before.advantages for before in found], masks, run)
    kl, tokens = run.sums(kl, sum(int(mask.sum()) for mask in masks))
    known = [before._replace(advantages=advantages) for before, advantages in zip(found, white, strict=True)]
    return known, kl / max(1.0, tokens)
