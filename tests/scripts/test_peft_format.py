"""Adapters to peft and back; the oracle is peft's output for the folder."""

import json

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from model.model_lora import apply_lora, attach_lora, load_lora, lora_off, lora_state_dict, save_lora
from scripts.formats import transformers_folder as transformers_format
from scripts.formats.peft_folder import read_folder, to_peft_state, write_folder
from tests.running import one_error_line, run_script
from tests.scripts.conversion import make_model
from trainer.errors import UserError

EVERY = ["wq", "wk", "wv", "wo", "w1", "w2", "w3"]
IDS = torch.arange(2 * 30).view(2, 30) * 7 % 50


def adapted(vocab_size, targets, **shape):
    model = make_model(vocab_size, **shape)
    settings = apply_lora(model, rank=4, alpha=6, targets=targets)
    with torch.no_grad():
        for value in lora_state_dict(model).values():
            value.normal_(std=0.1)
    return model, settings


@torch.no_grad()
def logits(model):
    return model(input_ids=IDS).logits


def base_folder(model, tokenizer, layout, folder):
    """The model without its adapter, as a folder in each format."""
    plain = make_model(len(tokenizer), use_moe=model.config.use_moe)
    plain.load_state_dict({key: model.state_dict()[key] for key in plain.state_dict()})
    if layout == "llama":
        transformers_format.write_folder(plain, tokenizer, folder)
    else:
        plain.save_pretrained(folder)
    return AutoModelForCausalLM.from_pretrained(folder).eval()


@pytest.mark.parametrize(
    ("layout", "targets", "use_moe"),
    [
        ("llama", EVERY, False),
        ("llama", ["wq", "wk", "wo"], True),
        ("minimind", EVERY, False),
        ("minimind", EVERY, True),
    ],
)
def test_peft_computes_the_same_logits_and_the_adapter_comes_back(tiny_tokenizer, tmp_path, layout, targets, use_moe):
    model, settings = adapted(len(tiny_tokenizer), targets, use_moe=use_moe)
    write_folder(lora_state_dict(model), settings, model.config, layout == "llama", "base", tmp_path / "peft")
    theirs = base_folder(model, tiny_tokenizer, layout, tmp_path / "base")
    with lora_off(model):
        assert (logits(theirs) - logits(model)).abs().max() < 1e-4
    theirs = PeftModel.from_pretrained(theirs, tmp_path / "peft").eval()
    assert (logits(theirs) - logits(model)).abs().max() < 1e-4
    with lora_off(model):
        assert (logits(theirs) - logits(model)).abs().max() > 1e-2

    state, about = read_folder(tmp_path / "peft", model.config)
    ours = lora_state_dict(model)
    assert about == {"alpha": 6}
    assert state.keys() == ours.keys()
    assert all(torch.equal(value, ours[key]) for key, value in state.items())


def test_an_adapter_that_peft_made_works_here(tiny_tokenizer, tmp_path):
    model = make_model(len(tiny_tokenizer))
    theirs = base_folder(model, tiny_tokenizer, "llama", tmp_path / "base")
    theirs = get_peft_model(theirs, LoraConfig(r=3, lora_alpha=9, target_modules=["q_proj", "k_proj", "down_proj"]))
    with torch.no_grad():
        for key, value in theirs.named_parameters():
            if "lora_" in key:
                value.normal_(std=0.1)
    theirs.save_pretrained(tmp_path / "peft")
    state, about = read_folder(tmp_path / "peft", model.config)
    assert attach_lora(model, state, about) == (3, 9, ("wq", "wk", "w2"))
    assert (logits(theirs.eval()) - logits(model)).abs().max() < 1e-4


def test_an_adapter_on_a_shared_expert_works_here_and_comes_back(tiny_tokenizer, tmp_path):
    """Qwen2-MoE halves the output of its shared expert."""
    model = make_model(len(tiny_tokenizer), use_moe=True)
    theirs = base_folder(model, tiny_tokenizer, "llama", tmp_path / "base")
    targets = r".*\.shared_expert\.(gate|up|down)_proj"
    theirs = get_peft_model(theirs, LoraConfig(r=3, lora_alpha=9, target_modules=targets))
    with torch.no_grad():
        for key, value in theirs.named_parameters():
            if "lora_" in key:
                value.normal_(std=0.1)
    theirs.save_pretrained(tmp_path / "peft")
    state, about = read_folder(tmp_path / "peft", model.config)
    saved = load_file(tmp_path / "peft" / "adapter_model.safetensors")
    back = to_peft_state(state, model.config, as_llama=True)
    assert back.keys() == saved.keys()
    assert all(torch.equal(value, saved[key]) for key, value in back.items())
    before = logits(model)
    with torch.no_grad():
        for layer, block in enumerate(model.layers):
            for name in ("w1", "w2", "w3"):
                a, b = (state[f"layers.{layer}.feed_forward.shared_experts.{name}.lora.{side}.weight"] for side in "AB")
                getattr(block.feed_forward.shared_experts, name).weight += about["alpha"] / 3 * b @ a
    assert (logits(theirs.eval()) - logits(model)).abs().max() < 1e-4
    assert (before - logits(model)).abs().max() > 1e-2


def test_what_the_other_side_cannot_say_is_refused(tiny_tokenizer, tmp_path):
    model, settings = adapted(len(tiny_tokenizer), ["w1"], use_moe=True)
    with pytest.raises(UserError, match=r"experts.0.w1: a Qwen2-MoE keeps all experts in one tensor"):
        write_folder(lora_state_dict(model), settings, model.config, True, "base", tmp_path / "moe")
    assert not (tmp_path / "moe").exists()

    model, settings = adapted(len(tiny_tokenizer), ["wq"])
    with pytest.raises(UserError, match="not an adapter that peft saved"):
        read_folder(tmp_path, model.config)
    folder = tmp_path / "peft"
    write_folder(lora_state_dict(model), settings, model.config, True, "base", folder)
    about, weights = json.loads((folder / "adapter_config.json").read_text()), folder / "adapter_model.safetensors"
    for changed, told in (
        (about | {"use_dora": True}, "made with use_dora"),
        (about | {"peft_type": "IA3"}, "is a IA3 adapter"),
        (about | {"lora_alpha": None}, "lora_alpha is None"),
        (about | {"lora_alpha": 0}, "lora_alpha is 0"),
        (about | {"lora_alpha": float("nan")}, "lora_alpha is nan"),
        ([about], "not a JSON object"),
    ):
        (folder / "adapter_config.json").write_text(json.dumps(changed))
        with pytest.raises(UserError, match=told):
            read_folder(folder, model.config)
    (folder / "adapter_config.json").write_text(json.dumps(about))
    save_file(load_file(weights) | {"base_model.model.model.norm.weight": torch.ones(2)}, weights)
    with pytest.raises(UserError, match=r"norm.weight is not an A or B of a plain LoRA"):
        read_folder(folder, model.config)
    weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(UserError, match="cannot be read"):
        read_folder(folder, model.config)


def test_there_and_back_by_the_command_line(tiny_tokenizer, tokenizer_dir, tmp_path):
    model, _ = adapted(len(tiny_tokenizer), None)
    save_lora(model, tmp_path / "me_64.pth")
    with torch.no_grad():
        torch.save({k: v for k, v in model.state_dict().items() if ".lora." not in k}, tmp_path / "base_64.pth")
    sizes = ("--tokenizer", tokenizer_dir, "--n_heads", model.config.n_heads, "--n_kv_heads", model.config.n_kv_heads)

    def convert(command, *names, **how):
        return run_script("scripts/convert_model.py", command, *(tmp_path / name for name in names), *sizes, **how)

    convert("to-peft", "base_64.pth", "me_64.pth", "peft")
    refused = convert("to-peft", "base_64.pth", "me_64.pth", "peft", exit_code=2)
    assert "already contains an adapter" in one_error_line(refused)
    convert("from-peft", "peft", "base_64.pth", "back_64.pth")
    fresh = make_model(len(tiny_tokenizer))
    fresh.load_state_dict(torch.load(tmp_path / "base_64.pth", weights_only=True))
    assert load_lora(fresh, tmp_path / "back_64.pth") == (4, 6, ("wq", "wo"))  # the json beside it names the base
    assert torch.equal(logits(fresh), logits(model))
    refused = convert("from-peft", "x", "base_64.pth", "y.pth", exit_code=2)
    assert "not an adapter that peft saved" in one_error_line(refused)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        *(({name: True}, f"made with {name}") for name in ("use_dora", "use_rslora", "fan_in_fan_out")),
        *(({name: {"x": 2}}, f"made with {name}") for name in ("rank_pattern", "alpha_pattern")),
        ({"lora_alpha": -1}, "lora_alpha is -1, not a number above 0"),
        ({"lora_alpha": "8"}, "lora_alpha is '8'"),
        ({"peft_type": None}, "is a None adapter"),
    ],
)
def test_every_setting_that_an_adapter_here_has_not_is_named(tmp_path, change, told):
    model, settings = adapted(50, ["wq"])
    write_folder(lora_state_dict(model), settings, model.config, True, "base", tmp_path)
    about = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps(about | change))
    with pytest.raises(UserError, match=told):
        read_folder(tmp_path, model.config)


@pytest.mark.parametrize("missing", ["adapter_config.json", "adapter_model.safetensors"])
def test_half_a_folder_is_none(tmp_path, missing):
    model, settings = adapted(50, ["wq"])
    write_folder(lora_state_dict(model), settings, model.config, True, "base", tmp_path)
    (tmp_path / missing).unlink()
    with pytest.raises(UserError, match="not an adapter that peft saved"):
        read_folder(tmp_path, model.config)


@pytest.mark.parametrize(("as_llama", "targets"), [(True, {"q_proj", "down_proj"}), (False, {"wq", "w2"})])
def test_what_peft_is_told_of_an_adapter(tmp_path, as_llama, targets):
    model, settings = adapted(50, ["wq", "w2"])
    write_folder(lora_state_dict(model), settings, model.config, as_llama, "base.pth", tmp_path / "a" / "b")
    about = json.loads((tmp_path / "a" / "b" / "adapter_config.json").read_text())
    assert set(about.pop("target_modules")) == targets
    assert (
        about.items()
        >= {
            **{"r": 4, "lora_alpha": 6, "lora_dropout": 0.0, "task_type": "CAUSAL_LM"},
            **{"base_model_name_or_path": "base.pth", "inference_mode": True, "peft_type": "LORA"},
        }.items()
    )
    assert read_folder(tmp_path / "a" / "b", model.config)[1] == {"alpha": 6}
