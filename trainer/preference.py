"""How probable a model finds the two answers of a pair, and how probable the one it started from did."""

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
        logits: those at `target_mask(labels)`, (learned, vocab), any float dtype; the softmax is taken in fp32.
        labels: (batch, n) int64, not shifted; -100 is not learned.

    Returns:
        (learned,) fp32.
    """
    targets = labels[:, 1:]
    return -F.cross_entropy(logits.float(), targets[targets != IGNORE_INDEX], reduction="none")


def sum_per_answer(values: Tensor, batch: dict[str, Tensor], labels: Tensor) -> Tensor:
    """Sum a number of each target token over the answer that it belongs to.

    Args:
        values: (learned,) fp32, as of `token_log_probs`.
        batch: rows of a DPODataset: whole pairs, chosen and rejected in turn.

    Returns:
        (pairs, 2) fp32, the pairs in the order of the rows; chosen, rejected.
    """
    starts = (batch["position_ids"] == 0) & batch["attention_mask"]
    answers = starts.flatten().cumsum(0).view_as(starts) - 1
    sums = values.new_zeros(int(starts.sum())).index_add(0, answers[:, 1:][labels[:, 1:] != IGNORE_INDEX], values)
    return sums.view(-1, 2)


def count_pairs(batches: list[dict[str, Tensor]]) -> int:
    return sum(int(((batch["position_ids"] == 0) & batch["attention_mask"]).sum()) // 2 for batch in batches)


def reference_log_probs(batch: dict[str, Tensor], labels: Tensor, frozen: nn.Module | None) -> Tensor:
    """What the reference gives each target token, (learned,) fp32; `batch` loses its column `reference`.

    Args:
        frozen: the model to ask, None where the batch brings the answer from the cache.
    """
    cached = batch.pop("reference", None)
    if frozen is None:
        return cached[:, 1:][labels[:, 1:] != IGNORE_INDEX]
    with torch.no_grad():
        return token_log_probs(frozen(**batch, logits_to_keep=target_mask(labels)).logits, labels)


def attach_reference_log_probs(
    dataset: DPODataset, model: nn.Module, model_hash: str, run: Runtime, batch_size: int
) -> None:
    """Give the dataset its column `reference`: log-probabilities under `model`, computed once and kept on disk.

    They lie beside the dataset's token cache, under a name in which everything has a part that decides them: the
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
            raise ValueError(f"log_probs.npy is of shape {values.shape}")
        return values

    def build(folder: Path) -> None:
        np.save(folder / "log_probs.npy", values)

    reference = find_cache(*place, load)
    (missing,) = run.sum(reference is None)  # somewhere: machines have disks of their own
    if missing:
        values = _all_log_probs(dataset, model, run, batch_size)
        with run.main_first():
            reference = open_cache(*place, load, build)
    dataset.reference = reference


@torch.no_grad()
def _all_log_probs(dataset: DPODataset, model: nn.Module, run: Runtime, batch_size: int) -> np.ndarray:
    """fp32 (tokens of the dataset's cache,), 0 where nothing is learned."""
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


def dpo_metrics(
    policy: Tensor,
    reference: Tensor,
    batch: dict[str, Tensor],
    labels: Tensor,
    loss_function: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]],
    length_normalize: bool,
) -> Tensor:
    """FIGURES of a batch, each summed over its pairs; the first one, the loss, can be differentiated.

    loss, margin: as of `loss_function`. reward_accuracy: 1 where the margin is above 0. accuracy: 1 where the chosen
    answer is the more probable. chosen, rejected: log-probability of the answers, summed, or averaged when
    `length_normalize`. kl: half the square by which a token's log-probability has moved, on average over a pair's
    tokens: an estimate of the KL divergence (Schulman, joschu.net/blog/kl-approx.html, 2020), here on given answers.

    Args:
        policy, reference: log-probability of each target token, (learned,) fp32.
        loss_function: from (pairs, 2) log-probabilities of policy and reference to each pair's loss and margin.

    Returns:
        (7,) fp32.
    """
    lengths = sum_per_answer(torch.ones_like(policy), batch, labels)
    divisor = lengths if length_normalize else 1
    ours, theirs = (sum_per_answer(values, batch, labels) / divisor for values in (policy, reference))
    losses, margins = loss_function(ours, theirs)
    ours, margins = ours.detach(), margins.detach()
    moved = sum_per_answer((policy.detach() - reference).square() / 2, batch, labels)
    kl = moved.sum(1) / lengths.sum(1)
    each = (losses, margins > 0, ours[:, 0] > ours[:, 1], margins, ours[:, 0], ours[:, 1], kl)
    return torch.stack([values.sum().float() for values in each])


@torch.no_grad()
def evaluate_pairs(
    model: nn.Module,
    frozen: nn.Module | None,
    held_out: DPODataset,
    run: Runtime,
    batch_size: int,
    measure: Callable[[Tensor, Tensor, dict[str, Tensor], Tensor], Tensor],
) -> dict[str, float]:
    """FIGURES of the held-out pairs, means over all of them on all ranks, each by its name with "eval_" before it.

    Args:
        frozen: as of `reference_log_probs`.
        measure: `dpo_metrics` with the stage's settings.

    Raises:
        EvaluationError: as of `sum_over_ranks`.
    """

    def sums_of_share() -> list[float]:
        measured = torch.zeros(len(DPO_METRICS), device=run.device)
        pairs = 0
        for (batch,) in held_out_loader(held_out, batch_size, run).steps():
            pairs += count_pairs([batch])
            batch = run.to_device(batch)
            labels = batch.pop("labels")
            with run.autocast():
                reference = reference_log_probs(batch, labels, frozen)
                policy = token_log_probs(model(**batch, logits_to_keep=target_mask(labels)).logits, labels)
            measured += measure(policy, reference, batch, labels)
        return [pairs, *measured.tolist()]

    pairs, *sums = sum_over_ranks(sums_of_share, 1 + len(DPO_METRICS), model, run)
    return {f"eval_{name}": value / pairs for name, value in zip(DPO_METRICS, sums, strict=True)}
