"""MiniMind-3 as a GGUF: llama.cpp's names, scaled positions, its chat template; and run by llama.cpp."""

import math

import gguf
import numpy as np
import pytest
import torch

from scripts.formats.gguf_file import modelfile, write_gguf
from tests.scripts.llama_cpp import next_distributions, serve_gguf
from tests.scripts.test_formats_minimind3 import MODELS, lively
from tests.trainer.test_loading_minimind3 import logits
from trainer.weights import load_tokenizer


@pytest.fixture(scope="module")
def third_tokenizer(shared):
    folder = shared / "fixtures" / "minimind3_tokenizer"
    if not folder.is_dir():
        pytest.skip("no tokenizer of MiniMind-3")
    return load_tokenizer(folder)


def write(model, tokenizer, path):
    write_gguf(model, tokenizer, path, "f32", "tiny")
    return path


@pytest.mark.parametrize("use_moe", [False, True])
def test_every_tensor_stands_in_the_file_as_it_is(use_moe, tiny_tokenizer, tmp_path):
    model = lively(len(tiny_tokenizer), use_moe=use_moe)
    reader = gguf.GGUFReader(write(model, tiny_tokenizer, tmp_path / "x.gguf"))
    kind = "qwen3moe" if use_moe else "qwen3"
    assert reader.get_field("general.architecture").contents() == kind
    facts = {"context_length": 256, "attention.head_count": 4, "attention.head_count_kv": 2, "attention.key_length": 8}
    facts |= {"expert_count": 4, "expert_used_count": 1, "expert_feed_forward_length": 128} if use_moe else {}
    for name, value in facts.items():
        assert reader.get_field(f"{kind}.{name}").contents() == value, name
    tensors = {tensor.name: torch.from_numpy(np.array(tensor.data)) for tensor in reader.tensors}
    state = model.state_dict()
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.QWEN3MOE if use_moe else gguf.MODEL_ARCH.QWEN3, 2)
    for key, value in state.items():
        if key == "lm_head.weight" or ".experts." in key:
            continue
        assert torch.equal(tensors.pop(names.get_name(key, (".weight",))), value), key
    for layer in range(2 if use_moe else 0):
        for part, theirs in (("gate_proj", "gate"), ("up_proj", "up"), ("down_proj", "down")):
            several = [state[f"model.layers.{layer}.mlp.experts.{e}.{part}.weight"] for e in range(4)]
            assert torch.equal(tensors.pop(f"blk.{layer}.ffn_{theirs}_exps.weight"), torch.stack(several))
    assert not tensors


def test_llama_cpps_own_yarn_factor_is_cancelled(tiny_tokenizer, tmp_path):
    reader = gguf.GGUFReader(
        write(lively(len(tiny_tokenizer), inference_rope_scaling=True), tiny_tokenizer, tmp_path / "x.gguf")
    )
    scaling = {"type": "yarn", "factor": 16.0, "original_context_length": 2048}
    for name, value in scaling.items():
        assert reader.get_field(f"qwen3.rope.scaling.{name}").contents() == value
    told = reader.get_field("qwen3.rope.scaling.attn_factor").contents()
    assert told * (1 + 0.1 * math.log(16)) == pytest.approx(1.0)


def test_the_modelfile_and_the_template_are_those_of_its_layout(third_tokenizer, tmp_path):
    text = modelfile(tmp_path / "x.gguf", third_tokenizer, 256)
    body = text.split('TEMPLATE """')[1].split('"""')[0]
    turn, _, end = body.removeprefix("{{ range .Messages }}").rpartition("{{ end }}")
    chat = [("user", "hi"), ("assistant", "yes"), ("user", "?")]
    laid = ""
    for role, content in chat:
        head, _, rest = turn.partition('{{ if eq .Role "assistant" }}')
        thought, _, tail = rest.partition("{{ end }}")
        laid += head.replace("{{ .Role }}", role) + (thought if role == "assistant" else "")
        laid += tail.replace("{{ .Content }}", content)
    turns = [{"role": role, "content": content} for role, content in chat]
    assert laid + end == third_tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    assert "SYSTEM" not in text
    model = lively(len(third_tokenizer))
    reader = gguf.GGUFReader(write(model, third_tokenizer, tmp_path / "x.gguf"))
    assert reader.get_field("tokenizer.chat_template").contents() == third_tokenizer.chat_template
    assert reader.get_field("tokenizer.ggml.pre").contents() == "gpt-2"


def test_llama_cpp_lays_a_chat_out_as_the_tokenizer_does(third_tokenizer, tmp_path):
    turns = ("user", "hi"), ("assistant", "yes"), ("user", "?")
    chat = [{"role": role, "content": content} for role, content in turns]
    text = third_tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    with serve_gguf(write(lively(len(third_tokenizer)), third_tokenizer, tmp_path / "x.gguf")) as llama:
        assert llama.ask("apply-template", messages=chat)["prompt"] == text
        ids = llama.ask("tokenize", content=text, add_special=False, parse_special=True)["tokens"]
    assert ids == third_tokenizer.encode(text, add_special_tokens=False)


@pytest.mark.parametrize("name", MODELS)
def test_llama_cpp_computes_the_same_distributions(name, tiny_tokenizer, tmp_path):
    """After ever longer beginnings of a text, read on from its cache, and after the whole text read in one go."""
    model = lively(len(tiny_tokenizer), **MODELS[name])
    path = write(model, tiny_tokenizer, tmp_path / "x.gguf")
    ids = torch.randint(len(tiny_tokenizer), (1, 200), generator=torch.Generator().manual_seed(0))
    ours = logits(model, ids)[0].log_softmax(-1)
    lengths = [1, 2, 3, 31, 32, 33, 64, 65, 100, 150, 199, 200]
    with serve_gguf(path) as llama:
        theirs = next_distributions(llama, [ids[0, :n].tolist() for n in lengths], tiny_tokenizer)
        at_once = next_distributions(llama, ids.tolist(), tiny_tokenizer, cache_prompt=False)
    torch.testing.assert_close(theirs, ours[[n - 1 for n in lengths]], rtol=0, atol=1e-4)
    torch.testing.assert_close(at_once, ours[-1:], rtol=0, atol=1e-4)
