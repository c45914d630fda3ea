"""Structured output over the API, with OpenAI's own client; forced calls, and the older `functions`."""

import json

import openai
import pytest
from fastapi.testclient import TestClient
from pydantic import BaseModel

from model.inference.scheduler import Engine
from model.inference.thread import EngineThread
from model.tool_calls import with_calls
from scripts.serving.app import make_app
from scripts.serving.requests import ServerState
from tests.model.networks import network
from tests.scripts.test_app import QUESTION, writes
from tests.scripts.test_app_tools import joined

ADD = {
    "name": "add",
    "parameters": {"type": "object", "properties": {"a": {"type": "integer", "maximum": 99}}, "required": ["a"]},
}
NOW = {"name": "now", "parameters": {"type": "object", "properties": {}, "additionalProperties": False}}
TOOLS = [{"type": "function", "function": function} for function in (ADD, NOW)]


class Person(BaseModel):
    name: str
    ages: list[int]


@pytest.fixture(scope="module")
def http(tiny_tokenizer):
    engine = Engine(network(vocab_size=len(tiny_tokenizer), max_seq_len=1024), tiny_tokenizer, slots=2)
    thread = EngineThread(engine)
    app = make_app(ServerState(thread, tiny_tokenizer))
    app.state.engine = engine
    yield TestClient(app, raise_server_exceptions=False)
    thread.close()


@pytest.fixture
def client(http):
    return openai.OpenAI(base_url="http://testserver/v1", api_key="none", http_client=http, max_retries=0)


def ask(client, **settings):
    given = {"model": "minimind", "messages": QUESTION, "temperature": 1, "seed": 3, "max_tokens": 300}
    return client.chat.completions.create(**given | settings)


def test_a_schema_of_pydantic_comes_back_as_its_object(client):
    given = {"model": "minimind", "messages": QUESTION, "seed": 1, "max_tokens": 60}
    reply = client.chat.completions.parse(**given, response_format=Person, n=2)
    assert all(isinstance(choice.message.parsed, Person) for choice in reply.choices)
    assert {choice.finish_reason for choice in reply.choices} == {"stop"}


def test_an_object_whole_and_streamed(client):
    whole = ask(client, response_format={"type": "json_object"}).choices[0].message.content
    assert isinstance(json.loads(whole), dict)
    assert joined(ask(client, response_format={"type": "json_object"}, stream=True))[0] == whole


@pytest.mark.parametrize(
    ("field", "value", "right"),
    [
        ("regex", "[0-9]{3}", str.isdigit),
        ("guided_regex", "[0-9]{3}", str.isdigit),
        ("choice", ["one", "two"], ("one", "two").__contains__),
        ("guided_choice", ["one", "two"], ("one", "two").__contains__),
        ("guided_json", {"type": "boolean"}, ("true", "false").__contains__),
        ("structured_outputs", {"json": {"type": "boolean"}}, ("true", "false").__contains__),
        ("structured_outputs", {"choice": ["one", "two"]}, ("one", "two").__contains__),
        ("structured_outputs", {"regex": "[0-9]{3}"}, str.isdigit),
    ],
)
def test_forms_as_vllm_names_them(client, field, value, right):
    assert right(ask(client, extra_body={field: value}).choices[0].message.content)
    text = client.completions.create(model="minimind", prompt="It is ", max_tokens=20, extra_body={field: value})
    assert right(text.choices[0].text)


@pytest.mark.parametrize(
    ("settings", "param", "said"),
    [
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"not": {}}}}},
            "response_format",
            'the schema keyword "not" is not supported',
        ),
        ({"regex": "(?=a)"}, "regex", "look-ahead"),
        ({"regex": "a", "choice": ["a"]}, "choice", "the output is already constrained by regex"),
        ({"tool_choice": "required"}, "tool_choice", "no tools are listed"),
        ({"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "x"}}}, "tool_choice", "'x'"),
        ({"functions": [ADD], "function_call": {"name": "x"}}, "function_call", "'x'"),
        ({"functions": [ADD], "tools": TOOLS}, "functions", "the older form of tools"),
    ],
)
def test_what_cannot_be_is_named(client, settings, param, said):
    with pytest.raises(openai.BadRequestError, match=said) as caught:
        ask(client, extra_body=settings)
    assert caught.value.param == param


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "add"}}])
def test_a_forced_call(client, choice, stream):
    reply = ask(client, tools=TOOLS, tool_choice=choice, max_tokens=200, stream=stream)
    if stream:
        text, calls, reason = joined(reply)
        found = [(call["name"], json.loads(call["arguments"])) for call in calls]
    else:
        text, reason = reply.choices[0].message.content or "", reply.choices[0].finish_reason
        found = [(c.function.name, json.loads(c.function.arguments)) for c in reply.choices[0].message.tool_calls]
    assert (text, reason) == ("", "tool_calls")
    assert found
    assert {name for name, _ in found} <= ({"add", "now"} if choice == "required" else {"add"})
    assert all(isinstance(arguments["a"], int) for name, arguments in found if name == "add")
    assert choice == "required" or len(found) == 1


def test_a_form_or_a_call(client):
    wanted = {"type": "json_schema", "json_schema": {"name": "n", "schema": {"type": "boolean"}}}
    reasons = set()
    for seed in range(12):
        choice = ask(client, tools=TOOLS, response_format=wanted, seed=seed, max_tokens=200).choices[0]
        assert choice.message.tool_calls or choice.message.content in ("true", "false")
        reasons.add(choice.finish_reason)
    assert reasons == {"tool_calls", "stop"}


def test_one_call_where_several_are_not_wanted(client, http, tiny_tokenizer, monkeypatch):
    writes(monkeypatch, http, with_calls("", [{"name": "now", "arguments": {}}] * 2), tiny_tokenizer)
    assert len(ask(client, tools=TOOLS).choices[0].message.tool_calls) == 2
    settings = {"tools": TOOLS, "parallel_tool_calls": False}
    assert len(ask(client, **settings).choices[0].message.tool_calls) == 1
    assert len(joined(ask(client, **settings, stream=True))[1]) == 1


def test_functions_of_older_clients(client, http, tiny_tokenizer, monkeypatch):
    writes(monkeypatch, http, with_calls("", [{"name": "add", "arguments": {"a": 12}}] * 2), tiny_tokenizer)
    choice = ask(client, functions=[ADD]).choices[0]
    assert (choice.finish_reason, choice.message.content, choice.message.tool_calls) == ("function_call", None, None)
    called = choice.message.function_call
    assert (called.name, json.loads(called.arguments)) == ("add", {"a": 12})
    deltas = [chunk.choices[0].delta.function_call for chunk in ask(client, functions=[ADD], stream=True)]
    deltas = [delta for delta in deltas if delta]
    assert [delta.name for delta in deltas] == ["add"] + [None] * (len(deltas) - 1)
    assert "".join(delta.arguments or "" for delta in deltas) == called.arguments
    none = ask(client, functions=[ADD], function_call="none").choices[0]
    assert none.finish_reason == "stop"
    asked = {"role": "assistant", "content": None, "function_call": called.model_dump()}
    result = {"role": "function", "name": "add", "content": "12"}
    older = ask(client, messages=[*QUESTION, asked, result], max_tokens=1).usage.prompt_tokens
    call = {"id": "x", "type": "function", "function": called.model_dump()}
    newer = [{"role": "assistant", "tool_calls": [call]}, {"role": "tool", "content": "12", "tool_call_id": "x"}]
    assert older == ask(client, messages=[*QUESTION, *newer], max_tokens=1).usage.prompt_tokens


def test_a_function_that_must_be_called(client):
    choice = ask(client, functions=[ADD, NOW], function_call={"name": "add"}, max_tokens=200).choices[0]
    assert (choice.finish_reason, choice.message.function_call.name) == ("function_call", "add")
