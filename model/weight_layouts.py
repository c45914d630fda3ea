"""State dicts as other tools write them, converted to MiniMind's own names if their meaning is certain.

The names of transformers' Llama are also those of MiniMind's own files since April 2025. In them RoPE rotates rows half
a head apart, (i, i + d/2), while ours are adjacent, (2i, 2i + 1): the rows of each head of wq and wk are reordered. A
MiniMind-3 also has these names, and is recognised by its norms of queries and keys: its names and rows stay unchanged.
"""

import re
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

THEIR_NAME = {  # of each part of a parameter's name that differs in transformers
    "tok_embeddings": "embed_tokens",
    "attention": "self_attn",
    "attention_norm": "input_layernorm",
    "wq": "q_proj",
    "wk": "k_proj",
    "wv": "v_proj",
    "wo": "o_proj",
    "ffn_norm": "post_attention_layernorm",
    "feed_forward": "mlp",
    "shared_experts": "shared_expert",
    "w1": "gate_proj",
    "w2": "down_proj",
    "w3": "up_proj",
}
OUR_NAME = {theirs: ours for ours, theirs in THEIR_NAME.items()}

HOLDERS = ("model", "state_dict", "model_state_dict", "module")  # keys under which a whole checkpoint keeps its weights
WRAPPERS = ("module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")  # put into names by torch
TABLES = ("pos_cis", "mask", "freqs_cos", "freqs_sin", "inv_freq")  # that old files carry; the model computes them
PRECISIONS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
OURS, THEIRS = (
    "attention|feed_forward|attention_norm|ffn_norm",
    "self_attn|mlp|input_layernorm|post_attention_layernorm",
)
IN_A_LAYER = re.compile(rf"(?P<prefix>(?:.*\.)?)layers\.\d+\.(?:(?P<ours>{OURS})|(?P<theirs>{THEIRS}))\.")

OTHERS = (  # other architectures, by one of their tensors' names
    (r"\.lora_(A|B|embedding_A|embedding_B)\b", "peft's LoRA adapter: `convert_model.py from-peft` reads its folder"),
    (r"\bself_attn\.[qkv]_proj\.bias$|\bshared_expert_gate\.", "a Qwen2 or Qwen2-MoE: `convert_model.py "
     "from-transformers` reads its folder"),
    (r"^(vision_model|text_model)\.|\bvision_encoder\.", "a CLIP, or a model with one inside: pass a vision tower as "
     "its folder, with --vision_model"),
    (r"(^|\.)h\.\d+\.(attn|mlp|ln_1)\.|(^|\.)wte\.weight$", "a GPT-2"),
    (r"\.(qweight|qzeros|absmax|quant_state|SCB)\b", "quantised weights, which cannot be trained on"),
    (r"^(base_model\.)?encoder\.|\.encoder\.layer\.", "an encoder such as BERT or T5"),
)  # fmt: skip


QK_NORM = re.compile(r"\bself_attn\.[qk]_norm\.")  # what a MiniMind2 has not
TIED = {  # embedding and output, by generation
    2: ("tok_embeddings.weight", "output.weight"),
    3: ("model.embed_tokens.weight", "lm_head.weight"),
}


class Recognised(NamedTuple):
    """A state dict under MiniMind's names, fp32.

    note: a description of the conversions; empty for a file in MiniMind2's form.
    newer: whether it had the names of April 2025.
    generation: the generation whose names the state has.
    """

    state: dict[str, Tensor]
    note: str = ""
    newer: bool = False
    generation: int = 2


def half_split(weight: Tensor, heads: int) -> Tensor:
    """wq or wk (heads * d, dim) with the rows of each head reordered from pairs (2i, 2i+1) to pairs (i, i + d/2)."""
    return weight.view(heads, -1, 2, weight.size(1)).transpose(1, 2).reshape_as(weight)


def interleaved(weight: Tensor, heads: int) -> Tensor:
    """The inverse of `half_split`."""
    return weight.view(heads, 2, -1, weight.size(1)).transpose(1, 2).reshape_as(weight)


def recognise(content: object, n_heads: int, n_kv_heads: int, generation: int | None = None) -> Recognised:
    """The content of a weight file as MiniMind's state dict or that of an adapter.

    Accepted are MiniMind2's own names, those of April 2025, and MiniMind-3's; prefixes of DDP, FSDP, torch.compile or
    Lightning; the state dict alone or under "model", "state_dict", "model_state_dict" or "module"; any floating
    precision; embedding and output, which are one matrix, both or only one of them.

    Args:
        content: the loaded file.
        n_heads, n_kv_heads: of the model; needed only for the names of April 2025.
        generation: of the model that it is for, 2 or 3, if the content does not show it, as for an adapter. None: it
            is recognised by its norms of queries and keys.

    Raises:
        ValueError: the meaning is not certain; the message says what the file looks like.
    """
    tensors, notes = _tensors_in(content)
    names = {name: ".".join(part for part in name.split(".") if part not in WRAPPERS) for name in tensors}
    if taken_off := sorted({part for name in names for part in name.split(".") if part in WRAPPERS}):
        notes.append(f"{' and '.join(taken_off)} removed from its names")
    _refuse_others(list(names.values()))
    found = next(filter(None, map(IN_A_LAYER.match, names.values())), None)
    if found is None:
        raise ValueError(f"contains nothing of a MiniMind model: {_some(tensors)}")
    prefix, newer = found["prefix"], found["theirs"] is not None
    if generation is None:
        generation = 3 if any(map(QK_NORM.search, names.values())) else 2
    outer = prefix.removesuffix("model.") if newer else prefix  # `lm_head` and `vision_proj` are siblings of `model`
    if outer:
        notes.append(f"{outer} removed from its names")
    newer = newer and generation == 2
    if newer:
        heads = f"{n_heads} and {n_kv_heads} heads"
        notes.append(f"its names are MiniMind's of April 2025, rows of q and k reordered as those of {heads}")

    state: dict[str, Tensor] = {}
    for name, plain in names.items():
        inside = plain.startswith(prefix)
        plain = plain.removeprefix(prefix) if inside else plain.removeprefix(outer)
        ours = _our_name(plain) if newer else plain
        if generation == 3 and inside and found["theirs"] and not plain.startswith("lm_head."):
            ours = f"model.{plain}"
        if ours.rpartition(".")[2] in TABLES:
            continue
        if ours in state:
            raise ValueError(f"contains {ours} twice")
        value = tensors[name].detach()
        if value.dtype not in PRECISIONS:
            raise ValueError(f"has {name} as {value.dtype}: quantised weights cannot be used")
        state[ours] = _in_pairs(ours, value.float(), n_heads, n_kv_heads) if newer else value.float()
    return Recognised(_tied(state, TIED[generation]), "; ".join(notes), newer, generation)


def _tensors_in(content: object) -> tuple[Mapping[str, Tensor], list[str]]:
    """The state dict in a file's content, and notes that say under which keys it was."""
    notes: list[str] = []
    while isinstance(content, Mapping):
        if content and all(isinstance(value, Tensor) for value in content.values()):
            if any(value.numel() == 0 for value in content.values()):
                raise ValueError(
                    "is one rank's shard of a model that DeepSpeed's ZeRO stage 3 or FSDP saved: merge the shards with "
                    "zero_to_fp32.py, which DeepSpeed leaves beside them"
                )
            return content, notes
        held = [key for key in HOLDERS if isinstance(content.get(key), Mapping)]
        if len(held) != 1:
            raise ValueError(_no_state_dict(content, held))
        notes.append(f"its weights are under {held[0]!r}")
        content = content[held[0]]
    raise ValueError(f"contains a {type(content).__name__}, not a state dict of tensors")


def _no_state_dict(content: Mapping, held: list[str]) -> str:
    if not content:
        return "is empty: it contains no tensors"
    if held:
        return f"contains several models, {' and '.join(held)}: save only one of them"
    if {"optimizer", "optimizer_state_dict", "param_groups", "base_optimizer_state"} & content.keys():
        return "contains an optimizer's state, but no weights"
    strange = next(key for key, value in content.items() if not isinstance(value, Tensor))
    return f"is not a plain state dict of tensors: its {strange!r} is a {type(content[strange]).__name__}"


def _refuse_others(names: list[str]) -> None:
    for pattern, words in OTHERS:
        if found := next((name for name in names if re.search(pattern, name)), None):
            raise ValueError(f"looks like {words} (it has {found})")


def _some(tensors: Mapping[str, Tensor]) -> str:
    more = f" and {len(tensors) - 3} more" if len(tensors) > 3 else ""
    return "its tensors are " + ", ".join(list(tensors)[:3]) + more


def _our_name(theirs: str) -> str:
    if theirs == "lm_head.weight":
        return "output.weight"
    ours = ".".join(OUR_NAME.get(part, part) for part in theirs.split("."))
    return ours.replace(".shared_experts.0.", ".shared_experts.")


def _in_pairs(name: str, value: Tensor, n_heads: int, n_kv_heads: int) -> Tensor:
    """wq, wk, or an adapter's B for them, with the rows in our order; any other tensor unchanged."""
    found = re.search(r"\.(wq|wk)\.(weight|lora\.B\.weight)$", name)
    if found is None:
        return value
    heads = n_heads if found[1] == "wq" else n_kv_heads
    if value.dim() != 2 or value.size(0) % (2 * heads):
        raise ValueError(f"has {name} of shape {[*value.shape]}, which does not fit {heads} heads")
    return interleaved(value, heads)


def _tied(state: dict[str, Tensor], pair: tuple[str, str]) -> dict[str, Tensor]:
    """The state dict with both embedding and output, if it has either of them."""
    there = [state[name] for name in pair if name in state]
    if len(there) == 2 and (there[0].shape != there[1].shape or not torch.equal(*map(torch.nan_to_num, there))):
        raise ValueError(f"has different {' and '.join(pair)}, but a MiniMind has one matrix for both")
    return state | dict.fromkeys(pair, there[0]) if there else state
