"""trainer/policy_losses.py: objectives compared with trl's code, advantages and KL by hand, a bandit."""

import math
from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch

from trainer.policy_losses import (
    LOSSES,
    Clip,
    Share,
    clipped_tokens,
    group_advantages,
    kl_estimate,
    without_signal,
)

LIMIT = 9
CLIPS = {"grpo": Clip(0.2, 0.2), "dr_grpo": Clip(0.1, 0.3), "dapo": Clip(0.2, 0.28), "gspo": Clip(0.02, 0.03)}
CLIPS["cispo"] = Clip(1.0, 0.15)


def a_batch() -> dict[str, torch.Tensor]:
    """Five answers of 2 to 6 tokens, with ratios well beyond every clip."""
    torch.manual_seed(0)
    log_probs = torch.randn(5, 6) - 2
    lengths = torch.tensor([2, 6, 3, 5, 4])
    return {
        "log_probs": log_probs.requires_grad_(),
        "old": log_probs.detach() + 0.3 * torch.randn(5, 6),
        "reference": log_probs.detach() + 0.5 * torch.randn(5, 6),
        "advantages": torch.tensor([1.0, -0.5, 0.7, -1.2, 0.0]),
        "mask": torch.arange(6) < lengths[:, None],
    }


def our_loss(name: str, batch: dict[str, torch.Tensor], beta: float, share: Share) -> torch.Tensor:
    given = (batch[key] for key in ("log_probs", "old", "advantages", "mask"))
    losses, weights = LOSSES[name].objective(*given, share, CLIPS[name])
    return ((losses + beta * kl_estimate(batch["log_probs"], batch["reference"])) * weights).sum()


def trl_loss(name: str, batch: dict[str, torch.Tensor], beta: float) -> tuple[torch.Tensor, dict]:
    """The loss of trl's trainer for the same log-probabilities, and its metrics."""
    from trl import GRPOTrainer

    mask = batch["mask"].long()
    accelerator = SimpleNamespace(
        num_processes=1, gather=lambda x: x, reduce=lambda x, reduction: x, gather_for_metrics=lambda x: x
    )
    args = {"steps_per_generation": 1, "delta": None, "use_bias_correction_kl": False}
    clip = CLIPS[name]
    given = SimpleNamespace(
        loss_type="grpo" if name == "gspo" else name,
        importance_sampling_level="sequence" if name == "gspo" else "token",
        epsilon_low=clip.low,
        epsilon_high=1 + clip.high if name == "cispo" else clip.high,
        beta=beta,
        max_completion_length=LIMIT,
        args=SimpleNamespace(**args),
        model=SimpleNamespace(training=True),
        current_gradient_accumulation_steps=1,
        accelerator=accelerator,
        top_entropy_quantile=1.0,
        off_policy_mask_threshold=None,
        use_vllm=False,
        aux_loss_enabled=False,
        _entropy_bonus_enabled=False,
        _metrics={"train": defaultdict(list)},
        _get_per_token_logps_and_entropies=lambda *_, **__: (batch["log_probs"], torch.zeros(mask.shape), None),
    )
    inputs = {
        "prompt_ids": mask,
        "prompt_mask": mask,
        "completion_ids": mask,
        "completion_mask": mask,
        "advantages": batch["advantages"],
        "old_per_token_logps": batch["old"],
        "ref_per_token_logps": batch["reference"],
        "num_items_in_batch": mask.sum(),
    }
    return GRPOTrainer._compute_loss(given, given.model, inputs), given._metrics["train"]


@pytest.mark.parametrize("beta", [0.0, 0.3])
@pytest.mark.parametrize("name", LOSSES)
def test_loss_and_gradient_are_trls(name, beta):
    batch = a_batch()
    share = Share(5, float(batch["mask"].sum()), LIMIT)
    ours = our_loss(name, batch, beta, share)
    (gradient,) = torch.autograd.grad(ours, batch["log_probs"])
    theirs, told = trl_loss(name, batch, beta)
    (expected,) = torch.autograd.grad(theirs, batch["log_probs"])
    assert ours.item() == pytest.approx(theirs.item(), abs=1e-5)
    torch.testing.assert_close(gradient, expected, atol=1e-5, rtol=1e-5)
    assert gradient.abs().max() > 1e-3
    if name not in ("gspo", "cispo"):  # for gspo it reports the share of answers, for cispo only ratios above the clip
        given = (batch[key] for key in ("log_probs", "old", "advantages", "mask"))
        clipped = clipped_tokens(*given, CLIPS[name], name) / share.tokens
        assert clipped.item() == pytest.approx(told["clip_ratio/region_mean"][0])
        assert 0 < clipped < 1


@pytest.mark.parametrize("name", LOSSES)
def test_a_step_that_is_cut_in_two_has_the_loss_of_the_whole(name):
    batch = a_batch()
    share = Share(5, float(batch["mask"].sum()), LIMIT)
    parts = [{key: value[rows] for key, value in batch.items()} for rows in (slice(0, 2), slice(2, 5))]
    cut = sum(our_loss(name, part, 0.1, share) for part in parts)
    assert cut.item() == pytest.approx(our_loss(name, batch, 0.1, share).item(), rel=1e-5)


@pytest.mark.parametrize("name", LOSSES)
def test_what_lies_outside_the_answers_changes_nothing(name):
    batch = a_batch()
    share = Share(5, float(batch["mask"].sum()), LIMIT)
    before = our_loss(name, batch, 0.0, share)
    noise = torch.full((5, 6), 50.0)
    spoiled = batch | {"old": torch.where(batch["mask"], batch["old"], noise)}
    assert our_loss(name, spoiled, 0.0, share).item() == before.item()


def test_advantages_by_hand():
    rewards = torch.tensor([[1.0, 0.0, 0.0, 1.0], [0.3, 0.3, 0.3, 0.3], [0.0, 0.0, 0.0, 2.0]])
    scaled = group_advantages(rewards)
    assert scaled[0].tolist() == pytest.approx([x / (math.sqrt(1 / 3) + 1e-4) for x in (0.5, -0.5, -0.5, 0.5)])
    assert scaled[1].tolist() == [0, 0, 0, 0]
    assert group_advantages(rewards, scale=False)[2].tolist() == [-0.5, -0.5, -0.5, 1.5]
    assert without_signal(rewards).tolist() == [False, True, False]
    assert group_advantages(torch.full((1, 3), 0.1 + 0.2)).tolist() == [[0, 0, 0]]  # whose fp32 mean differs


def test_the_kl_estimate_is_right_on_average_and_never_negative():
    """Its mean over tokens sampled from the policy is the divergence."""
    torch.manual_seed(0)
    policy, reference = torch.randn(2, 7).log_softmax(-1)
    exact = (policy.exp() * (policy - reference)).sum()
    estimates = kl_estimate(policy, reference)
    assert (policy.exp() * estimates).sum().item() == pytest.approx(exact.item(), abs=1e-6)
    assert (estimates >= 0).all()
    assert kl_estimate(policy, policy).tolist() == [0] * 7


@pytest.mark.parametrize("name", LOSSES)
def test_a_bandit_finds_the_arm_that_pays_most(name):
    """One token per answer and four arms that pay 0.1, 0.4, 0.9 and 0.6: the optimum is always the third arm."""
    torch.manual_seed(0)
    pays = torch.tensor([0.1, 0.4, 0.9, 0.6])
    logits = torch.zeros(4, requires_grad=True)
    optimizer = torch.optim.SGD([logits], lr=0.5)
    variant = LOSSES[name]
    for _ in range(150):
        arms = torch.distributions.Categorical(logits=logits.detach()).sample((4, 8))
        advantages = group_advantages(pays[arms], variant.scale).flatten()
        log_probs = logits.log_softmax(-1)[arms.flatten()][:, None]
        mask = torch.ones(32, 1, dtype=torch.bool)
        losses, weights = variant.objective(
            log_probs, log_probs.detach(), advantages, mask, Share(32, 32, 1), variant.clip
        )
        optimizer.zero_grad()
        (losses * weights).sum().backward()
        optimizer.step()
    assert logits.softmax(-1)[2] > 0.9
