"""MiniMind as one of the architectures that every tool knows, and back: a Dense model is a Llama, a MoE a Qwen2-MoE.

Three things differ, and each has an exact answer:

- RoPE turns pairs of rows of wq and wk. Ours stand side by side (2i, 2i+1), theirs half a head apart (i, i + d/2): the
  rows of each head are put in the other order, and as queries and keys change alike, their products do not.
- Qwen2-MoE adds biases to q, k and v: they are zero.
- Qwen2-MoE multiplies its shared expert by a sigmoid gate. A gate of zeros gives 1/2 for every token, so the shared w2
  is doubled, and a power of two costs no bit.

So weights come back from a folder as the bits they went in with. A folder is written as plain files (config.json,
generation_config.json, model.safetensors, tokenizer), readable by transformers 4 and 5 and by what reads their folders.
"""

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase

from model import LMConfig, MiniMindLM
from model.chat_template import CHAT_TEMPLATE
from model.tokenizer import special_ids
from model.weight_layouts import OUR_NAME, TABLES, THEIR_NAME, half_split, interleaved, recognise
from trainer.errors import UserError
from trainer.weight_files import read_content
from trainer.weights import load_tokenizer

WEIGHTS = "model.safetensors"
SAMPLING = {"do_sample": True, "temperature": 0.85, "top_p": 0.85}  # what eval_model.py does unless told otherwise


# ------------------------------------------------------------------------------------------------------- tensors


def to_their_state(state: Mapping[str, Tensor], config: LMConfig) -> dict[str, Tensor]:
    """MiniMind's state dict as a Llama's, or, with `use_moe`, as a Qwen2-MoE's.

    The output matrix, tied to the embedding, is left out, as transformers does. A MoE without a shared expert gets one
    of zeros.
    """
    theirs = {}
    for name, value in state.items():
        if name == "output.weight":
            continue
        if name.endswith("wq.weight"):
            value = half_split(value, config.n_heads)
        elif name.endswith("wk.weight"):
            value = half_split(value, config.n_kv_heads)
        elif name.endswith("shared_experts.w2.weight"):
            value = 2 * value
        theirs["model." + ".".join(THEIR_NAME.get(part, part) for part in name.split("."))] = value
    for layer in range(config.n_layers if config.use_moe else 0):
        block = f"model.layers.{layer}"
        theirs[f"{block}.mlp.shared_expert_gate.weight"] = torch.zeros(1, config.dim)
        for name in ("q_proj", "k_proj", "v_proj"):
            rows = theirs[f"{block}.self_attn.{name}.weight"].size(0)
            theirs[f"{block}.self_attn.{name}.bias"] = torch.zeros(rows)
        if not config.n_shared_experts:
            into, out_of = torch.zeros(config.hidden_dim, config.dim), torch.zeros(config.dim, config.hidden_dim)
            for name, value in (("gate_proj", into), ("up_proj", into.clone()), ("down_proj", out_of)):
                theirs[f"{block}.mlp.shared_expert.{name}.weight"] = value
    return {name: value.contiguous() for name, value in theirs.items()}


def to_our_state(theirs: Mapping[str, Tensor], config: LMConfig) -> dict[str, Tensor]:
    """The inverse of `to_their_state`, fp32.

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
        name = ".".join(OUR_NAME.get(part, part) for part in name.removeprefix("model.").split("."))
        if name.endswith("wq.weight"):
            value = interleaved(value, config.n_heads)
        elif name.endswith("wk.weight"):
            value = interleaved(value, config.n_kv_heads)
        elif name.endswith("shared_experts.w2.weight"):
            value = value / 2
        state[name] = value
    return state


# ------------------------------------------------------------------------------------------------------ settings


def to_their_config(config: LMConfig) -> dict:
    """The content of config.json. The rope's base stands in it twice: under the names of transformers 4 and 5."""
    common = {
        "architectures": ["Qwen2MoeForCausalLM" if config.use_moe else "LlamaForCausalLM"],
        "model_type": "qwen2_moe" if config.use_moe else "llama",
        "vocab_size": config.vocab_size,
        "hidden_size": config.dim,
        "intermediate_size": config.hidden_dim,
        "num_hidden_layers": config.n_layers,
        "num_attention_heads": config.n_heads,
        "num_key_value_heads": config.n_kv_heads,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": config.max_seq_len,
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope_theta,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
        "initializer_range": 0.02,
        "tie_word_embeddings": True,
        "bos_token_id": config.bos_token_id,
        "eos_token_id": config.eos_token_id,
        "pad_token_id": config.pad_token_id,
        "torch_dtype": "float32",
    }
    if not config.use_moe:
        return common | {"attention_bias": False, "mlp_bias": False, "attention_dropout": 0.0}
    return common | {
        "moe_intermediate_size": config.hidden_dim,
        "shared_expert_intermediate_size": config.hidden_dim,
        "num_experts": config.n_routed_experts,
        "num_experts_per_tok": config.num_experts_per_tok,
        "norm_topk_prob": config.norm_topk_prob and config.num_experts_per_tok > 1,  # a single weight stays as it is
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "router_aux_loss_coef": config.aux_loss_alpha,
        "output_router_logits": False,
        "qkv_bias": True,
        "use_sliding_window": False,
        "sliding_window": None,
        "max_window_layers": config.n_layers,
        "attention_dropout": 0.0,
    }


def to_our_config(theirs: dict, state: Mapping[str, Tensor]) -> LMConfig:
    """The configuration of a folder.

    Args:
        theirs: its config.json, of `model_type` "llama", "qwen2_moe" or our own "minimind".
        state: its parameters; shared experts that are zero in every layer are none.

    Raises:
        KeyError: a field is not there.
        UserError: an architecture that MiniMind is not; the message names the field.
    """
    kind = theirs.get("model_type")
    if kind == "minimind":
        names = LMConfig.attribute_map | {"rms_norm_eps": "norm_eps"}  # those of April 2025
        return LMConfig.from_dict({names.get(name, name): value for name, value in theirs.items()})
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


# ------------------------------------------------------------------------------------------------------- folders


def write_folder(model: MiniMindLM, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write all that `transformers` needs into an empty folder, without code of ours."""
    config = model.config
    folder.mkdir(parents=True, exist_ok=True)
    _write_json(to_their_config(config), folder / "config.json")
    ids = {name: getattr(config, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    _write_json(ids | SAMPLING, folder / "generation_config.json")
    weights = save(to_their_state(model.state_dict(), config), metadata={"format": "pt"})
    (folder / WEIGHTS).write_bytes(weights)  # save_file would make it readable for its owner alone

    tokenizer.save_pretrained(folder, save_jinja_files=False)
    about = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    about["tokenizer_class"] = "PreTrainedTokenizerFast"  # transformers 4 knows no other name for it
    about["chat_template"] = CHAT_TEMPLATE  # whatever the tokenizer had: this is the layout a MiniMind learns
    about["padding_side"] = "left"  # a batch is continued at the end of its rows
    about["model_max_length"] = config.max_seq_len
    _write_json(about, folder / "tokenizer_config.json")


def read_folder(folder: Path, tokenizer_folder: str | None = None) -> tuple[MiniMindLM, PreTrainedTokenizerBase]:
    """The model and the tokenizer in a folder that `to_transformers` wrote, or a tool that trained on from there.

    Weights may be safetensors, in one file or several, or an old pytorch_model.bin; nothing in them is run.

    Raises:
        UserError: something is missing or damaged, or the folder holds what a MiniMind is not.
    """
    theirs = _read_json(folder / "config.json")
    state = _read_tensors(folder)
    try:
        config = to_our_config(theirs, state)
        if theirs["model_type"] == "minimind":
            state = recognise(state, config.n_heads, config.n_kv_heads).state
        else:
            state = to_our_state(state, config)
    except KeyError as missing:
        raise UserError(f"{folder} lacks {missing} in its config.json or its weights") from None
    except (TypeError, AttributeError) as error:
        raise UserError(f"{folder / 'config.json'} is damaged ({error})") from None
    except ValueError as error:
        raise UserError(f"{folder} {error}") from None
    tokenizer = load_tokenizer(tokenizer_folder or folder)
    if len(tokenizer) > config.vocab_size:
        raise UserError(
            f"{folder} is of {config.vocab_size} tokens, and the tokenizer has {len(tokenizer)}: --tokenizer"
        )
    config.update(special_ids(tokenizer))
    state = {name: value for name, value in state.items() if name.split(".")[-1] not in TABLES}
    state.setdefault("output.weight", state.get("tok_embeddings.weight"))
    model = MiniMindLM(config)
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        raise UserError(f"{folder} does not fit its config.json: {' '.join(str(error).split())[:300]}") from None
    return model, tokenizer


@torch.inference_mode()
def check_equal(model: MiniMindLM, folder: Path) -> float:
    """How far the logits that `transformers` computes from a folder are from the model's, on random ids.

    Raises:
        UserError: more than 1e-4 of the largest logit (or of 1, where that is less).
    """
    ids = torch.randint(model.config.vocab_size, (2, 64), generator=torch.Generator().manual_seed(0))
    ids = ids[:, : model.config.max_seq_len]
    theirs = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True, dtype=torch.float32).eval()(ids).logits
    ours = model.eval()(ids).logits
    difference = float((ours - theirs).abs().max())
    if not difference <= 1e-4 * max(1.0, float(ours.abs().max())):
        raise UserError(
            f"{folder}: transformers' logits are {difference:.1e} from MiniMind's, so this is another model"
        )
    return difference


def _read_tensors(folder: Path) -> dict[str, Tensor]:
    index = folder / f"{WEIGHTS}.index.json"
    files = sorted(set(_read_json(index)["weight_map"].values())) if index.is_file() else [WEIGHTS]
    if files == [WEIGHTS] and not (folder / WEIGHTS).is_file() and (folder / "pytorch_model.bin").is_file():
        files = ["pytorch_model.bin"]
    state = {}
    for name in files:
        state |= read_content(folder / name)
    return state


def _read_json(path: Path) -> dict:
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        raise UserError(f"{path} is missing: this is not a folder of a transformers model") from None
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{path} cannot be read ({error})") from None


def _write_json(content: dict, path: Path) -> None:
    path.write_text(json.dumps(content, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
