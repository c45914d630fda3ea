"""The log-probabilities of a pair's two answers, under the model and under the reference it started from."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from dataset import DPODataset, collate
from dataset.cache_folder import find_cache, hold, open_cache, short_hash
from model.loss import IGNORE_INDEX, target_mask
from trainer.evaluation import held_out_loader, sum_over_ranks
from trainer.runtime import Runtime
from trainer.weights import architecture

DPO_METRICS = ("loss", "reward_accuracy", "accuracy", "margin", "chosen", "rejected", "kl")  # see `dpo_metrics`
FORMAT = 1  # of a reference cache; to be raised when the way its numbers are computed changes


def token_log_probs(logits: Tensor, labels: Tensor) -> Tensor:
    """log p of each target token, in nats.

    Args:
        logits: those at `target_mask(labels)`, (target tokens, vocab), any float dtype; the softmax is taken in fp32.
        labels: (batch, n) int64, not shifted; -100 is ignored.

    Returns:
        (target tokens,) fp32.
    """
    targets = labels[:, 1:]
    return -F.cross_entropy(logits.float(), targets[targets != IGNORE_INDEX], reduction="none")


def sum_per_answer(values: Tensor, batch: dict[str, Tensor], labels: Tensor) -> Tensor:
    """Sum one value per target token over the answer that it belongs to.

    Args:
        values: (target tokens,) fp32, as from `token_log_probs`.
        batch: rows of a DPODataset: whole pairs, chosen and rejected in turn.

    Returns:
        (pairs, 2) fp32, the pairs in the order of the rows; chosen, rejected.
    """
    starts = (batch["position_ids"] == 0) & batch["attention_mask"]
    answers = starts.flatten().cumsum(0).view_as(starts) - 1
    sums = values.new_zeros(int(starts.sum())).index_add(0, answers[:, 1:][labels[:, 1:] != IGNORE_INDEX], values)
    return sums.view(-1, 2)


def mean_per_answer(values: Tensor, batch: dict[str, Tensor], labels: Tensor) -> Tensor:
    """As `sum_per_answer`, divided by the number of the answer's target tokens."""
    return sum_per_answer(values, batch, labels) / sum_per_answer(torch.ones_like(values), batch, labels)


def count_pairs(batches: list[dict[str, Tensor]]) -> int:
    return sum(int(((batch["position_ids"] == 0) & batch["attention_mask"]).sum()) // 2 for batch in batches)


def reference_token_log_probs(
    cached: Tensor | None, frozen: nn.Module | None, batch: dict[str, Tensor], labels: Tensor
) -> Tensor:
    """The reference's log p of each target token, in nats, (target tokens,) fp32.

    Args:
        cached: the batch's column `reference`, (batch, n) fp32; without it, `frozen` is run.
    """
    if cached is not None:
        return cached[:, 1:][labels[:, 1:] != IGNORE_INDEX]
    with torch.no_grad():
        return token_log_probs(frozen(**batch, logits_to_keep=target_mask(labels)).logits, labels)


def attach_reference_log_probs(
    dataset: DPODataset, model: nn.Module, model_hash: str, run: Runtime, batch_size: int
) -> None:
    """Give the dataset its column `reference`: log-probabilities under `model`, computed once and kept on disk.

    They are stored beside the dataset's token cache, under a name that depends on everything that affects them: the
    data file, the tokenizer, the rows, the model's weights and settings, the precision. The ranks share the work.

    Raises:
        DataError: they cannot be written.
    """
    decided_by = [FORMAT, dataset.rows_key, model_hash, architecture(model.config), str(run.dtype), run.device.type]
    place = (dataset.data_path, dataset.cache.folder.name.split("-")[0], f"reference-{short_hash(decided_by)}")

    def load(folder: Path) -> np.ndarray:
        values = np.load(folder / "log_probs.npy", mmap_mode="r")
        hold(folder, values)
        if values.shape != (dataset.cache.lengths.sum(),):
            raise ValueError(f"log_probs.npy has shape {values.shape}")
        return values

    def build(folder: Path) -> None:
        np.save(folder / "log_probs.npy", values)

    reference = find_cache(*place, load)
    if run.sum(reference is None):  # somewhere: machines have disks of their own
        values = _all_log_probs(dataset, model, run, batch_size)
        with run.main_first():
            reference = open_cache(*place, load, build)
    dataset.reference = reference


@torch.no_grad()
def _all_log_probs(dataset: DPODataset, model: nn.Module, run: Runtime, batch_size: int) -> np.ndarray:
    """log p of every token of the dataset's cache, fp32 (tokens,); 0 for tokens that are not targets."""
    values = np.zeros(dataset.cache.lengths.sum(), dtype=np.float32)
    training = model.training
    model.eval()
    starts = range(run.rank * batch_size, len(dataset), run.world_size * batch_size)
    for start in tqdm(starts, desc="reference", unit="batch", disable=None if run.is_main else True):
        rows = range(start, min(start + batch_size, len(dataset)))
        batch = run.to_device(collate([dataset[row] for row in rows], dataset.max_seq_len if dataset.packing else None))
        labels = batch.pop("labels")
        places = torch.zeros_like(labels, device="cpu")
        places[batch["attention_mask"].cpu()] = torch.from_numpy(np.concatenate([dataset.places(row) for row in rows]))
        with run.autocast():
            logits = model(**batch, logits_to_keep=target_mask(labels)).logits
        learned = places[:, 1:][labels[:, 1:].cpu() != IGNORE_INDEX]
        values[learned.numpy()] = token_log_probs(logits, labels).cpu().numpy()
    model.train(training)
    if run.world_size > 1:
        everyone = torch.from_numpy(values).to(run.device)
        dist.all_reduce(everyone)
        values = everyone.cpu().numpy()
    return values


# --------------------------------------------------------------------------------------------------------- measures


@torch.no_grad()
def dpo_metrics(
    losses: Tensor, margins: Tensor, policy: Tensor, log_ratios: Tensor, batch: dict[str, Tensor], labels: Tensor
) -> Tensor:
    """DPO_METRICS of a batch, each summed over its pairs, (7,) fp32.

    reward_accuracy: 1 where the margin is above 0. accuracy: 1 where the chosen answer is more probable. kl: half
    the square by which a token's log-probability has moved, on average over a pair's tokens: an estimate of the KL
    divergence (Schulman, joschu.net/blog/kl-approx.html, 2020), here on given answers.

    Args:
        losses, margins: of each pair, (pairs,).
        policy: log-probabilities of the answers, chosen and rejected, (pairs, 2).
        log_ratios: log pi / pi_ref of each target token, (target tokens,).
    """
    lengths = sum_per_answer(torch.ones_like(log_ratios), batch, labels)
    kl = sum_per_answer(log_ratios.square() / 2, batch, labels).sum(1) / lengths.sum(1)
    chosen, rejected = policy.unbind(1)
    each = (losses, margins > 0, chosen > rejected, margins, chosen, rejected, kl)
    return torch.stack([values.sum().float() for values in each])


@torch.no_grad()
def evaluate_pairs(
    model: nn.Module,
    frozen: nn.Module | None,
    held_out: DPODataset,
    run: Runtime,
    batch_size: int,
    per_answer: Callable[[Tensor, dict[str, Tensor], Tensor], Tensor],
    loss_function: Callable[[Tensor, Tensor, float], tuple[Tensor, Tensor]],
    beta: float,
) -> dict[str, float]:
    """DPO_METRICS of the held-out pairs, means over all of them on all ranks, each by its name with "eval_" before it.

    Args:
        frozen: the reference, None where `held_out` has its log-probabilities.
        per_answer: `sum_per_answer` or `mean_per_answer`.
        loss_function: (log-probabilities of policy and reference, (pairs, 2) each, and `beta`) -> each pair's loss and
            margin, (pairs,) each.

    Raises:
        EvaluationError: see `sum_over_ranks`.
    """

    def sums_of_share() -> list[float]:
        sums = torch.zeros(len(DPO_METRICS), device=run.device)
        pairs = 0
        for (batch,) in held_out_loader(held_out, batch_size, run).steps():
            pairs += count_pairs([batch])
            batch = run.to_device(batch)
            labels, cached = batch.pop("labels"), batch.pop("reference", None)
            with run.autocast():
                log_probs = token_log_probs(model(**batch, logits_to_keep=target_mask(labels)).logits, labels)
                reference_log_probs = reference_token_log_probs(cached, frozen, batch, labels)
            policy = per_answer(log_probs, batch, labels)
            losses, margins = loss_function(policy, per_answer(reference_log_probs, batch, labels), beta)
            sums += dpo_metrics(losses, margins, policy, log_probs - reference_log_probs, batch, labels)
        return [pairs, *sums.tolist()]

    pairs, *sums = sum_over_ranks(sums_of_share, 1 + len(DPO_METRICS), model, run)
    return {f"eval_{name}": value / pairs for name, value in zip(DPO_METRICS, sums, strict=True)}
