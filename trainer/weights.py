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
from model.model_lora import LoRASettings, attach_lora, is_lora
from model.tokenizer import special_ids, tokenizer_hash
from model.tokenizer_check import check_tokenizer
from trainer.arguments import ROOT
from trainer.errors import UserError, print_notice
from trainer.files import check_hash
from trainer.weight_files import is_file_name, read_weights

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
ARCHITECTURE = (
    *("dim", "n_layers", "n_heads", "n_kv_heads", "vocab_size", "hidden_dim", "norm_eps", "rope_theta", "use_moe"),
    *("num_experts_per_tok", "n_routed_experts", "n_shared_experts", "norm_topk_prob"),  # these of MoE only
)
DELIMITERS = ("bos_token_id", "eos_token_id")  # that begin and end a text, as the tokenizer has them
NEWER_BOS = "<|im_start|>"  # of the tokenizer that goes with MiniMind's names of April 2025


def load_tokenizer(folder: str | os.PathLike | None = None) -> PreTrainedTokenizerBase:
    """The tokenizer in `folder`, or the shipped one; a MiniMind can be trained with it.

    Raises:
        UserError: no tokenizer there, a damaged one, or one that `check_tokenizer` refuses.
    """
    tokenizer = read_tokenizer(folder or SHIPPED_TOKENIZER)
    try:
        check_tokenizer(tokenizer)
    except ValueError as error:
        raise UserError(f"--tokenizer {tokenizer.name_or_path}: {error}") from None
    if tokenizer.pad_token is None:  # what fills a row is known by its place, and no id is spent on it
        tokenizer.pad_token = tokenizer.convert_ids_to_tokens(special_ids(tokenizer)["pad_token_id"])
    return tokenizer


def read_tokenizer(folder: str | os.PathLike) -> PreTrainedTokenizerBase:
    """The tokenizer in `folder`, whichever kind it is.

    Raises:
        UserError: no tokenizer there, or a damaged one.
    """
    folder = Path(folder)
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
    """Where a stage's weights lie; `stage` may be the path of a file itself."""
    if is_file_name(stage):
        return Path(stage)
    return Path(args.out_dir) / f"{weights_name(stage, args.dim, args.use_moe)}.pth"


def build_config(args, tokenizer: PreTrainedTokenizerBase) -> LMConfig:
    """The configuration that the model flags name.

    Raises:
        UserError: they do not fit together.
    """
    return config_from_sizes({name: getattr(args, name) for name in ("dim", "n_layers", "use_moe")}, tokenizer)


def config_from_sizes(sizes: dict, tokenizer: PreTrainedTokenizerBase) -> LMConfig:
    """The configuration with these sizes and the tokenizer's vocabulary and special ids.

    Raises:
        UserError: they do not fit together.
    """
    try:
        return LMConfig(**sizes | {"vocab_size": len(tokenizer)} | special_ids(tokenizer))
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
            raise TypeError("its tokenizer is not text")
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
    known = (*ARCHITECTURE, *DELIMITERS, "max_seq_len")
    return LMConfig(**{name: value for name, value in settings["config"].items() if name in known})


def architecture(config: LMConfig) -> dict:
    """The fields that decide parameters and maths (the experts' only where there are any), and what ends a text."""
    names = [name for name in ARCHITECTURE if config.use_moe or ("expert" not in name and name != "norm_topk_prob")]
    return {name: getattr(config, name) for name in (*names, *DELIMITERS)}


def existing(path: Path, by_flags: bool = True, adapter: bool = False) -> Path:
    """The path of weights, or where only that is there, of the .safetensors by the same name.

    Args:
        by_flags: the path was made of --dim and --use_moe, and not given by the user.
        adapter: it is a LoRA adapter's.

    Raises:
        UserError: neither is there; the message says what is.
    """
    if path.is_file():
        return path
    if (other := path.with_suffix(".safetensors")).is_file():
        return other
    any_size = re.compile(r"(?P<stage>.+?)_(?P<dim>\d+)(?P<moe>_moe)?")
    asked = any_size.fullmatch(path.stem)
    stage = asked["stage"] if asked else path.stem
    maker = "train_lora.py --lora_name NAME" if adapter else SCRIPT_OF_STAGE.get(stage)
    found = []
    for file in sorted(path.parent.glob("*")):
        size = any_size.fullmatch(file.stem)
        if size and is_file_name(file.name) and (adapter or size["stage"] == stage):
            flags = f" (--dim {size['dim']}{' --use_moe' if size['moe'] else ''})" if by_flags else ""
            found.append(f"{file}{flags}")
    advice = f"{maker} makes it" if maker else "check --out_dir and the flags"
    there = f"; there is {', '.join(found)}" if found else ""
    raise UserError(f"{path} is missing: {advice}{there}")


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
    path = existing(path)
    asking = "the flags ask"
    settings = read_settings(path)
    if settings is not None:
        _compare_tokenizer(path, settings, tokenizer)
        saved = saved_config(settings)
        saved.update(special_ids(tokenizer))  # an older json has none
        if config is None:
            config, asking = saved, "its json asks"
        _compare(path, architecture(saved), "by its json", architecture(config), asking)
    state, done, newer = read_weights(path, *((config.n_heads, config.n_kv_heads) if config else ()))
    if done:
        print_notice(f"{path}: {done}")
    if settings is None:
        assumed = f"{path} has no json beside it; assumed is the tokenizer {tokenizer.name_or_path}"
        warning = f", and MiniMind's of April 2025 began a turn with {NEWER_BOS}: name its folder with --tokenizer"
        print_notice(assumed + (warning if newer and tokenizer.bos_token != NEWER_BOS else ""))
    if adapter := next(filter(is_lora, state), None):
        raise UserError(f"{path} is a LoRA adapter (it has {adapter}): name its base here, and it with --lora_name")
    if config is None:
        config = config_from_sizes(infer_sizes(state), tokenizer)
    _compare(path, infer_sizes(state), "by its tensors", architecture(config), asking)
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
        UserError: no such folder, one that lacks a parameter, or another kind of model.
    """
    if not (Path(folder) / "config.json").is_file():
        raise UserError(f"{folder} holds no config.json: it is not a folder that save_pretrained wrote")
    try:
        model, report = AutoModelForCausalLM.from_pretrained(
            str(folder), local_files_only=True, dtype=dtype, output_loading_info=True
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise UserError(f"{folder} cannot be loaded: {' '.join(str(error).split())[:300]}") from error
    if not isinstance(model, kind):
        raise UserError(f"{folder} holds a {type(model).__name__}, not a {kind.__name__}")
    if report["missing_keys"]:  # which transformers fills with random numbers
        raise UserError(f"{folder} lacks {_few(sorted(report['missing_keys']))} of what its config.json describes")
    return model


def load_adapter(name: str, args, model: MiniMindLM) -> LoRASettings:
    """Give the model the LoRA adapter of a name, `out/lora/NAME_D.pth`; the name may be the path of a .pth itself.

    Raises:
        UserError: missing, damaged, or made for another base; the message names both sides.
    """
    by_file = is_file_name(name)
    path = existing(weights_path(args, name if by_file else f"lora/{name}"), not by_file, adapter=True)
    state = read_weights(path, model.config.n_heads, model.config.n_kv_heads).state
    about, beside = {}, path.with_suffix(".json")
    if beside.is_file():
        with _reading(beside):
            about = dict(json.loads(beside.read_text(encoding="utf-8")))
            if not about.get("alpha", 1) > 0:
                raise ValueError("its alpha is not above 0")
    check_hash(path, beside, about)
    try:
        return attach_lora(model, state, about)
    except ValueError as error:
        raise UserError(f"{path}: {error}") from None


def _compare_tokenizer(path: Path, settings: dict, tokenizer: PreTrainedTokenizerBase) -> None:
    named = f"{path} was trained with"
    if settings["tokenizer"] != tokenizer_hash(tokenizer):
        raise UserError(
            f"{named} tokenizer {settings['tokenizer']}, and {tokenizer.name_or_path} is {tokenizer_hash(tokenizer)}: "
            "name the right folder with --tokenizer"
        )
    for name, ours in special_ids(tokenizer).items():
        theirs = settings["config"].get(name, ours)
        if name in DELIMITERS and theirs != ours:
            raise UserError(f"{named} {name} {theirs}, and {tokenizer.name_or_path} has {ours}: mend its settings")


def _compare(path: Path, ours: dict, by: str, theirs: dict, asking: str) -> None:
    different = [name for name in ours if name in theirs and ours[name] != theirs[name]]
    if different:
        has = ", ".join(f"{name} {ours[name]}" for name in different)
        asked = ", ".join(f"{name} {theirs[name]}" for name in different)
        flags = [f"--{name} {ours[name]}" for name in different if name in ("dim", "n_layers")]
        flags += ["--use_moe" if ours["use_moe"] else "--no-use_moe"] if "use_moe" in different else []
        hint = f": give {' '.join(flags)}" if flags and asking == "the flags ask" else ""
        raise UserError(f"{path} has {has} {by}, but {asking} for {asked}{hint}")


def _few(keys: list[str]) -> str:
    return "nothing" if not keys else ", ".join(keys[:3]) + (f" and {len(keys) - 3} more" if len(keys) > 3 else "")


def infer_sizes(state: dict[str, Tensor]) -> dict:
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
