"""State dicts written by other tools: loaded if their meaning is certain, else refused as what they look like."""

import re

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from model import LMConfig, MiniMindLM
from model.weight_layouts import THEIR_NAME, half_split, recognise

HEADS = (4, 2)


def make_model(**changes) -> MiniMindLM:
    torch.manual_seed(3)
    sizes = {"dim": 32, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "vocab_size": 50, "max_seq_len": 64}
    return MiniMindLM(LMConfig(**sizes | changes)).eval()


@pytest.fixture(scope="module", params=[False, True], ids=["dense", "moe"])
def state(request):
    return make_model(use_moe=request.param).state_dict()


def in_april_2025(state: dict, prefix: str = "model.", heads: tuple[int, int] = HEADS) -> dict:
    """A state dict with the names and row order of MiniMind's files since April 2025."""
    theirs = {}
    for name, value in state.items():
        if name.endswith(("wq.weight", "wk.weight")):
            value = half_split(value, heads["wk" in name])
        if name == "output.weight":
            theirs["lm_head.weight"] = value
            continue
        name = name.replace("shared_experts", "shared_experts.0")
        names = THEIR_NAME | {"shared_experts": "shared_experts"}
        theirs[prefix + ".".join(names.get(part, part) for part in name.split("."))] = value
    return theirs


def prefixed(state: dict, prefix: str) -> dict:
    return {prefix + name: value for name, value in state.items()}


FORMS = {
    "as MiniMind2 wrote it": (lambda state: state, ""),
    "old tables": (lambda state: state | {"pos_cis": torch.ones(4, 2), "layers.0.attention.mask": torch.ones(4)}, ""),
    "half precision": (lambda state: {name: value.bfloat16().double() for name, value in state.items()}, ""),
    "DDP": (lambda state: prefixed(state, "module."), "module removed from its names"),
    "torch.compile": (lambda state: prefixed(state, "_orig_mod."), "_orig_mod removed from its names"),
    "both": (lambda state: prefixed(state, "module._orig_mod."), "_orig_mod and module removed from its names"),
    "both, the other way": (lambda state: prefixed(state, "_orig_mod.module."), "_orig_mod and module"),
    "layers compiled alone": (
        lambda state: {re.sub(r"layers\.(\d+)", r"layers.\1._orig_mod", name): value for name, value in state.items()},
        "_orig_mod removed from its names",
    ),
    "Lightning": (
        lambda state: {"state_dict": prefixed(state, "model."), "epoch": 3, "loops": {"fit_loop": {}}},
        "its weights are under 'state_dict'; model. removed from its names",
    ),
    "Lightning, compiled": (lambda state: {"state_dict": prefixed(state, "model._orig_mod.")}, "model. removed"),
    "a checkpoint": (lambda state: {"model": state, "step": 3, "optimizer": {"state": {}}}, "are under 'model'"),
    "another": (lambda state: {"model_state_dict": state, "epoch": 3}, "are under 'model_state_dict'"),
    "DeepSpeed's": (lambda state: {"module": state, "ds_version": "0.16"}, "are under 'module'"),
    "nested": (
        lambda state: {"state_dict": {"model": state, "step": 1}},
        "'state_dict'; its weights are under 'model'",
    ),
    "no output": (lambda state: {name: value for name, value in state.items() if name != "output.weight"}, ""),
    "no embedding": (lambda state: {name: v for name, v in state.items() if name != "tok_embeddings.weight"}, ""),
    "April 2025": (
        in_april_2025,
        "names are MiniMind's of April 2025, rows of q and k reordered as those of 4 and 2 heads",
    ),
    "April 2025, no head": (
        lambda state: {name: value for name, value in in_april_2025(state).items() if name != "lm_head.weight"},
        "April 2025",
    ),
    "April 2025, without model": (lambda state: in_april_2025(state, ""), "April 2025"),
    "April 2025, tables": (lambda state: in_april_2025(state) | {"model.freqs_cos": torch.ones(4, 2)}, "April 2025"),
    "April 2025, Lightning, DDP": (
        lambda state: {"state_dict": prefixed(in_april_2025(state), "model.module.")},
        "module removed from its names; model. removed from its names; its names are MiniMind's of April 2025",
    ),
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_comes_back_bit_for_bit(state, form):
    change, told = FORMS[form]
    found = recognise(change(state), *HEADS)
    wanted = {name: value.bfloat16().float() for name, value in state.items()} if form == "half precision" else state
    assert found.state.keys() == state.keys()
    assert all(torch.equal(value, wanted[name]) for name, value in found.state.items())
    assert all(value.dtype == torch.float32 for value in found.state.values())
    assert told in found.note if told else found.note == ""
    assert found.newer == form.startswith("April")


@pytest.mark.parametrize("n_kv_heads", [1, 2, 4])
def test_a_llama_of_transformers_computes_the_same(n_kv_heads):
    """An oracle for the order of rows: transformers' code and names compute the same as ours."""
    torch.manual_seed(0)
    theirs = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=50,
            hidden_size=32,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=n_kv_heads,
            rms_norm_eps=1e-5,
            rope_parameters={"rope_type": "default", "rope_theta": 1e6},
            tie_word_embeddings=True,
            initializer_range=0.5,
        )
    ).eval()
    ours = make_model(n_kv_heads=n_kv_heads)
    ours.load_state_dict(recognise(theirs.state_dict(), 4, n_kv_heads).state)
    ids = torch.randint(50, (2, 40), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        assert (ours(ids).logits - theirs(ids).logits).abs().max() < 1e-4
        ours.load_state_dict(recognise(theirs.state_dict(), 2, n_kv_heads if n_kv_heads == 1 else 2).state)
        assert (ours(ids).logits - theirs(ids).logits).abs().max() > 0.1  # the test detects a wrong order


def test_an_adapter_is_read_likewise():
    adapter = {f"layers.{n}.attention.{m}.lora.{s}.weight": torch.randn(32, 4) if s == "B" else torch.randn(4, 32)
               for n in range(2) for m in ("wq", "wo") for s in "AB"}  # fmt: skip
    assert recognise(prefixed(adapter, "module."), *HEADS).state.keys() == adapter.keys()
    newer = {}
    for name, value in adapter.items():
        value = half_split(value, 4) if "wq.lora.B" in name else value
        newer["model." + ".".join(THEIR_NAME.get(part, part) for part in name.split("."))] = value
    found = recognise(newer, *HEADS)
    assert found.state.keys() == adapter.keys()
    assert all(torch.equal(value, adapter[name]) for name, value in found.state.items())


def one(name: str, **others) -> dict:
    return {name: torch.zeros(2, 2), **others}


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ({}, "is empty: it contains no tensors"),
        ({"model": {}}, "is empty: it contains no tensors"),
        ([1, 2], "contains a list"),
        (torch.zeros(3), "contains a Tensor"),
        ({"a": 1}, "not a plain state dict of tensors: its 'a' is a int"),
        ({"state": {}, "param_groups": []}, "contains an optimizer's state, but no weights"),
        ({"scaler": {}, "optimizer": {"state": {}}}, "contains an optimizer's state, but no weights"),
        ({"model": one("a"), "state_dict": one("b")}, "contains several models, model and state_dict"),
        (one("layers.0.attention.wq.weight", b=torch.zeros(0)), "is one rank's shard of a model"),
        ({"module": {"layers.0.attention.wq.weight": torch.zeros(0)}}, "zero_to_fp32.py"),
        (one("base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"), "looks like peft's LoRA adapter"),
        (one("model.layers.0.self_attn.q_proj.bias"), "looks like a Qwen2"),
        (one("vision_model.encoder.layers.0.mlp.fc1.weight"), "looks like a CLIP"),
        (one("vision_encoder.vision_model.post_layernorm.weight"), "--vision_model"),
        (one("transformer.h.0.attn.c_attn.weight"), "looks like a GPT-2"),
        (one("model.layers.0.self_attn.q_proj.qweight"), "looks like quantised weights"),
        (one("encoder.layer.0.attention.self.query.weight"), "looks like an encoder such as BERT or T5"),
        (one("a.weight", **one("b.weight")), "contains nothing of a MiniMind model: its tensors are a.weight, b."),
        (one("layers.0.ffn_norm.weight", **one("module.layers.0.ffn_norm.weight")), "ffn_norm.weight twice"),
        ({"layers.0.attention.wq.weight": torch.zeros(2, dtype=torch.int8)}, "torch.int8: quantised"),
        (
            {**one("layers.0.ffn_norm.weight"), **one("tok_embeddings.weight"), "output.weight": torch.ones(2, 2)},
            "different tok_embeddings.weight and output.weight",
        ),
        ({"model.layers.0.self_attn.q_proj.weight": torch.zeros(6, 4)}, "which does not fit 4 heads"),
    ],
)  # fmt: skip
def test_what_is_not_certain_is_called_what_it_looks_like(content, told):
    with pytest.raises(ValueError, match=re.escape(told)):
        recognise(content, *HEADS)


def test_a_second_shared_expert_is_not_dropped():
    state = in_april_2025(make_model(use_moe=True).state_dict())
    more = {name.replace("shared_experts.0", "shared_experts.1"): v for name, v in state.items() if "shared" in name}
    found = recognise(state | more, *HEADS).state
    assert [name for name in found if "shared_experts.1" in name]  # and strict loading reports it
