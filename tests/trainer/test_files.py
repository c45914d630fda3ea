"""Files that are whole or not there, and tensors that cannot bring code along."""

import os
import pickle
import random
import subprocess

import pytest
import torch

from trainer.errors import UserError
from trainer.files import load_tensors, replacing, save_json, save_tensors


def test_what_is_written_replaces_what_was_there(tmp_path):
    path = tmp_path / "new" / "folder" / "a.json"
    save_json({"名": 1}, path)
    save_json({"名": 2}, path)
    assert path.read_text(encoding="utf-8") == '{\n  "名": 2\n}\n'
    assert os.listdir(path.parent) == ["a.json"]


@pytest.mark.parametrize(
    "failure", [RuntimeError("a bug"), KeyboardInterrupt(), OSError(28, "No space left on device")]
)
def test_a_failure_leaves_what_was_there(tmp_path, failure):
    path = tmp_path / "a.txt"
    path.write_text("old")

    def write():
        with replacing(path) as temporary:
            temporary.write_text("half of the n")
            raise failure

    with pytest.raises((UserError, type(failure))) as raised:
        write()
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["a.txt"]
    if isinstance(failure, OSError):
        assert "No space left" in str(raised.value)
        assert str(path) in str(raised.value)


def test_a_place_that_cannot_be(tmp_path):
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(UserError, match="cannot write"):
        save_json({}, tmp_path / "file" / "a.json")
    (tmp_path / "folder.json").mkdir()
    with pytest.raises(UserError, match="cannot write"):
        save_json({}, tmp_path / "folder.json")


@pytest.fixture
def small_disk(tmp_path):
    """A disk of 64 KiB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", disk], check=False, capture_output=True
    )
    if mounted.returncode:
        pytest.skip("a disk to fill cannot be mounted here")
    yield disk
    subprocess.run(["umount", disk], check=True)


def test_a_full_disk(small_disk):
    path = small_disk / "a.pth"
    save_tensors({"a": torch.ones(10)}, path)
    with pytest.raises(UserError, match="No space left on device"):
        save_tensors({"a": torch.ones(100_000)}, path)
    assert load_tensors(path)["a"].tolist() == [1.0] * 10
    assert os.listdir(small_disk) == ["a.pth"]


class Code:
    def __reduce__(self):
        return os.mkdir, ("was-run",)


@pytest.mark.parametrize("new_format", [True, False])
def test_code_is_refused_and_not_run(tmp_path, monkeypatch, new_format):
    monkeypatch.chdir(tmp_path)
    torch.save({"a": torch.ones(2), "b": Code()}, "a.pth", _use_new_zipfile_serialization=new_format)
    with pytest.raises(UserError, match="not run"):
        load_tensors(tmp_path / "a.pth")
    with open("b.pth", "wb") as file:
        pickle.dump(Code(), file)
    with pytest.raises(UserError, match="not run"):
        load_tensors(tmp_path / "b.pth")
    assert not (tmp_path / "was-run").exists()


def test_whatever_is_damaged_ends_in_one_line(tmp_path):
    whole, damaged = tmp_path / "a.pth", tmp_path / "b.pth"
    torch.save({f"layers.{n}.w": torch.randn(4, 4) for n in range(4)}, whole)
    content = whole.read_bytes()
    chance = random.Random(0)
    cuts = [content[: len(content) * n // 20] for n in range(20)]
    noise = [chance.randbytes(chance.randrange(300)) for _ in range(40)]
    for bad in [*cuts, *noise, b'{"a": 1}', b"<html>404</html>"]:
        damaged.write_bytes(bad)
        with pytest.raises(UserError, match="truncated, damaged"):
            load_tensors(damaged)
    with pytest.raises(UserError, match="is missing"):
        load_tensors(tmp_path / "missing.pth")
