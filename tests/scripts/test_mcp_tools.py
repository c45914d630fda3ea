"""scripts/tool_use/mcp_tools.py: the tools of a real MCP server, over both transports, and the user's permission."""

import argparse
import contextlib
import socket
import subprocess
import sys
import time

import pytest

from scripts.tool_use import open_tools as opening
from scripts.tool_use.mcp_tools import mcp_tools
from scripts.tool_use.open_tools import open_tools
from scripts.tool_use.registry import Registry, tool_of
from tests.running import ROOT
from trainer.errors import UserError

DOUBLE = ROOT / "tests" / "scripts" / "mcp_double.py"
COMMAND = f'"{sys.executable}" "{DOUBLE}"'


def flags(**given) -> argparse.Namespace:
    return argparse.Namespace(**{"tools": None, "mcp": None, "mcp_http": None, "yes": False} | given)


@pytest.fixture(scope="module")
def tools():
    with mcp_tools([COMMAND], []) as found:
        yield found


@pytest.fixture
def address():
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    server = subprocess.Popen([sys.executable, DOUBLE, str(port)], stderr=subprocess.DEVNULL)
    try:
        while True:
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            assert server.poll() is None
            time.sleep(0.1)
        yield f"http://127.0.0.1:{port}/mcp"
    finally:
        server.kill()
        server.wait()


def test_they_are_listed_with_their_schemas(tools):
    assert [tool.schema["name"] for tool in tools] == ["reverse", "fail", "pair"]
    assert tools[0].schema["description"] == "Turn a text around."
    assert tools[0].schema["parameters"]["required"] == ["text"]
    assert all(tool.foreign for tool in tools)


def test_they_answer_or_say_what_is_wrong(tools):
    registry = Registry(tools, allow=lambda name, arguments: True)
    assert registry.call("reverse", {"text": "abc为"}) == "为cba"
    assert '"b": 4' in registry.call("pair", {"a": 2})
    assert registry.call("fail", {}).startswith("error: ")
    assert registry.call("reverse", {}).startswith("error: ")
    assert registry.call("reverse", {"text": 5, "times": "x"}).startswith("error: ")


def test_none_acts_unasked(tools, monkeypatch):
    asked = []
    registry = Registry(tools, allow=lambda *call: asked.append(call) or False)
    assert registry.call("reverse", {"text": "abc"}) == "error: the user did not allow this call"
    assert asked == [("reverse", {"text": "abc"})]
    assert Registry(tools).call("reverse", {"text": "abc"}).startswith("error: the user did not allow")
    monkeypatch.setattr(sys, "stdin", argparse.Namespace(isatty=lambda: False))
    assert not opening.ask_person("reverse", {})
    monkeypatch.setattr(sys, "stdin", argparse.Namespace(isatty=lambda: True))
    shown = []
    for typed, may in (("y", True), ("YES", True), ("", False), ("no", False)):
        monkeypatch.setattr(opening, "read_line", lambda prompt, typed=typed: shown.append(prompt) or typed)
        assert opening.ask_person("reverse", {"text": "\x1b[2J为"}) == may
    assert shown[0] == '[run reverse({"text": "\\u001b[2J为"})? y/N] '


def test_ours_are_not_asked_about(monkeypatch):
    def double(x: int) -> int:
        return 2 * x

    assert Registry([tool_of(double)]).call("double", {"x": 4}) == "8"


def test_by_the_flags_and_over_http(address):
    with open_tools(flags(tools="calculator", mcp_http=[address], yes=True)) as registry:
        assert [tool["function"]["name"] for tool in registry.schemas] == ["calculator", "reverse", "fail", "pair"]
        assert registry.call("reverse", {"text": "abc"}) == "cba"
        assert registry.call("calculator", {"expression": "6*7"}) == "42"
    with open_tools(flags()) as nothing:
        assert nothing is None


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"tools": "hammer"}, "--tools: there is no tool 'hammer'"),
        ({"mcp": ["no-such-program-22"]}, "--mcp 'no-such-program-22': "),
        ({"mcp": [f'"{sys.executable}" -c "pass"']}, "--mcp "),
        ({"mcp": ['"unclosed']}, "--mcp "),
        ({"mcp_http": ["http://127.0.0.1:1/mcp"]}, "--mcp_http 'http://127.0.0.1:1/mcp': "),
    ],
)
def test_what_cannot_be_opened_is_named(given, told):
    with pytest.raises(UserError) as caught, open_tools(flags(**given)):
        pass
    assert str(caught.value).startswith(told)
    assert "\n" not in str(caught.value)


def test_two_of_one_name(tools, monkeypatch):
    monkeypatch.setattr(opening, "mcp_tools", lambda *given: contextlib.nullcontext([*tools, *tools]))
    with pytest.raises(UserError, match="two tools are named reverse"), open_tools(flags(mcp=["x"])):
        pass


def test_what_fails_while_they_are_open_is_what_is_raised():
    with pytest.raises(ZeroDivisionError), mcp_tools([COMMAND], []):
        raise ZeroDivisionError
