"""Writing a MiniMind as an architecture that every tool knows: a dense model as a Llama, a mixture of experts as a
Qwen2-MoE; in generation 3 as a Qwen3 or Qwen3-MoE.

`trainer/folder_layouts.py` describes the differences, and reads the folders back, bit for bit. A folder is written as
plain files (config.json, generation_config.json, model.safetensors, tokenizer), readable by transformers 4 and 5 and by
all tools that read their folders.
"""

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase

from model import LMConfig, MiniMindLM
from model.chat_template import chat_template_of
from model.rope_scaling import ntk_theta
from model.weight_layouts import THEIR_NAME, half_split
from trainer.errors import UserError
from trainer.folder_layouts import WEIGHTS
from trainer.inference_arguments import SAMPLING

# ------------------------------------------------------------------------------------------------------- tensors


def to_their_state(state: Mapping[str, Tensor], config: LMConfig) -> dict[str, Tensor]:
    """MiniMind's state dict as Llama's, or with `use_moe` as Qwen2-MoE's; generation 3 already has Qwen3's names.

    The output matrix, tied to the embedding, is left out, as in transformers. An MoE without a shared expert gets one
    of zeros.
    """
    if config.generation == 3:
        return {name: value.contiguous() for name, value in state.items() if name != "lm_head.weight"}
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


# ------------------------------------------------------------------------------------------------------ settings


ARCHITECTURES = {  # by generation, and whether there are experts
    (2, False): ("llama", "LlamaForCausalLM"),
    (2, True): ("qwen2_moe", "Qwen2MoeForCausalLM"),
    (3, False): ("qwen3", "Qwen3ForCausalLM"),
    (3, True): ("qwen3_moe", "Qwen3MoeForCausalLM"),
}


def to_their_config(config: LMConfig) -> dict:
    """The content of config.json. It has the RoPE base twice: under the names of transformers 4 and 5.

    Raises:
        UserError: the model has a feature that none of these architectures has.
    """
    if config.variant:
        raise UserError(f"{config.variant}: no architecture of transformers that is written here has this")
    kind, architecture = ARCHITECTURES[config.generation, config.use_moe]
    theirs = {
        "architectures": [architecture],
        "model_type": kind,
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
        **_rope(config),
        "initializer_range": 0.02,
        "tie_word_embeddings": True,
        "bos_token_id": config.bos_token_id,
        "eos_token_id": config.eos_token_id,
        "pad_token_id": config.pad_token_id,
        "torch_dtype": "float32",
        "attention_dropout": 0.0,
    }
    if config.use_moe:
        theirs |= _experts(config)
    if config.generation == 3 or not config.use_moe:
        theirs["attention_bias"] = False
    if kind == "llama":
        theirs["mlp_bias"] = False
    else:
        theirs |= {"use_sliding_window": False, "sliding_window": None, "max_window_layers": config.n_layers}
    return theirs


def _rope(config: LMConfig) -> dict:
    """Base and scaling of the positions, always with YaRN's attention factor: transformers' default is another."""
    theta, scaling = config.rope_theta, config.rope_scaling or {"rope_type": "default"}
    if scaling["rope_type"] == "ntk":  # by its other name: a larger base
        theta, scaling = ntk_theta(theta, scaling["factor"], config.head_dim), {"rope_type": "default"}
    rope = {"rope_theta": theta, "rope_parameters": scaling | {"rope_theta": theta}}
    return rope | ({"rope_scaling": scaling} if scaling["rope_type"] != "default" else {})


def _experts(config: LMConfig) -> dict:
    common = {
        "moe_intermediate_size": config.hidden_dim,
        "num_experts": config.n_routed_experts,
        "num_experts_per_tok": config.num_experts_per_tok,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "router_aux_loss_coef": config.aux_loss_alpha,
        "output_router_logits": False,
    }
    if config.generation == 3:
        return common | {"norm_topk_prob": True}
    return common | {
        "shared_expert_intermediate_size": config.hidden_dim,
        "norm_topk_prob": config.norm_topk_prob and config.num_experts_per_tok > 1,  # a single weight stays as it is
        "qkv_bias": True,
    }


# ------------------------------------------------------------------------------------------------------- folders


def write_folder(model: MiniMindLM, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write everything that `transformers` needs into an empty folder, without our code."""
    config = model.config
    folder.mkdir(parents=True, exist_ok=True)
    _write_json(to_their_config(config), folder / "config.json")
    ids = {name: getattr(config, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    writing = {"do_sample": True} | {name: SAMPLING[name] for name in ("temperature", "top_p")}
    _write_json(ids | writing, folder / "generation_config.json")
    weights = save(to_their_state(model.state_dict(), config), metadata={"format": "pt"})
    (folder / WEIGHTS).write_bytes(weights)  # save_file would make it readable for its owner alone

    tokenizer.save_pretrained(folder, save_jinja_files=False)
    about = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    about["tokenizer_class"] = "PreTrainedTokenizerFast"  # transformers 4 knows no other name for it
    about["chat_template"] = chat_template_of(tokenizer)  # whatever it had: this is the layout a MiniMind learns
    about["padding_side"] = "left"  # a batch is continued at the end of its rows
    about["model_max_length"] = config.max_seq_len
    _write_json(about, folder / "tokenizer_config.json")


@torch.inference_mode()
def check_equal(model: MiniMindLM, folder: Path) -> float:
    """The largest difference between the logits of `transformers` for a folder and the model's, on random ids.

    Raises:
        UserError: it is more than 1e-4 of the largest logit (or of 1 if that is less).
    """
    ids = torch.randint(model.config.vocab_size, (2, 64), generator=torch.Generator().manual_seed(0))
    ids = ids[:, : model.config.max_seq_len]
    theirs = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True, dtype=torch.float32).eval()(ids).logits
    ours = model.eval()(ids).logits
    difference = float((ours - theirs).abs().max())
    if not difference <= 1e-4 * max(1.0, float(ours.abs().max())):
        raise UserError(
            f"{folder}: transformers' logits are {difference:.1e} from MiniMind's, so this is a different model"
        )
    return difference


def _write_json(content: dict, path: Path) -> None:
    path.write_text(json.dumps(content, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
