"""MiniMind-3 as a Qwen3 or Qwen3-MoE folder without our code, and back; transformers' logits are the oracle."""

import json

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, Qwen3ForCausalLM, Qwen3MoeForCausalLM

from model import MiniMind3LM
from scripts.formats.transformers_folder import check_equal, write_folder
from tests.running import call_script
from tests.scripts.conversion import make_model as make_minimind2
from tests.trainer.test_loading_minimind3 import logits, make_model
from trainer.errors import UserError
from trainer.loading import load_for_inference

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
MODELS = {
    "dense": {},
    "moe": {"use_moe": True},
    "moe, two of three": {"use_moe": True, "num_experts_per_tok": 2, "num_experts": 3},
    "its yarn": {"inference_rope_scaling": True},
    "yarn": {"rope_scaling": YARN},
    "linear": {"rope_scaling": {"rope_type": "linear", "factor": 2}},
    "ntk": {"rope_scaling": {"rope_type": "ntk", "factor": 4.0}},
}


def lively(vocab_size: int, **sizes) -> MiniMind3LM:
    model = make_model(vocab_size, **sizes)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(6 if parameter.dim() == 2 else 1).add_(0.1 * torch.randn_like(parameter))
    return model


@pytest.mark.parametrize("name", MODELS)
def test_a_folder_computes_the_same_and_comes_back_bit_for_bit(name, tiny_tokenizer, tmp_path):
    model = lively(len(tiny_tokenizer), **MODELS[name])
    write_folder(model, tiny_tokenizer, tmp_path)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    assert type(theirs) is (Qwen3MoeForCausalLM if "moe" in name else Qwen3ForCausalLM)
    ids = torch.randint(len(tiny_tokenizer), (2, 200), generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(logits(theirs, ids), logits(model, ids), rtol=0, atol=1e-4)
    assert check_equal(model, tmp_path) < 1e-4
    back, _ = load_for_inference(tmp_path)
    assert isinstance(back, MiniMind3LM)
    for key, value in model.state_dict().items():
        assert torch.equal(back.state_dict()[key], value), key
    torch.testing.assert_close(logits(back, ids), logits(model, ids), rtol=0, atol=1e-5)
    assert (back.config.max_seq_len, back.config.norm_eps) == (256, 1e-6)


def test_the_scaling_stands_in_the_folder_under_transformers_names(tiny_tokenizer, tmp_path):
    write_folder(lively(len(tiny_tokenizer), inference_rope_scaling=True), tiny_tokenizer, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    expected = {"rope_type": "yarn", "factor": 16.0, "original_max_position_embeddings": 2048}
    expected |= {"beta_fast": 32.0, "beta_slow": 1.0, "attention_factor": 1.0}
    assert config["rope_scaling"] == expected
    assert config["rope_parameters"] == expected | {"rope_theta": 1e6}
    assert "auto_map" not in config
    assert AutoConfig.from_pretrained(tmp_path).rope_parameters["attention_factor"] == 1.0


@pytest.mark.parametrize("name", ["yarn", "linear", "ntk"])
def test_generation_2_is_scaled_and_exported_the_same_way(name, tiny_tokenizer, tmp_path):
    scaling = MODELS[name]["rope_scaling"]
    model = make_minimind2(len(tiny_tokenizer), rope_scaling=scaling)
    plain = make_minimind2(len(tiny_tokenizer))
    write_folder(model, tiny_tokenizer, tmp_path)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    ids = torch.randint(len(tiny_tokenizer), (2, 200), generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(logits(theirs, ids), logits(model, ids), rtol=0, atol=1e-4)
    assert (logits(plain, ids) - logits(model, ids)).abs().max() > 0.1
    torch.testing.assert_close(logits(load_for_inference(tmp_path)[0], ids), logits(model, ids), rtol=0, atol=1e-5)


def test_a_folder_of_its_own_kind_comes_back(tiny_tokenizer, tmp_path):
    """As `save_pretrained` writes it, and as MiniMind-3's own code does: type "minimind", with norms of q and k."""
    model = lively(len(tiny_tokenizer), use_moe=True)
    model.save_pretrained(tmp_path)
    tiny_tokenizer.save_pretrained(tmp_path)
    ids = torch.randint(len(tiny_tokenizer), (1, 40), generator=torch.Generator().manual_seed(0))
    assert torch.equal(logits(load_for_inference(tmp_path)[0], ids), logits(model, ids))
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path).eval(), ids), logits(model, ids))
    own = {"model_type": "minimind", "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    own |= {"num_key_value_heads": 2, "vocab_size": len(tiny_tokenizer), "use_moe": True, "num_experts": 4}
    own |= {"num_experts_per_tok": 1, "rope_theta": 1e6, "rms_norm_eps": 1e-6, "head_dim": 8, "rope_scaling": None}
    (tmp_path / "config.json").write_text(json.dumps(own | {"inference_rope_scaling": False}))
    assert torch.equal(logits(load_for_inference(tmp_path)[0], ids), logits(model, ids))
    (tmp_path / "config.json").write_text(json.dumps(own | {"inference_rope_scaling": True}))
    assert not torch.equal(logits(load_for_inference(tmp_path)[0], ids), logits(model, ids))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"attention_bias": True}, "attention_bias True"),
        ({"head_dim": 16}, "head_dim 16"),
        ({"model_type": "qwen2"}, "model_type 'qwen2'"),
        ({"rope_parameters": {"rope_type": "dynamic", "factor": 2, "rope_theta": 1e6}}, "rope_type 'dynamic'"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 2, "rope_theta": 1e6, "mscale": 1.0}}, "mscale 1.0"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 2, "truncate": False}}, "truncate False"),
    ],
)
def test_what_a_minimind3_is_not_is_named(change, said, tiny_tokenizer, tmp_path):
    write_folder(lively(len(tiny_tokenizer)), tiny_tokenizer, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(UserError, match=said):
        load_for_inference(tmp_path)


def test_the_script_takes_a_published_file_there_and_back(tiny_tokenizer, tokenizer_dir, tmp_path):
    model = lively(len(tiny_tokenizer), use_moe=True)
    torch.save(model.state_dict(), tmp_path / "published.pth")
    said = ("--tokenizer", tokenizer_dir)
    call_script("scripts/convert_model.py", "to-transformers", tmp_path / "published.pth", tmp_path / "folder", *said)
    call_script("scripts/convert_model.py", "from-transformers", tmp_path / "folder", tmp_path / "back_32_moe.pth")
    back = torch.load(tmp_path / "back_32_moe.pth", weights_only=True)
    assert back.keys() == model.state_dict().keys()
    assert all(torch.equal(back[key], value) for key, value in model.state_dict().items())
    about = json.loads((tmp_path / "back_32_moe.json").read_text())
    assert (about["config"]["generation"], about["config"]["num_experts_per_tok"]) == (3, 1)
