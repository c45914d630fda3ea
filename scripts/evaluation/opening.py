"""Opening the models to evaluate: our weights by our own loader, other `transformers` folders by the harness's."""

from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from lm_eval.api.model import TemplateLM
from lm_eval.models.huggingface import HFLM
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from model import MiniMindLM
from model.fingerprint import hash_weights
from model.model_vlm import MiniMindVLM, VLMConfig
from model.tokenizer import tokenizer_hash
from scripts.evaluation.harness_model import MiniMindHarness
from trainer.architecture import untold_sizes
from trainer.device import pick_device
from trainer.errors import UserError, print_notice
from trainer.folder_layouts import check_config
from trainer.inference_arguments import STAGES
from trainer.loading import load_by_flags, load_for_inference, merge_adapter
from trainer.weight_files import read_weights
from trainer.weights import (
    architecture,
    existing,
    find_adapter,
    load_tokenizer,
    load_weights,
    weights_name,
)

PROJECTION = "vision_proj.vision_proj.0.weight"  # what a vision-language model has and no other


def open_models(args) -> Iterator[tuple[str, Callable[[], TemplateLM]]]:
    """(name, function that opens it) for each model of the command line: --weights, or eval_model.py's flags.

    Raises:
        UserError: when opened: missing, damaged, or not a model.
    """
    device = pick_device(args.device)
    if not args.weights:
        name = args.out_dir if args.load == 1 else weights_name(STAGES[args.model_mode], args.dim, args.use_moe)
        name = name if args.lora_name in (None, "None") else f"{name}+{args.lora_name}"
        yield name, lambda: _harness(*load_by_flags(args), args, device)
    for path in args.weights:
        yield path, lambda path=Path(path): _open(path, args, device)


def _harness(model: MiniMindLM, tokenizer: PreTrainedTokenizerBase, args, device: torch.device) -> MiniMindHarness:
    return MiniMindHarness(model.to(device), tokenizer, args.batch_size)


def _open(path: Path, args, device: torch.device) -> TemplateLM:
    path = path if path.is_dir() else existing(path)
    adapter = find_adapter(args.lora_name, args)
    if path.is_dir():
        try:
            check_config(path)
        except UserError as reason:
            return _open_other(path, args, device, reason)
    elif PROJECTION in (state := read_weights(path).state):
        return _harness(*_language_half(path, state[PROJECTION], args.tokenizer, adapter), args, device)
    return _harness(*load_for_inference(path, args.tokenizer, adapter, **untold_sizes(args)), args, device)


def _language_half(
    path: Path, projection: Tensor, tokenizer_folder: str | None, adapter: Path | None
) -> tuple[MiniMindLM, PreTrainedTokenizerBase]:
    """The language model of a vision-language model: without images it needs no vision tower.

    Args:
        projection: the weight of the projection (dim, vision_dim), which gives the tower's width.
    """
    tokenizer = load_tokenizer(tokenizer_folder)

    def build(config) -> MiniMindVLM:
        fields = architecture(config) | {"max_seq_len": config.max_seq_len}
        return MiniMindVLM(VLMConfig(**fields, vision_dim=projection.size(1)))

    model = load_weights(path, None, tokenizer, build=build)
    if adapter is not None:
        merge_adapter(adapter, model)
    return model.eval(), tokenizer


def _open_other(path: Path, args, device: torch.device, reason: UserError) -> HFLM:
    """Any causal language model that `transformers` reads, in fp32.

    Args:
        reason: why it is not a MiniMind.
    """
    if not (path / "config.json").is_file():
        raise UserError(f"{path} has no config.json: it is not a transformers model folder")
    try:
        lm = HFLM(str(path), device=str(device), dtype="float32", batch_size=args.batch_size, tokenizer=args.tokenizer)
    except Exception as error:  # transformers' and the harness's, of any class
        raise UserError(
            f"{path}: {reason}; nor can transformers load it: {' '.join(str(error).split())[:160]}"
        ) from None
    print_notice(f"{path} is evaluated with transformers, because it is not a MiniMind ({reason})")
    return lm


def fingerprint(lm: TemplateLM) -> str:
    """Identifies a model's weights and tokenizer."""
    return f"{hash_weights(lm.model.state_dict())}-{tokenizer_hash(lm.tokenizer)}"
