"""How well a small model predicts each line: the worst lines are mostly not natural language."""

from collections.abc import Sequence

import numpy as np
import orjson
import torch

from scripts.preparing.options import Settings
from scripts.preparing.stage_records import whole_text
from scripts.preparing.work_folder import CleanChunk, WorkFolder, save_array
from trainer.errors import UserError

TOKENS = 512  # of a line that are read: the model was trained on rows of about as many
BATCH_TOKENS = 16_384


def worst_lines(
    chunks: Sequence[CleanChunk],
    starts: Sequence[int],
    kept: np.ndarray,
    settings: Settings,
    device: str | None,
    work: WorkFolder,
) -> np.ndarray:
    """The numbers of the lines to drop: the share `settings.drop_worst` with the most bits per byte, int64.

    The bits of each chunk are stored in the work folder.

    Raises:
        UserError: the weights or the device do not exist.
    """
    from trainer.device import pick_device
    from trainer.loading import load_for_inference

    folder = work.path / "bits"
    folder.mkdir(exist_ok=True)
    model = None
    scores = []
    for chunk, start, end in zip(chunks, starts[:-1], starts[1:], strict=True):
        saved = folder / f"{chunk.path.name}.npy"
        if not saved.exists():
            if model is None:
                model, tokenizer = load_for_inference(settings.ppl_model, settings.tokenizer)
                model.to(pick_device(device))
            numbers = np.flatnonzero(kept[start:end])
            bits = np.full(end - start, -np.inf, np.float32)
            bits[numbers] = bits_per_byte(
                model, tokenizer, [whole_text(orjson.loads(line)) for line in chunk.some_lines(numbers)]
            )
            save_array(saved, bits)
        scores.append(np.load(saved))
    scores = np.concatenate([np.empty(0, np.float32), *scores])
    lines = np.flatnonzero(kept)
    dropped = round(settings.drop_worst * len(lines))
    if dropped == len(lines):
        raise UserError(f"--drop_worst {settings.drop_worst:.0%} leaves no line")
    return np.sort(lines[np.argsort(-scores[lines], kind="stable")[:dropped]])


@torch.inference_mode()
def bits_per_byte(model, tokenizer, texts: Sequence[str]) -> np.ndarray:
    """The cross-entropy of each text's first `TOKENS` tokens, in bits per byte of what they spell, float32 (n,).

    Args:
        model: a MiniMindLM in eval mode.
        tokenizer: its tokenizer.
    """
    from model.chat import render_text
    from model.tokenizer import token_bytes

    pieces = token_bytes(tokenizer)
    rows = [ids[:TOKENS] for ids in render_text(tokenizer, texts)]
    device = next(model.parameters()).device
    bits = np.zeros(len(rows), np.float32)
    order = sorted(range(len(rows)), key=lambda number: len(rows[number]))
    begin = 0
    while begin < len(order):
        count = max(1, BATCH_TOKENS // TOKENS)
        batch = order[begin : begin + count]
        begin += count
        longest = len(rows[batch[-1]])
        ids = torch.zeros(len(batch), longest, dtype=torch.long)
        labels = torch.full((len(batch), longest), -100)
        for row, number in enumerate(batch):
            ids[row, : len(rows[number])] = labels[row, : len(rows[number])] = torch.tensor(rows[number])
        logits = model(ids.to(device)).logits[:, :-1].float()
        losses = torch.nn.functional.cross_entropy(
            logits.transpose(1, 2), labels[:, 1:].to(device), ignore_index=-100, reduction="none"
        )
        for number, nats in zip(batch, losses.sum(dim=1).tolist(), strict=True):
            spelled = sum(len(pieces[token]) for token in rows[number][1:-1] if token < len(pieces))
            bits[number] = nats / np.log(2) / max(1, spelled)
    return bits
