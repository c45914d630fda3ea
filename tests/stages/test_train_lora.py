"""train_lora.py, run for real with one and two processes, and its adapter in eval_model.py."""

import json
import shutil

import pytest
import torch

from model import LMConfig, MiniMindLM
from model.model_lora import is_lora, load_lora
from tests.running import TINY, TINY_TRAINING, one_error_line, run_script
from trainer.weights import load_weights

STEPS = ("--max_steps", "4", "--epochs", "9", "--learning_rate", "1e-2")  # the first two are warm-up steps
EXPERTS = ("--use_moe", "--lora_name", "me", "--rank", "4", "--alpha", "8", "--target_modules", "wq,w1,w2")


@pytest.fixture(scope="module")
def base(tiny_tokenizer, tmp_path_factory):
    """An --out_dir with a random full_sft_32, dense and MoE, without a json, as if downloaded."""
    out = tmp_path_factory.mktemp("base")
    torch.manual_seed(0)
    for use_moe in (False, True):
        config = LMConfig(dim=32, n_layers=2, vocab_size=len(tiny_tokenizer), use_moe=use_moe)
        torch.save(MiniMindLM(config).state_dict(), out / f"full_sft_32{'_moe' * use_moe}.pth")
    return out


@pytest.fixture
def out(base, tmp_path):
    return shutil.copytree(base, tmp_path / "out")


@pytest.fixture(scope="module")
def train(tokenizer_dir, tiny_data):
    """Runs train_lora.py with a folder as --out_dir."""
    data = ("--tokenizer", tokenizer_dir, "--data_path", tiny_data / "sft_mini_512.jsonl")
    return lambda out, *flags, **how: run_script(
        "train_lora.py", "--out_dir", out, *TINY_TRAINING, *data, *STEPS, *flags, **how
    )


@pytest.fixture(scope="module")
def alone(base, train, tmp_path_factory):
    """One process's result after four steps: an adapter on the attention and on every expert."""
    out = shutil.copytree(base, tmp_path_factory.mktemp("alone"), dirs_exist_ok=True)
    train(out, *EXPERTS)
    return out


def adapter(out):
    return torch.load(out / "lora" / "me_32_moe.pth", weights_only=True)


def assert_close(ours, theirs, atol):
    assert ours.keys() == theirs.keys()
    for key, value in ours.items():
        torch.testing.assert_close(value, theirs[key], atol=atol, rtol=0, msg=lambda text, key=key: f"{key}: {text}")


def test_only_the_adapter_is_trained_and_saved(base, alone):
    saved = adapter(alone)
    assert all(is_lora(key) and value.dtype == torch.float32 for key, value in saved.items())
    assert len(saved) == 2 * 2 * (1 + 5 * 2)  # A and B, two layers: wq, then w1 and w2 of five experts
    assert all(value.abs().max() > 1e-4 for key, value in saved.items() if "attention" in key)  # B is no longer zero
    assert (alone / "full_sft_32_moe.pth").read_bytes() == (base / "full_sft_32_moe.pth").read_bytes()
    about = json.loads((alone / "lora" / "me_32_moe.json").read_text(encoding="utf-8"))
    assert (about["rank"], about["alpha"], about["targets"]) == (4, 8, ["wq", "w1", "w2"])
    assert (about["base"], about["stage"], about["step"]) == ("full_sft_32_moe.pth", "lora/me", 4)


def test_two_processes_equal_one(out, alone, train):
    train(out, *EXPERTS, "--batch_size", "2", processes=2)
    assert_close(adapter(out), adapter(alone), atol=2e-5)


def test_zero_equals_one_process(out, alone, train):
    train(out, *EXPERTS, "--batch_size", "2", "--deepspeed", "--zero_stage", "2", processes=2)
    assert_close(adapter(out), adapter(alone), atol=2e-4)


def test_a_resumed_run_is_bit_for_bit_the_same(out, alone, train):
    train(out, *EXPERTS, "--max_steps", "2")
    assert "use --resume to continue" in one_error_line(train(out, *EXPERTS, exit_code=2))
    refused = train(out, *EXPERTS, "--resume", "--rank", "2", exit_code=2)
    assert "the saved run had rank 4, this one has 2" in one_error_line(refused)
    assert "resumed at step 2" in train(out, *EXPERTS, "--resume").stdout
    assert_close(adapter(out), adapter(alone), atol=0)


def test_the_adapter_lowers_the_held_out_loss(out, train, tiny_data, tiny_tokenizer):
    """A dense model, default target layers, bf16, one sample per row, Muon only."""
    held_out = ("--eval_path", tiny_data / "sft_mini_512.jsonl", "--eval_interval", "1", "--max_seq_len", "96")
    how = ("--max_steps", "8", "--learning_rate", "0.1", "--optimizer", "muon", "--dtype", "bfloat16", "--packing", "0")
    train(out, *held_out, *how)
    lines = map(json.loads, (out / "lora" / "identity_32.metrics.jsonl").read_text(encoding="utf-8").splitlines())
    losses = [line["eval_loss"] for line in lines if "eval_loss" in line]
    assert losses[-1] < losses[0] - 0.02

    model = load_weights(out / "full_sft_32.pth", None, tiny_tokenizer)
    assert load_lora(model, out / "lora" / "identity_32.pth") == (16, 16, ("wq", "wo"))


def test_qlora_trains_an_adapter_for_the_base_as_it_was_saved(out, base, train, alone, tokenizer_dir):
    """Interrupted, and with two processes; the adapter is close to LoRA's, and merges into the exact base."""
    told = train(out, *EXPERTS, "--quantize", "nf4", "--max_steps", "2").stdout
    assert "bytes each; not quantized: embedding and norms" in told
    refused = one_error_line(train(out, *EXPERTS, "--resume", exit_code=2))
    assert "the saved run had quantize nf4, this one has None" in refused
    train(out, *EXPERTS, "--quantize", "nf4", "--resume", "--batch_size", "2", processes=2)
    ours, theirs = adapter(out), adapter(alone)
    assert ours.keys() == theirs.keys()
    moved = {key: value for key, value in theirs.items() if key.endswith("B.weight")}  # from zero
    apart = sum((ours[key] - value).square().sum() for key, value in moved.items()).sqrt()
    assert 0 < apart < 0.7 * sum(value.square().sum() for value in moved.values()).sqrt()
    about = json.loads((out / "lora" / "me_32_moe.json").read_text(encoding="utf-8"))
    same = json.loads((alone / "lora" / "me_32_moe.json").read_text(encoding="utf-8"))
    assert about["base_hash"] == same["base_hash"]
    weights, merged = out / "full_sft_32_moe.pth", out / "merged_32_moe.pth"
    lora = out / "lora" / "me_32_moe.pth"
    run_script("scripts/convert_model.py", "merge-lora", weights, lora, merged, "--tokenizer", tokenizer_dir)
    exact, state = (torch.load(path, weights_only=True) for path in (weights, merged))
    update = ours["layers.0.attention.wq.lora.B.weight"] @ ours["layers.0.attention.wq.lora.A.weight"]
    key = "layers.0.attention.wq.weight"
    torch.testing.assert_close(state[key], exact[key] + 8 / 4 * update)


def test_eval_model_puts_the_adapter_on(out, train, tokenizer_dir):
    def ask(name, **how):
        settings = ("--temperature", "0", "--max_new_tokens", "8", "--prompt", "Who are you?", "--lora_name", name)
        return run_script("eval_model.py", *TINY, "--out_dir", out, "--tokenizer", tokenizer_dir, *settings, **how)

    train(out, "--lora_name", "me", "--learning_rate", "0.3")
    assert ask("None").stdout != ask("me").stdout
    told = f"run train_lora.py --lora_name NAME; there is {out / 'lora' / 'me_32.pth'} (--dim 32)"
    assert f"you_32.pth is missing: {told}" in one_error_line(ask("you", exit_code=2))
    state = torch.load(out / "full_sft_32.pth", weights_only=True)
    torch.save(state | {"norm.weight": state["norm.weight"] + 1}, out / "full_sft_32.pth")
    assert "adapter was trained on full_sft_32.pth with weights" in one_error_line(ask("me", exit_code=2))


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (("--lora_name", "a/b"), "--lora_name 'a/b' must be letters"),
        (("--lora_name", "me.pth"), "--lora_name 'me.pth' must be letters"),
        (("--target_modules", "wq,q_proj"), "no Linear of the model's blocks is named q_proj; use wq"),
        (("--target_modules", ""), "no Linear of the model's blocks is named ; use wq"),
        (("--alpha", "-1"), "alpha above 0"),
        (("--from_weight", "nothing"), "nothing_32.pth is missing"),
        (("--data_path", "nowhere.jsonl"), "nowhere.jsonl does not exist"),
    ],
)
def test_flags_that_cannot_work(base, train, flags, told):
    assert told in one_error_line(train(base, *flags, exit_code=2))
    assert not list(base.glob("lora/*.pth"))
