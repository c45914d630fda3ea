"""MiniMind in GGUF, the one-file format of llama.cpp, and the Modelfile that Ollama reads beside it.

llama.cpp's "llama" rotates the same interleaved pairs of rows as we do, and its "qwen3" and "qwen3moe" those of a
MiniMind-3, so every matrix is stored unchanged. Its tokenizer "gpt2" is our byte-level BPE; a name says how text is
split before merging.
"""

import json
import math
import re
from collections.abc import Iterator
from pathlib import Path

import gguf
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from model import LMConfig, MiniMindLM
from model.chat import DEFAULT_SYSTEM_PROMPT
from model.chat_template import chat_template_of, without_generation_marks
from model.rope_scaling import ntk_theta
from model.template_chat import lays_out_thinking
from model.tokenizer import special_ids
from trainer.errors import UserError
from trainer.inference_arguments import SAMPLING

DTYPES = {  # of matrices, by the name on the command line: how a tensor is stored, and what the file calls itself
    "f32": (gguf.GGMLQuantizationType.F32, gguf.LlamaFileType.ALL_F32),
    "f16": (gguf.GGMLQuantizationType.F16, gguf.LlamaFileType.MOSTLY_F16),
    "bf16": (gguf.GGMLQuantizationType.BF16, gguf.LlamaFileType.MOSTLY_BF16),
    "q8_0": (gguf.GGMLQuantizationType.Q8_0, gguf.LlamaFileType.MOSTLY_Q8_0),
    "q4_0": (gguf.GGMLQuantizationType.Q4_0, gguf.LlamaFileType.MOSTLY_Q4_0),  # the embedding in q8_0
}
TENSOR_NAME = {
    "tok_embeddings": "token_embd",
    "norm": "output_norm",
    "attention_norm": "attn_norm",
    "attention.wq": "attn_q",
    "attention.wk": "attn_k",
    "attention.wv": "attn_v",
    "attention.wo": "attn_output",
    "ffn_norm": "ffn_norm",
    "feed_forward.w1": "ffn_gate",
    "feed_forward.w2": "ffn_down",
    "feed_forward.w3": "ffn_up",
}
TENSOR_NAME_3 = {  # of generation 3
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.down_proj": "ffn_down",
    "mlp.up_proj": "ffn_up",
    "mlp.gate": "ffn_gate_inp",  # the router, which llama.cpp wants in fp32
}
BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}
SINGLE_DIGITS = {"type": "Digits", "individual_digits": True}


def pre_tokenizer_name(tokenizer: PreTrainedTokenizerFast) -> str:
    """llama.cpp's name for the way this tokenizer splits text: "gpt-2" for only GPT-2's pattern, as in MiniMind2's,
    "smollm" for single digits first, as in the shipped one.

    Raises:
        UserError: it splits text differently.
    """
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    cuts = backend["pre_tokenizer"] or {}
    steps = [
        {key: value for key, value in step.items() if key != "trim_offsets"}  # of offsets, which GGUF has not
        for step in cuts.get("pretokenizers", [cuts])
    ]
    if backend["normalizer"] is None and backend["model"]["type"] == "BPE":
        if steps == [BYTE_LEVEL]:
            return "gpt-2"
        if steps == [SINGLE_DIGITS, BYTE_LEVEL]:
            return "smollm"
    raise UserError(f"{tokenizer.name_or_path}: llama.cpp does not support this pre-tokenizer: {json.dumps(cuts)}")


def write_gguf(model: MiniMindLM, tokenizer: PreTrainedTokenizerFast, path: Path, dtype: str, name: str) -> None:
    """Write weights, tokenizer and chat template into one file; norms and routers stay fp32.

    Args:
        dtype: the matrices' type, a key of DTYPES.
        name: the model's name in llama.cpp.

    Raises:
        UserError: a mixture of experts of generation 2, a tokenizer that llama.cpp does not know, or a width that is
            not a multiple of 32.
    """
    config = model.config
    third = config.generation == 3
    if config.variant:
        raise UserError(f"GGUF export does not support {config.variant}")
    if config.use_moe and not third:
        raise UserError("GGUF export does not support MoE: use to-transformers, which writes a Qwen2-MoE")
    if dtype.startswith("q") and (config.dim % 32 or config.hidden_dim % 32):
        raise UserError(
            f"{dtype} stores blocks of 32, but dim {config.dim} and hidden_dim {config.hidden_dim} are not multiples"
        )
    storage, file_type = DTYPES[dtype]
    writer = gguf.GGUFWriter(path, ("qwen3moe" if config.use_moe else "qwen3") if third else "llama")
    writer.add_name(name)
    writer.add_file_type(file_type)
    writer.add_context_length(config.max_seq_len)
    writer.add_embedding_length(config.dim)
    writer.add_block_count(config.n_layers)
    writer.add_feed_forward_length(config.hidden_dim)
    writer.add_head_count(config.n_heads)
    writer.add_head_count_kv(config.n_kv_heads)
    writer.add_layer_norm_rms_eps(config.norm_eps)
    _add_rope(writer, config)
    if third:
        writer.add_key_length(config.head_dim)
        writer.add_value_length(config.head_dim)
    if config.use_moe:
        writer.add_expert_count(config.n_routed_experts)
        writer.add_expert_used_count(config.num_experts_per_tok)
        writer.add_expert_feed_forward_length(config.hidden_dim)
    writer.add_vocab_size(config.vocab_size)
    _add_tokenizer(writer, tokenizer, config.vocab_size)
    for their_name, value in (_tensors_of_3 if third else _tensors_of_2)(model.state_dict()):
        matrix = value.dim() >= 2 and not their_name.endswith("ffn_gate_inp")
        kind = storage if matrix else gguf.GGMLQuantizationType.F32
        if dtype == "q4_0" and their_name == "token_embd":  # also the output matrix
            kind = gguf.GGMLQuantizationType.Q8_0
        packed = gguf.quants.quantize(value.float().cpu().numpy(), kind)
        writer.add_tensor(f"{their_name}.weight", packed, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _tensors_of_2(state: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Each matrix and norm under llama.cpp's name, except the tied output, which llama.cpp takes from the embedding."""
    for key, value in state.items():
        if key != "output.weight":
            layer, part = re.fullmatch(r"(?:layers\.(\d+)\.)?(.+)\.weight", key).groups()
            yield TENSOR_NAME[part] if layer is None else f"blk.{layer}.{TENSOR_NAME[part]}", value


def _tensors_of_3(state: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """The same for generation 3; a layer's experts become one tensor (experts, out, in) per matrix."""
    experts: dict[str, list[Tensor]] = {}
    for key, value in state.items():
        if key == "lm_head.weight":
            continue
        layer, expert, part = re.fullmatch(
            r"(?:model\.layers\.(\d+)\.)?(?:mlp\.experts\.(\d+)\.)?(.+)\.weight", key
        ).groups()
        if expert is not None:
            name = f"blk.{layer}.{TENSOR_NAME_3[f'mlp.{part}']}_exps"
            experts.setdefault(name, []).append(value)  # in their order, as modules are
            continue
        yield TENSOR_NAME_3[part] if layer is None else f"blk.{layer}.{TENSOR_NAME_3[part]}", value
    for name, matrices in experts.items():
        yield name, torch.stack(matrices)


def _add_rope(writer: gguf.GGUFWriter, config: LMConfig) -> None:
    """Base and scaling of the positions. llama.cpp itself multiplies YaRN's cosine and sine by 1 + 0.1 ln(factor), so
    it gets the attention factor divided by that."""
    scaling = config.rope_scaling or {}
    kind, factor = scaling.get("rope_type"), scaling.get("factor", 1.0)
    stretched = kind == "ntk"  # by its other name: a larger base
    writer.add_rope_freq_base(ntk_theta(config.rope_theta, factor, config.head_dim) if stretched else config.rope_theta)
    writer.add_rope_dimension_count(config.head_dim)
    if kind in ("linear", "yarn"):
        writer.add_rope_scaling_type(gguf.RopeScalingType(kind))
        writer.add_rope_scaling_factor(factor)
        if "original_max_position_embeddings" in scaling:
            writer.add_rope_scaling_orig_ctx_len(scaling["original_max_position_embeddings"])
    if kind == "yarn":
        writer.add_rope_scaling_attn_factors(scaling["attention_factor"] / (1 + 0.1 * math.log(factor)))
        writer.add_rope_scaling_yarn_beta_fast(scaling["beta_fast"])
        writer.add_rope_scaling_yarn_beta_slow(scaling["beta_slow"])


def _add_tokenizer(writer: gguf.GGUFWriter, tokenizer: PreTrainedTokenizerFast, vocab_size: int) -> None:
    """Vocabulary, merges, special ids and chat template; ids that only the model has are marked as unused."""
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    added = tokenizer.added_tokens_decoder
    tokens, types = [], []
    for token_id, token in enumerate(tokenizer.convert_ids_to_tokens(range(len(tokenizer)))):
        kind = gguf.TokenType.NORMAL
        if token_id in added:
            kind = gguf.TokenType.CONTROL if added[token_id].special else gguf.TokenType.USER_DEFINED
        tokens.append(token)
        types.append(kind)
    for token_id in range(len(tokenizer), vocab_size):
        tokens.append(f"[PAD{token_id}]")
        types.append(gguf.TokenType.UNUSED)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre_tokenizer_name(tokenizer))
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges([m if isinstance(m, str) else " ".join(m) for m in backend["model"]["merges"]])
    ids = special_ids(tokenizer)
    writer.add_bos_token_id(ids["bos_token_id"])
    writer.add_eos_token_id(ids["eos_token_id"])
    writer.add_pad_token_id(ids["pad_token_id"])
    writer.add_add_bos_token(False)  # the chat template begins with it
    writer.add_add_eos_token(False)
    writer.add_chat_template(
        without_generation_marks(chat_template_of(tokenizer))
    )  # llama-cpp-python's Jinja is the plain one


def modelfile(weights: Path, tokenizer: PreTrainedTokenizerFast, context: int) -> str:
    """The Modelfile for `ollama create NAME -f FILE`: weights, chat layout as a Go template, sampling settings.

    Args:
        weights: the GGUF, in the same folder.
        tokenizer: its tokenizer, whose bos and eos begin and end a turn.
        context: maximum length of prompt and answer together, in tokens.
    """
    bos, eos = tokenizer.bos_token, tokenizer.eos_token
    if lays_out_thinking(tokenizer):  # without a thought, and without a system prompt of its own
        empty = "<think>\n\n</think>\n\n"
        thought, opened, system = f'{{{{ if eq .Role "assistant" }}}}{empty}{{{{ end }}}}', empty, ""
    else:
        thought, opened, system = "", "", f'SYSTEM """{DEFAULT_SYSTEM_PROMPT}"""\n'
    return f'''FROM ./{weights.name}
TEMPLATE """{{{{ range .Messages }}}}{bos}{{{{ .Role }}}}
{thought}{{{{ .Content }}}}{eos}
{{{{ end }}}}{bos}assistant
{opened}"""
{system}PARAMETER stop "{eos}"
PARAMETER num_ctx {context}
PARAMETER temperature {SAMPLING["temperature"]}
PARAMETER top_p {SAMPLING["top_p"]}
PARAMETER repeat_penalty {SAMPLING["repetition_penalty"]}
'''
