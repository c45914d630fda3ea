"""Loading a model for inference: the one way for everything that generates, scores, serves, evaluates or converts."""

import os
from pathlib import Path

from transformers import CLIPImageProcessorPil, PreTrainedTokenizerBase

from model import MiniMindLM
from model.inference.scheduler import Engine
from model.model_lora import merge_lora, remove_lora
from model.model_vlm import MiniMindVLM
from trainer.architecture import SIZES, untold_sizes
from trainer.device import DTYPES
from trainer.errors import UserError
from trainer.folder_layouts import check_config, require_folder
from trainer.inference_arguments import STAGES, VLM_STAGES
from trainer.vision import Vision, load_vlm, open_vision
from trainer.weights import (
    existing,
    find_adapter,
    find_weights,
    load_adapter,
    load_tokenizer,
    load_weights,
    read_settings,
)

COMPILE_FROM = 10_000_000  # parameters; the decode step of a smaller model is fast enough as it is


def load_for_inference(
    path: str | os.PathLike,
    tokenizer: str | os.PathLike | PreTrainedTokenizerBase | None = None,
    lora: str | os.PathLike | None = None,
    **sizes,
) -> tuple[MiniMindLM, PreTrainedTokenizerBase]:
    """A model for inference and its tokenizer; loaded strictly.

    Args:
        path: a file (.pth, .safetensors), or a `transformers` folder of type llama, qwen2_moe, qwen3, qwen3_moe or
            minimind, of generation 2 or 3. `find_weights` turns a flag's value such as "full_sft" into a path.
        tokenizer: a folder or a tokenizer; None: the one in the folder `path`, else the shipped one. It must be the one
            that the weights were trained with, as far as a json or the folder says.
        lora: the file of a LoRA adapter, to be merged into the weights.
        sizes: fields of LMConfig (dim, n_layers, n_heads, use_moe, …), for a downloaded file. They must agree with the
            json beside it and the shapes of its tensors; fields that neither gives default to MiniMind2's, or
            MiniMind-3's. MiniMind-3's own names (hidden_size, num_experts_per_tok, rope_theta, …) mean the same, and
            `inference_rope_scaling` is its YaRN.

    Returns:
        the model in eval mode, fp32, on the CPU (`.to(device)` moves it), without an adapter's layers; the tokenizer.

    Raises:
        UserError: something is missing, damaged, or does not fit the rest; in one line that names both sides.
        TypeError: LMConfig has no such field.
    """
    if unknown := sizes.keys() - SIZES:
        raise TypeError(f"load_for_inference: LMConfig has no {', '.join(sorted(unknown))}")
    path, tokenizer = _open(path, tokenizer)
    model = load_weights(path, sizes, tokenizer)
    if lora is not None:
        merge_adapter(Path(lora), model)
    return model.eval(), tokenizer


def merge_adapter(path: Path, model: MiniMindLM) -> None:
    """Add a LoRA adapter to the model's weights; its layers are not kept.

    Raises:
        UserError: as in `load_adapter`.
    """
    load_adapter(path, model)
    merge_lora(model)
    remove_lora(model)


def load_vlm_for_inference(
    path: str | os.PathLike,
    vision_model: str | os.PathLike,
    tokenizer: str | os.PathLike | PreTrainedTokenizerBase | None = None,
) -> tuple[MiniMindVLM, PreTrainedTokenizerBase, CLIPImageProcessorPil]:
    """The same for a vision-language model, with its image processor.

    Args:
        path: a file, or a folder that `MiniMindVLM.save_pretrained` wrote.
        vision_model: the folder of the CLIP whose vision tower it uses.
        tokenizer: as in `load_for_inference`.

    Returns:
        model and tokenizer as in `load_for_inference`, and the image processor.

    Raises:
        UserError: as in `load_for_inference`; the weights were trained with another tower.
    """
    return _load_vlm(open_vision(str(vision_model)), path, tokenizer)


def load_by_flags(args) -> tuple[MiniMindLM, PreTrainedTokenizerBase]:
    """Load the model that --model_mode, --load, --lora_name and the model flags name, by `load_for_inference`.

    --dim, --n_layers and --use_moe always have a value: it applies only if no json gives the model's sizes.
    """
    path, tokenizer = _find_by_flags(args, STAGES)
    sizes = untold_sizes(args)
    if path.is_file() and read_settings(path) is None:
        sizes |= {name: getattr(args, name) for name in ("dim", "n_layers", "use_moe")}
    return load_for_inference(path, tokenizer, find_adapter(args.lora_name, args), **sizes)


def open_engine(
    model: MiniMindLM, tokenizer: PreTrainedTokenizerBase, args, slots: int, compile_large: bool = False
) -> Engine:
    """An inference engine by the flags of `trainer.inference_arguments.add_engine_arguments`.

    Args:
        compile_large: without --compile, compile the decode step of models of `COMPILE_FROM` parameters or more.

    Raises:
        UserError: the model's or the draft model's matrices do not fit the precision; the draft model is missing,
            damaged, or has another tokenizer.
    """
    compile = args.compile
    if compile is None:
        compile = compile_large and sum(parameter.numel() for parameter in model.parameters()) >= COMPILE_FROM
    draft = None
    if args.draft is not None:
        draft, _ = load_for_inference(find_weights(args.draft, args), tokenizer)
        draft.to(model.device)
        ours, theirs = model.config.vocab_size, draft.config.vocab_size
        if ours != theirs:
            raise UserError(f"--draft {args.draft} has a vocabulary of {theirs} tokens, but the model has {ours}")
    try:
        return Engine(
            model,
            tokenizer,
            slots,
            dtype=DTYPES.get(args.dtype, args.dtype),
            deterministic=args.deterministic,
            compile=compile,
            speculate=args.speculate,
            draft=draft,
        )
    except ValueError as error:
        raise UserError(f"--dtype {args.dtype}: {error}") from error


def load_vlm_by_flags(args) -> tuple[MiniMindVLM, PreTrainedTokenizerBase, CLIPImageProcessorPil]:
    """Load the model that --model_mode, --load, --vision_model and the model flags name."""
    vision = open_vision(str(args.vision_model))
    return _load_vlm(vision, *_find_by_flags(args, VLM_STAGES))


def _load_vlm(
    vision: Vision, path: str | os.PathLike, tokenizer
) -> tuple[MiniMindVLM, PreTrainedTokenizerBase, CLIPImageProcessorPil]:
    path, tokenizer = _open(path, tokenizer)
    return load_vlm(path, None, tokenizer, vision).eval(), tokenizer, vision.processor


def _open(
    path: str | os.PathLike, tokenizer: str | os.PathLike | PreTrainedTokenizerBase | None
) -> tuple[Path, PreTrainedTokenizerBase]:
    """The path of weights that exist, and the tokenizer that belongs to them."""
    path = existing(Path(path))
    if path.is_dir():
        check_config(path)
        tokenizer = path if tokenizer is None else tokenizer
    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        tokenizer = load_tokenizer(tokenizer)
    return path, tokenizer


def _find_by_flags(args, stages: tuple[str, ...]) -> tuple[Path, PreTrainedTokenizerBase | None]:
    """The weights' path, and --tokenizer's tokenizer if given: it is loaded first, so that its errors come first."""
    tokenizer = load_tokenizer(args.tokenizer) if args.tokenizer else None
    if args.load == 1:
        return require_folder(Path(args.out_dir)), tokenizer
    return find_weights(stages[args.model_mode], args), tokenizer
