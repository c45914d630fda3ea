"""User errors in a training stage: each ends in one helpful line and exit code 2, and nothing is lost."""

import json
import os
import pickle
import shutil

import pytest
import torch

from model import LMConfig, MiniMindLM
from tests.conftest import write_jsonl
from tests.running import one_error_line
from tests.stages.training import about, snapshot, weights


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (("--max_seq_len", "1"), ("--max_seq_len", "2 or more")),
        (("--max_seq_len", "9000"), ("--max_seq_len 9000", "8192")),
        (("--batch_size", "0"), ("--batch_size", "1 or more")),
        (("--dim", "30"), ("dim 30", "n_heads 8")),
        (("--device", "cuda"), ("--device cuda", "--device cpu")),
        (("--device", "tpu"), ("--device tpu", "cuda:N")),
        (("--deepspeed",), ("--deepspeed", "torchrun")),
        (("--tokenizer", "/nowhere"), ("--tokenizer /nowhere", "train_tokenizer.py")),
        (("--data_path", "/nowhere.jsonl"), ("/nowhere.jsonl", "make demo", "http")),
        (("--eval_path", "/nowhere.jsonl", "--eval_interval", "1"), ("/nowhere.jsonl",)),
        (("--no-such-flag",), ("--no-such-flag",)),
        (("stray",), ("stray",)),
    ],
)
def test_wrong_flags(pretrain, tmp_path, flags, told):
    line = one_error_line(pretrain(tmp_path, *flags, exit_code=2))
    assert all(text in line for text in told), line
    assert not snapshot(tmp_path)


LINES = ['{"text": "one"}', '{"text": "two"}', '{"text": "three"}']


@pytest.mark.parametrize(
    ("bad", "why"),
    [
        ('{"text": "half', "not valid JSON"),
        ("[1, 2]", "not a JSON object"),
        ('{"txt": "x"}', '"text"'),
        ('{"text": 5}', "not a string"),
        ('{"text": " "}', "empty"),
        (b'{"text": "\xff"}', "UTF-8"),
        ("", "empty"),
    ],
)
def test_a_bad_line_in_the_middle(pretrain, tmp_path, bad, why):
    lines = [line.encode() for line in LINES]
    lines.insert(2, bad if isinstance(bad, bytes) else bad.encode())
    data = tmp_path / "data.jsonl"
    data.write_bytes(b"\n".join(lines) + b"\n")
    line = one_error_line(pretrain(tmp_path / "out", "--data_path", data, exit_code=2))
    assert f"{data}, line 3" in line
    assert why in line
    assert not snapshot(tmp_path / "out")
    done = pretrain(tmp_path / "out", "--data_path", data, "--skip_bad_lines")
    assert "1 bad lines skipped, the first: line 3" in done.stdout


def test_data_without_anything_to_learn(pretrain, sft, tmp_path):
    empty = tmp_path / "empty.jsonl"
    empty.write_bytes(b"")
    assert "is empty" in one_error_line(pretrain(tmp_path, "--data_path", empty, exit_code=2))
    chat = [{"role": "user", "content": "long " * 200}, {"role": "assistant", "content": "short"}]
    long = write_jsonl(tmp_path / "long.jsonl", [{"conversations": chat}])
    assert "a target within 128 tokens" in one_error_line(sft(tmp_path, "--data_path", long, exit_code=2))
    assert "is not a file" in one_error_line(pretrain(tmp_path, "--data_path", tmp_path, exit_code=2))


def test_a_bom_crlf_and_a_very_long_line_simply_work(pretrain, tmp_path):
    data = tmp_path / "data.jsonl"
    long = json.dumps({"text": "小机器人 counts apples. " * 20_000}, ensure_ascii=False)
    data.write_bytes("\ufeff".encode() + "\r\n".join([*LINES, long, *LINES, ""]).encode())
    done = pretrain(tmp_path, "--data_path", data, "--max_steps", "1")
    assert "7 samples" in done.stdout
    assert "1 split across rows" in done.stdout


@pytest.mark.parametrize("place", ["below a file", "read-only", "a folder in the way"])
def test_a_place_that_cannot_be_written(pretrain, tmp_path, place):
    """It is reported before the data is read, not when the first steps are saved."""
    (tmp_path / "file").write_text("mine")
    out = {"below a file": tmp_path / "file", "read-only": "/proc/minimind"}.get(place, tmp_path)
    if place == "a folder in the way":
        (tmp_path / "pretrain_32.resume").write_text("mine, too")
    line = one_error_line(pretrain(out, "--data_path", "/nowhere.jsonl", exit_code=2))
    assert "cannot write" in line
    assert (tmp_path / "file").read_text() == "mine"


def spoil(out, how: str) -> tuple[str, ...]:
    """Damage pretrain_32 in `out`; returns the flags to try it with."""
    path, story = out / "pretrain_32.pth", out / "pretrain_32.json"
    if how == "missing":
        return "--from_weight", "pretrain", "--dim", "64"
    if how == "unknown":
        return "--from_weight", "best"
    if how == "another depth":
        return "--n_layers", "3"
    if how == "another depth, no json":
        story.unlink()
        return "--n_layers", "3"
    if how == "dense, where experts are asked for":
        shutil.copy(path, out / "pretrain_32_moe.pth")
        return ("--use_moe",)
    if how == "truncated":
        path.write_bytes(path.read_bytes()[:50_000])
    elif how == "empty":
        path.write_bytes(b"")
    elif how == "code":
        with open(path, "wb") as file:
            pickle.dump({"a": os.path.join}, file)
    elif how == "no state dict":
        torch.save({"lr": 1e-4, "step": 3}, path)
    elif how == "an adapter":
        story.unlink()
        torch.save({f"layers.{n}.attention.wq.lora.A.weight": torch.zeros(4, 32) for n in range(2)}, path)
    elif how == "one key lacks":
        state = weights(out)
        del state["norm.weight"]
        torch.save(state, path)
    elif how == "one key too much":
        torch.save(weights(out) | {"vision_proj.weight": torch.zeros(2, 2)}, path)
    elif how == "other heads, no json":
        story.unlink()
        torch.save(MiniMindLM(LMConfig(dim=32, n_layers=2, n_kv_heads=8, vocab_size=589)).state_dict(), path)
    elif how == "json damaged":
        story.write_text(story.read_text()[:100])
    elif how == "json of something else":
        story.write_text('["a list"]')
    elif how == "json with impossible sizes":
        story.write_text(json.dumps(about(out) | {"config": {"dim": "wide"}}))
    return ()


@pytest.mark.parametrize(
    ("how", "told"),
    [
        ("missing", ("pretrain_64.pth is missing", "train_pretrain.py", "pretrain_32.pth (--dim 32)")),
        ("unknown", ("best_32.pth is missing",)),
        ("another depth", ("n_layers 2", "n_layers 3", "json", "give --n_layers 2")),
        ("another depth, no json", ("n_layers 2", "n_layers 3", "tensors")),
        ("dense, where experts are asked for", ("use_moe False", "use_moe True", "give --no-use_moe")),
        ("truncated", ("truncated, damaged",)),
        ("empty", ("truncated, damaged",)),
        ("code", ("its code was not run",)),
        ("no state dict", ("not a plain state dict of tensors: its 'lr' is a float",)),
        ("an adapter", ("lora.A.weight",)),
        ("one key lacks", ("missing: norm.weight",)),
        ("one key too much", ("unexpected: vision_proj.weight",)),
        ("other heads, no json", ("attention.wk.weight is [32, 32], not [8, 32]",)),
        ("json damaged", ("pretrain_32.json is damaged",)),
        ("json of something else", ("pretrain_32.json is damaged",)),
        ("json with impossible sizes", ("pretrain_32.json is damaged",)),
    ],
)
def test_weights_that_do_not_fit(sft, tiny_out, tmp_path, how, told):
    for name in ("pretrain_32.pth", "pretrain_32.json"):
        shutil.copy(tiny_out / name, tmp_path)
    flags = spoil(tmp_path, how)
    before = snapshot(tmp_path)
    start = () if "--from_weight" in flags else ("--from_weight", "pretrain")
    line = one_error_line(sft(tmp_path, *start, *flags, exit_code=2))
    assert all(text in line for text in told), line
    assert snapshot(tmp_path) == before


def test_weights_of_another_tokenizer(sft, plain_tokenizer, tmp_path):
    plain_tokenizer.save_pretrained(tmp_path / "other")
    line = one_error_line(sft(tmp_path, "--tokenizer", tmp_path / "other", exit_code=2))
    assert "was trained with tokenizer" in line
    assert str(tmp_path / "other") in line


def test_a_downloaded_file_says_which_tokenizer_is_assumed(sft, tiny_out, tokenizer_dir, tmp_path):
    """Half precision, tables of old versions, no json."""
    state = {key: value.half() for key, value in weights(tiny_out).items()}
    torch.save(state | {"pos_cis": torch.zeros(4, 2), "layers.0.attention.mask": torch.zeros(4, 4)}, tmp_path / "a.pth")
    done = sft(tmp_path, "--from_weight", tmp_path / "a.pth", "--max_steps", "1")
    assert done.stderr == f"{tmp_path / 'a.pth'} has no json beside it; assuming the tokenizer {tokenizer_dir}\n"
    assert about(tmp_path, "full_sft_32")["step"] == 1


@pytest.mark.parametrize(("size", "told"), [("64k", "a --num_workers batch"), ("4k", "cannot use shared memory")])
def test_a_small_shared_memory(pretrain, tmp_path, size, told):
    """It used to wait forever for the batch that did not fit."""
    before = ("tests/stages/small_shm.py", size)
    done = pretrain(tmp_path, "--num_workers", "2", "--batch_size", "64", before=before, exit_code=None)
    if done.returncode == 77:
        pytest.skip("a small /dev/shm cannot be mounted here")
    assert done.returncode == 2
    line = one_error_line(done)
    assert told in line
    assert "--shm-size" in line
    assert "--num_workers 0" in line
    pretrain(tmp_path, "--num_workers", "0", "--batch_size", "16", "--max_steps", "1", before=before)


def test_of_two_ranks_one_speaks(pretrain, tmp_path):
    done = pretrain(tmp_path, "--data_path", "/nowhere.jsonl", processes=2, exit_code=2)
    assert "/nowhere.jsonl" in one_error_line(done)


def test_a_rank_that_fails_alone_is_heard(pretrain, tmp_path):
    """Rank 0 cannot write; the other rank, whose connection is closed or which the launcher terminates, is silent, so
    that no traceback hides the line."""
    flags, struck = ("--max_steps", "2", "--deepspeed"), {"STRUCK_RANK": "0"}
    done = pretrain.interrupted(tmp_path, "SIGXFSZ", "size", 50_000, *flags, processes=2, exit_code=2, env=struck)
    line = one_error_line(done)
    assert "cannot write" in line
    assert "pretrain_32.resume" in line
