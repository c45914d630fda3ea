"""scripts/rejection_sampling.py: an answer is kept if, and only if, it passes every check."""

import json

import pytest
import torch

from model import LMConfig, MiniMindLM
from scripts.rejection_sampling import sort_out
from tests.conftest import write_jsonl
from tests.running import call_script
from trainer.rewards import Reply, read_rewards

GOOD = "<think>\n1 + 1 = 2\n</think>\n<answer>\n2\n</answer>"


def reply(text: str, finished: bool = True) -> Reply:
    return Reply([{"role": "user", "content": "?"}], text, "2", [1] * len(text.split()), finished, 64)


def test_what_passes_every_check_is_told_from_the_rest_each_text_once():
    wrong = GOOD.replace("<answer>\n2", "<answer>\n3")
    replies = [reply(text) for text in ("2", GOOD, wrong, GOOD, wrong, f"{GOOD}\n")]
    assert sort_out(replies, read_rewards(["format:1", "accuracy:1"])) == ([GOOD], ["2", wrong, f"{GOOD}\n"])
    assert sort_out(replies, read_rewards(["accuracy:1"]))[0] == ["2", GOOD, f"{GOOD}\n"]
    assert sort_out([reply(GOOD, finished=False)], read_rewards(["accuracy:1"])) == ([], [GOOD])


@pytest.fixture
def sample(tiny_tokenizer, tokenizer_dir, tmp_path):
    """Runs the script on four questions with random weights."""
    torch.manual_seed(0)
    model = MiniMindLM(LMConfig(dim=32, n_layers=2, vocab_size=len(tiny_tokenizer)))
    torch.save(model.state_dict(), tmp_path / "grpo_32.pth")
    write_jsonl(tmp_path / "rl.jsonl", [{"question": f"{n}?", "answer": n, "system": "Think."} for n in range(4)])
    sizes = ("--dim", "32", "--n_layers", "2", "--device", "cpu", "--out_dir", tmp_path, "--tokenizer", tokenizer_dir)
    lengths = ("--max_new_tokens", "8", "--max_seq_len", "64")
    files = (tmp_path / "rl.jsonl", tmp_path / "kept.jsonl")
    return lambda *flags, **how: call_script("scripts/rejection_sampling.py", *files, *sizes, *lengths, *flags, **how)


def test_the_lines_are_for_fine_tuning_and_for_preferences(sample, tmp_path, capsys):
    flags = ("--accept", "repetition:-0.1", "language:0.8", "--samples", "6", "--most", "2")
    sample(*flags, "--pairs", tmp_path / "pairs.jsonl")
    lines = [json.loads(line) for line in (tmp_path / "kept.jsonl").read_text(encoding="utf-8").splitlines()]
    assert 0 < len(lines) <= 8
    for line in lines:
        roles = [turn["role"] for turn in line["conversations"]]
        assert roles == ["system", "user", "assistant"]
    pairs = [json.loads(line) for line in (tmp_path / "pairs.jsonl").read_text(encoding="utf-8").splitlines()]
    assert 0 < len(pairs) <= 4
    assert all(pair["chosen"][:2] == pair["rejected"][:2] and pair["chosen"] != pair["rejected"] for pair in pairs)
    assert f"{len(lines)} answers kept" in capsys.readouterr().out
    before = (tmp_path / "kept.jsonl").read_bytes()
    sample(*flags, exit_code=2)
    assert "--overwrite" in capsys.readouterr().err
    sample(*flags, "--overwrite")
    assert (tmp_path / "kept.jsonl").read_bytes() == before


def test_where_nothing_passes_nothing_is_written(sample, tmp_path, capsys):
    sample("--samples", "2", exit_code=2)
    assert "no answer to any of 4 questions passed format:1 accuracy:1" in capsys.readouterr().err
    assert not (tmp_path / "kept.jsonl").exists()
