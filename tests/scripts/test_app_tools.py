"""Tools over the API, with OpenAI's own client: calls whole and streamed, results, and malformed calls."""

import json

import openai
import pytest
from fastapi.testclient import TestClient

from model.chat import render_chat
from model.inference.scheduler import Engine
from model.inference.thread import EngineThread
from model.tool_calls import with_calls
from scripts.serving.app import make_app
from scripts.serving.requests import ServerState
from tests.model.networks import network
from tests.scripts.test_app import QUESTION, chat, writes

FUNCTION = {"name": "add", "description": "Add two numbers.", "parameters": {"type": "object", "properties": {}}}
TOOLS = [{"type": "function", "function": FUNCTION}]
LONG = {"name": "add", "arguments": {"a": 1, "text": "long " * 20}}
NOW = {"name": "now", "arguments": {"zone": "为"}}
BROKEN = '<tool_call>\n{"name": "add", "arguments": {"a": \n</tool_call>'


@pytest.fixture(params=[False, True], ids=["plain", "reasoning"])
def http(request, tiny_tokenizer):
    engine = Engine(network(vocab_size=len(tiny_tokenizer), max_seq_len=1024), tiny_tokenizer, slots=2)
    thread = EngineThread(engine)
    app = make_app(ServerState(thread, tiny_tokenizer, reasoning=request.param))
    app.state.engine = engine
    yield TestClient(app, raise_server_exceptions=False)
    thread.close()


def ask(http, **settings):
    client = openai.OpenAI(base_url="http://testserver/v1", api_key="none", http_client=http, max_retries=0)
    given = {"model": "minimind", "messages": QUESTION, "temperature": 0, "max_tokens": 500, "tools": TOOLS}
    return client.chat.completions.create(**given | settings)


def joined(chunks) -> tuple[str, list[dict], str]:
    """A stream joined as clients do: the text, the calls by their index, and the finish reason."""
    text, calls, reason = "", {}, ""
    for chunk in chunks:
        (choice,) = chunk.choices
        text += choice.delta.content or ""
        reason = choice.finish_reason or reason
        for part in choice.delta.tool_calls or ():
            call = calls.setdefault(part.index, {"id": part.id, "name": part.function.name, "arguments": ""})
            call["arguments"] += part.function.arguments
    assert list(calls) == list(range(len(calls)))
    return text, list(calls.values()), reason


@pytest.mark.parametrize(
    ("written", "said", "calls"),
    [
        (with_calls("", [LONG]), "", [LONG]),
        (with_calls("Let me see.", [NOW, LONG]), "Let me see.", [NOW, LONG]),
        ("No tool is needed. ", "No tool is needed.", []),
        (BROKEN, BROKEN, []),
    ],
)
def test_calls_whole_and_streamed(http, tiny_tokenizer, monkeypatch, written, said, calls):
    writes(monkeypatch, http, written, tiny_tokenizer)
    whole = ask(http).choices[0]
    found = [(call.function.name, json.loads(call.function.arguments)) for call in whole.message.tool_calls or ()]
    assert found == [(call["name"], call["arguments"]) for call in calls]
    assert (whole.message.content or "").strip() == said
    assert whole.finish_reason == ("tool_calls" if calls else "stop")
    assert (whole.message.content is None) == (bool(calls) and not said)
    text, streamed, reason = joined(ask(http, stream=True))
    assert (text.strip(), reason) == (said, whole.finish_reason)
    assert [(call["name"], json.loads(call["arguments"])) for call in streamed] == found
    ids = [call["id"] for call in streamed] + [call.id for call in whole.message.tool_calls or ()]
    assert len(set(ids)) == len(ids)
    assert all(ids)


@pytest.mark.parametrize("settings", [{"tool_choice": "none"}, {"tools": []}])
def test_without_tools_a_call_is_text(http, tiny_tokenizer, monkeypatch, settings):
    writes(monkeypatch, http, with_calls("", [NOW]), tiny_tokenizer)
    choice = ask(http, **settings).choices[0]
    assert (choice.message.content, choice.message.tool_calls) == (with_calls("", [NOW]), None)
    assert choice.finish_reason == "stop"


def test_a_call_that_is_cut_off_is_text_and_says_so(http, tiny_tokenizer, monkeypatch):
    writes(monkeypatch, http, with_calls("", [LONG]), tiny_tokenizer)
    choice = ask(http, max_tokens=20).choices[0]
    assert choice.finish_reason == "length"
    assert choice.message.tool_calls is None
    assert choice.message.content.startswith("<tool_call>")


def test_the_prompt_is_that_of_the_renderer_results_in_the_order_of_calls(http, tiny_tokenizer):
    calls = [
        {"id": i, "type": "function", "function": {"name": "add", "arguments": json.dumps({"a": i})}} for i in "xy"
    ]
    asked = {"role": "assistant", "content": None, "tool_calls": calls}
    results = [{"role": "tool", "tool_call_id": i, "content": f"result {i}"} for i in "yx"]
    reply = ask(http, messages=[*QUESTION, asked, *results], max_tokens=1)
    turns = [
        *QUESTION,
        {"role": "assistant", "content": "", "tool_calls": [{"name": "add", "arguments": {"a": i}} for i in "xy"]},
        *({"role": "tool", "content": f"result {i}"} for i in "xy"),
    ]
    expected, _ = render_chat(tiny_tokenizer, turns, add_generation_prompt=True, tools=TOOLS)
    assert reply.usage.prompt_tokens == len(expected)
    assert http.app.state.engine._slots[0].holds[: len(expected)] == expected


def test_a_result_without_a_call_is_named(http):
    reply = chat(http, [*QUESTION, {"role": "tool", "content": "42", "tool_call_id": "z"}])
    assert reply.status_code == 400
    assert reply.json()["error"]["param"] == "messages[1]"
    assert "a result of the call 'z' that nothing before it asks for" in reply.json()["error"]["message"]
