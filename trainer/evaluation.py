"""How well a model predicts text it was not trained on."""

import math
from collections.abc import Callable

import torch
from torch import nn
from torch.utils.data import Dataset

from dataset import StepLoader
from model.loss import next_token_loss, target_mask
from model.tokenizer import token_bytes
from trainer.runtime import Runtime
from trainer.sharding import is_sharded


class EvaluationError(Exception):
    """An evaluation that failed; its cause is known on the rank where it failed."""


@torch.no_grad()
def evaluate(model: nn.Module, held_out: Dataset, tokenizer, runtime: Runtime, batch_size: int) -> dict[str, float]:
    """Loss over all target tokens of `held_out`, divided among the ranks.

    Returns:
        eval_loss: nats per token. eval_bits_per_byte: bits per UTF-8 byte of the text those tokens stand for, which
        compares models with different tokenizers.

    Raises:
        EvaluationError: see `sum_over_ranks`.
    """

    def measure() -> list[float]:
        bytes_of = torch.tensor([len(piece) for piece in token_bytes(tokenizer)], device=runtime.device)
        nats = tokens = text_bytes = 0.0
        for (batch,) in held_out_loader(held_out, batch_size, runtime).steps():
            batch = runtime.to_device(batch)
            labels = batch.pop("labels")
            learned = target_mask(labels)
            with runtime.autocast():
                nats += next_token_loss(model(**batch, logits_to_keep=learned).logits, labels).item()
            targets = labels[:, 1:][learned[:, :-1]]
            tokens += targets.numel()
            text_bytes += bytes_of[targets].sum().item()
        return [nats, tokens, text_bytes]

    nats, tokens, text_bytes = sum_over_ranks(measure, 3, model, runtime)
    return {"eval_loss": nats / max(1, tokens), "eval_bits_per_byte": nats / math.log(2) / max(1, text_bytes)}


def held_out_loader(held_out: Dataset, batch_size: int, runtime: Runtime) -> StepLoader:
    """This rank's share, as in training: the same number of batches per rank, of the shape compiled already."""
    return StepLoader(held_out, batch_size, 1, 1, 0, rank=runtime.rank, world_size=runtime.world_size)


def sum_over_ranks(measure: Callable[[], list[float]], count: int, model: nn.Module, runtime: Runtime) -> list[float]:
    """The sum over ranks of what `measure` returns with the model in eval mode; the mode is restored afterwards.

    Args:
        measure: returns `count` sums over this rank's share of the held-out rows.

    Raises:
        EvaluationError: it failed on some rank; raised on all of them, so that none waits for another.
    """
    training = model.training
    model.eval()
    sums, cause = [0.0] * count, None
    try:
        sums = measure()
    except Exception as error:  # out of memory, a picture that is gone: whatever it is, training need not end for it
        if gathers_weights(model):
            raise
        cause = error
    finally:
        model.train(training)
    failed, *sums = runtime.sums(cause is not None, *sums)
    if failed:
        raise EvaluationError("an evaluation failed") from cause
    return sums


def gathers_weights(model: nn.Module) -> bool:
    """Whether each layer waits for all ranks (ZeRO-3, FSDP2), so that one of them cannot leave alone."""
    return getattr(model, "zero_optimization_stage", int)() == 3 or is_sharded(model)
