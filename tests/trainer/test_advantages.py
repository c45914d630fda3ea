"""trainer/advantages.py: PPO's formulas by hand, and compared with a plain loop over one answer."""

import pytest
import torch

from trainer.advantages import (
    AdaptiveKL,
    clipped_policy_loss,
    clipped_value_loss,
    generalised_advantages,
    token_rewards,
    whiten,
)
from trainer.runtime import Runtime

MASK = torch.tensor([[False, True, True, True], [True, True, False, False]])


def test_the_reward_comes_with_the_last_token_and_the_kl_with_each():
    log_ratios = torch.tensor([[9.0, 0.5, -0.25, 1.0], [0.0, 2.0, 9.0, 9.0]])
    earned = token_rewards(torch.tensor([1.0, -3.0]), log_ratios, MASK, coefficient=0.2)
    assert earned.tolist()[0] == pytest.approx([0, -0.1, 0.05, 1 - 0.2])
    assert earned.tolist()[1] == pytest.approx([0, -3 - 0.4, 0, 0])


def test_advantages_by_hand():
    """gamma 0.5, lambda 0.5; the second answer has two tokens: delta = 1 + 0.5 * 2 - 3 = -1, then 4 - 2 = 2."""
    rewards = torch.tensor([[0.0, 0.0, 0.0, 1.0], [1.0, 4.0, 0.0, 0.0]])
    values = torch.tensor([[7.0, 0.5, 1.0, 2.0], [3.0, 2.0, 7.0, 7.0]])  # 7: outside the mask, must be ignored
    advantages, returns = generalised_advantages(rewards, values, MASK, gamma=0.5, decay=0.5)
    third = 1 - 2
    second = (0.5 * 2 - 1) + 0.25 * third
    first = (0.5 * 1 - 0.5) + 0.25 * second
    assert advantages.tolist()[0] == pytest.approx([0, first, second, third])
    assert advantages.tolist()[1] == pytest.approx([-1 + 0.25 * 2, 2, 0, 0])
    assert returns.tolist()[0] == pytest.approx([0, first + 0.5, second + 1, third + 2])
    assert returns.tolist()[1] == pytest.approx([-0.5 + 3, 4, 0, 0])


def test_with_lambda_1_the_return_is_what_is_still_earned_whatever_the_critic_says():
    torch.manual_seed(0)
    rewards, values = torch.randn(2, 4) * MASK, torch.randn(2, 4)
    _, returns = generalised_advantages(rewards, values, MASK, gamma=1.0, decay=1.0)
    still = rewards.flip(1).cumsum(1).flip(1) * MASK
    torch.testing.assert_close(returns, still)


def test_white_advantages_have_mean_0_and_deviation_1_over_all_micro_batches():
    torch.manual_seed(0)
    run = Runtime(torch.device("cpu"), torch.float32)
    white = whiten([torch.randn(2, 4) * 3 + 5, torch.randn(2, 4)], [MASK, ~MASK], run)
    tokens = torch.cat([white[0][MASK], white[1][~MASK]])
    assert tokens.mean().item() == pytest.approx(0, abs=1e-6)
    assert tokens.std(unbiased=False).item() == pytest.approx(1, abs=1e-5)
    assert whiten([torch.ones(2, 4)], [MASK], run)[0].abs().max() < 1e-3  # all equal: no signal


def test_the_policy_loss_by_hand():
    old = torch.zeros(1, 4)
    log_probs = torch.log(torch.tensor([[1.5, 1.1, 0.5, 0.5]]))
    advantages = torch.tensor([[2.0, 2.0, 2.0, -2.0]])
    mask = torch.ones(1, 4, dtype=torch.bool)
    losses = clipped_policy_loss(log_probs, old, advantages, mask, epsilon=0.2)
    assert losses.tolist()[0] == pytest.approx([-2.4, -2.2, -1.0, 1.6])  # 1.2 * 2, 1.1 * 2, 0.5 * 2, 0.8 * -2
    assert clipped_policy_loss(log_probs, old, advantages, ~mask, 0.2).tolist() == [[0] * 4]


def test_the_value_loss_by_hand():
    mask = torch.ones(1, 3, dtype=torch.bool)
    values, old, returns = (torch.tensor([row]) for row in ([1.0, 0.1, -0.5], [0.0, 0.0, 0.0], [2.0, 2.0, -0.4]))
    losses = clipped_value_loss(values, old, returns, mask, epsilon=0.2)
    # clipped: (0.2 - 2)^2; within: (0.1 - 2)^2; beyond the bound, but the clipped value would be better
    assert losses.tolist()[0] == pytest.approx([1.8**2 / 2, 1.9**2 / 2, 0.2**2 / 2])


def test_the_kls_weight_follows_its_target():
    kl = AdaptiveKL(0.5, target=0.1)
    kl.update(0.1)
    assert kl.coefficient == 0.5
    kl.update(0.11)
    assert kl.coefficient == pytest.approx(0.5 * 1.01)
    kl.update(9.0)
    assert kl.coefficient == pytest.approx(0.5 * 1.01 * 1.02)
    kl.update(0.0)
    assert kl.coefficient == pytest.approx(0.5 * 1.01 * 1.02 * 0.98)
