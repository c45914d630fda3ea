"""The chat page in Streamlit's own test harness, and in a real browser where there is one."""

import sys
from types import SimpleNamespace

import pytest
import torch
from streamlit.testing.v1 import AppTest

from model.chat import render_chat
from scripts.serving import page as web_page
from tests.running import PATIENCE, ROOT, call_script
from tests.scripts.openai_double import openai_double
from trainer.weights import load_weights

UGLY = "<b>bold</b> *stars* $x$ [link](javascript:alert(1)) <script>alert(1)</script>\n  two  spaces"


@pytest.fixture
def open_page(monkeypatch):
    """Opens the page with options, like `streamlit run scripts/web_demo.py -- OPTIONS`."""
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)

    def run(*options, script: str = "web_demo.py") -> AppTest:
        monkeypatch.setattr(sys, "argv", [script, *map(str, options)])
        app = AppTest.from_file(str(ROOT / "scripts" / script), default_timeout=PATIENCE).run()
        assert not app.exception, app.exception
        return app

    return run


@pytest.fixture
def local(open_page, tiny_out, tokenizer_dir):
    """The page with the tiny model, with short greedy answers."""
    app = open_page("--out_dir", tiny_out, "--tokenizer", tokenizer_dir, "--device", "cpu")
    app.slider(key="t").set_value(0.0)
    app.slider(key="longest").set_value(16)
    return app


def ask(app: AppTest, question: str) -> AppTest:
    app.chat_input(key="question").set_value(question).run()
    assert not app.exception, app.exception
    return app


def talk(app: AppTest) -> list[tuple[str, str]]:
    """(role, text) of each message, from the plain text elements."""
    return [(message.name, message.text[0].value) for message in app.chat_message]


@pytest.fixture
def greedy(tiny_out, tiny_tokenizer):
    """The tiny model's whole greedy answer."""
    model = load_weights(tiny_out / "full_sft_32.pth", None, tiny_tokenizer).eval()

    def answer(*contents: str, system: str | None = None) -> str:
        turns = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(contents)]
        turns = [{"role": "system", "content": system}, *turns] if system else turns
        ids = torch.tensor([render_chat(tiny_tokenizer, turns, add_generation_prompt=True)[0]])
        return tiny_tokenizer.decode(model.generate(ids, max_new_tokens=16)[0, ids.size(1) :], skip_special_tokens=True)

    return answer


def test_a_talk_with_a_model_of_this_machine(local, greedy):
    assert local.selectbox(key="weights").value.name == "full_sft_32.pth"
    ask(local, UGLY)
    first = greedy(UGLY)
    assert talk(local) == [("user", UGLY), ("assistant", first.strip())]
    assert not local.markdown  # no message is rendered as Markdown
    ask(local, "你好")
    second = greedy(UGLY, first, "你好")
    assert talk(local)[2:] == [("user", "你好"), ("assistant", second.strip())]
    ask(local, "And?")
    assert talk(local)[5] == ("assistant", greedy(UGLY, first, "你好", second, "And?").strip())
    local.button(key="delete 3").click().run()

    local.text_area(key="system").set_value("Be kind.")
    local.slider(key="history").set_value(0).run()
    assert len(talk(local)) == 4  # changing a setting does not change the chat
    local.button(key="again 2").click().run()
    assert talk(local)[3] == ("assistant", greedy("你好", system="Be kind.").strip())

    local.button_group(key="language").set_value("中文").run()
    assert local.slider(key="longest").label == "最大回答长度（token）"
    assert local.slider(key="longest").value == 16
    assert len(talk(local)) == 4
    local.button(key="delete 1").click().run()
    assert next(text for _, text in talk(local)) == "你好"
    local.button(key="new").click().run()
    assert talk(local) == []
    assert local.button(key="sample 0").label == "你是谁？"
    local.button(key="sample 0").click().run()
    assert talk(local)[0] == ("user", "你是谁？")


def test_a_talk_over_an_address_folds_the_thinking_away(open_page, tmp_path):
    with openai_double() as double:
        double.reply = lambda body: [("thinking", "hm <i>"), "<think>more</think>", UGLY]
        app = open_page("--out_dir", tmp_path, "--base_url", double.address)
        assert app.info[0].value.startswith("There are no weights in")
        app.radio(key="source").set_value("OpenAI API").run()
        app.text_area(key="system").set_value("Be brief.")
        ask(app, "hi")
        answer = app.chat_message[1]
        assert answer.expander[0].label == "Thinking"
        assert not answer.expander[0].proto.expanded
        assert answer.expander[0].text[0].value == "hm <i>more"
        assert [element.value for element in answer.text][-1] == UGLY
        assert not app.markdown
        request = double.requests[-1]
        assert request["messages"] == [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "hi"}]
        assert (request["max_tokens"], request["temperature"], request["stream"]) == (512, 0.85, True)
        assert "seed" not in request

        turn = app.session_state.turns[0]
        turn.answer.tokens, turn.answer.seconds = 12, 4.0
        assert app.run().chat_message[1].caption[0].value == "12 tokens · 3 tokens/s"

        double.reply = lambda body: {"message": "too *long*", "type": "invalid_request_error"}
        ask(app, "again")
        assert double.requests[-1]["messages"][2]["content"].endswith(UGLY)
        assert app.chat_message[3].text[-1].value.endswith("too *long*")
        double.reply = lambda body: ["better"]
        app.button(key="again 2").click().run()
        assert talk(app)[-1] == ("assistant", "better")
        for turns, shown in ((0, ["again"]), (1, ["hi", UGLY, "again"]), (20, ["hi", UGLY, "again"])):
            app.slider(key="history").set_value(turns).run()
            app.button(key="again 2").click().run()
            contents = [message["content"] for message in double.requests[-1]["messages"]]
            assert [content.removeprefix("<think>more</think>") for content in contents] == ["Be brief.", *shown]
    app.text_input(key="address").set_value("http://127.0.0.1:9/v1").run()
    assert app.sidebar.text[0].value.startswith("nothing answers at http://127.0.0.1:9/v1")
    assert app.chat_input(key="question").disabled
    assert talk(app)[-1] == ("assistant", "better")


def test_weights_that_do_not_load_are_named_and_the_page_goes_on(open_page, tiny_out, tokenizer_dir, tmp_path):
    (tmp_path / "full_sft_32.pth").write_bytes(b"nothing")
    app = open_page("--out_dir", tmp_path, "--tokenizer", tokenizer_dir)
    assert "is truncated" in app.sidebar.text[0].value
    for name in ("full_sft_32.pth", "full_sft_32.json"):
        (tmp_path / name).write_bytes((tiny_out / name).read_bytes())
    app.run()
    assert not app.sidebar.text
    assert not app.chat_input(key="question").disabled


@pytest.mark.parametrize("script", ["web_demo.py", "web_demo_vlm.py"])
def test_without_streamlit_it_says_what_to_type(script, capsys):
    call_script(f"scripts/{script}", exit_code=2)
    told = f"error: this page needs Streamlit: run {sys.executable} -m streamlit run scripts/{script}"
    assert told in capsys.readouterr().err.splitlines()


@pytest.mark.parametrize(
    ("address", "typed", "sent"),
    [("http://own/v1", "", "secret"), ("http://own/v1", "mine", "mine"), ("http://other/v1", "", "")],
)
def test_the_key_of_the_environment_goes_to_no_address_that_somebody_typed(address, typed, sent, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    asked = []
    monkeypatch.setattr(web_page, "_remote", lambda *given: asked.append(given) or (None, []))
    inputs = iter([address, typed])
    page = SimpleNamespace(text_input=lambda *_, **__: next(inputs), selectbox=lambda *_, **__: None)
    monkeypatch.setattr(web_page, "st", page)
    web_page.choose_remote(web_page.WORDS["English"], SimpleNamespace(base_url="http://own/v1"))
    assert asked == [(address, sent)]


def test_the_parameters_of_a_page_where_nobody_moves_them(open_page, tmp_path):
    app = open_page("--out_dir", tmp_path)
    sliders = {slider.key: (slider.min, slider.max, slider.value, slider.step) for slider in app.slider}
    assert sliders == {
        "t": (0.0, 2.0, 0.85, 0.05),
        "top_p": (0.05, 1.0, 0.85, 0.05),
        "penalty": (1.0, 2.0, 1.0, 0.05),
        "longest": (16, 4096, 512, 16),
        "history": (0, 20, 3, 1),
    }
    seed = app.number_input(key="seed")
    assert (seed.min, seed.max, seed.value) == (0, 2**31 - 1, None)
    assert not app.slider(key="penalty").disabled
    assert app.radio(key="source").value == "out/"
    app.radio(key="source").set_value("OpenAI API").run()
    assert app.slider(key="penalty").disabled  # not part of OpenAI's API


@pytest.fixture
def talking(monkeypatch):
    """A page's chat of three turns: the first answer is complete, the second being generated, the third not begun."""

    class State(dict):
        __getattr__, __setattr__ = dict.__getitem__, dict.__setitem__

    stopped = []
    answers = [SimpleNamespace(stop=lambda name=name: stopped.append(name)) for name in (1, 2)]
    turns = [web_page.Turn(number, "q", [], answer) for number, answer in enumerate((*answers, None), 1)]
    state = State(turns=list(turns), asked=3)
    monkeypatch.setattr(web_page, "st", SimpleNamespace(session_state=state))
    return state, turns, stopped


def test_a_new_talk_has_nothing_of_the_old_one_and_no_answer_goes_on(talking):
    state, _, stopped = talking
    web_page.forget_all()
    assert (state.turns, stopped) == ([], [1, 2])


def test_what_is_said_comes_last_and_ends_what_is_still_being_written(talking):
    state, turns, stopped = talking
    web_page.say("more", [b"1"])
    *earlier, new = state.turns
    assert (earlier, vars(new)) == (turns, {"number": 4, "question": "more", "pictures": [b"1"], "answer": None})
    assert stopped == [1, 2]


def test_a_turn_that_is_deleted_is_gone_alone(talking):
    state, turns, stopped = talking
    web_page.forget(turns[1])
    assert (state.turns, stopped) == ([turns[0], turns[2]], [2])


def test_the_words_of_both_languages_are_for_the_same_things():
    chinese, english = web_page.WORDS["中文"], web_page.WORDS["English"]
    assert chinese.keys() == english.keys()
    for key in chinese:
        assert str(chinese[key]).count("{") == str(english[key]).count("{"), key
    assert len(chinese["samples"]) == len(english["samples"]) == 4
    assert english["speed"].format(7, 3.6) == "7 tokens · 4 tokens/s"


def test_a_question_without_an_answer_is_no_part_of_a_later_history():
    answered = web_page.Turn(1, "q", [], SimpleNamespace(raw="a"))
    assert answered.messages() == [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    assert web_page.Turn(1, "q", []).messages() == []
    assert web_page.Turn(1, "q", [], SimpleNamespace(raw="")).messages() == []
    assert web_page.Turn(1, "q", [b"1", b"2"]).asked() == {"role": "user", "content": [b"1", b"2", "q"]}
