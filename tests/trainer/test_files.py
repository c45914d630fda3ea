"""Files that are complete or absent, and tensor files that cannot contain code."""

import errno
import hashlib
import os
import pickle
import random
import stat
import subprocess

import pytest
import torch

from trainer.errors import UserError
from trainer.files import (
    check_hash,
    file_hash,
    left_by_a_kill,
    load_tensors,
    make_folder,
    replacing,
    save_json,
    save_tensors,
)


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


@pytest.mark.parametrize("why", [None, OSError(errno.EDQUOT, "Disk quota exceeded")])
def test_a_write_that_pytorch_gave_up_is_told_by_its_reason(tmp_path, monkeypatch, why):
    """PyTorch reports the reason, or only its own operation and a page of its code."""

    def broken(*_, **__):
        error = RuntimeError("PytorchStreamWriter failed writing file data/0\nand where in its code")
        error.__context__ = why
        raise error

    save_tensors({"a": torch.ones(1)}, tmp_path / "a.pth")
    monkeypatch.setattr(torch, "save", broken)
    with pytest.raises(UserError) as told:
        save_tensors({"a": torch.zeros(1)}, tmp_path / "a.pth")
    assert ("Disk quota exceeded" if why else "PytorchStreamWriter failed writing file data/0") in str(told.value)
    assert "where in its code" not in str(told.value)
    assert load_tensors(tmp_path / "a.pth")["a"].tolist() == [1.0]


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


def big_and_small(tmp_path):
    big, small = tmp_path / "big", tmp_path / "small"
    big.mkdir()
    small.mkdir()
    return big, small


@pytest.mark.parametrize("way", ["a link to a file", "a link to a link", "a link to what is not there yet"])
def test_a_file_under_a_link_is_replaced_where_it_lies(tmp_path, way):
    big, small = big_and_small(tmp_path)
    target, path = big / "weights.pth", small / "a.pth"
    path.symlink_to(target)
    if way != "a link to what is not there yet":
        target.write_text("old")
    if way == "a link to a link":
        path = small / "b.pth"
        path.symlink_to("a.pth")
    with replacing(path) as temporary:
        assert temporary.parent == big  # renaming works only within a disk, and the small one may be full
        temporary.write_text("new")
    assert path.is_symlink()
    assert target.read_text() == "new"
    assert not target.is_symlink()
    assert os.listdir(big) == ["weights.pth"]


def test_a_file_in_a_folder_under_a_link(tmp_path):
    big, small = big_and_small(tmp_path)
    (small / "out").symlink_to(big)
    with replacing(small / "out" / "lora" / "a.pth") as temporary:
        assert temporary.parent == big / "lora"
        temporary.write_text("new")
    assert (big / "lora" / "a.pth").read_text() == "new"
    assert (small / "out").is_symlink()


@pytest.mark.parametrize("lost", ["out", "a.pth"])
def test_a_link_to_a_disk_that_is_not_mounted(tmp_path, lost):
    """It is reported, instead of the folder being created on the small disk."""
    (tmp_path / lost).symlink_to(tmp_path / "disk" / "folder" / lost)
    path = tmp_path / "a.pth" if lost == "a.pth" else tmp_path / "out" / "a.pth"
    with pytest.raises(UserError, match="cannot write"):
        save_json({}, path)
    assert not (tmp_path / "disk").exists()


def test_what_a_kill_leaves_is_found_beside_the_file_itself(tmp_path):
    big, small = big_and_small(tmp_path)
    path = small / "a.pth"
    path.symlink_to(big / "weights.pth")
    left = big / ".weights.pth.123.tmp"
    for name in (".weights.pth.123.tmp", ".weights.pth.mine", ".other.pth.123.tmp", "weights.pth"):
        (big / name).write_text("half")
    assert left_by_a_kill(path) == [left]
    with replacing(path) as being_written:  # by this process, which is alive
        being_written.write_text("half")
        assert left_by_a_kill(path) == [left]
    assert left_by_a_kill(tmp_path / "nowhere" / "a.pth") == []


def test_content_is_on_the_disk_before_its_name_is_and_the_name_before_it_returns(tmp_path, monkeypatch):
    order, folder, path = [], tmp_path.stat().st_ino, tmp_path / "a.txt"
    flush, rename = os.fsync, os.replace

    def fsync(handle: int) -> None:
        about = os.fstat(handle)
        order.append("flush of the folder" if about.st_ino == folder else f"flush of {about.st_size} bytes")
        flush(handle)

    def replace(old, new) -> None:
        order.append(f"rename to {os.path.basename(new)}")
        rename(old, new)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", replace)
    with replacing(path) as temporary:
        temporary.write_text("12345")
    assert order == ["flush of 5 bytes", "rename to a.txt", "flush of the folder"]


def test_new_folders_are_in_their_own_folders_after_a_power_loss(tmp_path, monkeypatch):
    flushed, flush = [], os.fsync

    def fsync(handle: int) -> None:
        flushed.append(os.fstat(handle).st_ino)
        flush(handle)

    monkeypatch.setattr(os, "fsync", fsync)
    make_folder(tmp_path / "out" / "lora")
    assert set(flushed) == {tmp_path.stat().st_ino, (tmp_path / "out").stat().st_ino}
    make_folder(tmp_path / "out" / "lora")
    assert len(flushed) == 2


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOTSUP, errno.EIO])
def test_a_file_system_that_cannot_flush_a_folder(tmp_path, monkeypatch, number):
    flush = os.fsync

    def fsync(handle: int) -> None:
        if stat.S_ISDIR(os.fstat(handle).st_mode):
            raise OSError(number, os.strerror(number))
        flush(handle)

    monkeypatch.setattr(os, "fsync", fsync)
    if number == errno.EIO:  # a failing disk is a different error
        with pytest.raises(UserError, match="cannot write"):
            save_json({}, tmp_path / "a.json")
    else:
        save_json({}, tmp_path / "a.json")
    assert (tmp_path / "a.json").read_text() == "{}\n"


def test_a_system_without_flushing_of_folders(tmp_path, monkeypatch):
    monkeypatch.delattr(os, "O_DIRECTORY")  # as on Windows, where a folder cannot be opened
    save_json({}, tmp_path / "a.json")
    assert (tmp_path / "a.json").read_text() == "{}\n"


@pytest.mark.parametrize("size", [1, 100, 3_000_000])
def test_what_is_saved_is_hashed_on_the_way(tmp_path, size):
    path = tmp_path / "a.pth"
    short_hash = save_tensors({"a": torch.randn(size), "b": {"c": [1, "x"]}}, path)
    assert short_hash == file_hash(path) == hashlib.sha256(path.read_bytes()).hexdigest()
    assert torch.equal(load_tensors(path)["a"], torch.load(path)["a"])
    assert save_json({"名": 1}, tmp_path / "a.json") == file_hash(tmp_path / "a.json")


def test_a_file_is_compared_with_what_its_json_tells(tmp_path):
    path, beside = tmp_path / "a.pth", tmp_path / "a.json"
    short_hash = save_tensors({"a": torch.ones(9)}, path)
    check_hash(path, beside, {"sha256": short_hash})
    check_hash(path, beside, {})  # an earlier version's json, without a hash
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"a\.pth does not match the sha256 in .*a\.json"):
        check_hash(path, beside, {"sha256": short_hash})
    check_hash(path, beside, {})
