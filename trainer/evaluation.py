"""How well a model predicts text it was not trained on."""

import math

import torch
from torch import nn
from torch.utils.data import Dataset

from dataset import StepLoader
from model.model import next_token_loss, predicting
from model.tokenizer import token_bytes
from trainer.runtime import Runtime


@torch.no_grad()
def evaluate(model: nn.Module, held_out: Dataset, tokenizer, runtime: Runtime, batch_size: int) -> dict[str, float]:
    """Loss over all trained tokens of `held_out`, shared out over the ranks.

    Returns:
        eval_loss: nats per token. eval_bits_per_byte: bits per UTF-8 byte of the text those tokens stand for, which
        compares models with different tokenizers.
    """
    bytes_of = torch.tensor([len(piece) for piece in token_bytes(tokenizer)], device=runtime.device)
    # dealt out as in training: every rank gets equally many batches, of the shape that is compiled already
    loader = StepLoader(held_out, batch_size, 1, 1, 0, rank=runtime.rank, world_size=runtime.world_size)
    training = model.training
    model.eval()
    nats = tokens = text_bytes = 0.0
    for (batch,) in loader.steps():
        batch = runtime.to_device(batch)
        labels = batch.pop("labels")
        learned = predicting(labels)
        with runtime.autocast():
            nats += next_token_loss(model(**batch, logits_to_keep=learned).logits, labels).item()
        targets = labels[:, 1:][learned[:, :-1]]
        tokens += targets.numel()
        text_bytes += bytes_of[targets].sum().item()
    model.train(training)
    nats, tokens, text_bytes = runtime.sum(nats, tokens, text_bytes)
    return {"eval_loss": nats / max(1, tokens), "eval_bits_per_byte": nats / math.log(2) / max(1, text_bytes)}
