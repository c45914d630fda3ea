"""Weights and tokenizers on disk: their names, the json beside them, and strict loading."""

import contextlib
import json
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from model import LMConfig, MiniMindLM
from model.model_lora import LoRASettings, put_lora
from model.tokenizer import tokenizer_hash
from trainer.arguments import ROOT
from trainer.errors import UserError, note
from trainer.files import check_hash, load_tensors

SHIPPED_TOKENIZER = ROOT / "model" / "minimind_tokenizer"
SCRIPT_OF_STAGE = {
    "pretrain": "train_pretrain.py",
    "full_sft": "train_full_sft.py",
    "rlhf": "train_dpo.py",
    "full_dist": "train_distillation.py",
    "reason": "train_distill_reason.py",
    "pretrain_vlm": "train_pretrain_vlm.py",
    "sft_vlm": "train_sft_vlm.py",
    "sft_vlm_multi": "train_sft_vlm.py --multi",
}
OLD_BUFFERS = ("pos_cis", "mask")  # tables that old files carry; the model computes them
ARCHITECTURE = (
    *("dim", "n_layers", "n_heads", "n_kv_heads", "vocab_size", "hidden_dim", "norm_eps", "rope_theta", "use_moe"),
    *("num_experts_per_tok", "n_routed_experts", "n_shared_experts", "norm_topk_prob"),  # these of MoE only
)


def load_tokenizer(folder: str | os.PathLike | None = None) -> PreTrainedTokenizerBase:
    """The tokenizer in `folder`, or the shipped one.

    Raises:
        UserError: no tokenizer there, or a damaged one.
    """
    folder = Path(folder or SHIPPED_TOKENIZER)
    if not (folder / "tokenizer.json").is_file():
        raise UserError(f"--tokenizer {folder}: no tokenizer.json there; scripts/train_tokenizer.py makes one")
    try:
        return AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
    except Exception as error:  # JSON's, transformers' and Rust's, of any class
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"--tokenizer {folder} cannot be loaded ({reason}): restore or remake it") from error


def weights_name(stage: str, dim: int, use_moe: bool) -> str:
    """'full_sft', 640, True -> 'full_sft_640_moe'."""
    return f"{stage}_{dim}{'_moe' if use_moe else ''}"


def weights_path(args, stage: str) -> Path:
    """Where a stage's weights lie; `stage` may be the path of a .pth itself."""
    if stage.endswith(".pth"):
        return Path(stage)
    return Path(args.out_dir) / f"{weights_name(stage, args.dim, args.use_moe)}.pth"


def config_of(args, tokenizer: PreTrainedTokenizerBase) -> LMConfig:
    """The configuration that the model flags name.

    Raises:
        UserError: they do not fit together.
    """
    return config_from({name: getattr(args, name) for name in ("dim", "n_layers", "use_moe")}, tokenizer)


def config_from(sizes: dict, tokenizer: PreTrainedTokenizerBase) -> LMConfig:
    """The configuration with these sizes and the tokenizer's vocabulary.

    Raises:
        UserError: they do not fit together.
    """
    try:
        return LMConfig(**sizes | {"vocab_size": len(tokenizer)})
    except ValueError as error:
        raise UserError(str(error)) from None


def read_settings(path: Path) -> dict | None:
    """What the json beside the weights says; None where there is none (a downloaded file).

    Raises:
        UserError: it is damaged.
    """
    beside = path.with_suffix(".json")
    if not beside.is_file():
        return None
    with _reading(beside):
        settings = json.loads(beside.read_text(encoding="utf-8"))
        if not isinstance(settings["tokenizer"], str):
            raise TypeError("its tokenizer is no text")
        saved_config(settings)
    return settings


@contextlib.contextmanager
def _reading(beside: Path) -> Iterator[None]:
    """What goes wrong in here tells the user that the json is damaged."""
    try:
        yield
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise UserError(f"{beside} is damaged ({error!r:.200}): restore it, or delete it to go by the flags") from None


def saved_config(settings: dict) -> LMConfig:
    """The model that a json beside weights describes."""
    return LMConfig(**{k: v for k, v in settings["config"].items() if k in ARCHITECTURE or k == "max_seq_len"})


def architecture(config: LMConfig) -> dict:
    """The fields that decide parameters and maths; the experts' only where there are any."""
    names = [name for name in ARCHITECTURE if config.use_moe or ("expert" not in name and name != "norm_topk_prob")]
    return {name: getattr(config, name) for name in names}


def load_weights(
    path: Path,
    config: LMConfig | None,
    tokenizer: PreTrainedTokenizerBase,
    missing: tuple[str, ...] = (),
    build: Callable[[LMConfig], MiniMindLM] = MiniMindLM,
) -> MiniMindLM:
    """A model with the weights in `path`, loaded strictly.

    Args:
        config: what the flags ask for; None takes the json beside the weights, and for a downloaded file, which has
            none, the sizes its tensors tell (with the heads, experts per token and rope of MiniMind2).
        tokenizer: must be the one the weights were trained with, by the json.
        missing: prefixes of parameters that the file may lack.
        build: makes the model that the weights go into.

    Raises:
        UserError: missing, damaged, of another shape or another tokenizer; the message names both sides.
    """
    if not path.is_file():
        maker = SCRIPT_OF_STAGE.get(re.sub(r"_\d+(_moe)?$", "", path.stem))
        raise UserError(f"{path} is missing: " + (f"{maker} makes it" if maker else "check --out_dir and the flags"))
    asking = "the flags ask"
    settings = read_settings(path)
    if settings is None:
        note(f"{path} has no json beside it; assumed is the tokenizer {tokenizer.name_or_path}")
    else:
        saved = saved_config(settings)
        if config is None:
            config, asking = saved, "its json asks"
        if settings["tokenizer"] != tokenizer_hash(tokenizer):
            raise UserError(
                f"{path} was trained with tokenizer {settings['tokenizer']}, and {tokenizer.name_or_path} is "
                f"{tokenizer_hash(tokenizer)}: name the right folder with --tokenizer"
            )
        _compare(path, architecture(saved), "by its json", architecture(config), asking)
    state = read_state(path)
    if config is None:
        config = config_from(shape_of(state), tokenizer)
    _compare(path, shape_of(state), "by its tensors", architecture(config), asking)
    model = build(config)
    wanted = model.state_dict()
    lacking = [key for key in wanted if key not in state and not key.startswith(missing)]
    surplus = [key for key in state if key not in wanted]
    if lacking or surplus:
        raise UserError(f"{path} does not fit the model: it lacks {_few(lacking)} and has {_few(surplus)} too much")
    reshaped = [key for key in state if state[key].shape != wanted[key].shape]
    if reshaped:
        key = reshaped[0]
        raise UserError(f"{path} does not fit the model: {key} is {[*state[key].shape]}, not {[*wanted[key].shape]}")
    check_hash(path, path.with_suffix(".json"), settings or {})
    model.load_state_dict(state, strict=not missing)
    return model


def load_folder(
    folder: str | os.PathLike, kind: type[PreTrainedModel] = MiniMindLM, dtype: str | torch.dtype = "auto"
) -> PreTrainedModel:
    """A model from a folder that `save_pretrained` wrote, in the dtype it was saved in or another.

    Raises:
        UserError: no such folder, or another kind of model.
    """
    if not (Path(folder) / "config.json").is_file():
        raise UserError(f"{folder} holds no config.json: it is no folder that save_pretrained wrote")
    try:
        model = AutoModelForCausalLM.from_pretrained(str(folder), local_files_only=True, dtype=dtype)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise UserError(f"{folder} cannot be loaded: {' '.join(str(error).split())[:300]}") from error
    if not isinstance(model, kind):
        raise UserError(f"{folder} holds a {type(model).__name__}, not a {kind.__name__}")
    return model


def load_adapter(name: str, args, model: MiniMindLM) -> LoRASettings:
    """Give the model the LoRA adapter of a name, `out/lora/NAME_D.pth`; the name may be the path of a .pth itself.

    Raises:
        UserError: missing, damaged, or made for another base; the message names both sides.
    """
    path = weights_path(args, name if name.endswith(".pth") else f"lora/{name}")
    if not path.is_file():
        there = sorted(file.name for file in path.parent.glob("*.pth"))
        raise UserError(
            f"{path} is missing: train_lora.py --lora_name NAME makes it"
            + (f"; there are {', '.join(there)}" if there else "")
        )
    state, about, beside = read_state(path), {}, path.with_suffix(".json")
    if beside.is_file():
        with _reading(beside):
            about = dict(json.loads(beside.read_text(encoding="utf-8")))
            if not about.get("alpha", 1) > 0:
                raise ValueError("its alpha is not above 0")
    check_hash(path, beside, about)
    try:
        return put_lora(model, state, about)
    except ValueError as error:
        raise UserError(f"{path}: {error}") from None


def read_state(path: Path) -> dict[str, Tensor]:
    """The parameters in a file, fp32, without the tables that old files carry.

    Raises:
        UserError: damaged, or no plain state dict.
    """
    state = load_tensors(path)
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise UserError(f"{path} is no plain state dict of tensors")
    return {key: value.float() for key, value in state.items() if key.split(".")[-1] not in OLD_BUFFERS}


def _compare(path: Path, ours: dict, by: str, theirs: dict, asking: str) -> None:
    different = [name for name in ours if name in theirs and ours[name] != theirs[name]]
    if different:
        has = ", ".join(f"{name} {ours[name]}" for name in different)
        asked = ", ".join(f"{name} {theirs[name]}" for name in different)
        raise UserError(f"{path} has {has} {by}, but {asking} for {asked}")


def _few(keys: list[str]) -> str:
    return "nothing" if not keys else ", ".join(keys[:3]) + (f" and {len(keys) - 3} more" if len(keys) > 3 else "")


def shape_of(state: dict[str, Tensor]) -> dict:
    """What the tensors of a state dict tell of the architecture, as keyword arguments of LMConfig."""
    layers = {key.split(".")[1] for key in state if key.startswith("layers.")}
    experts = {key.split(".")[4] for key in state if ".feed_forward.experts." in key}
    shape = {"n_layers": len(layers), "use_moe": bool(experts)}
    if experts:
        shape["n_routed_experts"] = len(experts)
        shape["n_shared_experts"] = any(".shared_experts." in key for key in state)
    embedding = state.get("tok_embeddings.weight")
    if embedding is not None and embedding.dim() == 2:
        shape |= {"vocab_size": embedding.size(0), "dim": embedding.size(1)}
    w1 = next((value for key, value in state.items() if key.endswith(".w1.weight")), None)
    if w1 is not None:
        shape["hidden_dim"] = w1.size(0)
    return shape
