"""trainer/loading.py with weights of generation 3: published files and folders, with MiniMind-3's own names."""

import json

import pytest
import torch

from model import MiniMind3Config, MiniMind3LM
from tests.conftest import SPECIAL, train_tokenizer
from tests.scripts.conversion import save_model
from trainer.errors import UserError
from trainer.loading import load_for_inference
from trainer.weights import load_weights

FIXTURES = ["minimind3_dense", "minimind3_moe", "minimind3_yarn"]


def make_model(vocab_size: int, **sizes) -> MiniMind3LM:
    torch.manual_seed(0)
    small = {"dim": 32, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "vocab_size": vocab_size, "max_seq_len": 256}
    return MiniMind3LM(MiniMind3Config(**small | sizes)).eval()


def fixture(shared, name: str):
    path = shared / f"fixtures/{name}.pth"
    if not path.is_file():
        pytest.skip("no fixtures of MiniMind-3")
    return path, torch.load(path.with_suffix(".expected.pt"), weights_only=True)


def logits(model, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(ids).logits


@pytest.fixture(scope="module")
def tokenizer_640(tmp_path_factory):
    """A tokenizer with as many entries as the reference checkpoints' vocabulary."""
    folder = tmp_path_factory.mktemp("tokenizer_640")
    text = [f"{chr(97 + i)}{chr(97 + j)}{chr(97 + k)}" for i in range(26) for j in range(0, 26, 5) for k in range(5)]
    tokenizer = train_tokenizer(SPECIAL, vocab_size=640)
    tokenizer.add_tokens(text[: 640 - len(tokenizer)])
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("name", FIXTURES)
@pytest.mark.parametrize("how", ["all sizes", "what is not told", "no tokenizer"])
def test_a_published_file_computes_its_reference_logits(shared, tokenizer_640, name, how, capsys):
    path, expected = fixture(shared, name)
    sizes = expected["config"]
    if how != "all sizes":
        untold = ("num_experts_per_tok", "rope_theta", "inference_rope_scaling")
        sizes = {size: sizes[size] for size in untold if size in sizes}
    model, _ = load_for_inference(path, None if how == "no tokenizer" else tokenizer_640, **sizes)
    torch.testing.assert_close(logits(model, expected["input_ids"]), expected["logits"], rtol=0, atol=1e-4)
    assert "MiniMind-3's begins turns with <|im_start|>: give its folder with --tokenizer" in capsys.readouterr().err


@pytest.mark.parametrize("change", ["half", "bare names", "under model", "DDP", "without lm_head"])
def test_a_file_as_other_tools_leave_it(tiny_tokenizer, tokenizer_dir, tmp_path, change):
    model = make_model(len(tiny_tokenizer))
    state = dict(model.state_dict())
    if change == "half":
        state = {name: value.half() for name, value in state.items()}
    elif change == "bare names":
        state = {name.removeprefix("model."): value for name, value in state.items()}
    elif change == "under model":
        state = {"model": state}
    elif change == "DDP":
        state = {f"module._orig_mod.{name}": value for name, value in state.items()}
    else:
        del state["lm_head.weight"]
    torch.save(state, tmp_path / "full_sft_32.pth")
    loaded, _ = load_for_inference(tmp_path / "full_sft_32.pth", tokenizer_dir)
    assert isinstance(loaded, MiniMind3LM)
    assert (loaded.config.n_heads, loaded.config.n_kv_heads) == (4, 2)
    for name, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value.half().float() if change == "half" else value), name


def test_sizes_are_compared_and_named(tiny_tokenizer, tokenizer_dir, tmp_path):
    path = tmp_path / "full_sft_32.pth"
    torch.save(make_model(len(tiny_tokenizer), use_moe=True).state_dict(), path)
    model, _ = load_for_inference(path, tokenizer_dir)
    assert (model.config.num_experts_per_tok, model.config.max_seq_len) == (1, 32768)
    model, _ = load_for_inference(path, tokenizer_dir, hidden_size=32, num_experts_per_tok=2, rope_theta=1e4)
    assert (model.config.num_experts_per_tok, model.config.rope_theta) == (2, 1e4)
    with pytest.raises(UserError, match="dim 32 according to its tensors, but the flags ask for dim 64"):
        load_for_inference(path, tokenizer_dir, hidden_size=64)
    with pytest.raises(UserError, match="hidden_size 64 and dim 32 are the same size"):
        load_for_inference(path, tokenizer_dir, dim=32, hidden_size=64)
    with pytest.raises(TypeError, match="LMConfig has no hidden"):
        load_for_inference(path, tokenizer_dir, hidden=64)


def test_the_json_holds_the_generation_and_a_mismatch_is_named(tiny_tokenizer, tokenizer_dir, tmp_path):
    path = save_model(make_model(len(tiny_tokenizer)), tiny_tokenizer, tmp_path / "full_sft_32.pth")
    assert json.loads(path.with_suffix(".json").read_text())["config"]["generation"] == 3
    assert isinstance(load_for_inference(path, tokenizer_dir)[0], MiniMind3LM)
    with pytest.raises(UserError, match=r"has generation 3 according to its json.* generation 2: give --generation 3"):
        load_weights(path, make_model_2(len(tiny_tokenizer)).config, tiny_tokenizer)
    path.with_suffix(".json").unlink()
    with pytest.raises(UserError, match=r"has generation 3 according to its tensors.*give --generation 3"):
        load_weights(path, make_model_2(len(tiny_tokenizer)).config, tiny_tokenizer)
    torch.save(make_model_2(len(tiny_tokenizer)).state_dict(), path)
    with pytest.raises(UserError, match=r"has generation 2 according to its tensors.*give --generation 2"):
        load_weights(path, make_model(len(tiny_tokenizer)).config, tiny_tokenizer)


def make_model_2(vocab_size: int):
    from model import LMConfig, MiniMindLM

    return MiniMindLM(LMConfig(dim=32, n_layers=2, n_heads=4, n_kv_heads=2, vocab_size=vocab_size))
