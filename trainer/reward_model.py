"""Scores of a reward model: of held-out pairs, and of answers that another model has just generated."""

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from dataset import DPODataset, collate
from model.chat import Chat, render_chat_arrays
from model.loss import IGNORE_INDEX
from model.model_reward import MiniMindReward, answer_scores
from trainer.errors import UserError
from trainer.evaluation import held_out_loader, sum_over_ranks
from trainer.preference import count_pairs
from trainer.rewards import Reply, WeighedReward
from trainer.runtime import Runtime
from trainer.weights import load_weights

REWARD_METRICS = ("loss", "accuracy", "margin", "chosen", "rejected")  # see `reward_metrics`


@torch.no_grad()
def reward_metrics(losses: Tensor, scores: Tensor) -> Tensor:
    """REWARD_METRICS of a batch, each summed over its pairs, (5,) fp32; accuracy: the chosen answer scores higher.

    Args:
        losses: (pairs,); scores: of chosen and rejected, (pairs, 2).
    """
    chosen, rejected = scores.unbind(1)
    each = (losses, chosen > rejected, chosen - rejected, chosen, rejected)
    return torch.stack([values.sum().float() for values in each])


@torch.no_grad()
def evaluate_scores(
    model: nn.Module, held_out: DPODataset, run: Runtime, batch_size: int, loss_function: Callable[[Tensor], Tensor]
) -> dict[str, float]:
    """REWARD_METRICS of the held-out pairs, means over all of them on all ranks, by their names with "eval_" in front.

    Args:
        loss_function: from scores (pairs, 2) to each pair's loss (pairs,).

    Raises:
        EvaluationError: see `sum_over_ranks`.
    """

    def sums_of_share() -> list[float]:
        sums = torch.zeros(len(REWARD_METRICS), device=run.device)
        pairs = 0
        for (batch,) in held_out_loader(held_out, batch_size, run).steps():
            pairs += count_pairs([batch])
            batch = run.to_device(batch)
            labels = batch.pop("labels")
            with run.autocast():
                scores = answer_scores(model, batch, labels)[0].view(-1, 2)
            sums += reward_metrics(loss_function(scores), scores)
        return [pairs, *sums.tolist()]

    pairs, *sums = sum_over_ranks(sums_of_share, 1 + len(REWARD_METRICS), model, run)
    return {f"eval_{name}": value / pairs for name, value in zip(REWARD_METRICS, sums, strict=True)}


def load_reward_model(path: Path, tokenizer: PreTrainedTokenizerBase) -> MiniMindReward:
    """A reward model in eval mode, fp32, on the CPU; its json or its tensors give its size.

    Raises:
        UserError: missing, damaged, a model without a scalar head, or another tokenizer's.
    """
    return load_weights(path, None, tokenizer, build=MiniMindReward).eval()


@torch.inference_mode()
def score_chats(
    model: MiniMindReward, tokenizer: PreTrainedTokenizerBase, chats: Sequence[Chat], batch_size: int = 32
) -> list[float]:
    """A score for each chat, whose last turn is the answer that is judged.

    Raises:
        UserError: a chat is longer than the model's context.
    """
    rendered = render_chat_arrays(tokenizer, chats)
    scores: list[float] = []
    for start in range(0, len(rendered), batch_size):
        items = []
        for ids, targets in rendered[start : start + batch_size]:
            if len(ids) > model.config.max_seq_len:
                raise UserError(f"a chat of {len(ids)} tokens: the reward model takes {model.config.max_seq_len}")
            ids, learned = torch.from_numpy(ids), torch.from_numpy(targets)
            labels = torch.where(learned, ids, IGNORE_INDEX)
            items.append({"input_ids": ids, "labels": labels, "position_ids": torch.arange(len(ids))})
        batch = {name: tensor.to(model.device) for name, tensor in collate(items).items()}
        labels = batch.pop("labels")
        scores += answer_scores(model, batch, labels)[0].tolist()
    return scores


def reward_by_model(path: Path, tokenizer: PreTrainedTokenizerBase, device: torch.device) -> WeighedReward:
    """A rule whose reward is the reward model's score.

    Raises:
        UserError: as in `load_reward_model`.
    """
    model = load_reward_model(path, tokenizer).to(device).requires_grad_(False)

    def rule(reply: Reply) -> float:
        return score_chats(model, tokenizer, [[*reply.question, {"role": "assistant", "content": reply.text}]])[0]

    return WeighedReward("model", 1.0, rule)
