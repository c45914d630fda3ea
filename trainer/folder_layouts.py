"""Reading a folder of transformers: a Llama, a Qwen2-MoE or a MiniMind of its own, as MiniMind's parameters.

A Dense MiniMind is a Llama, a MoE a Qwen2-MoE (`scripts/formats/transformers_folder.py` writes them). Three things
differ, and each has an exact answer, so weights come back from a folder as the bits they went in with:

- RoPE turns pairs of rows of wq and wk. Ours stand side by side (2i, 2i+1), theirs half a head apart (i, i + d/2): the
  rows of each head are put in the other order, and as queries and keys change alike, their products do not.
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

from model import LMConfig
from model.model_vlm import VLMConfig
from model.weight_layouts import OUR_NAME, TABLES, interleaved, recognise
from trainer.errors import UserError
from trainer.weight_files import read_content

WEIGHTS = "model.safetensors"
OUR_TYPES = {config.model_type: config for config in (LMConfig, VLMConfig)}


def require_folder(folder: Path) -> Path:
    """The folder, which must be one of a transformers model.

    Raises:
        UserError: it has no config.json.
    """
    if not (folder / "config.json").is_file():
        raise UserError(f"{folder / 'config.json'} is missing: this is not a folder of a transformers model")
    return folder


def read_folder(folder: Path) -> tuple[dict[str, Tensor], LMConfig]:
    """The parameters in a folder under MiniMind's names, fp32, and its configuration; a `VLMConfig` of a MiniMind-V's.

    Weights may be safetensors, in one file or several, or an old pytorch_model.bin; nothing in them is run.

    Raises:
        UserError: something is missing or damaged, or the folder holds what a MiniMind is not.
    """
    theirs = read_json(require_folder(folder) / "config.json")
    state = _read_tensors(folder)
    with _telling(folder):
        config = to_our_config(theirs, state)
        if theirs["model_type"] in OUR_TYPES:
            return recognise(state, config.n_heads, config.n_kv_heads).state, config
        return to_our_state(state, config), config


def check_config(folder: Path) -> None:
    """Look at a folder's config.json alone: transformers reads it with the tokenizer, and tells less of what is wrong.

    Raises:
        UserError: it is missing, damaged, or of what a MiniMind is not.
    """
    theirs = read_json(require_folder(folder) / "config.json")
    with _telling(folder):
        to_our_config(theirs, {})


@contextlib.contextmanager
def _telling(folder: Path) -> Iterator[None]:
    """What goes wrong in here tells the user about the folder."""
    try:
        yield
    except KeyError as missing:
        raise UserError(f"{folder} lacks {missing} in its config.json or its weights") from None
    except (TypeError, AttributeError) as error:
        raise UserError(f"{folder / 'config.json'} is damaged ({error})") from None
    except ValueError as error:
        raise UserError(f"{folder} {error}") from None
    except RuntimeError as error:  # rows that are not those of so many heads
        raise UserError(f"{folder} does not fit its config.json: {error}") from None


def to_our_config(theirs: dict, state: Mapping[str, Tensor]) -> LMConfig:
    """The configuration of a folder.

    Args:
        theirs: its config.json, of `model_type` "llama", "qwen2_moe" or our own, "minimind" and "minimind-v".
        state: its parameters; shared experts that are zero in every layer are none.

    Raises:
        KeyError: a field is not there.
        UserError: an architecture that MiniMind is not; the message names the field.
    """
    kind = theirs.get("model_type")
    if kind in OUR_TYPES:
        names = LMConfig.attribute_map | {"rms_norm_eps": "norm_eps"}  # those of April 2025
        return OUR_TYPES[kind].from_dict({names.get(name, name): value for name, value in theirs.items()})
    if kind not in ("llama", "qwen2_moe"):
        raise UserError(f"config.json says model_type {kind!r}: a MiniMind is a 'llama', a 'qwen2_moe' or a 'minimind'")
    rope = theirs.get("rope_parameters") or theirs.get("rope_scaling") or {}
    heads, width = theirs["num_attention_heads"], theirs["hidden_size"]
    moe = kind == "qwen2_moe"
    neutral = {
        "hidden_act": ("silu", theirs.get("hidden_act", "silu")),
        "rope_type": ("default", rope.get("rope_type", rope.get("type", "default"))),
        "head_dim": (width // heads, theirs.get("head_dim") or width // heads),
        "use_sliding_window": (False, theirs.get("use_sliding_window", False)),
    }
    if moe:
        expert_width = theirs["moe_intermediate_size"]
        neutral |= {
            "shared_expert_intermediate_size": (expert_width, theirs["shared_expert_intermediate_size"]),
            "decoder_sparse_step": (1, theirs.get("decoder_sparse_step", 1)),
            "mlp_only_layers": ([], theirs.get("mlp_only_layers") or []),
        }
        if theirs["num_experts_per_tok"] == 1:
            neutral["norm_topk_prob"] = (False, theirs.get("norm_topk_prob", False))
    for field, (ours, value) in neutral.items():
        if value != ours:
            raise UserError(f"config.json says {field} {value!r}, and a MiniMind has {ours!r}")
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
    }
    if moe:
        sizes |= {
            "use_moe": True,
            "n_shared_experts": any(
                v.any() for name, v in state.items() if name.endswith("shared_expert.down_proj.weight")
            ),
            "n_routed_experts": theirs["num_experts"],
            "num_experts_per_tok": theirs["num_experts_per_tok"],
            "norm_topk_prob": theirs.get("norm_topk_prob", False) or theirs["num_experts_per_tok"] == 1,
            "aux_loss_alpha": theirs.get("router_aux_loss_coef", 0.1),
        }
    try:
        return LMConfig(**sizes)
    except ValueError as error:
        raise UserError(f"config.json: {error}") from None


def to_our_state(theirs: Mapping[str, Tensor], config: LMConfig) -> dict[str, Tensor]:
    """The parameters of a Llama or a Qwen2-MoE as MiniMind's, fp32: the inverse of `to_their_state`.

    Raises:
        UserError: a parameter that MiniMind has no place for and that is not neutral (a bias, a gate, another output
            matrix than the embedding).
    """
    state = {}
    for name, value in theirs.items():
        value = value.float()
        if name == "lm_head.weight":
            if not torch.equal(value, theirs["model.embed_tokens.weight"].float()):
                raise UserError(f"{name} differs from the embedding, and a MiniMind has one matrix for both")
            continue
        if name.endswith(("_proj.bias", ".shared_expert_gate.weight")):
            if value.any():
                raise UserError(
                    f"{name} is not zero, and a MiniMind has no place for it: freeze biases and shared_expert_gate "
                    "where a Qwen2-MoE is trained that shall come back"
                )
            continue
        if ".shared_expert." in name and not config.n_shared_experts:
            continue
        if name.rpartition(".")[2] in TABLES:
            continue
        name = ".".join(OUR_NAME.get(part, part) for part in name.removeprefix("model.").split("."))
        if name.endswith("wq.weight"):
            value = interleaved(value, config.n_heads)
        elif name.endswith("wk.weight"):
            value = interleaved(value, config.n_kv_heads)
        elif name.endswith("shared_experts.w2.weight"):
            value = value / 2
        state[name] = value
    state["output.weight"] = state["tok_embeddings.weight"]
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
