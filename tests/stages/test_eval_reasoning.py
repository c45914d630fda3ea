"""eval_model.py with a reasoning model: thinking and answer shown separately, thinking hidden, majority votes."""

import shutil

import pytest

import eval_model
from tests.running import TINY
from trainer.errors import UserError
from trainer.talk import show

PIECES = ["<thi", "nk>\n1 + 1", " = 2\n</think>\n<answer>", "\n2\n", "</answer>"]


@pytest.mark.parametrize("pieces", [PIECES, ["".join(PIECES)]])
def test_thinking_and_answer_apart(pieces, capsys):
    show(pieces, reasoning=True, hide_thinking=False)
    assert capsys.readouterr().out == "[thinking]\n1 + 1 = 2\n[answer]\n2\n"


def test_thinking_hidden(capsys):
    show(PIECES, reasoning=True, hide_thinking=True)
    assert capsys.readouterr().out == "2\n"


def test_other_models_say_what_they_say(capsys):
    show(PIECES, reasoning=False, hide_thinking=False)
    assert capsys.readouterr().out == "".join(PIECES) + "\n"


@pytest.fixture
def reason_out(tiny_out, tmp_path):
    """An --out_dir with a model for --model_mode 3."""
    for suffix in (".pth", ".json"):
        shutil.copy(tiny_out / f"full_sft_32{suffix}", tmp_path / f"reason_32{suffix}")
    return tmp_path


def ask(monkeypatch, out, tokenizer_dir, *arguments: str) -> None:
    flags = (*TINY, "--out_dir", out, "--tokenizer", tokenizer_dir, "--model_mode", "3", "--max_new_tokens", "8")
    monkeypatch.setattr("sys.argv", ["eval_model.py", *map(str, flags), "--prompt", "1 + 1 = ?", *arguments])
    eval_model.main()


def test_a_vote_shows_one_of_the_answers_and_how_it_went(monkeypatch, reason_out, tokenizer_dir, capsys):
    ask(monkeypatch, reason_out, tokenizer_dir, "--votes", "3", "--seed", "1")
    printed = capsys.readouterr()
    assert printed.out.startswith("> 1 + 1 = ?\n[answer]\n")
    assert " of 3 votes, " in printed.err


def test_a_vote_needs_a_temperature(monkeypatch, reason_out, tokenizer_dir):
    with pytest.raises(UserError, match="--temperature"):
        ask(monkeypatch, reason_out, tokenizer_dir, "--votes", "3", "--temperature", "0")
