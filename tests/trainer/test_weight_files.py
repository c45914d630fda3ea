"""Weight files written by any tool, and the errors for files without weights."""

import pytest
import torch
from safetensors.torch import save_file

from trainer.errors import UserError
from trainer.weight_files import is_file_name, read_weights

STATE = {f"layers.0.attention.{name}.weight": torch.randn(16, 16) for name in ("wq", "wk", "wv", "wo")}


@pytest.mark.parametrize("name", ["a.pth", "a.pt", "a.bin", "a.ckpt", "a.safetensors", "a safetensors.pth"])
def test_every_kind_of_file_is_read(tmp_path, name):
    path = tmp_path / name
    if "safetensors" in name:
        save_file(STATE, path)
    else:
        torch.save(STATE, path)
    found = read_weights(path, 2, 2).state
    assert all(torch.equal(found[key], STATE[key]) for key in STATE)
    assert is_file_name(str(path))
    assert not is_file_name("full_sft_512")


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("a.pth", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n", "git lfs pull"),
        ("a.pth", b"<!DOCTYPE html><html>", "is a web page"),
        ("a.pth", b"GGUF\3\0\0\0", "is a GGUF"),
        ("a.pth", b"", "truncated, damaged"),
        ("a.safetensors", b"\x10\0\0\0\0\0\0\0{}", "truncated or not a safetensors file"),
        ("a.safetensors", b"", "truncated or not a safetensors file"),
    ],
)
def test_what_is_no_file_of_weights(tmp_path, name, content, told):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=told):
        read_weights(tmp_path / name)


def test_a_part_of_a_folder_of_transformers_is_not_taken_for_the_whole(tmp_path):
    """Its sizes and RoPE base are in config.json: the file alone would be loaded as another model."""
    (tmp_path / "config.json").write_text("{}")
    for name in ("model.safetensors", "pytorch_model.bin", "model-00001-of-00002.safetensors"):
        save_file(STATE, tmp_path / name)
        with pytest.raises(UserError, match=f"convert_model.py from-transformers {tmp_path}"):
            read_weights(tmp_path / name)
    (tmp_path / "config.json").unlink()
    assert read_weights(tmp_path / "model.safetensors", 2, 2).state.keys() == STATE.keys()
    with pytest.raises(UserError, match="from-transformers"):
        read_weights(tmp_path / "model-00001-of-00002.safetensors")
