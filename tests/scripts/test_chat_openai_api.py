"""The terminal client, operated through a pseudo-terminal."""

import os
import re
import select
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest

from scripts import chat_openai_api
from tests.running import PATIENCE, ROOT, one_error_line, run_script
from tests.scripts.openai_double import openai_double

fcntl, termios = (pytest.importorskip(name, reason="Windows has none") for name in ("fcntl", "termios"))

CTRL_C, CTRL_D = "\x03", "\x04"


class Terminal:
    """A script at a pseudo-terminal."""

    def __init__(self, *arguments: str):
        self.master, slave = os.openpty()
        self.process = subprocess.Popen(
            [sys.executable, str(ROOT / "scripts/chat_openai_api.py"), *arguments],
            stdin=slave,
            stdout=slave,
            stderr=slave,
            start_new_session=True,
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),  # so that Ctrl-C is a signal
            env=os.environ | {"TERM": "dumb"},
        )
        os.close(slave)
        self.seen = ""

    def type(self, text: str) -> None:
        os.write(self.master, text.encode())

    def wait_for(self, pattern: str, again: str = "") -> str:
        """Wait for the pattern; returns the output up to its end, and discards it.

        Args:
            again: type this repeatedly until the pattern appears. If Ctrl-C arrives just before readline begins to wait
                for a key, Python handles it only at the next key.

        Raises:
            AssertionError: it does not appear.
        """
        end = time.monotonic() + PATIENCE
        while not (found := re.search(pattern, self.seen)):
            assert time.monotonic() < end, f"no {pattern!r} in {self.seen!r}"
            if select.select([self.master], [], [], 1)[0]:
                self.seen += os.read(self.master, 65536).decode(errors="replace")
            else:
                self.type(again)
        before, self.seen = self.seen[: found.end()], self.seen[found.end() :]
        return before

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self.master)


@pytest.fixture
def server():
    with openai_double() as double:
        yield double


def test_a_talk_with_history_commands_and_an_answer_that_is_stopped(server):
    def endless(body):
        yield "one "
        while True:
            yield "more "
            yield 0.02

    terminal = Terminal("--base_url", server.address, "--temperature", "0.5")
    try:
        terminal.wait_for("double at .*\n> ")
        terminal.type("你好 there\n")
        terminal.wait_for("You said: 你好 there\r\n> ")
        assert server.requests[-1]["messages"] == [{"role": "user", "content": "你好 there"}]
        assert server.requests[-1]["temperature"] == 0.5
        assert "top_p" not in server.requests[-1]  # the server's own default applies

        terminal.type("again\n")
        terminal.wait_for("You said: again\r\n> ")
        assert [turn["content"] for turn in server.requests[-1]["messages"]] == [
            *("你好 there", "You said: 你好 there", "again"),
        ]

        server.reply = endless
        terminal.type("talk\n")
        terminal.wait_for("one more more")
        terminal.type(CTRL_C)
        terminal.wait_for(r"\(stopped\)\r\n> ")
        assert server.abandoned.wait(PATIENCE)

        server.reply = lambda body: [("thinking", "hm"), "I think\033[2J\x9b so"]
        terminal.type("/usr/bin is what?\n")
        printed = terminal.wait_for("so\r\n> ")
        assert "\033[2mhm\n".replace("\n", "\r\n") + "\033[0mI think[2J so" in printed  # no escapes from the model
        messages = server.requests[-1]["messages"]
        assert messages[-1]["content"] == "/usr/bin is what?"
        assert re.fullmatch("one( more)+ ", messages[-2]["content"])

        terminal.type("/system Be brief.\nhi\n")
        terminal.wait_for("system prompt: Be brief.(.|\n)*so\r\n> ")
        assert server.requests[-1]["messages"] == [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "hi"},
        ]
        server.reply = lambda body: {"message": "too long by 3 tokens", "type": "invalid_request_error"}
        terminal.type("/rest\n/reset\n/help\nfail\n")
        terminal.wait_for("/rest is not a command(.|\n)*forgotten(.|\n)*/exit(.|\n)*too long by 3 tokens(.|\n)*> ")
        assert [turn["role"] for turn in server.requests[-1]["messages"]] == ["system", "user"]

        terminal.type("half a line")
        terminal.wait_for(r"Ctrl-D or /exit ends\)\r\n> ", again=CTRL_C)
        terminal.type(CTRL_D)
        assert terminal.process.wait(PATIENCE) == 0
    finally:
        terminal.close()


def test_piped_lines_are_answered_without_a_terminal_and_history_can_be_cut(server):
    options = ("--no-stream", "--history_cnt", "1", "--max_tokens", "9", "--model", "mine")
    done = run_script("scripts/chat_openai_api.py", "--base_url", server.address, *options, stdin="a\n\nb\nc\n")
    assert done.stdout.splitlines() == ["You said: a", "You said: b", "You said: c"]
    assert [turn["content"] for turn in server.requests[-1]["messages"]] == ["b", "You said: b", "c"]
    assert (server.requests[-1]["max_tokens"], server.requests[-1]["model"]) == (9, "mine")


@pytest.mark.parametrize(("count", "sent"), [(None, "a A b B c"), (1, "b B c"), (0, "c")])
def test_so_many_earlier_turns_are_sent_along(monkeypatch, count, sent):
    def answer_parts(client, model, messages, stream, **settings):
        requests.append(" ".join(message["content"] for message in messages))
        yield "answer", messages[-1]["content"].upper()

    requests: list[str] = []
    monkeypatch.setattr(chat_openai_api, "answer_parts", answer_parts)
    settings = dict.fromkeys(("model", "system", "max_tokens", "temperature", "top_p", "seed"))
    chat = chat_openai_api.Chat(None, SimpleNamespace(history_cnt=count, stream=True, **settings))
    for question in "abc":
        list(chat.ask(question))
    assert requests[-1] == sent


def test_where_nothing_answers_one_line_says_what_to_do():
    done = run_script("scripts/chat_openai_api.py", "--base_url", "http://127.0.0.1:9/v1", exit_code=2)
    assert "serve_openai_api.py" in one_error_line(done)
