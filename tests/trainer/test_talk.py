"""Typed or piped input is read as UTF-8, or refused if it is not, whatever the system's locale."""

import ast
import io
import sys
import time

import pytest

from model.inference.request import Piece
from scripts.chat_openai_api import lines
from tests.running import ROOT
from trainer.argument_types import text
from trainer.arguments import Parser
from trainer.errors import UserError
from trainer.talk import piped_lines, questions, read_line, report_speed, room_for_prompt, show, stream_texts

LATIN = "caf\u00e9?".encode("latin-1")


@pytest.fixture
def pipe(monkeypatch):
    """Puts bytes on stdin, which Python would decode as UTF-8 or, as on Windows, in another encoding."""

    def put(content: bytes, encoding: str = "utf-8", errors: str = "strict") -> None:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content), encoding, errors))

    return put


@pytest.mark.parametrize("read", [piped_lines, lines, lambda: questions(None, ["sample"], by_hand=False)])
@pytest.mark.parametrize("locale", [("utf-8", "strict"), ("utf-8", "surrogateescape"), ("cp1252", "strict")])
def test_a_pipe_is_utf8_or_is_told_not_to_be(pipe, read, locale):
    pipe("\ufeff 你好 \r\n\n  \ncaf\u00e9?".encode(), *locale)
    assert list(read()) == ["你好", "caf\u00e9?"]
    pipe(b"good\n" + LATIN, *locale)
    asked = iter(read())
    assert next(asked) == "good"
    with pytest.raises(UserError, match=r"the piped input is not UTF-8 \(line 2: .* at byte 4\)"):
        next(asked)


def test_a_pipe_to_the_chat_ends_at_exit(pipe):
    pipe(b"one\n/exit\ntwo\n")
    assert list(lines()) == ["one"]


@pytest.mark.parametrize("fault", ["strict", "surrogateescape"])
def test_a_terminal_is_utf8_or_is_told_not_to_be(monkeypatch, fault):
    monkeypatch.setattr("builtins.input", lambda prompt: LATIN.decode("utf-8", fault))
    with pytest.raises(UserError, match="the input is not UTF-8"):
        read_line("> ")
    monkeypatch.setattr("builtins.input", lambda prompt: " 你好 ")
    assert read_line("> ") == "你好"


def test_words_of_the_command_line_are_utf8():
    parser = Parser("")
    parser.add_argument("--prompt", type=text)
    assert parser.parse_args(["--prompt", "你好"]).prompt == "你好"
    with pytest.raises(UserError, match="argument --prompt: not valid UTF-8"):
        parser.parse_args(["--prompt", LATIN.decode("utf-8", "surrogateescape")])


def test_a_text_that_is_shown_has_been_counted_also_when_the_rest_is_not_wanted():
    pieces = []
    texts = stream_texts(iter([Piece("a", ()), Piece("b", ())]), pieces)
    assert next(texts) == "a"
    texts.close()  # Ctrl-C
    assert [piece.text for piece in pieces] == ["a"]


def test_nothing_reads_stdin_but_what_says_so():
    """Other modules may only check whether stdin is a terminal."""
    rooms = [ROOT / room for room in ("model", "dataset", "trainer", "scripts", "benchmarks")]
    sources = [*ROOT.glob("*.py"), *(path for room in rooms for path in room.rglob("*.py"))]
    allowed = {ROOT / "trainer" / "talk.py", ROOT / "trainer" / "errors.py"}  # the latter sets the streams' encoding
    for path in set(sources) - allowed:
        nodes = list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
        asked = [n.value for n in nodes if isinstance(n, ast.Attribute) and n.attr == "isatty"]
        for node in nodes:
            name = node.func.id if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) else None
            assert name != "input", path
            assert not (isinstance(node, ast.Attribute) and node.attr == "stdin" and node not in asked), path


def test_the_longest_answer_leaves_room_for_a_token_at_least():
    assert room_for_prompt(64, 63) == 1
    assert room_for_prompt(64, 1) == 63
    for asked in (64, 65):
        with pytest.raises(UserError, match=f"^--max_new_tokens {asked}: the model's context is 64$"):
            room_for_prompt(64, asked)


@pytest.mark.parametrize("terminal", [True, False])
def test_samples_are_for_a_terminal_alone(pipe, monkeypatch, terminal):
    pipe(b"piped\n")
    monkeypatch.setattr(sys.stdin, "isatty", lambda: terminal)
    assert list(questions(None, ["sample"], by_hand=False)) == (["sample"] if terminal else ["piped"])
    assert list(questions([], ["sample"], by_hand=False)) == (["sample"] if terminal else [])


def test_a_person_is_asked_anew_until_there_is_nothing(monkeypatch, capsys):
    typed, asked = iter(["a", "b"]), []

    def read(prompt: str) -> str:
        asked.append(prompt)
        try:
            return next(typed)
        except StopIteration:
            raise EOFError from None

    monkeypatch.setattr("builtins.input", read)
    assert list(questions(["given"], ["sample"], by_hand=True)) == ["a", "b"]
    assert asked == ["\n> "] * 3
    assert capsys.readouterr().out == "\n"  # a new line after Ctrl-D


def test_the_speed_of_two_pieces(monkeypatch, capsys):
    monkeypatch.setattr(time, "monotonic", lambda: 14.0)
    report_speed([Piece("a", (1, 2)), Piece("b", (3,))], started=12.0)
    assert capsys.readouterr() == ("", "[3 tokens, 1.5 tokens/s]\n")


@pytest.mark.parametrize(
    ("reasoning", "hide", "shown"),
    [
        (False, False, "<think>\na\n</think>\n<answer>\nb\n</answer>\n"),
        (True, False, "[thinking]\na\n[answer]\nb\n"),
        (True, True, "b\n"),
    ],
)
def test_what_is_shown_to_the_letter(reasoning, hide, shown, capsys):
    show(["<think>\na\n</think>\n", "<answer>\nb\n</answer>"], reasoning, hide)
    assert capsys.readouterr().out == shown


def test_a_thought_that_the_prompt_has_begun_is_shown_as_one(capsys):
    show(["12 + 30", "\n</think>\n", "\n42"], reasoning=True, hide_thinking=False, opened=True)
    assert capsys.readouterr().out == "[thinking]\n12 + 30\n[answer]\n42\n"
    show(["12 + 30\n</think>\n\n42"], reasoning=True, hide_thinking=True, opened=True)
    assert capsys.readouterr().out == "42\n"
