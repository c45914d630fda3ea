"""Names of weights, and loading them; what cannot be loaded is in tests/stages/test_errors.py, as a user meets it."""

import json
import shutil
from types import SimpleNamespace

import pytest
import torch

from model.model_lora import apply_lora, lora_state_dict
from trainer.errors import UserError
from trainer.files import save_json, save_tensors
from trainer.weights import load_adapter, load_tokenizer, load_weights, read_settings, weights_name, weights_path


def test_names():
    assert weights_name("pretrain", 512, False) == "pretrain_512"
    assert weights_name("full_sft", 640, True) == "full_sft_640_moe"
    args = SimpleNamespace(out_dir="out", dim=512, use_moe=False)
    assert str(weights_path(args, "rlhf")) == "out/rlhf_512.pth"
    assert str(weights_path(args, "some/where/a.pth")) == "some/where/a.pth"


def test_a_downloaded_file_loads_by_the_sizes_of_its_tensors(tiny_out, tiny_tokenizer, tmp_path, capsys):
    path = tmp_path / "downloaded.pth"
    shutil.copy(tiny_out / "full_sft_32.pth", path)
    assert read_settings(path) is None
    model = load_weights(path, None, tiny_tokenizer)
    known = load_weights(tiny_out / "full_sft_32.pth", None, tiny_tokenizer)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(model.parameters(), known.parameters(), strict=True))
    assert model.output.weight is model.tok_embeddings.weight
    assert capsys.readouterr().err.count("has no json beside it") == 1


def test_only_what_is_named_may_lack(tiny_out, tiny_tokenizer, tmp_path):
    path = tmp_path / "part.pth"
    state = torch.load(tiny_out / "full_sft_32.pth", weights_only=True)
    del state["norm.weight"]
    torch.save(state, path)
    with pytest.raises(UserError, match=r"lacks norm\.weight"):
        load_weights(path, None, tiny_tokenizer, missing=("layers.",))
    assert load_weights(path, None, tiny_tokenizer, missing=("norm",)).norm.weight.eq(1).all()


def test_a_folder_without_a_tokenizer(tmp_path):
    with pytest.raises(UserError, match=r"tokenizer\.json"):
        load_tokenizer(tmp_path)


def flipped(out, name: str, folder):
    """A copy of weights and their json, one bit of the weights changed."""
    path = folder / f"{name}.pth"
    for suffix in (".pth", ".json"):
        shutil.copy(out / f"{name}{suffix}", folder)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    return path


def test_a_flipped_bit_is_seen_where_a_json_tells_the_hash(tiny_out, tiny_tokenizer, tmp_path):
    path = flipped(tiny_out, "full_sft_32", tmp_path)
    with pytest.raises(UserError, match=r"full_sft_32\.pth is not what was written"):
        load_weights(path, None, tiny_tokenizer)
    about = json.loads(path.with_suffix(".json").read_text())
    del about["sha256"]  # as an earlier version wrote it, or after an own change
    path.with_suffix(".json").write_text(json.dumps(about))
    load_weights(path, None, tiny_tokenizer)
    path.with_suffix(".json").unlink()
    load_weights(path, None, tiny_tokenizer)


def test_a_flipped_bit_in_an_adapter(tiny_out, tiny_tokenizer, tmp_path):
    model = load_weights(tiny_out / "full_sft_32.pth", None, tiny_tokenizer)
    settings = apply_lora(model, rank=2)
    path = tmp_path / "mine_32.pth"
    about = settings._asdict() | {"sha256": save_tensors(lora_state_dict(model), path)}
    save_json(about, path.with_suffix(".json"))
    model = load_weights(tiny_out / "full_sft_32.pth", None, tiny_tokenizer)
    load_adapter(str(path), SimpleNamespace(), model)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    model = load_weights(tiny_out / "full_sft_32.pth", None, tiny_tokenizer)
    with pytest.raises(UserError, match=r"mine_32\.pth is not what was written"):
        load_adapter(str(path), SimpleNamespace(), model)
