"""MiniMind in GGUF, the one-file format of llama.cpp, and the Modelfile that Ollama reads beside it.

llama.cpp's "llama" turns the same interleaved pairs of rows as we do, so every matrix goes in as it is. Its tokenizer
is our byte-level BPE ("gpt2"), told by a name how to cut text before merging.
"""

import json
import re
from pathlib import Path

import gguf
from transformers import PreTrainedTokenizerFast

from model import MiniMindLM
from model.chat import DEFAULT_SYSTEM_PROMPT
from model.chat_template import CHAT_TEMPLATE, without_generation_marks
from model.tokenizer import special_ids
from trainer.arguments import SAMPLING
from trainer.errors import UserError

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
BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}
SINGLE_DIGITS = {"type": "Digits", "individual_digits": True}


def pre_tokenizer_name(tokenizer: PreTrainedTokenizerFast) -> str:
    """llama.cpp's name for the way this tokenizer cuts text: "gpt-2" for GPT-2's pattern alone, as MiniMind2's,
    "smollm" for single digits first, as the shipped one's.

    Raises:
        UserError: another way.
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
    """Write weights, tokenizer and chat template of a Dense model into one file; norms stay fp32.

    Args:
        dtype: of the matrices, a key of DTYPES.
        name: by which llama.cpp introduces the model.

    Raises:
        UserError: a MoE, a tokenizer that llama.cpp does not know, or a width that blocks of 32 do not divide.
    """
    config = model.config
    if config.use_moe:
        raise UserError("GGUF export does not support MoE: use to-transformers, which writes a Qwen2-MoE")
    if dtype.startswith("q") and (config.dim % 32 or config.hidden_dim % 32):
        raise UserError(
            f"{dtype} stores blocks of 32, but dim {config.dim} and hidden_dim {config.hidden_dim} are not multiples"
        )
    storage, file_type = DTYPES[dtype]
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name(name)
    writer.add_file_type(file_type)
    writer.add_context_length(config.max_seq_len)
    writer.add_embedding_length(config.dim)
    writer.add_block_count(config.n_layers)
    writer.add_feed_forward_length(config.hidden_dim)
    writer.add_head_count(config.n_heads)
    writer.add_head_count_kv(config.n_kv_heads)
    writer.add_layer_norm_rms_eps(config.norm_eps)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_vocab_size(config.vocab_size)
    _add_tokenizer(writer, tokenizer, config.vocab_size)
    for key, value in model.state_dict().items():
        if key == "output.weight":  # tied: llama.cpp takes the embedding
            continue
        layer, part = re.fullmatch(r"(?:layers\.(\d+)\.)?(.+)\.weight", key).groups()
        their_name = TENSOR_NAME[part] if layer is None else f"blk.{layer}.{TENSOR_NAME[part]}"
        kind = storage if value.dim() == 2 else gguf.GGMLQuantizationType.F32
        if dtype == "q4_0" and part == "tok_embeddings":  # also the output matrix
            kind = gguf.GGMLQuantizationType.Q8_0
        packed = gguf.quants.quantize(value.float().cpu().numpy(), kind)
        writer.add_tensor(f"{their_name}.weight", packed, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _add_tokenizer(writer: gguf.GGUFWriter, tokenizer: PreTrainedTokenizerFast, vocab_size: int) -> None:
    """Entries, merges, special ids and the chat template; ids that the model has and the tokenizer not are unused."""
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
    writer.add_chat_template(without_generation_marks(CHAT_TEMPLATE))  # llama-cpp-python's Jinja is the plain one


def modelfile(weights: Path, tokenizer: PreTrainedTokenizerFast, context: int) -> str:
    """What `ollama create NAME -f FILE` reads: the weights, MiniMind's chat layout as a Go template, how to sample.

    Args:
        weights: the GGUF, in the same folder.
        tokenizer: its tokenizer, by whose bos and eos a turn begins and ends.
        context: tokens of prompt and answer together.
    """
    bos, eos = tokenizer.bos_token, tokenizer.eos_token
    return f'''FROM ./{weights.name}
TEMPLATE """{{{{ range .Messages }}}}{bos}{{{{ .Role }}}}
{{{{ .Content }}}}{eos}
{{{{ end }}}}{bos}assistant
"""
SYSTEM """{DEFAULT_SYSTEM_PROMPT}"""
PARAMETER stop "{eos}"
PARAMETER num_ctx {context}
PARAMETER temperature {SAMPLING["temperature"]}
PARAMETER top_p {SAMPLING["top_p"]}
PARAMETER repeat_penalty {SAMPLING["repetition_penalty"]}
'''
