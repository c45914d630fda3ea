"""GGUF files: read by the gguf package, and run by llama.cpp where it is installed."""

import codecs
import copy
import itertools
import random
import unicodedata

import gguf
import numpy as np
import pytest
from jinja2.sandbox import ImmutableSandboxedEnvironment
from transformers import AutoTokenizer

from model.chat import DEFAULT_SYSTEM_PROMPT, render_chat
from model.tokenizer import token_bytes
from scripts.formats.gguf_file import modelfile, pre_tokenizer_name, write_gguf
from tests.scripts.conversion import QUESTIONS, greedy, make_model, prompts
from tests.scripts.llama_cpp import serve_gguf
from trainer.errors import UserError
from trainer.weights import load_tokenizer

TEXTS = (
    "",
    "Hello, world! It's 12 o'clock, isn't it?   3.14  + 2 = 5\n\n\tdef f(x):\n    return x ** 2  \n",
    "你好，世界！２０２５年１２月，第Ⅳ章 ½ ③ 一二三 🙂👩‍👩‍👧 𠮷 é e\u0301 \u00a0\u3000x",
    " a  b   1 2  3 \r\n \n 4\t5 '' 's'll I'M I'm ...--- __x__ <think>1</think> < think>",
)


LLAMA_CPP = {  # its names for a layer's tensors
    "attn_norm": "attention_norm",
    "attn_q": "attention.wq",
    "attn_k": "attention.wk",
    "attn_v": "attention.wv",
    "attn_output": "attention.wo",
    "ffn_norm": "ffn_norm",
    "ffn_gate": "feed_forward.w1",
    "ffn_down": "feed_forward.w2",
    "ffn_up": "feed_forward.w3",
}


@pytest.fixture(scope="module")
def model(tiny_tokenizer):
    return make_model(len(tiny_tokenizer))


def write(model, tokenizer, path, dtype="f32"):
    write_gguf(model, tokenizer, path, dtype, "tiny")
    return path


@pytest.mark.parametrize(
    ("dtype", "off"), [("f32", 0), ("f16", 2**-11), ("bf16", 2**-8), ("q8_0", 1 / 127), ("q4_0", 1 / 8)]
)
def test_every_matrix_is_there_within_its_rounding(model, tiny_tokenizer, tmp_path, dtype, off):
    reader = gguf.GGUFReader(write(model, tiny_tokenizer, tmp_path / "x.gguf", dtype))
    tensors = {tensor.name: gguf.quants.dequantize(tensor.data, tensor.tensor_type) for tensor in reader.tensors}
    state = model.state_dict()
    assert len(tensors) == len(state) - 1  # the output is the embedding
    pairs = [("token_embd", "tok_embeddings"), ("output_norm", "norm")]
    pairs += [(f"blk.{n}.{theirs}", f"layers.{n}.{ours}") for n in range(2) for theirs, ours in LLAMA_CPP.items()]
    assert len(pairs) == len(tensors)
    for theirs, ours in pairs:
        value, right = tensors[f"{theirs}.weight"], state[f"{ours}.weight"].numpy()
        assert value.shape == right.shape
        exact = off == 0 or "norm" in theirs
        assert np.abs(value - right).max() <= (0 if exact else off * np.abs(right).max())


def test_the_template_of_the_file_is_plain_jinja_and_lays_a_chat_out_as_we_do(model, tiny_tokenizer, tmp_path):
    """Other programs render it so; whatever template the tokenizer brought, this is the layout a MiniMind learns."""
    other = copy.deepcopy(tiny_tokenizer)
    other.chat_template = "{{ messages[0]['content'] }}"
    reader = gguf.GGUFReader(write(model, other, tmp_path / "x.gguf"))
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string(reader.get_field("tokenizer.chat_template").contents())
    chat = [
        {"role": "user", "content": " hi"},
        {"role": "assistant", "content": "你好 "},
        {"role": "user", "content": "\nbye"},
    ]
    text = template.render(messages=chat, add_generation_prompt=True, bos_token="<s>", eos_token="</s>")
    ids = render_chat(tiny_tokenizer, chat, add_generation_prompt=True)[0]
    assert tiny_tokenizer.encode(text, add_special_tokens=False) == ids


def test_every_number_is_the_models(tiny_tokenizer, tmp_path):
    sizes = {"dim": 96, "n_layers": 3, "n_heads": 6, "n_kv_heads": 3, "hidden_dim": 160, "max_seq_len": 200}
    model = make_model(len(tiny_tokenizer) + 5, **sizes, rope_theta=1e4, norm_eps=1e-6)
    reader = gguf.GGUFReader(write(model, tiny_tokenizer, tmp_path / "x.gguf"))
    for field, value in (
        ("llama.embedding_length", 96),
        ("llama.block_count", 3),
        ("llama.attention.head_count", 6),
        ("llama.attention.head_count_kv", 3),
        ("llama.feed_forward_length", 160),
        ("llama.context_length", 200),
        ("llama.rope.dimension_count", 16),
        ("llama.rope.freq_base", 1e4),
        ("llama.attention.layer_norm_rms_epsilon", pytest.approx(1e-6)),
        ("llama.vocab_size", len(tiny_tokenizer) + 5),
        ("tokenizer.ggml.bos_token_id", 1),
        ("tokenizer.ggml.eos_token_id", 2),
        ("tokenizer.ggml.padding_token_id", 0),
        ("tokenizer.ggml.add_bos_token", False),  # the template begins with it: it would appear twice
        ("tokenizer.ggml.add_eos_token", False),
    ):
        assert reader.get_field(field).contents() == value, field
    tokens, types = (reader.get_field(f"tokenizer.ggml.{name}").contents() for name in ("tokens", "token_type"))
    assert tokens[: len(tiny_tokenizer)] == tiny_tokenizer.convert_ids_to_tokens(range(len(tiny_tokenizer)))
    assert (tokens[:4], types[:4]) == (["<unk>", "<s>", "</s>", "<think>"], [3, 3, 3, 4])  # control, user-defined
    assert (types[20], types[-5:]) == (1, [5] * 5)  # normal, unused


def test_what_gguf_cannot_hold_is_refused(model, tiny_tokenizer, tmp_path):
    with pytest.raises(UserError, match="MoE"):
        write(make_model(50, use_moe=True), tiny_tokenizer, tmp_path / "x.gguf")
    with pytest.raises(UserError, match="blocks of 32"):
        write(make_model(50, dim=48), tiny_tokenizer, tmp_path / "x.gguf", "q8_0")
    other = AutoTokenizer.from_pretrained(load_tokenizer().name_or_path)
    from tokenizers import pre_tokenizers

    other.backend_tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    with pytest.raises(UserError, match="Whitespace"):
        write(model, other, tmp_path / "x.gguf")
    assert not list(tmp_path.iterdir())


def test_each_tokenizer_has_its_name(tiny_tokenizer):
    assert pre_tokenizer_name(tiny_tokenizer) == "gpt-2"  # like MiniMind2's
    assert pre_tokenizer_name(load_tokenizer()) == "smollm"


def test_the_modelfile_lays_a_chat_out_as_we_do(tmp_path, tiny_tokenizer):
    """Ollama uses Go's templates: `range` repeats its body for each message, dots access fields."""
    text = modelfile(tmp_path / "tiny.gguf", tiny_tokenizer, 256)
    assert text.startswith("FROM ./tiny.gguf\n")
    body = text.split('TEMPLATE """')[1].split('"""')[0]
    turn = body.removeprefix("{{ range .Messages }}").removesuffix("{{ end }}<s>assistant\n")
    chat = [{"role": "system", "content": DEFAULT_SYSTEM_PROMPT}, {"role": "user", "content": "hi"}]
    laid = "".join(turn.replace("{{ .Role }}", t["role"]).replace("{{ .Content }}", t["content"]) for t in chat)
    laid += "<s>assistant\n"
    assert laid == tiny_tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert f'SYSTEM """{DEFAULT_SYSTEM_PROMPT}"""' in text


# --------------------------------------------------------------------------------------------------- by llama.cpp


def test_llama_cpp_writes_the_same_greedy_text(model, tiny_tokenizer, tmp_path):
    path = write(model, tiny_tokenizer, tmp_path / "x.gguf")
    asked = prompts(tiny_tokenizer)
    answers = [greedy(model, ids) for ids in asked]
    with serve_gguf(path) as llama:
        for question, ids in zip(QUESTIONS, asked, strict=True):
            chat = [{"role": "user", "content": question}]
            text = llama.ask("apply-template", messages=chat)["prompt"]
            assert text == tiny_tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
            assert llama.ask("tokenize", content=text, add_special=False, parse_special=True)["tokens"] == ids
        assert [reply["tokens"] for reply in llama.complete(asked, 24)] == answers
        settings = {"temperature": 0, "max_tokens": 24, "reasoning_format": "none"}
        reply = llama.ask("v1/chat/completions", messages=[{"role": "user", "content": QUESTIONS[0]}], **settings)
    spelled = b"".join(token_bytes(tiny_tokenizer)[token] for token in answers[0])
    answer = codecs.getincrementaldecoder("utf-8")("replace").decode(spelled)  # less a half character at the end
    assert len(answer) > 8
    assert reply["choices"][0]["message"]["content"] == answer


@pytest.mark.parametrize("which", ["shipped", "as MiniMind2's"])
def test_llama_cpp_cuts_text_as_we_do(which, plain_tokenizer, tmp_path, shared):
    tokenizer = load_tokenizer() if which == "shipped" else plain_tokenizer
    path = write(make_model(len(tokenizer)), tokenizer, tmp_path / "x.gguf")
    random.seed(0)
    assigned = [chr(c) for c in range(32, 0x30000) if unicodedata.category(chr(c)) not in ("Cn", "Cs", "Co")]
    noise = ["".join(random.choices(assigned, k=20)) for _ in range(300)]
    mixed = ["".join(random.choices(" 1a中.'\n\t٣½é", k=30)) for _ in range(300)]
    lines = (shared / "data/pretrain_hq.jsonl").read_text(encoding="utf-8").splitlines()[::150]
    texts = [*TEXTS, *noise, *mixed, *lines]
    with serve_gguf(path) as llama:
        content = list(itertools.chain.from_iterable((text, -1) for text in texts))  # a number is taken for an id
        ids = iter(llama.ask("tokenize", content=content, add_special=False, parse_special=False)["tokens"])
    for text in texts:
        theirs = list(itertools.takewhile(lambda token: token != -1, ids))
        assert theirs == tokenizer.encode(text, add_special_tokens=False), repr(text)
    assert next(ids, None) is None


@pytest.mark.parametrize(("dtype", "number"), [("f32", 0), ("f16", 1), ("bf16", 32), ("q8_0", 7), ("q4_0", 2)])
def test_what_a_file_calls_itself(model, tiny_tokenizer, tmp_path, dtype, number):
    """llama.cpp's numbers for file types, see llama_ftype in its llama.h."""
    reader = gguf.GGUFReader(write(model, tiny_tokenizer, tmp_path / "x.gguf", dtype))
    assert reader.get_field("general.file_type").contents() == number
    assert reader.get_field("general.name").contents() == "tiny"
    assert reader.get_field("general.architecture").contents() == "llama"
    assert reader.get_field("tokenizer.ggml.model").contents() == "gpt2"
    norms = [tensor.tensor_type for tensor in reader.tensors if "norm" in tensor.name]
    assert set(norms) == {gguf.GGMLQuantizationType.F32}


@pytest.mark.parametrize("sizes", [{"dim": 48}, {"hidden_dim": 80}])
def test_blocks_of_32_divide_width_and_hidden_width(sizes, tiny_tokenizer, tmp_path):
    uneven = make_model(len(tiny_tokenizer), **sizes)
    with pytest.raises(UserError, match="blocks of 32"):
        write(uneven, tiny_tokenizer, tmp_path / "x.gguf", "q8_0")
    write(uneven, tiny_tokenizer, tmp_path / "x.gguf", "f16")


def test_how_ollama_is_told_to_write(tmp_path, tiny_tokenizer):
    lines = modelfile(tmp_path / "tiny.gguf", tiny_tokenizer, 256).splitlines()
    assert [line for line in lines if line.startswith("PARAMETER")] == [
        *('PARAMETER stop "</s>"', "PARAMETER num_ctx 256", "PARAMETER temperature 0.85", "PARAMETER top_p 0.85"),
        "PARAMETER repeat_penalty 1.0",
    ]
