"""Reading a folder of transformers: a Llama, a Qwen2-MoE, a Qwen3, a Qwen3-MoE or a MiniMind of its own.

A MiniMind-3 is a Qwen3 or a Qwen3-MoE under the same names. A dense MiniMind2 is a Llama, a mixture of experts a
Qwen2-MoE (`scripts/formats/transformers_folder.py` writes them all). These two differ from ours in three points, each
of which can be converted exactly, so that weights come back from a folder bit for bit:

- RoPE rotates pairs of rows of wq and wk. Ours are adjacent (2i, 2i+1), theirs half a head apart (i, i + d/2): the rows
  of each head are reordered, and as queries and keys are reordered alike, their products do not change.
- Qwen2-MoE adds biases to q, k and v: they are zero.
- Qwen2-MoE multiplies its shared expert by a sigmoid gate. A gate of zeros gives 1/2 for every token, so the shared w2
  is doubled, and a power of two costs no bit.
"""

import contextlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from model import LMConfig, MiniMind3Config
from model.model_vlm import VLMConfig
from model.weight_layouts import OUR_NAME, QK_NORM, TABLES, TIED, interleaved, recognise
from trainer.architecture import DELIMITERS, SIZES
from trainer.errors import UserError
from trainer.weight_files import read_content

WEIGHTS = "model.safetensors"
OUR_TYPES = {config.model_type: config for config in (LMConfig, VLMConfig, MiniMind3Config)}
THEIR_TYPES = ("llama", "qwen2_moe", "qwen3", "qwen3_moe")  # generation 2, dense and MoE, and generation 3


def require_folder(folder: Path) -> Path:
    """Check that a folder is that of a transformers model, and return it.

    Raises:
        UserError: it has no config.json.
    """
    if not (folder / "config.json").is_file():
        raise UserError(f"{folder / 'config.json'} is missing: this is not a transformers model folder")
    return folder


def read_folder(folder: Path) -> tuple[dict[str, Tensor], LMConfig]:
    """The parameters in a folder under MiniMind's names, fp32, and its configuration; a `VLMConfig` of a MiniMind-V's.

    Weights may be safetensors, in one file or several, or an old pytorch_model.bin; nothing in them is run.

    Raises:
        UserError: something is missing or damaged, or the folder's architecture is not a MiniMind's.
    """
    theirs = read_json(require_folder(folder) / "config.json")
    state = _read_tensors(folder)
    with _telling(folder):
        config = to_our_config(theirs, state)
        if theirs["model_type"] in OUR_TYPES:
            return recognise(state, config.n_heads, config.n_kv_heads).state, config
        return to_our_state(state, config), config


def check_config(folder: Path) -> None:
    """Check only a folder's config.json: transformers would read it with the tokenizer, with less helpful errors.

    Raises:
        UserError: it is missing, damaged, or its architecture is not a MiniMind's.
    """
    theirs = read_json(require_folder(folder) / "config.json")
    with _telling(folder):
        to_our_config(theirs, {})


@contextlib.contextmanager
def _telling(folder: Path) -> Iterator[None]:
    """Turn errors raised inside into a UserError that names the folder."""
    try:
        yield
    except KeyError as missing:
        raise UserError(f"{folder} has no {missing} in its config.json or its weights") from None
    except (TypeError, AttributeError) as error:
        raise UserError(f"{folder / 'config.json'} is damaged ({error})") from None
    except ValueError as error:
        raise UserError(f"{folder} {error}") from None
    except RuntimeError as error:  # rows that are not those of so many heads
        raise UserError(f"{folder} does not fit its config.json: {error}") from None


def to_our_config(theirs: dict, state: Mapping[str, Tensor]) -> LMConfig:
    """The configuration of a folder.

    Args:
        theirs: its config.json, of a `model_type` in THEIR_TYPES or our own, "minimind", "minimind-v", "minimind3".
        state: its parameters; shared experts that are zero in every layer do not count as experts.

    Raises:
        KeyError: a field is missing.
        UserError: the architecture is not a MiniMind's; the message names the field.
    """
    kind = theirs.get("model_type")
    if kind == MiniMind3Config.model_type or (kind == LMConfig.model_type and any(map(QK_NORM.search, state))):
        return _minimind3(theirs)
    if kind in OUR_TYPES:
        names = LMConfig.attribute_map | {"rms_norm_eps": "norm_eps"}  # those of April 2025
        return OUR_TYPES[kind].from_dict({names.get(name, name): value for name, value in theirs.items()})
    if kind not in THEIR_TYPES:
        raise UserError(f"config.json says model_type {kind!r}: it must be {', '.join(map(repr, THEIR_TYPES))} or "
                        "'minimind'")  # fmt: skip
    rope = theirs.get("rope_parameters") or theirs.get("rope_scaling") or {}
    heads, width = theirs["num_attention_heads"], theirs["hidden_size"]
    moe, third = kind.endswith("_moe"), kind.startswith("qwen3")
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    neutral = {
        "hidden_act": ("silu", theirs.get("hidden_act", "silu")),
        "rope_type": (rope_type if rope_type in ("yarn", "linear") else "default", rope_type),
        "head_dim": (width // heads, theirs.get("head_dim") or width // heads),
        "use_sliding_window": (False, theirs.get("use_sliding_window", False)),
    }
    if rope_type == "yarn":  # what changes its numbers, and is DeepSeek's or gpt-oss's
        neutral |= {name: (None, rope.get(name)) for name in ("mscale", "mscale_all_dim")}
        neutral["truncate"] = (True, rope.get("truncate", True))
    if third:
        neutral["attention_bias"] = (False, theirs.get("attention_bias", False))
    if moe:
        neutral |= {
            "decoder_sparse_step": (1, theirs.get("decoder_sparse_step", 1)),
            "mlp_only_layers": ([], theirs.get("mlp_only_layers") or []),
        }
    if moe and third:
        neutral["norm_topk_prob"] = (True, theirs.get("norm_topk_prob", False))
    elif moe:
        expert_width = theirs["moe_intermediate_size"]
        neutral["shared_expert_intermediate_size"] = (expert_width, theirs["shared_expert_intermediate_size"])
        if theirs["num_experts_per_tok"] == 1:
            neutral["norm_topk_prob"] = (False, theirs.get("norm_topk_prob", False))
    for field, (ours, value) in neutral.items():
        if value != ours:
            raise UserError(f"config.json says {field} {value!r}, but MiniMind needs {ours!r}")
    sizes = {
        "dim": width,
        "n_layers": theirs["num_hidden_layers"],
        "n_heads": heads,
        "n_kv_heads": theirs.get("num_key_value_heads") or heads,
        "vocab_size": theirs["vocab_size"],
        "hidden_dim": theirs["moe_intermediate_size" if moe else "intermediate_size"],
        "norm_eps": theirs["rms_norm_eps"],
        "max_seq_len": theirs["max_position_embeddings"],
        "rope_theta": rope.get("rope_theta", theirs.get("rope_theta", 1e4)),
        "rope_scaling": _scaling(rope, theirs["max_position_embeddings"]),
    }
    if moe:
        sizes |= {
            "use_moe": True,
            "n_routed_experts": theirs["num_experts"],
            "num_experts_per_tok": theirs["num_experts_per_tok"],
            "aux_loss_alpha": theirs.get("router_aux_loss_coef", 5e-4 if third else 0.1),
        }
    if moe and not third:
        sizes |= {
            "n_shared_experts": any(
                v.any() for name, v in state.items() if name.endswith("shared_expert.down_proj.weight")
            ),
            "norm_topk_prob": theirs.get("norm_topk_prob", False) or theirs["num_experts_per_tok"] == 1,
        }
    try:
        return (MiniMind3Config if third else LMConfig)(**sizes)
    except ValueError as error:
        raise UserError(f"config.json: {error}") from None


def _minimind3(theirs: dict) -> MiniMind3Config:
    """The configuration of a folder with MiniMind-3's own code, or one that `MiniMind3LM.save_pretrained` wrote."""
    names = {*SIZES, *DELIMITERS, "pad_token_id"}
    sizes = {name: value for name, value in theirs.items() if name in names and value is not None}
    if "rope_scaling" in sizes:
        sizes.pop("inference_rope_scaling", None)  # which made it
    try:
        return MiniMind3Config(**sizes)
    except ValueError as error:
        raise UserError(f"config.json: {error}") from None


def _scaling(rope: dict, longest: int) -> dict | None:
    """A folder's scaling of the positions, for LMConfig."""
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in ("yarn", "linear"):
        return None
    names = ("factor", "original_max_position_embeddings", "beta_fast", "beta_slow", "attention_factor")
    told = {name: rope[name] for name in names if rope.get(name) is not None}
    if kind == "linear":
        return {"rope_type": kind} | {name: told[name] for name in names[:2] if name in told}
    return {"rope_type": kind, "original_max_position_embeddings": longest} | told


def to_our_state(theirs: Mapping[str, Tensor], config: LMConfig) -> dict[str, Tensor]:
    """The parameters of a folder of theirs as MiniMind's, fp32: the inverse of `to_their_state`.

    Raises:
        UserError: a parameter that MiniMind does not have and that is not neutral (a bias, a gate, an output matrix
            different from the embedding).
    """
    state = {}
    for name, value in theirs.items():
        value = value.float()
        if name == "lm_head.weight":
            if not torch.equal(value, theirs["model.embed_tokens.weight"].float()):
                raise UserError(f"{name} differs from the embedding, but MiniMind ties the two")
            continue
        if name.endswith(("_proj.bias", ".shared_expert_gate.weight")):
            if value.any():
                raise UserError(
                    f"{name} is not zero, but MiniMind has no such parameter: freeze biases and shared_expert_gate "
                    "when training a Qwen2-MoE that is to be converted back"
                )
            continue
        if ".shared_expert." in name and not config.n_shared_experts:
            continue
        if name.rpartition(".")[2] in TABLES:
            continue
        if config.generation == 3:
            state[name] = value
            continue
        name = ".".join(OUR_NAME.get(part, part) for part in name.removeprefix("model.").split("."))
        if name.endswith("wq.weight"):
            value = interleaved(value, config.n_heads)
        elif name.endswith("wk.weight"):
            value = interleaved(value, config.n_kv_heads)
        elif name.endswith("shared_experts.w2.weight"):
            value = value / 2
        state[name] = value
    embedding, output = TIED[config.generation]
    state[output] = state[embedding]
    return state


def _read_tensors(folder: Path) -> dict[str, Tensor]:
    index = folder / f"{WEIGHTS}.index.json"
    files = sorted(set(read_json(index)["weight_map"].values())) if index.is_file() else [WEIGHTS]
    if files == [WEIGHTS] and not (folder / WEIGHTS).is_file() and (folder / "pytorch_model.bin").is_file():
        files = ["pytorch_model.bin"]
    state = {}
    for name in files:
        state |= read_content(folder / name)
    return state


def read_json(path: Path) -> dict:
    """A json file of a folder.

    Raises:
        UserError: it is missing or damaged.
    """
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        raise UserError(f"{path} is missing") from None
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{path} cannot be read ({error})") from None
