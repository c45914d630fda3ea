"""The clients of OpenAI-compatible servers: base URLs, and proxies from the environment."""

import asyncio
import io
import os
from types import SimpleNamespace

import pytest

from scripts import chat_openai_api, collect_teacher_answers
from scripts.chat_openai_api import HELP, Chat, obey, show
from scripts.serving.client import (
    answer_parts,
    check_address,
    explain_failure,
    is_this_machine,
    models_at,
    open_client,
    proxy_variable,
)
from scripts.serving.fetch_images import ImageFetcher
from tests.running import call_script, free_port
from tests.scripts.openai_double import openai_double
from trainer.errors import UserError

ELSEWHERE = "http://teacher.example/v1"


@pytest.fixture(autouse=True)
def no_proxies(monkeypatch):
    for name in list(os.environ):
        if name.lower().endswith("_proxy") or name == "SSL_CERT_DIR":
            monkeypatch.delenv(name)


@pytest.mark.parametrize(
    ("host", "here"),
    [
        ("127.0.0.1", True),
        ("127.8.8.8", True),
        ("::1", True),
        ("0.0.0.0", True),
        ("localhost", True),
        ("api.localhost", True),
        ("192.168.1.9", False),
        ("localhost.example", False),
        ("api.openai.com", False),
    ],
)
def test_what_is_this_machine(host, here):
    assert is_this_machine(host) == here


@pytest.mark.parametrize(
    ("name", "proxy"),
    [("ALL_PROXY", "socks://127.0.0.1:1"), ("all_proxy", "nonsense:"), ("http_proxy", "http://127.0.0.1:1")],
)
def test_this_machine_is_asked_directly(name, proxy, monkeypatch):
    with openai_double() as server:
        monkeypatch.setenv(name, proxy)
        assert models_at(open_client(server.address, "none")) == ["double"]
        assert models_at(open_client(server.address.replace("127.0.0.1", "localhost"), "none")) == ["double"]


def test_an_asynchronous_client_asks_this_machine_directly_too(monkeypatch):
    monkeypatch.setenv("ALL_PROXY", "socks://127.0.0.1:1")

    async def ask(address: str) -> str:
        async with open_client(address, "none", asynchronous=True) as client:
            messages = [{"role": "user", "content": "x"}]
            return (await client.chat.completions.create(model="m", messages=messages)).choices[0].message.content

    with openai_double() as server:
        assert asyncio.run(ask(server.address)) == "You said: x"


@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.parametrize(
    "proxy", ["socks://127.0.0.1:1", "socks5h://127.0.0.1:1", "http://127.0.0.1:port", "http://[::1"]
)
def test_a_proxy_that_no_client_can_use_is_named(proxy, asynchronous, monkeypatch):
    monkeypatch.setenv("ALL_PROXY", proxy)
    with pytest.raises(UserError, match=r"^ALL_PROXY in the environment: .*; unset it, or give it an http:// address$"):
        open_client(ELSEWHERE, "none", asynchronous)


@pytest.mark.parametrize("content", [None, "no certificate"])
def test_certificates_that_no_client_can_use_are_named(content, monkeypatch, tmp_path):
    monkeypatch.setenv("SSL_CERT_FILE", str(path := tmp_path / "ca.pem"))
    if content:
        path.write_text(content)
    with pytest.raises(UserError, match=r"^SSL_CERT_FILE in the environment: .*; fix or unset it$"):
        open_client(ELSEWHERE, "none")
    with pytest.raises(UserError, match=r"^SSL_CERT_FILE in the environment: "):
        ImageFetcher()
    open_client("http://127.0.0.1:1/v1", "none")  # http, which needs no certificate


@pytest.mark.parametrize("name", ["all_proxy", "HTTP_PROXY", "http_proxy"])
def test_a_dead_proxy_is_named(name, monkeypatch):
    monkeypatch.setenv(name, f"http://127.0.0.1:{free_port()}")
    with pytest.raises(UserError) as told:
        models_at(open_client(ELSEWHERE, "none", max_retries=0))
    assert f"{ELSEWHERE} does not answer through the proxy of {name}" in str(told.value)
    assert "add teacher.example to NO_PROXY" in str(told.value)
    assert "serve_openai_api.py" not in str(told.value)


def test_a_proxy_that_refuses_is_named(monkeypatch):
    with openai_double() as proxy:  # has no such address, and answers 501 to methods that it does not have
        monkeypatch.setenv("https_proxy", proxy.address.removesuffix("/v1"))
        with pytest.raises(UserError, match="through the proxy of https_proxy"):
            models_at(open_client("https://teacher.example/v1", "none", max_retries=0))


@pytest.mark.parametrize(
    ("set_to", "address", "found"),
    [
        ({}, ELSEWHERE, None),
        ({"http_proxy": "http://a:1"}, ELSEWHERE, "http_proxy"),
        ({"https_proxy": "http://a:1"}, ELSEWHERE, None),
        ({"ALL_PROXY": "http://a:1", "HTTP_PROXY": "http://b:1"}, ELSEWHERE, "HTTP_PROXY"),
        ({"ALL_PROXY": "http://a:1"}, "https://teacher.example/v1", "ALL_PROXY"),
        ({"ALL_PROXY": ""}, ELSEWHERE, None),
        ({"ALL_PROXY": "http://a:1", "NO_PROXY": "example"}, ELSEWHERE, None),
        ({"ALL_PROXY": "http://a:1", "no_proxy": "*"}, ELSEWHERE, None),
        ({"ALL_PROXY": "http://a:1", "no_proxy": "other.example"}, ELSEWHERE, "ALL_PROXY"),
        ({"ALL_PROXY": "http://a:1"}, "http://127.0.0.1:8998/v1", None),
    ],
)
def test_which_variable_sends_an_address_through_a_proxy(set_to, address, found, monkeypatch):
    for name, value in set_to.items():
        monkeypatch.setenv(name, value)
    assert proxy_variable(address) == found


def test_why_there_is_no_answer(monkeypatch):
    failed = RuntimeError("Connection error.")
    failed.__cause__ = OSError("nobody there")
    assert explain_failure(failed, ELSEWHERE) == "Connection error. (nobody there)"
    assert explain_failure(RuntimeError("no"), ELSEWHERE) == "no"
    monkeypatch.setenv("http_proxy", "http://a:1")
    assert explain_failure(failed, ELSEWHERE) == "Connection error. (nobody there), through the proxy in http_proxy"


def test_collecting_names_the_proxy(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{free_port()}")
    (tmp_path / "q.jsonl").write_text('{"question": "x"}\n', encoding="utf-8")
    flags = ("--base_url", ELSEWHERE, "--model", "m", "--retries", "0", "--give_up_after", "1")
    call_script("scripts/collect_teacher_answers.py", tmp_path / "q.jsonl", tmp_path / "a.jsonl", *flags, exit_code=2)
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert "through the proxy in http_proxy" in errors[0]


def test_the_chat_names_the_proxy(monkeypatch, capsys):
    monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{free_port()}")
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"hello\n")))
    monkeypatch.setattr("openai._base_client.MAX_RETRY_DELAY", 0)
    monkeypatch.setattr("openai._base_client.INITIAL_RETRY_DELAY", 0)
    call_script("scripts/chat_openai_api.py", "--base_url", ELSEWHERE, "--model", "m")
    assert "through the proxy in http_proxy" in capsys.readouterr().err


@pytest.mark.parametrize("address", "ftp://a/v1 http:///v1 http://a:0/v1 http://a:99999/v1 a/v1 http://[/v1".split())
def test_what_is_no_address(address):
    with pytest.raises(UserError, match="is not an API base URL"):
        check_address(address, "none")
    check_address("http://a:1/v1", "none")


def test_wishes_of_zero_are_sent_and_those_left_to_the_server_are_not():
    sent = {}
    said = SimpleNamespace(reasoning_content=None, content="x")
    reply = SimpleNamespace(choices=[SimpleNamespace(message=said)])
    completions = SimpleNamespace(create=lambda **given: sent.update(given) or reply)
    client = SimpleNamespace(chat=SimpleNamespace(completions=completions))
    wishes = {"temperature": 0.0, "seed": 0, "top_p": None}
    assert list(answer_parts(client, "m", [], stream=False, **wishes)) == [("answer", "x")]
    assert sent == {"model": "m", "messages": [], "stream": False, "temperature": 0.0, "seed": 0}


def test_what_would_steer_a_terminal_is_not_printed(capsys):
    show(iter([("answer", "a\x1b[2J\x00\x7f\x9bb\n\tc")]), hide_thinking=False)
    assert capsys.readouterr().out == "a[2Jb\n\tc\n"


def test_nor_is_it_in_an_error(monkeypatch, capsys):
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"hello\n")))
    with openai_double() as double:
        double.reply = lambda body: {"message": "no\x1b[2J\x9b way", "type": "invalid_request_error"}
        call_script("scripts/chat_openai_api.py", "--base_url", double.address, "--model", "m")
    error = capsys.readouterr().err
    assert "no[2J way" in error
    assert error.replace("\n", "").isprintable()


@pytest.mark.parametrize("address", "http://a https://a/v1 http://a:65535/v1 http://[::1]:1/v1".split())
def test_what_is_an_address(address):
    check_address(address, "sk-~")


def test_a_key_is_ascii():
    with pytest.raises(UserError, match="the API key must be printable ASCII without spaces around it"):
        check_address("http://a/v1", "schl\u00fcssel")


@pytest.mark.parametrize(
    ("stream", "said", "parts"),
    [
        (True, {"reasoning_content": "hm", "content": "x"}, [("thinking", "hm"), ("answer", "x")]),
        (False, {"reasoning_content": "hm", "content": "x"}, [("thinking", "hm"), ("answer", "x")]),
        (True, {"content": "x"}, [("answer", "x")]),  # most servers accept no other part
        (True, {"reasoning_content": "", "content": None}, []),
        (False, {"reasoning_content": None, "content": ""}, []),
    ],
)
def test_parts_of_an_answer(stream, said, parts):
    choice = SimpleNamespace(**{"delta" if stream else "message": SimpleNamespace(**said)})
    whole = SimpleNamespace(choices=[choice])

    class Stream(list):
        closed = False

        def __enter__(self):
            return self

        def __exit__(self, *_):
            self.closed = True

    reply = Stream([SimpleNamespace(choices=[]), whole, SimpleNamespace(choices=None)]) if stream else whole
    client = SimpleNamespace(chat=SimpleNamespace(completions=SimpleNamespace(create=lambda **_: reply)))
    assert list(answer_parts(client, "m", [], stream)) == parts
    if stream:
        assert reply.closed
        reply[:] = [SimpleNamespace(choices=[])]
        with pytest.raises(UserError, match="the server sent no answer"):
            list(answer_parts(client, "m", []))


@pytest.mark.parametrize(
    ("line", "obeyed", "said", "system", "forgotten"),
    [
        ("/reset", True, "forgotten", "old", True),
        ("/reset  now", True, "forgotten", "old", True),
        ("/help me", True, HELP, "old", False),
        ("/system", True, "system prompt: old", "old", False),
        ("/system   ", True, "system prompt: old", "old", False),
        ("/system  be kind ", True, "system prompt: be kind", "be kind", True),
        ("/system -", True, "system prompt: default of the server", None, True),
        ("/help", True, HELP, "old", False),
        ("/restart", True, "/restart is not a command; /help lists them", "old", False),
        ("/etc/hosts", False, "", "old", False),
        ("/word and more", False, "", "old", False),
        ("/", False, "", "old", False),
        ("/1", False, "", "old", False),
    ],
)
def test_what_a_line_with_a_slash_does(line, obeyed, said, system, forgotten, capsys):
    chat = Chat(None, SimpleNamespace(model="m", system="old"))
    chat.turns += [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    assert obey(line, chat) is obeyed
    assert capsys.readouterr().out == (f"{said}\n" if said else "")
    assert chat.system == system
    assert (chat.turns == []) is forgotten


@pytest.mark.parametrize(
    ("parts", "hide", "plain", "coloured"),
    [
        ("A", False, "a\n", "a\n"),
        ("TTA", False, "[thinking]\ntt\n[answer]\na\n", "\033[2mtt\n\033[0ma\n"),
        ("TT", False, "[thinking]\ntt\n", "\033[2mtt\033[0m\n"),  # stopped while thinking
        ("TTA", True, "a\n", "a\n"),
        ("", False, "\n", "\n"),
    ],
)
@pytest.mark.parametrize("terminal", [True, False])
def test_thinking_is_dim_on_a_terminal_and_under_a_heading_elsewhere(
    parts, hide, plain, coloured, terminal, monkeypatch
):
    out = io.StringIO()
    out.isatty = lambda: terminal
    monkeypatch.setattr("sys.stdout", out)
    show(iter([("answer" if part == "A" else "thinking", part.lower()) for part in parts]), hide)
    assert out.getvalue() == (coloured if terminal else plain)


@pytest.mark.parametrize("system", [None, "", "be kind"])
def test_only_an_answer_that_came_joins_the_history(system, monkeypatch):
    asked, replies = [], iter([[("thinking", "hm")], [("thinking", "hm"), ("answer", "a"), ("answer", "b")], []])

    def parts(client, model, messages, stream, **wishes):
        asked.append((model, [(turn["role"], turn["content"]) for turn in messages], stream, wishes))
        yield from next(replies)

    monkeypatch.setattr("scripts.chat_openai_api.answer_parts", parts)
    wishes = {"max_tokens": 3, "temperature": 0.0, "top_p": None, "seed": 0}
    chat = Chat(None, SimpleNamespace(model="m", system=system, history_cnt=None, stream=False, **wishes))
    for question in "pqr":
        list(chat.ask(question))
    first = [("system", system)] if system else []
    assert asked[0] == ("m", [*first, ("user", "p")], False, wishes)
    assert asked[2][1] == [*first, ("user", "q"), ("assistant", "ab"), ("user", "r")]
    assert len(chat.turns) == 2


@pytest.mark.parametrize(
    ("flag", "environment", "key"),
    [
        *(("mine", "secret", "mine"), ("mine", None, "mine"), (None, "secret", "secret")),
        *((None, None, "none"), ("", "", "none")),
    ],
)
@pytest.mark.parametrize("script", [chat_openai_api, collect_teacher_answers])
def test_a_key_that_is_named_comes_before_the_environments(script, flag, environment, key, monkeypatch):
    asked = []

    def refuse(address, key, **how):
        asked.append((address, key))
        raise UserError("enough")

    monkeypatch.setattr(script, "open_client", refuse)
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    if environment is not None:
        monkeypatch.setenv("OPENAI_API_KEY", environment)
    files = [] if script is chat_openai_api else ["a.jsonl", "b.jsonl", "--model", "m"]
    flags = [] if flag is None else ["--api_key", flag]
    monkeypatch.setattr("sys.argv", ["script", *files, "--base_url", "http://a/v1", *flags])
    with pytest.raises(UserError, match="enough"):
        script.main()
    assert asked == [("http://a/v1", key)]
