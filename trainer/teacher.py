"""The frozen model a student learns from: loading it, making sure it reads the same tokens, and asking it."""

import json
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from model import MiniMindLM
from model.kv_cache import build_attention_mask
from model.tokenizer import tokenizer_hash
from trainer.errors import UserError
from trainer.weight_files import is_file_name
from trainer.weights import existing, load_folder, load_weights, read_tokenizer


def load_teacher(name: str, out_dir: str, tokenizer: PreTrainedTokenizerBase, max_seq_len: int) -> nn.Module:
    """The model that --teacher_weight names, frozen, fp32, in eval mode.

    Args:
        name: the weights' name in `out_dir` ("full_sft_768"), the path of a .pth, or a `transformers` folder.

    Raises:
        UserError: it is missing, cannot be read, reads other tokens than the student, or fewer than `max_seq_len`.
    """
    if Path(name).is_dir():
        teacher = _from_folder(Path(name), tokenizer)
    else:
        path = Path(name) if is_file_name(name) else Path(out_dir) / f"{name}.pth"
        teacher = load_weights(existing(path, by_flags=False), None, tokenizer)
    longest = getattr(teacher.config, "max_position_embeddings", None)  # None: no limit that it tells of
    if longest is not None and longest < max_seq_len:
        raise UserError(f"--teacher_weight {name} reads at most {longest} tokens: lower --max_seq_len {max_seq_len}")
    return teacher.requires_grad_(False).eval()


def _from_folder(folder: Path, tokenizer: PreTrainedTokenizerBase) -> nn.Module:
    if not (folder / "tokenizer.json").is_file():
        raise UserError(f"--teacher_weight {folder}: no tokenizer.json there: save the teacher's tokenizer beside it")
    difference = first_difference(tokenizer, read_tokenizer(folder))
    if difference:
        raise UserError(f"--teacher_weight {folder} reads other tokens than the student: {difference}")
    teacher = load_folder(folder, PreTrainedModel, torch.float32)
    columns = teacher.get_output_embeddings().weight.size(0)
    if columns < len(tokenizer):
        raise UserError(f"--teacher_weight {folder} knows {columns} tokens, and the tokenizer has {len(tokenizer)}")
    return teacher


def first_difference(ours: PreTrainedTokenizerBase, theirs: PreTrainedTokenizerBase) -> str | None:
    """The first thing in which two tokenizers differ, in words; None when every text gets the same ids from both."""
    if tokenizer_hash(ours) == tokenizer_hash(theirs):
        return None
    for token_id in range(max(len(ours), len(theirs))):
        left, right = ours.convert_ids_to_tokens(token_id), theirs.convert_ids_to_tokens(token_id)
        if left != right:
            return f"id {token_id} is {left!r} for the student and {right!r} for the teacher"
    left, right = (json.loads(tokenizer.backend_tokenizer.to_str()) for tokenizer in (ours, theirs))
    # as far as the shorter list goes, hence not strict: that one is longer is told below
    for i, (a, b) in enumerate(zip(left["model"].get("merges", []), right["model"].get("merges", []), strict=False)):
        if a != b:
            return f"merge {i} joins {a} for the student and {b} for the teacher"
    part = next(part for part in ("added_tokens", "normalizer", "pre_tokenizer", "model") if left[part] != right[part])
    return f"their {part.replace('_', ' ')} differ"


@torch.no_grad()
def teacher_logits(teacher: nn.Module, batch: dict[str, Tensor], kept: Tensor, vocab_size: int) -> Tensor:
    """What the teacher predicts at some positions of a batch; samples packed in a row stay apart.

    Args:
        batch: input_ids, position_ids and attention_mask, each (rows, n).
        kept: bool (rows, n), True at the positions wanted.
        vocab_size: columns beyond it, with which some models fill up their matrices, are cut off.

    Returns:
        (positions, vocab_size).
    """
    if isinstance(teacher, MiniMindLM):
        return teacher(**batch, logits_to_keep=kept).logits[:, :vocab_size]
    # other models do not take a position of 0 for the start of a new sample: say what each token may see
    real, positions = batch["attention_mask"].bool(), batch["position_ids"]
    visible = build_attention_mask(real * ((positions == 0) & real).cumsum(1), real.size(1))
    mask = torch.zeros(visible.shape, device=visible.device).masked_fill(~visible, float("-inf"))
    out = teacher(batch["input_ids"], attention_mask=mask, position_ids=positions, use_cache=False)
    return out.logits[kept][:, :vocab_size]
