"""Weights and tokenizers on disk: their names, the json beside them, and strict loading."""

import contextlib
import json
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path

from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from model import LMConfig, MiniMindLM, build_model
from model.minimind3 import our_fields
from model.model_lora import LoRASettings, attach_lora, is_lora
from model.rope_scaling import MINIMIND3_YARN
from model.tokenizer import special_ids, tokenizer_hash
from model.tokenizer_check import check_tokenizer
from trainer.architecture import (
    DELIMITERS,
    architecture,
    changed_config,
    config_from_sizes,
    infer_sizes,
    saved_config,
    untold_sizes,
)
from trainer.arguments import ROOT
from trainer.errors import UserError, print_notice
from trainer.files import check_hash, require_utf8
from trainer.folder_layouts import read_folder, require_folder
from trainer.variant_arguments import FIELDS
from trainer.weight_files import is_file_name, read_weights

SHIPPED_TOKENIZER = ROOT / "model" / "minimind_tokenizer"
SCRIPT_OF_STAGE = {
    "pretrain": "train_pretrain.py",
    "full_sft": "train_full_sft.py",
    "rlhf": "train_dpo.py",
    "full_dist": "train_distillation.py",
    "reason": "train_distill_reason.py",
    "grpo": "train_grpo.py",
    "ppo": "train_ppo.py",
    "reward": "train_reward.py",
    "pretrain_vlm": "train_pretrain_vlm.py",
    "sft_vlm": "train_sft_vlm.py",
    "sft_vlm_multi": "train_sft_vlm.py --multi",
}
SIZE_IN_NAME = re.compile(r"(?P<stage>.+?)_(?P<dim>\d+)(?P<moe>_moe)?")  # of a file's stem: full_sft_640_moe
NEWER_BOS = "<|im_start|>"  # of the tokenizer that goes with MiniMind's names of April 2025


def load_tokenizer(folder: str | os.PathLike | None = None) -> PreTrainedTokenizerBase:
    """The tokenizer in `folder`, or the shipped one, checked for use with a MiniMind.

    Raises:
        UserError: there is no tokenizer, it is damaged, or `check_tokenizer` refuses it.
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
    """The tokenizer in `folder`, of any kind.

    Raises:
        UserError: there is no tokenizer, or it is damaged; the path is not UTF-8.
    """
    folder = Path(folder)
    require_utf8(folder, "--tokenizer")
    if not (folder / "tokenizer.json").is_file():
        raise UserError(f"--tokenizer {folder}: no tokenizer.json there; train one with scripts/train_tokenizer.py")
    try:
        return AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
    except Exception as error:  # JSON's, transformers' and Rust's, of any class
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"--tokenizer {folder} cannot be loaded ({reason}): restore it or train it again") from error


def weights_name(stage: str, dim: int, use_moe: bool) -> str:
    """'full_sft', 640, True -> 'full_sft_640_moe'."""
    return f"{stage}_{dim}{'_moe' if use_moe else ''}"


def weights_path(args, stage: str) -> Path:
    """The path of a stage's weights of the flags' size."""
    return Path(args.out_dir) / f"{weights_name(stage, args.dim, args.use_moe)}.pth"


def find_weights(name: str, args) -> Path:
    """The file or folder that a WEIGHTS flag names (--from_weight, --teacher_weight, …).

    Args:
        name: a stage ("full_sft"), with the size of --dim and --use_moe; the whole name of weights in --out_dir
            ("full_sft_768"); or the path of a .pth, a .safetensors, or a `transformers` folder. For a plain word,
            weights in --out_dir take precedence over a folder in the working directory.

    Raises:
        UserError: there are no such weights; the message lists those that exist.
    """
    path = Path(name)
    if is_file_name(name) or (path.is_dir() and os.path.dirname(name)):
        return existing(path)
    by_stage, by_name = weights_path(args, name), Path(args.out_dir) / f"{name}.pth"
    if found := _present(by_stage) or _present(by_name):
        return found
    if (path / "config.json").is_file():  # any other folder that has a stage's name is the user's own
        return path
    return existing(by_name) if SIZE_IN_NAME.fullmatch(name) else existing(by_stage, by_flags=True)


def find_adapter(name: str | None, args) -> Path | None:
    """The LoRA adapter that --lora_name names: `out/lora/NAME_D.pth`, or the path of a .pth itself.

    Returns:
        None if none is named, for which old commands pass the word "None".

    Raises:
        UserError: it does not exist; the message lists those that do.
    """
    if name in (None, "None"):
        return None
    if is_file_name(name):
        return existing(Path(name), adapter=True)
    return existing(weights_path(args, f"lora/{name}"), by_flags=True, adapter=True)


def _present(path: Path) -> Path | None:
    """The file of weights, or the .safetensors of the same name if only that exists."""
    return next(filter(Path.is_file, (path, path.with_suffix(".safetensors"))), None)


def existing(path: Path, by_flags: bool = False, adapter: bool = False) -> Path:
    """The path of existing weights, or the .safetensors of the same name if only that exists; or a folder's.

    Args:
        by_flags: the path was derived from --dim and --use_moe, not given by the user.
        adapter: it is a LoRA adapter's.

    Raises:
        UserError: there are no weights, and the message lists those that exist; or the folder is not a model's.
    """
    if path.is_dir() and not adapter:
        return require_folder(path)
    if found := _present(path):
        return found
    asked = SIZE_IN_NAME.fullmatch(path.stem)
    stage = asked["stage"] if asked else path.stem
    maker = "train_lora.py --lora_name NAME" if adapter else SCRIPT_OF_STAGE.get(stage)
    found = []
    for file in sorted(path.parent.glob("*")):
        size = SIZE_IN_NAME.fullmatch(file.stem)
        if size and is_file_name(file.name) and (adapter or size["stage"] == stage):
            flags = f" (--dim {size['dim']}{' --use_moe' if size['moe'] else ''})" if by_flags else ""
            found.append(f"{file}{flags}")
    advice = f"run {maker}" if maker else "check --out_dir and the flags"
    there = f"; there is {', '.join(found)}" if found else ""
    raise UserError(f"{path} is missing: {advice}{there}")


def build_config(args, tokenizer: PreTrainedTokenizerBase) -> LMConfig:
    """The configuration that a training stage's flags name.

    Raises:
        UserError: they do not fit together.
    """
    sizes = {name: getattr(args, name) for name in ("dim", "n_layers", "use_moe", "generation") if hasattr(args, name)}
    sizes |= untold_sizes(args) | _variant(args)
    return config_from_sizes(sizes | {"trained_seq_len": getattr(args, "max_seq_len", None)}, tokenizer)


def _variant(args) -> dict:
    """The fields of a variant, from the json of the weights that a stage starts from, and from the flags."""
    name, found = getattr(args, "from_weight", "none"), {}
    if name != "none":
        with contextlib.suppress(UserError):  # it is reported when they are loaded
            path = find_weights(name, args)
            said = (read_settings(path) or {}).get("config", {}) if path.is_file() else {}
            if all(said.get(size) == getattr(args, size) for size in ("dim", "use_moe")):
                found = {name: said[name] for name in FIELDS if name in said}
    found |= {name: value for name in FIELDS if (value := getattr(args, name, None)) is not None}
    if (shared := getattr(args, "n_shared_experts", None)) is not None:  # one so many times as wide
        found |= {"n_shared_experts": shared > 0, "shared_width": max(1, shared)}
    return found


def read_settings(path: Path) -> dict | None:
    """The json beside the weights; None if there is none (a downloaded file).

    Raises:
        UserError: it is damaged.
    """
    beside = path.with_suffix(".json")
    if not beside.is_file():
        return None
    with _reading(beside):
        settings = json.loads(beside.read_text(encoding="utf-8"))
        if not isinstance(settings["tokenizer"], str):
            raise TypeError("its tokenizer is not a string")
        saved_config(settings)
    return settings


@contextlib.contextmanager
def _reading(beside: Path) -> Iterator[None]:
    """Turn errors raised inside into a UserError: the json is damaged."""
    try:
        yield
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise UserError(f"{beside} is damaged ({error!r:.200}): restore it, or delete it to use the flags") from None


def load_weights(
    path: Path,
    wanted: LMConfig | dict | None,
    tokenizer: PreTrainedTokenizerBase,
    missing: tuple[str, ...] = (),
    build: Callable[[LMConfig], MiniMindLM] = build_model,
) -> MiniMindLM:
    """A model with the weights in a file, or in a folder of `transformers`, loaded strictly: fp32, on the CPU.

    Args:
        wanted: the configuration that the flags ask for, or some of its fields. The others come from the json beside
            the file or the folder's config.json; and for a downloaded file, which has none, from the shapes of its
            tensors (with MiniMind2's heads, experts per token and RoPE; MiniMind-3's tensors also give the heads).
        tokenizer: must be the one that the weights were trained with, by the json or the tokenizer in the folder.
        missing: prefixes of parameters that the weights may lack.
        build: makes the model that the weights are loaded into.

    Raises:
        UserError: missing, damaged, of another shape or another tokenizer; the message names both sides.
    """
    path = existing(path)
    config = wanted if isinstance(wanted, LMConfig) else None
    sizes = {} if config else _named_once(wanted or {})
    asking, settings, state, saved = "the flags ask", None, None, None
    if path.is_dir():
        state, saved = read_folder(path)
        origin = "its config.json"
        _compare_tokenizer_in(path, saved, tokenizer)
    elif settings := read_settings(path):
        saved = saved_config(settings)
        origin = "its json"
        _compare_tokenizer(path, settings, tokenizer)
    if saved is not None:
        saved.update(special_ids(tokenizer))  # an older json has none, and a folder may have others
        if config is None:
            config = changed_config(saved, sizes)
            asking = asking if sizes else f"{origin} asks"
        _compare(path, architecture(saved), f"according to {origin}", architecture(config), asking)
        _compare_positions(path, saved, config, origin)
    if state is None:
        state = _read_file(path, config or sizes, tokenizer, downloaded=settings is None)
    found = {"generation": 2} | infer_sizes(state)
    if config is None:
        told = {name: value for name, value in found.items() if name != "vocab_size" or _assumed(found, tokenizer)}
        config = config_from_sizes(told | sizes, tokenizer)
    _compare(path, found, "according to its tensors", architecture(config), asking)
    model = build(config)
    _fill(model, state, path, missing)
    check_hash(path, path.with_suffix(".json"), settings or {})
    return model


def _named_once(sizes: dict) -> dict:
    try:
        return our_fields(sizes)
    except ValueError as error:
        raise UserError(str(error)) from None


def _assumed(found: dict, tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether MiniMind-3's weights came without a tokenizer, so that the shipped one was assumed, which is not theirs:
    a notice says so, and the vocabulary size is that of the embeddings."""
    return found["generation"] == 3 and Path(tokenizer.name_or_path) == SHIPPED_TOKENIZER


def _read_file(
    path: Path, known: LMConfig | dict, tokenizer: PreTrainedTokenizerBase, downloaded: bool
) -> dict[str, Tensor]:
    """The parameters in a file; prints a notice about what had to be converted or assumed."""
    known = known if isinstance(known, dict) else architecture(known)
    heads = {name: known[name] for name in ("n_heads", "n_kv_heads") if name in known}
    state, done, newer, generation = read_weights(path, **heads)
    if done:
        print_notice(f"{path}: {done}")
    if downloaded:
        assumed = f"{path} has no json beside it; assuming the tokenizer {tokenizer.name_or_path}"
        whose = "MiniMind-3's begins" if generation == 3 else "MiniMind's of April 2025 began"
        warning = f", but {whose} turns with {NEWER_BOS}: give its folder with --tokenizer"
        newer = newer or generation == 3
        print_notice(assumed + (warning if newer and tokenizer.bos_token != NEWER_BOS else ""))
    if adapter := next(filter(is_lora, state), None):
        raise UserError(
            f"{path} is a LoRA adapter (it has {adapter}): give its base here, and the adapter with --lora_name"
        )
    return state


def _fill(model: MiniMindLM, state: dict[str, Tensor], path: Path, missing: tuple[str, ...]) -> None:
    """Load a state dict into a model; only keys that begin with `missing` may be missing."""
    wanted = model.state_dict()
    lacking = [key for key in wanted if key not in state and not key.startswith(missing)]
    surplus = [key for key in state if key not in wanted]
    if lacking or surplus:
        what = " (it is a vision-language model)" if any(key.startswith("vision_proj.") for key in surplus) else ""
        raise UserError(f"{path} does not fit the model: missing: {_few(lacking)}; unexpected: {_few(surplus)}{what}")
    reshaped = [key for key in state if state[key].shape != wanted[key].shape]
    if reshaped:
        key = reshaped[0]
        raise UserError(f"{path} does not fit the model: {key} is {[*state[key].shape]}, not {[*wanted[key].shape]}")
    model.load_state_dict(state, strict=not missing)


def load_adapter(path: Path, model: MiniMindLM) -> LoRASettings:
    """Load the LoRA adapter in a file into the model, separate from its weights; `merge_lora` adds it to them.

    Raises:
        UserError: missing, damaged, or made for another base; the message names both sides.
    """
    path = existing(path, adapter=True)
    config = model.config
    state = read_weights(path, config.n_heads, config.n_kv_heads, config.generation).state
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
            f"{named} tokenizer {settings['tokenizer']}, but {tokenizer.name_or_path} is {tokenizer_hash(tokenizer)}: "
            "give the right folder with --tokenizer"
        )
    for name, ours in special_ids(tokenizer).items():
        theirs = settings["config"].get(name, ours)
        if name in DELIMITERS and theirs != ours:
            raise UserError(f"{named} {name} {theirs}, but {tokenizer.name_or_path} has {ours}: correct its settings")


def _compare_tokenizer_in(folder: Path, saved: LMConfig, tokenizer: PreTrainedTokenizerBase) -> None:
    if not (folder / "tokenizer.json").is_file():
        print_notice(f"{folder} has no tokenizer.json; assuming the tokenizer {tokenizer.name_or_path}")
    elif (theirs := tokenizer_hash(read_tokenizer(folder))) != tokenizer_hash(tokenizer):
        raise UserError(
            f"{folder} has its own tokenizer, {theirs}, but {tokenizer.name_or_path} is "
            f"{tokenizer_hash(tokenizer)}: give the right folder with --tokenizer"
        )
    if len(tokenizer) > saved.vocab_size:
        raise UserError(
            f"{folder} has {saved.vocab_size} embeddings, but {tokenizer.name_or_path} has {len(tokenizer)}: "
            "give the right folder with --tokenizer"
        )


def _compare(path: Path, ours: dict, by: str, theirs: dict, asking: str) -> None:
    different = [name for name in ours if name in theirs and ours[name] != theirs[name]]
    if "generation" in different:
        different = ["generation"]  # most others follow from it
    if different:
        has = ", ".join(f"{name} {ours[name]}" for name in different)
        asked = ", ".join(f"{name} {theirs[name]}" for name in different)
        flags = [f"--{name} {ours[name]}" for name in different if name in ("generation", "dim", "n_layers")]
        flags += ["--use_moe" if ours["use_moe"] else "--no-use_moe"] if "use_moe" in different else []
        hint = f": give {' '.join(flags)}" if flags and asking == "the flags ask" else ""
        raise UserError(f"{path} has {has} {by}, but {asking} for {asked}{hint}")


def _compare_positions(path: Path, saved: LMConfig, config: LMConfig, origin: str) -> None:
    """Refuse to drop the scaling of the positions that the weights were trained with unless the user asks for it."""
    if saved.rope_scaling and not config.rope_scaling:
        kind, factor = saved.rope_scaling["rope_type"], saved.rope_scaling["factor"]
        flags = [f"{kind}:{factor:g}", str(saved.rope_scaling.get("original_max_position_embeddings", ""))]
        flag = f"--rope_scaling {':'.join(filter(None, flags))}"
        if saved.rope_scaling == MINIMIND3_YARN:
            flag = "--inference_rope_scaling"
        raise UserError(
            f"{path} has rope_scaling {kind} according to {origin}, but the flags ask for none: give {flag}"
        )


def _few(keys: list[str]) -> str:
    return "none" if not keys else ", ".join(keys[:3]) + (f" and {len(keys) - 3} more" if len(keys) > 3 else "")
