"""Talking to a model: what is asked, what is shown, and how fast it is said to have come."""

import io
import sys
import time
from types import SimpleNamespace

import pytest
from PIL import Image

import eval_model
import eval_vlm
from trainer import talk
from trainer.errors import UserError


def test_what_is_piped_in_is_asked_line_by_line_but_for_empty_ones(monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b" one \n\n  \ntwo\n")))
    assert list(talk.questions(None, ("sample",), by_hand=False)) == ["one", "two"]
    assert list(talk.questions(["given"], ("sample",), by_hand=False)) == ["given"]


def test_by_hand_an_empty_line_ends(monkeypatch):
    typed = iter(["a", "", "b"])
    monkeypatch.setattr("builtins.input", lambda prompt: next(typed))
    assert list(talk.questions(["given"], (), by_hand=True)) == ["a"]


def test_the_speed_is_of_tokens_and_not_of_pieces(monkeypatch, capsys):
    monkeypatch.setattr(time, "monotonic", lambda: 12.0)
    talk.report_speed([SimpleNamespace(tokens=[1, 2, 3]), SimpleNamespace(tokens=[4])], started=10.0, prefix="x, ")
    assert capsys.readouterr().err == "[x, 4 tokens, 2.0 tokens/s]\n"


PIECES = ["<think>\nhm\n</think>\n", "<answer>\nyes\n</answer>"]


def test_thinking_and_answer_are_shown_apart_or_the_answer_alone(capsys):
    talk.show(PIECES, reasoning=True, hide_thinking=False)
    shown = capsys.readouterr().out
    assert shown.index("[thinking]") < shown.index("hm") < shown.index("[answer]") < shown.index("yes")
    talk.show(PIECES, reasoning=True, hide_thinking=True)
    shown = capsys.readouterr().out
    assert "yes" in shown
    assert "hm" not in shown
    assert "[" not in shown


def test_every_vote_has_a_seed_of_its_own(capsys):
    asked = []

    class Engine:
        def run(self, requests):
            asked.extend(requests)
            return [SimpleNamespace(text="<answer>\n4\n</answer>", tokens=[1]) for _ in asked]

    sampling = {"max_new_tokens": 4, "temperature": 1.0, "top_k": 0, "top_p": 1.0, "repetition_penalty": 1.0}
    args = SimpleNamespace(**sampling, seed=7, votes=3, model_mode=3, stream=True, hide_thinking=True)
    assert "4" in eval_model.reply(Engine(), [1, 5], args, by_hand=False)
    assert [request.seed for request in asked] == [7, 8, 9]
    assert "3 of 3 votes, 3 tokens" in capsys.readouterr().err


def test_which_images_belong_to_one_question(tmp_path):
    def groups(**flags) -> list[list[str]]:
        args = SimpleNamespace(
            **{"image": None, "image_dir": tmp_path, "model_mode": 1, "skip_bad_images": False} | flags
        )
        return [[path.name for path in group] for group in eval_vlm.groups_of_images(args)]

    picture = Image.new("RGB", (4, 4))
    with pytest.raises(UserError, match=r"holds 0 images, and --model_mode 1 shows 1"):
        groups()
    (tmp_path / "notes.txt").touch()
    picture.save(tmp_path / "b.jpg")
    assert groups() == [["b.jpg"]]
    with pytest.raises(UserError, match=r"holds 1 images, and --model_mode 2 shows 2"):
        groups(model_mode=2)
    picture.save(tmp_path / "a.PNG")
    assert groups() == [["a.PNG"], ["b.jpg"]]
    assert groups(model_mode=2) == [["a.PNG", "b.jpg"]]
    picture.save(tmp_path / "c.webp")
    assert groups(model_mode=2) == [["a.PNG", "b.jpg"], ["c.webp"]]
    assert groups(image=[tmp_path / "c.webp", tmp_path / "b.jpg"]) == [["c.webp", "b.jpg"]]


@pytest.mark.parametrize("script", [eval_model, eval_vlm])
def test_an_answer_as_long_as_the_context_leaves_no_room_to_ask(script, monkeypatch, tmp_path):
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    model = SimpleNamespace(config=SimpleNamespace(max_seq_len=64), to=lambda device: None)
    monkeypatch.setattr("trainer.loading.load_by_flags", lambda args: (model, None))
    monkeypatch.setattr("trainer.loading.load_vlm_by_flags", lambda args: (model, None, None))
    monkeypatch.setattr("model.inference.scheduler.Engine", lambda *_, **settings: None)
    asked = ["--prompt", "q", "--max_new_tokens", "64"]
    asked += ["--image", str(tmp_path / "a.png")] if script is eval_vlm else []
    monkeypatch.setattr(sys, "argv", ["script", *asked])
    with pytest.raises(UserError, match=r"^--max_new_tokens 64: the model takes 64 in all$"):
        script.main()
