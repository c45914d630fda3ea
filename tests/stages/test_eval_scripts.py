"""Chatting with a model: which questions it is asked, what is printed, and the reported speed."""

import io
import sys
import time
from types import SimpleNamespace

import pytest
from PIL import Image

import eval_model
import eval_vlm
from scripts.tool_use import conversation
from scripts.tool_use.conversation import reply
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
    args = SimpleNamespace(
        **sampling, seed=7, votes=3, model_mode=3, stream=True, hide_thinking=True, open_thinking=False
    )
    assert "4" in reply(Engine(), [1, 5], args, by_hand=False)
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
    done = []
    model = SimpleNamespace(config=SimpleNamespace(max_seq_len=64), to=lambda device: done.append(device.type))
    monkeypatch.setattr("trainer.loading.load_by_flags", lambda args: (model, None))
    monkeypatch.setattr("trainer.loading.load_vlm_by_flags", lambda args: (model, None, None))
    monkeypatch.setattr("trainer.loading.open_engine", lambda given, *_, **settings: done.append(given))
    asked = ["--prompt", "q", "--max_new_tokens", "64", "--device", "cpu"]
    asked += ["--image", str(tmp_path / "a.png")] if script is eval_vlm else []
    monkeypatch.setattr(sys, "argv", ["script", *asked])
    with pytest.raises(UserError, match=r"^--max_new_tokens 64: the model's context is 64$"):
        script.main()
    assert done[0] == "cpu"  # before an engine is made


class Engine:
    """Answers each request with "w" and a number, and records the requests."""

    def __init__(self):
        self.asked, self.slots = [], None

    def stream(self, request):
        self.asked.append(request)
        yield SimpleNamespace(text=f"w{len(self.asked)}", tokens=[1])


@pytest.fixture
def evaluate(monkeypatch):
    """Runs eval_model.py with a fake model; returns the fake engine, which has recorded the requests."""

    def run(*flags, context: int = 600) -> Engine:
        engine = Engine()
        model = SimpleNamespace(config=SimpleNamespace(max_seq_len=context), to=lambda device: None)
        monkeypatch.setattr("trainer.loading.load_by_flags", lambda args: (model, "tokenizer"))
        monkeypatch.setattr(
            "trainer.loading.open_engine",
            lambda *_, slots: setattr(engine, "slots", slots) or engine,
        )
        monkeypatch.setattr(conversation, "render_text", lambda tokenizer, texts: [[1] * len(texts[0]) + [2]])
        monkeypatch.setattr(
            conversation,
            "fit_history",
            lambda tokenizer, system, turns, room, **_: ([turn["content"] for turn in [*system, *turns]], turns),
        )
        monkeypatch.setattr(sys, "argv", ["eval_model.py", "--device", "cpu", *flags])
        eval_model.main()
        return engine

    return run


@pytest.mark.parametrize(
    ("flags", "last"),
    [
        ((), ["c"]),
        (("--history_cnt", "1"), ["b", "w2", "c"]),
        (("--history_cnt", "2"), ["a", "w1", "b", "w2", "c"]),
        (("--history_cnt", "9", "--system", "s"), ["s", "a", "w1", "b", "w2", "c"]),
        (("--system", ""), ["c"]),
    ],
)
def test_earlier_questions_with_their_answers(evaluate, capsys, flags, last):
    engine = evaluate("--prompt", "a", "--prompt", "b", "--prompt", "c", *flags)
    assert engine.asked[-1].prompt == last
    assert capsys.readouterr().out == "> a\nw1\n\n> b\nw2\n\n> c\nw3\n"
    assert engine.slots == 1
    assert (engine.asked[0].max_new_tokens, engine.asked[0].temperature, engine.asked[0].seed) == (512, 0.85, None)


@pytest.mark.parametrize("stream", ["1", "0"])
def test_a_pretrained_model_may_be_given_all_the_room_that_is_left(evaluate, stream):
    flags = ("--model_mode", "0", "--max_new_tokens", "90", "--stream", stream)
    assert evaluate(*flags, "--prompt", "x" * 10, context=100).asked[0].prompt == [1] * 10
    with pytest.raises(UserError, match=r"^'xxxxxxxxxxx': the text has 11 tokens, but only 10 fit$"):
        evaluate(*flags, "--prompt", "x" * 11, context=100)


@pytest.mark.parametrize(
    ("votes", "temperature", "refused"), [("2", "0", True), ("1", "0", False), ("2", "0.001", False)]
)
def test_votes_need_some_chance(votes, temperature, refused, evaluate, monkeypatch):
    monkeypatch.setattr(conversation, "reply", lambda *given: "x")
    flags = ("--votes", votes, "--temperature", temperature, "--prompt", "a")
    if refused:
        with pytest.raises(UserError, match="--votes 2 at --temperature 0 is 2 times the same answer"):
            evaluate(*flags)
    else:
        assert evaluate(*flags).slots == int(votes)


def test_ctrl_c_ends_an_answer_by_hand_and_else_everything(capsys):
    class Interrupted(Engine):
        abandoned = 0

        def stream(self, request):
            yield SimpleNamespace(text="half", tokens=[1, 2])
            raise KeyboardInterrupt

        def abandon(self):
            self.abandoned += 1

    sampling = {"max_new_tokens": 4, "temperature": 1.0, "top_k": 0, "top_p": 1.0, "repetition_penalty": 1.0}
    args = SimpleNamespace(
        **sampling, seed=None, votes=1, model_mode=1, stream=True, hide_thinking=False, open_thinking=False
    )
    engine = Interrupted()
    assert reply(engine, [1], args, by_hand=True) == "half"
    assert engine.abandoned == 1
    told = capsys.readouterr()
    assert told.out == "half [stopped]\n"
    assert told.err.startswith("[2 tokens, ")
    with pytest.raises(KeyboardInterrupt):
        reply(engine, [1], args, by_hand=False)


@pytest.mark.parametrize(
    ("images", "asked"),
    [(1, "请描述这张图片。"), (2, "请比较这两张图片。"), (3, "请比较这两张图片。")],
)
def test_what_is_asked_about_pictures_where_nobody_asks(images, asked, monkeypatch, tmp_path, capsys):
    names = [f"{n}.png" for n in range(images)]
    for name in names:
        Image.new("RGB", (4, 4)).save(tmp_path / name)
    engine, chats = Engine(), []
    model = SimpleNamespace(config=SimpleNamespace(max_seq_len=600), to=lambda device: None)
    prompt = SimpleNamespace(input_ids=[SimpleNamespace(tolist=lambda: [7, 8])])
    monkeypatch.setattr("trainer.loading.load_vlm_by_flags", lambda args: (model, "tokenizer", "processor"))
    monkeypatch.setattr("trainer.loading.open_engine", lambda *_, slots: setattr(engine, "slots", slots) or engine)
    monkeypatch.setattr(
        "model.images.prepare_chat", lambda tokenizer, chat, *rest: chats.append((chat, rest[-1])) or prompt
    )
    monkeypatch.setattr("model.images.prompt_embeddings", lambda model, prompt: "seen")
    flags = [flag for name in names for flag in ("--image", str(tmp_path / name))]
    monkeypatch.setattr(sys, "argv", ["eval_vlm.py", "--device", "cpu", "--system", "s", *flags])
    eval_vlm.main()
    paths = [tmp_path / name for name in names]
    assert chats == [([{"role": "system", "content": "s"}, {"role": "user", "content": [*paths, asked]}], 88)]
    assert (engine.slots, engine.asked[0].embeddings, engine.asked[0].prompt) == (1, "seen", [7, 8])
    assert capsys.readouterr().out == f"\n{', '.join(names)}\n> {asked}\nw1\n"
