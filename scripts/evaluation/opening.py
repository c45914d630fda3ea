"""Which models are asked: our weights by our own reading, any other `transformers` folder by the harness's."""

from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from lm_eval.api.model import TemplateLM
from lm_eval.models.huggingface import HFLM

import eval_model
from model import MiniMindLM
from model.fingerprint import hash_weights
from model.model_lora import merge_lora
from model.model_vlm import MiniMindVLM, VLMConfig
from model.tokenizer import tokenizer_hash
from scripts.evaluation.harness_model import MiniMindHarness
from scripts.formats.transformers_folder import read_folder
from trainer import weights
from trainer.device import pick_device
from trainer.errors import UserError, print_notice
from trainer.weight_files import read_weights


def open_models(args) -> Iterator[tuple[str, Callable[[], TemplateLM]]]:
    """(name, what opens it) of each model that the command line names: --weights, or eval_model.py's flags.

    Raises:
        UserError: when opened: missing, damaged, or no model.
    """
    device = pick_device(args.device)
    if not args.weights:
        stage = f"{weights.weights_name(eval_model.STAGES[args.model_mode], args.dim, args.use_moe)}"
        name = args.out_dir if args.load == 1 else stage
        name = name if args.lora_name in (None, "None") else f"{name}+{args.lora_name}"
        yield name, lambda: MiniMindHarness(*eval_model.load_model(args), args.batch_size)
    for path in args.weights:
        yield path, lambda path=Path(path): _open(path, args, device)


def _open(path: Path, args, device: torch.device) -> TemplateLM:
    if path.is_dir():
        try:
            model, tokenizer = read_folder(path, args.tokenizer)
        except UserError as reason:
            return _open_other(path, args, device, reason)
    else:
        model, tokenizer = _load(path, args.tokenizer)
    if args.lora_name not in (None, "None"):
        weights.load_adapter(args.lora_name, args, model)
        merge_lora(model)
    return MiniMindHarness(model.to(device).eval(), tokenizer, args.batch_size)


def _load(path: Path, tokenizer_folder: str | None) -> tuple[MiniMindLM, object]:
    """The model in a file of weights; of a vision-language model the language half is asked."""
    tokenizer = weights.load_tokenizer(tokenizer_folder)
    path = weights.existing(path, by_flags=False)
    projection = read_weights(path).state.get("vision_proj.vision_proj.0.weight")

    def with_projection(config) -> MiniMindVLM:
        fields = weights.architecture(config) | {"max_seq_len": config.max_seq_len}
        return MiniMindVLM(VLMConfig(**fields, vision_dim=projection.size(1)))

    build = MiniMindLM if projection is None else with_projection
    return weights.load_weights(path, None, tokenizer, build=build), tokenizer


def _open_other(path: Path, args, device: torch.device, reason: UserError) -> HFLM:
    """Any causal language model that `transformers` reads, in fp32.

    Args:
        reason: why it is no MiniMind.
    """
    if not (path / "config.json").is_file():
        raise UserError(f"{path} holds no config.json: it is not a folder of a transformers model")
    try:
        lm = HFLM(str(path), device=str(device), dtype="float32", batch_size=args.batch_size, tokenizer=args.tokenizer)
    except Exception as error:  # transformers' and the harness's, of any class
        raise UserError(
            f"{path}: {reason}; nor does transformers read it: {' '.join(str(error).split())[:160]}"
        ) from None
    print_notice(f"{path} is asked through transformers, as it is no MiniMind ({reason})")
    return lm


def fingerprint(lm: TemplateLM) -> str:
    """Tells a model's weights and tokenizer from others'."""
    return f"{hash_weights(lm.model.state_dict())}-{tokenizer_hash(lm.tokenizer)}"
