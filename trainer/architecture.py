"""A model's configuration, from flags, from a json, or from the shapes of its tensors."""

import copy
import inspect
import re

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from model import GENERATIONS, LMConfig
from model.minimind3 import OUR_FIELD, our_fields
from model.rope_scaling import checked_scaling
from model.tokenizer import special_ids
from trainer.errors import UserError

ARCHITECTURE = (
    *("generation", "dim", "n_layers", "n_heads", "n_kv_heads", "vocab_size", "hidden_dim", "norm_eps", "rope_theta"),
    *("use_moe", "num_experts_per_tok", "n_routed_experts", "n_shared_experts", "norm_topk_prob"),  # the last: of MoE
)
VARIANT = {  # fields beyond the plain decoder, named only where there is such a thing
    "attention": lambda config: config.attention != "gqa",
    "kv_latent_dim": lambda config: config.attention != "gqa",
    "rope_head_dim": lambda config: config.attention != "gqa",
    "shared_width": lambda config: config.use_moe and config.shared_width > 1,
    "balance": lambda config: config.balance != "loss",
    "mtp_depth": lambda config: config.mtp_depth > 0,
    "mtp": lambda config: config.mtp_depth > 0,
}
DELIMITERS = ("bos_token_id", "eos_token_id")  # that begin and end a text, as the tokenizer has them
POSITIONS = ("max_seq_len", "rope_scaling", "trained_seq_len")  # promised, how they are stretched, learned
UNTOLD = ("num_experts_per_tok", "rope_theta", "rope_scaling", "inference_rope_scaling")  # by tensors; flags name them
SIZES = {*inspect.signature(LMConfig).parameters, *OUR_FIELD, "inference_rope_scaling"} - {"kwargs"}


def architecture(config: LMConfig) -> dict:
    """The fields that determine parameters and computation (the experts' only if there are any), and the end token."""
    names = [name for name in ARCHITECTURE if config.use_moe or ("expert" not in name and name != "norm_topk_prob")]
    names += [name for name, is_there in VARIANT.items() if is_there(config)]
    return {name: getattr(config, name) for name in (*names, *DELIMITERS)}


def positions(config: LMConfig) -> dict:
    """For the json beside weights: the number of positions that the model takes, and that it was trained on."""
    return {name: getattr(config, name) for name in POSITIONS}


def saved_config(settings: dict) -> LMConfig:
    """The model that a json beside weights describes.

    Raises:
        KeyError, ValueError, TypeError: it describes none.
    """
    said = settings["config"]
    known = (*ARCHITECTURE[1:], *VARIANT, *DELIMITERS, *POSITIONS)
    config_class, _ = GENERATIONS[said.get("generation", 2)]
    return config_class(**{name: value for name, value in said.items() if name in known})


def untold_sizes(args) -> dict:
    """The flags of `add_untold_arguments` that were given, as fields of LMConfig."""
    return {name: value for name in UNTOLD if (value := getattr(args, name, None))}


def config_from_sizes(sizes: dict, tokenizer: PreTrainedTokenizerBase) -> LMConfig:
    """The configuration with these sizes and the tokenizer's vocabulary and special ids.

    Args:
        sizes: fields of LMConfig, or the same by MiniMind-3's names, and `generation` (default: 2).

    Raises:
        UserError: they do not fit together.
    """
    try:
        sizes = _stretched(our_fields(sizes), sizes.get("trained_seq_len"))
        config_class, _ = GENERATIONS[sizes.pop("generation", 2)]
        return config_class(**{"vocab_size": len(tokenizer)} | sizes | special_ids(tokenizer))
    except ValueError as error:
        raise UserError(str(error)) from None


def changed_config(config: LMConfig, sizes: dict) -> LMConfig:
    """A copy with other sizes, under MiniMind2's or MiniMind-3's names.

    Raises:
        UserError: an unknown scaling of the positions.
    """
    config = copy.deepcopy(config)
    try:
        sizes = _stretched(our_fields(sizes), config.trained_seq_len)
        if "rope_scaling" in sizes:
            sizes["rope_scaling"] = checked_scaling(sizes["rope_scaling"])
    except ValueError as error:
        raise UserError(str(error)) from None
    config.update({name: value for name, value in sizes.items() if name != "generation"})
    return config


def _stretched(sizes: dict, trained: int | None) -> dict:
    """The sizes; a scaling that does not say which trained length it extends gets `trained`."""
    scaling = sizes.get("rope_scaling")
    if scaling and trained and scaling.get("original_max_position_embeddings") is None:
        scaling = scaling | {"original_max_position_embeddings": trained}
    return sizes | ({"rope_scaling": scaling} if scaling else {})


def infer_sizes(state: dict[str, Tensor]) -> dict:
    """The architecture that the tensors of a state dict imply, as keyword arguments of LMConfig; with `generation` 3
    of MiniMind3Config, and then the heads, too."""
    third = any(key.startswith("model.layers.") for key in state)
    if third:
        state = {_name_of_2(key): value for key, value in state.items()}
    layers = {key.split(".")[1] for key in state if key.startswith("layers.")}
    experts = {key.split(".")[4] for key in state if re.match(r"layers\.\d+\.feed_forward\.experts\.", key)}
    shape = {"n_layers": len(layers), "use_moe": bool(experts)}
    if experts:
        shape["n_routed_experts"] = len(experts)
        shared, routed = (state.get(f"layers.0.feed_forward.{of}.w1.weight") for of in ("shared_experts", "experts.0"))
        shape["n_shared_experts"] = any(".shared_experts." in key for key in state)
        if shared is not None and routed is not None and len(shared) > len(routed):
            shape["shared_width"] = len(shared) // len(routed)
    embedding = state.get("tok_embeddings.weight")
    if embedding is not None and embedding.dim() == 2:
        shape |= {"vocab_size": embedding.size(0), "dim": embedding.size(1)}
    w1 = next((value for key, value in state.items() if key.endswith(".w1.weight")), None)
    if w1 is not None:
        shape["hidden_dim"] = w1.size(0)
    if third:
        return shape | {"generation": 3} | _heads(state)
    return shape | _variant(state)


def _variant(state: dict[str, Tensor]) -> dict:
    """The fields of VARIANT that the tensors of a generation-2 model reveal."""
    found = {}
    down, norm = (state.get(f"layers.0.attention.{name}.weight") for name in ("wkv_down", "latent_norm"))
    if down is not None and norm is not None:
        found |= {"attention": "mla", "kv_latent_dim": len(norm), "rope_head_dim": len(down) - len(norm)}
    if any(key.endswith(".gate.expert_bias") for key in state):
        found["balance"] = "bias"
    if modules := {key.split(".")[1] for key in state if key.startswith("mtp.")}:
        sequential = any(key.endswith(".merge.weight") for key in state)
        found |= {"mtp_depth": len(modules), "mtp": "sequential" if sequential else "parallel"}
    return found


def _name_of_2(name: str) -> str:
    """A generation-3 parameter's name in generation 2, for the parameters whose shapes give the sizes."""
    for theirs, ours in (
        *(("model.", ""), ("embed_tokens", "tok_embeddings"), ("mlp", "feed_forward"), ("gate_proj", "w1")),
        *(("self_attn", "attention"), ("q_proj", "wq"), ("k_proj", "wk")),
    ):
        name = name.replace(theirs, ours, 1)
    return name


def _heads(state: dict[str, Tensor]) -> dict:
    """The number of query and key heads; each head is as wide as its norm."""
    sides = {"n_heads": ("wq", "q_norm"), "n_kv_heads": ("wk", "k_norm")}
    found = {}
    for size, names in sides.items():
        matrix, norm = (state.get(f"layers.0.attention.{name}.weight") for name in names)
        if matrix is not None and norm is not None and matrix.dim() == 2 and norm.numel():
            found[size] = matrix.size(0) // norm.numel()
    return found
