"""The frozen model that a student learns from: loading it, checking that it uses the same tokens, running it."""

import json
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase

from model import MiniMindLM
from model.kv_cache import build_attention_mask
from model.tokenizer import tokenizer_hash
from trainer.errors import UserError
from trainer.folder_layouts import require_folder
from trainer.weights import load_weights, read_tokenizer


def load_teacher(path: Path, tokenizer: PreTrainedTokenizerBase, max_seq_len: int) -> nn.Module:
    """The model that --teacher_weight names, frozen, fp32, in eval mode.

    Args:
        path: a file with a MiniMind's weights, or a `transformers` folder of any architecture; see `find_weights`.

    Raises:
        UserError: it is missing, unreadable, has other tokens than the student, or a context below `max_seq_len`.
    """
    teacher = _from_folder(path, tokenizer) if path.is_dir() else load_weights(path, None, tokenizer)
    longest = getattr(teacher.config, "max_position_embeddings", None)  # None: no limit that it tells of
    if longest is not None and longest < max_seq_len:
        raise UserError(f"--teacher_weight {path} has a context of {longest} tokens: lower --max_seq_len {max_seq_len}")
    return teacher.requires_grad_(False).eval()


def _from_folder(folder: Path, tokenizer: PreTrainedTokenizerBase) -> nn.Module:
    if not (folder / "tokenizer.json").is_file():
        raise UserError(f"--teacher_weight {folder}: no tokenizer.json there: save the teacher's tokenizer beside it")
    difference = first_difference(tokenizer, read_tokenizer(folder))
    if difference:
        raise UserError(f"--teacher_weight {folder} has a different tokenizer from the student: {difference}")
    try:
        teacher, report = AutoModelForCausalLM.from_pretrained(
            str(require_folder(folder)), local_files_only=True, dtype=torch.float32, output_loading_info=True
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise UserError(f"{folder} cannot be loaded: {' '.join(str(error).split())[:300]}") from error
    if lacking := sorted(report["missing_keys"]):  # which transformers fills with random numbers
        raise UserError(f"{folder} lacks {', '.join(lacking[:3])} that its config.json describes")
    columns = teacher.get_output_embeddings().weight.size(0)
    if columns < len(tokenizer):
        raise UserError(
            f"--teacher_weight {folder} has {columns} embeddings, but the tokenizer has {len(tokenizer)} tokens"
        )
    return teacher


def first_difference(ours: PreTrainedTokenizerBase, theirs: PreTrainedTokenizerBase) -> str | None:
    """The first difference between two tokenizers, in words; None if every text gets the same ids from both."""
    if tokenizer_hash(ours) == tokenizer_hash(theirs):
        return None
    for token_id in range(max(len(ours), len(theirs))):
        left, right = ours.convert_ids_to_tokens(token_id), theirs.convert_ids_to_tokens(token_id)
        if left != right:
            return f"id {token_id} is {left!r} for the student and {right!r} for the teacher"
    left, right = (json.loads(tokenizer.backend_tokenizer.to_str()) for tokenizer in (ours, theirs))
    # not strict: up to the end of the shorter list; different lengths are reported below
    for i, (a, b) in enumerate(zip(left["model"].get("merges", []), right["model"].get("merges", []), strict=False)):
        if a != b:
            return f"merge {i} joins {a} for the student and {b} for the teacher"
    part = next(part for part in ("added_tokens", "normalizer", "pre_tokenizer", "model") if left[part] != right[part])
    return f"their {part.replace('_', ' ')} differ"


@torch.no_grad()
def teacher_logits(teacher: nn.Module, batch: dict[str, Tensor], kept: Tensor, vocab_size: int) -> Tensor:
    """The teacher's logits at some positions of a batch; samples packed into a row do not see each other.

    Args:
        batch: input_ids, position_ids and attention_mask, each (rows, n).
        kept: bool (rows, n), True at these positions.
        vocab_size: further columns, with which some models pad their matrices, are cut off.

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
