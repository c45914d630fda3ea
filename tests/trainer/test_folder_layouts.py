"""transformers folders as MiniMinds: what is loaded, whoever wrote it, and what is refused by name.

tests/scripts/test_transformers_format.py checks that a folder written by us loads bit for bit.
"""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from model import LMConfig
from scripts.formats.transformers_folder import write_folder
from tests.model.test_weight_layouts import in_april_2025
from tests.scripts.conversion import copy_folder, make_model
from trainer.errors import UserError
from trainer.loading import load_for_inference


@pytest.fixture(scope="module")
def llama(tiny_tokenizer, tmp_path_factory):
    """A dense model and its folder."""
    model = make_model(len(tiny_tokenizer))
    folder = tmp_path_factory.mktemp("folder") / "llama"
    write_folder(model, tiny_tokenizer, folder)
    return model, folder


def test_our_own_save_pretrained_folder_and_old_bin_files_are_read(tiny_tokenizer, tmp_path):
    model = make_model(len(tiny_tokenizer), use_moe=True)
    model.save_pretrained(tmp_path / "minimind")
    tiny_tokenizer.save_pretrained(tmp_path / "minimind")
    (tmp_path / "bin").mkdir()
    write_folder(model, tiny_tokenizer, tmp_path / "bin")
    state = load_file(tmp_path / "bin" / "model.safetensors")
    state["lm_head.weight"] = state["model.embed_tokens.weight"].clone()
    torch.save(state, tmp_path / "bin" / "pytorch_model.bin")
    (tmp_path / "bin" / "model.safetensors").unlink()
    for name in ("minimind", "bin"):
        back, _ = load_for_inference(tmp_path / name)
        assert all(torch.equal(a, b) for a, b in zip(back.parameters(), model.parameters(), strict=True)), name


@pytest.mark.parametrize("use_moe", [False, True])
def test_a_minimind_folder_of_april_2025_is_read(tiny_tokenizer, tmp_path, use_moe):
    """model_type "minimind", with transformers' names for sizes and for all tensors but the shared expert's."""
    model = make_model(len(tiny_tokenizer), use_moe=use_moe, hidden_dim=96, rope_theta=1e4, norm_eps=1e-6)
    config = {theirs: getattr(model.config, ours) for theirs, ours in LMConfig.attribute_map.items()}
    config |= {name: getattr(model.config, name) for name in ("vocab_size", "rope_theta", "use_moe", "norm_topk_prob")}
    config |= {"model_type": "minimind", "rms_norm_eps": 1e-6, "n_shared_experts": 1, "bos_token_id": 1}
    (tmp_path / "config.json").write_text(json.dumps(config))
    state = {name: value.clone() for name, value in in_april_2025(model.state_dict(), heads=(4, 2)).items()}
    save_file(state, tmp_path / "model.safetensors")
    tiny_tokenizer.save_pretrained(tmp_path)
    back, _ = load_for_inference(tmp_path)
    assert all(torch.equal(value, back.state_dict()[name]) for name, value in model.state_dict().items())
    assert back.config.to_dict() == model.config.to_dict()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "gpt2"}, "model_type 'gpt2'"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        ({"rope_parameters": {"rope_type": "llama3", "rope_theta": 1e4}}, "rope_type 'llama3'"),
        ({"head_dim": 32}, "head_dim 32"),
        ({"num_hidden_layers": 3}, "has n_layers 2 according to its tensors, but its config.json asks for n_layers 3"),
        ({"hidden_size": None}, "has no 'hidden_size'"),
        ({"hidden_size": "64"}, "config.json is damaged"),
    ],
)
def test_what_a_minimind_is_not_is_refused_by_name(llama, tmp_path, change, message):
    _, folder = llama
    copy_folder(folder, tmp_path, change)
    with pytest.raises(UserError, match=message):
        load_for_inference(tmp_path)
    (tmp_path / "config.json").write_text("[1]")
    with pytest.raises(UserError, match=r"config\.json cannot be read"):
        load_for_inference(tmp_path)


def test_tensors_without_a_place_are_refused_by_name(llama, tmp_path):
    _, folder = llama
    copy_folder(folder, tmp_path, {})
    state = load_file(folder / "model.safetensors")
    for message, value in (
        ("lm_head.weight differs", state["model.embed_tokens.weight"] + 1),
        ("model.layers.0.self_attn.q_proj.bias is not zero", torch.ones(64)),
    ):
        save_file(state | {message.split()[0]: value}, tmp_path / "model.safetensors")
        with pytest.raises(UserError, match=message):
            load_for_inference(tmp_path)
    (tmp_path / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:5000])
    with pytest.raises(UserError, match="truncated"):
        load_for_inference(tmp_path)
    (tmp_path / "config.json").unlink()
    with pytest.raises(UserError, match=r"config\.json is missing"):
        load_for_inference(tmp_path)
