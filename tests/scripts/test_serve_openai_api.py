"""scripts/serve_openai_api.py: a real server process, and OpenAI's own client."""

import asyncio
import contextlib
import http.client
import json
import re
import signal
import socket
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import httpx
import openai
import pytest
import torch

from model import MiniMindLM
from model.chat import render_chat
from model.tokenizer import tokenizer_hash
from scripts import serve_openai_api
from tests.model.networks import network
from tests.running import PATIENCE, RunningScript, call_script
from trainer.errors import UserError

KEY = "sk-secret"
CONTEXT = 65_536  # tokens; enough for answers that no machine finishes during a test
ENDLESS = {"max_tokens": 60_000, "extra_body": {"ignore_eos": True}}
QUESTION = [{"role": "user", "content": "请问今天的天气怎么样？"}]
HISTORY = [
    {"role": "system", "content": "You are a robot."},
    {"role": "user", "content": "What is an island?"},
    {"role": "assistant", "content": "A town in the sea."},
    {"role": "user", "content": "And the sky?"},
]


class Started:
    """A server in its own process, on a free port."""

    def __init__(self, *arguments, **environment: str):
        self.script = RunningScript("scripts/serve_openai_api.py", *arguments, "--port", "0", env=environment)
        self.script.wait_for("/v1\n")
        self.address = re.search(r"serving at (\S+)/v1", self.script.stdout)[1]
        self.openai = openai.OpenAI(base_url=f"{self.address}/v1", api_key=KEY, max_retries=0)
        self.http = httpx.Client(base_url=self.address, headers={"Authorization": f"Bearer {KEY}"}, timeout=PATIENCE)

    def chat(self, messages=QUESTION, **settings):
        return self.openai.chat.completions.create(model="minimind", messages=messages, **settings)

    def say(self, messages=QUESTION, **settings) -> str:
        return self.chat(messages, **settings).choices[0].message.content

    def complete(self, prompt, **settings):
        return self.openai.completions.create(model="minimind", prompt=prompt, **settings)

    def health(self) -> dict:
        return self.http.get("/health").json()

    def wait_until(self, unfinished: int) -> None:
        deadline = time.monotonic() + PATIENCE
        while (found := self.health())["running"] + found["waiting"] != unfinished:
            assert time.monotonic() < deadline, found
            time.sleep(0.005)

    def stop(self) -> None:
        self.http.close()
        self.openai.close()
        self.script.send(signal.SIGTERM)
        done = self.script.wait()
        assert done.returncode == 0, done.stderr
        assert "Traceback" not in done.stderr


def server_arguments(out_dir: Path, tokenizer_dir: Path) -> tuple:
    common = ("--out_dir", out_dir, "--tokenizer", tokenizer_dir, "--dim", "32", "--n_layers", "2", "--device", "cpu")
    return (*common, "--max_concurrency", "3", "--max_queue", "4", "--drain_seconds", str(PATIENCE))


@pytest.fixture(scope="module")
def model(tiny_tokenizer) -> MiniMindLM:
    """The model that is served, also the oracle for its answers."""
    return network(n_heads=8, vocab_size=len(tiny_tokenizer), max_seq_len=CONTEXT)


@pytest.fixture(scope="module")
def out_dir(model, tiny_tokenizer, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("served")
    torch.save(model.state_dict(), folder / "full_sft_32.pth")
    settings = {"config": model.config.to_dict(), "tokenizer": tokenizer_hash(tiny_tokenizer)}
    (folder / "full_sft_32.json").write_text(json.dumps(settings))
    return folder


@pytest.fixture(scope="module")
def server(out_dir, tokenizer_dir):
    server = Started(*server_arguments(out_dir, tokenizer_dir), "--cors", "http://page.example", MINIMIND_API_KEY=KEY)
    yield server
    server.stop()


def prompt_of(tokenizer, messages) -> list[int]:
    return render_chat(tokenizer, messages, add_generation_prompt=True)[0]


def written(model, ids: list[int], **settings) -> list[int]:
    tokens = [int(token) for token in model.stream(torch.tensor([ids]), **settings)]
    return tokens[:-1] if tokens[-1] == model.config.eos_token_id else tokens


# ------------------------------------------------------------------------------------------------------------ chats


@pytest.mark.parametrize("messages", [QUESTION, HISTORY])
def test_a_chat_says_what_the_model_says(messages, server, model, tiny_tokenizer):
    reply = server.chat(messages, temperature=0, max_tokens=24)
    ids = prompt_of(tiny_tokenizer, messages)
    tokens = written(model, ids, max_new_tokens=24)
    (choice,) = reply.choices
    assert choice.message.content == tiny_tokenizer.decode(tokens) != ""
    assert choice.message.role == "assistant"
    assert choice.finish_reason == "length"
    assert (reply.object, reply.model) == ("chat.completion", "minimind")
    assert abs(reply.created - time.time()) < 600
    assert (reply.usage.prompt_tokens, reply.usage.completion_tokens) == (len(ids), 24)
    assert reply.usage.total_tokens == len(ids) + 24
    again = server.chat(messages, temperature=0, max_completion_tokens=24)
    assert again.choices[0].message == choice.message
    assert again.id != reply.id
    assert again.usage.prompt_tokens_details.cached_tokens == len(ids) - 1


def test_an_answer_streams_in_openais_form(server):
    whole = server.chat(temperature=0, max_tokens=20)
    chunks = list(server.chat(temperature=0, max_tokens=20, stream=True))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == whole.choices[0].message.content
    assert {chunk.id for chunk in chunks} == {chunks[0].id}
    assert {chunk.object for chunk in chunks} == {"chat.completion.chunk"}
    assert all(chunk.model == "minimind" and chunk.created == chunks[0].created for chunk in chunks)
    assert [chunk.choices[0].delta.role for chunk in chunks] == ["assistant"] + [None] * (len(chunks) - 1)
    assert [chunk.choices[0].finish_reason for chunk in chunks] == [None] * (len(chunks) - 1) + ["length"]
    assert all(chunk.usage is None for chunk in chunks)

    *others, last = server.chat(temperature=0, max_tokens=20, stream=True, stream_options={"include_usage": True})
    assert all(len(chunk.choices) == 1 and chunk.usage is None for chunk in others)
    assert last.choices == []
    assert last.usage.completion_tokens == 20
    assert last.usage.prompt_tokens == whole.usage.prompt_tokens


def test_the_bytes_of_a_stream(server):
    body = {"model": "minimind", "messages": QUESTION, "max_tokens": 3, "stream": True}
    with server.http.stream("POST", "/v1/chat/completions", json=body) as reply:
        assert reply.headers["content-type"].startswith("text/event-stream")
        events = reply.read().decode().split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""]
    assert all(event.startswith("data: {") for event in events[:-2])
    assert all("usage" not in json.loads(event[6:]) for event in events[:-2])


def test_a_text_may_come_as_parts_and_unknown_or_null_fields_change_nothing(server):
    right = server.say(temperature=0, max_tokens=9)
    text = QUESTION[0]["content"]
    parts = [{"type": "text", "text": text[:4]}, {"type": "text", "text": text[4:]}]
    assert (
        server.chat([{"role": "user", "content": parts}], temperature=0, max_tokens=9).choices[0].message.content
        == right
    )
    body = {"messages": [QUESTION[0] | {"name": "x"}], "temperature": 0, "max_tokens": 9, "user": "u", "tools": []}
    body |= dict.fromkeys(("stop", "n", "seed", "stream", "logprobs", "top_p", "stream_options", "model"))
    reply = server.http.post("/v1/chat/completions", json=body)
    assert reply.json()["choices"][0]["message"]["content"] == right


def test_choices_differ_by_seed_and_come_again(server):
    settings = {"temperature": 1.5, "top_p": 1, "max_tokens": 12}
    several = server.chat(n=3, seed=5, **settings)
    texts = [choice.message.content for choice in several.choices]
    assert [choice.index for choice in several.choices] == [0, 1, 2]
    assert len(set(texts)) == 3
    assert texts == [server.say(seed=seed, **settings) for seed in (5, 6, 7)]
    assert several.usage.completion_tokens == 36
    streamed, ends = ["", "", ""], [None] * 3
    for chunk in server.chat(n=3, seed=5, stream=True, **settings):
        (choice,) = chunk.choices
        streamed[choice.index] += choice.delta.content or ""
        ends[choice.index] = choice.finish_reason or ends[choice.index]
    assert streamed == texts
    assert ends == ["length"] * 3
    unseeded = {server.say(**settings) for _ in range(3)}
    assert len(unseeded) > 1


def test_sampling_settings_reach_the_model(server, model, tiny_tokenizer):
    settings = {"temperature": 0.9, "top_p": 0.7, "seed": 11}
    reply = server.chat(max_tokens=20, **settings, extra_body={"top_k": 9, "repetition_penalty": 1.3})
    ids = prompt_of(tiny_tokenizer, QUESTION)
    tokens = written(model, ids, max_new_tokens=20, top_k=9, repetition_penalty=1.3, **settings)
    assert reply.choices[0].message.content == tiny_tokenizer.decode(tokens)
    free = server.chat(temperature=0, max_tokens=30).choices[0].message.content
    assert (
        server.chat(temperature=0, max_tokens=30, frequency_penalty=2, presence_penalty=2).choices[0].message.content
        != free
    )


@pytest.mark.parametrize("stream", [False, True])
def test_stop_strings_end_an_answer(stream, server):
    free = server.say(temperature=0, max_tokens=30)
    stop = free[7:9]
    for given in (stop, ["no such text", stop]):
        reply = server.chat(temperature=0, max_tokens=30, stop=given, stream=stream)
        if stream:
            chunks = list(reply)
            text, end = "".join(c.choices[0].delta.content or "" for c in chunks), chunks[-1].choices[0].finish_reason
        else:
            text, end = reply.choices[0].message.content, reply.choices[0].finish_reason
        assert (text, end) == (free[: free.index(stop)], "stop")


@pytest.mark.parametrize("stream", [False, True])
def test_log_probabilities_of_a_chat(stream, server, model, tiny_tokenizer):
    settings = {"temperature": 0, "max_tokens": 8, "logprobs": True, "top_logprobs": 3}
    if stream:
        content = [
            token
            for chunk in server.chat(stream=True, **settings)
            for token in (chunk.choices[0].logprobs.content if chunk.choices[0].logprobs else ())
        ]
    else:
        content = server.chat(**settings).choices[0].logprobs.content
    ids = prompt_of(tiny_tokenizer, QUESTION)
    tokens = written(model, ids, max_new_tokens=8)
    with torch.no_grad():
        rows = model(torch.tensor([ids + tokens])).logits[0, len(ids) - 1 : -1].log_softmax(-1)
    assert len(content) == len(tokens) == 8
    for got, token, row in zip(content, tokens, rows, strict=True):
        assert got.logprob == pytest.approx(row[token].item(), abs=1e-4)
        assert [best.logprob for best in got.top_logprobs] == pytest.approx(row.topk(3).values.tolist(), abs=1e-4)
        assert got.top_logprobs[0].token == got.token
    assert b"".join(bytes(got.bytes) for got in content).decode(errors="replace") == tiny_tokenizer.decode(tokens)


# ------------------------------------------------------------------------------------------------------ completions


def test_a_completion_continues_a_text(server, model, tiny_tokenizer):
    text = "The little robot"
    reply = server.complete(text, temperature=0, max_tokens=10)
    ids = [1, *tiny_tokenizer.encode(text, add_special_tokens=False)]
    tokens = written(model, ids, max_new_tokens=10)
    assert reply.choices[0].text == tiny_tokenizer.decode(tokens)
    assert (reply.object, reply.choices[0].finish_reason) == ("text_completion", "length")
    assert reply.usage.prompt_tokens == len(ids)
    assert server.complete(ids, temperature=0, max_tokens=10).choices[0].text == reply.choices[0].text
    assert server.complete(text, temperature=0).usage.completion_tokens == 16
    echoed = server.complete(text, temperature=0, max_tokens=10, echo=True).choices[0]
    assert echoed.text == text + reply.choices[0].text
    streamed = server.complete(text, temperature=0, max_tokens=10, echo=True, stream=True)
    assert "".join(chunk.choices[0].text for chunk in streamed) == echoed.text


def test_several_prompts_and_choices_keep_their_places(server):
    texts = ["A teacher", "小机器人", ""]
    settings = {"temperature": 1.2, "seed": 1, "max_tokens": 6}
    reply = server.complete(texts, n=2, **settings)
    assert [choice.index for choice in reply.choices] == list(range(6))
    alone = [server.complete(text, n=2, **settings).choices for text in texts]
    assert [choice.text for choice in reply.choices] == [choice.text for choices in alone for choice in choices]
    streamed = [""] * 6
    *chunks, last = server.complete(texts, n=2, stream=True, stream_options={"include_usage": True}, **settings)
    for chunk in chunks:
        streamed[chunk.choices[0].index] += chunk.choices[0].text
    assert streamed == [choice.text for choice in reply.choices]
    assert last.usage.completion_tokens == reply.usage.completion_tokens == 36
    assert last.usage.prompt_tokens == reply.usage.prompt_tokens


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("as_ids", [False, True])
def test_a_text_is_scored_as_evaluation_tools_do_it(as_ids, stream, server, model, tiny_tokenizer):
    """echo, logprobs and no new tokens: the log-probability of each token of the prompt."""
    text = "The capital 的小岛 is Harbour 🙂."
    ids = [1, *tiny_tokenizer.encode(text, add_special_tokens=False)]
    with torch.no_grad():
        rows = model(torch.tensor([ids])).logits[0].log_softmax(-1)
    reply = server.complete(ids if as_ids else text, max_tokens=0, echo=True, logprobs=2, stream=stream)
    (choice,) = [chunk.choices[0] for chunk in reply] if stream else reply.choices
    assert choice.text == text
    scores = choice.logprobs
    if as_ids:  # the first is the client's own <s>
        assert scores.tokens[0] == "<s>"
        assert scores.token_logprobs.pop(0) is scores.top_logprobs.pop(0) is None
        assert scores.text_offset.pop(0) == scores.text_offset[0] == 0
        scores.tokens.pop(0)
    expected = [rows[i, token].item() for i, token in enumerate(ids[1:])]
    assert scores.token_logprobs == pytest.approx(expected, abs=1e-4)
    for got, row in zip(scores.top_logprobs, rows[:-1], strict=True):
        assert list(got.values()) == pytest.approx(row.topk(2).values.tolist(), abs=1e-4)
    greedy = [max(best, key=best.get) == token for best, token in zip(scores.top_logprobs, scores.tokens, strict=True)]
    assert greedy == [row.argmax() == token for row, token in zip(rows[:-1], ids[1:], strict=True)]
    for token, start in zip(scores.tokens, scores.text_offset, strict=True):
        assert token.startswith("bytes:") or text[start:].startswith(token)


# ----------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("changes", "param"),
    [
        ({"temperature": 2.1}, "temperature"),
        ({"temperature": -1}, "temperature"),
        ({"temperature": "warm"}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"top_p": 1.5}, "top_p"),
        ({"n": 0}, "n"),
        ({"n": 17}, "n"),
        ({"n": 1.5}, "n"),
        ({"n": 8}, "n"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_completion_tokens": -5}, "max_completion_tokens"),
        ({"frequency_penalty": 3}, "frequency_penalty"),
        ({"presence_penalty": -3}, "presence_penalty"),
        ({"repetition_penalty": 0}, "repetition_penalty"),
        ({"repetition_penalty": 11}, "repetition_penalty"),
        ({"stop": ""}, "stop"),
        ({"stop": ["a"] * 17}, "stop"),
        ({"stop": [1]}, "stop[0]"),
        ({"seed": "x"}, "seed"),
        ({"top_logprobs": 21, "logprobs": True}, "top_logprobs"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"stream": "maybe"}, "stream"),
        ({"stream_options": []}, "stream_options"),
        ({"messages": []}, "messages"),
        ({"messages": None}, "messages"),
        ({"messages": "hi"}, "messages"),
        ({"messages": [{"content": "hi"}]}, "messages[0].role"),
        ({"messages": [{"role": "tool", "content": "hi"}]}, "messages[0]"),
        ({"messages": [{"role": "user", "content": 3}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages[0].content[0]"),
        ({"messages": [{"role": "user", "content": [{"type": "audio"}]}]}, "messages[0].content[0]"),
        ({"messages": [{"role": "user", "content": "\ud800"}]}, "messages"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:,"}}]}]},
            "messages",
        ),
    ],
)
def test_a_bad_chat_names_the_parameter(changes, param, server):
    body = json.dumps({"model": "minimind", "messages": QUESTION, "max_tokens": 2} | changes)
    reply = server.http.post("/v1/chat/completions", content=body, headers={"Content-Type": "application/json"})
    assert reply.status_code == 400, reply.text
    error = reply.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert (error["param"], error["type"]) == (param, "invalid_request_error")
    assert "\n" not in error["message"]


@pytest.mark.parametrize(
    ("changes", "param"),
    [
        ({"prompt": []}, "prompt"),
        ({"prompt": [[]]}, "prompt[0]"),
        ({"prompt": [-1]}, "prompt[0]"),
        ({"prompt": [1, "a"]}, "prompt[1]"),
        ({"prompt": 3}, "prompt"),
        ({"prompt": ["a"] * 65}, "prompt"),
        ({"prompt": "\udc00"}, "prompt"),
        ({"max_tokens": -2}, "max_tokens"),
        ({"logprobs": 21}, "logprobs"),
    ],
)
def test_a_bad_completion_names_the_parameter(changes, param, server):
    body = json.dumps({"model": "minimind", "prompt": "hi", "max_tokens": 2} | changes)
    reply = server.http.post("/v1/completions", content=body, headers={"Content-Type": "application/json"})
    assert reply.status_code == 400, reply.text
    assert reply.json()["error"]["param"] == param


def test_ids_that_the_model_does_not_have(server, tiny_tokenizer):
    with pytest.raises(openai.BadRequestError, match=f"outside 0 to {len(tiny_tokenizer) - 1}") as caught:
        server.complete([5, len(tiny_tokenizer)])
    assert caught.value.param == "prompt"


@pytest.mark.parametrize(
    "body", [b"", b"{", b"[]", b"null", b"3", b'"x"', b"\xff\xfe", b'{"temperature": NaN}', b"[" * 99_999]
)
def test_a_body_that_is_no_object(body, server):
    for path in ("/v1/chat/completions", "/v1/completions"):
        reply = server.http.post(path, content=body, headers={"Content-Type": "application/json"})
        assert reply.status_code == 400
        assert reply.json()["error"]["type"] == "invalid_request_error"
    assert "application/json" in server.http.post(path, content=b"{}", headers={"Content-Type": "text/plain"}).text


def test_a_body_that_is_too_large(server):
    big = json.dumps({"prompt": "x" * 2**25})
    json_type = {"Content-Type": "application/json"}
    for content in (big.encode(), (piece.encode() for piece in (big[:100], big[100:]))):  # the second without a length
        try:
            reply = server.http.post("/v1/completions", content=content, headers=json_type)
        except httpx.TransportError:
            continue  # the server may hang up before everything is sent
        assert reply.status_code == 413
        assert "32 MiB" in reply.json()["error"]["message"]
    assert server.health()["status"] == "ok"


def test_a_prompt_longer_than_the_context_says_both_numbers(server, tiny_tokenizer):
    long = [{"role": "user", "content": "a b c d " * (CONTEXT // 4)}]
    n = len(prompt_of(tiny_tokenizer, long))
    with pytest.raises(openai.BadRequestError, match=rf"\b{n} tokens.*\b{CONTEXT}\b") as caught:
        server.chat(long)
    assert (caught.value.code, caught.value.param) == ("context_length_exceeded", "messages")
    with pytest.raises(openai.BadRequestError, match=rf"\b{CONTEXT + 1} tokens") as caught:
        server.complete([5] * (CONTEXT + 1), max_tokens=0)
    assert caught.value.param == "prompt"


def test_the_key(server):
    for given in (b"", b"Bearer wrong", b"Bearer", b"Basic " + KEY.encode(), "Bearer schlüssel".encode()):
        headers = {"Authorization": given}
        for path in ("/v1/models", "/v1/models/minimind"):
            assert httpx.get(server.address + path, headers=headers).status_code == 401
        reply = httpx.post(f"{server.address}/v1/chat/completions", headers=headers, json={"messages": QUESTION})
        assert reply.status_code == 401
        assert reply.json()["error"]["code"] == "invalid_api_key"
        assert reply.headers["www-authenticate"] == "Bearer"
    assert httpx.get(f"{server.address}/health").status_code == 200
    with pytest.raises(openai.AuthenticationError):
        server.openai.with_options(api_key="wrong").models.list()


def test_models(server):
    (model,) = server.openai.models.list().data
    assert (model.id, model.object) == ("minimind", "model")
    assert server.openai.models.retrieve("minimind").id == "minimind"
    for ask in (
        lambda: server.openai.models.retrieve("gpt-9"),
        lambda: server.openai.chat.completions.create(model="gpt-9", messages=QUESTION),
        lambda: server.openai.completions.create(model="gpt-9", prompt="x"),
    ):
        with pytest.raises(openai.NotFoundError, match=r"'gpt-9'.*'minimind'") as caught:
            ask()
        assert (caught.value.code, caught.value.param) == ("model_not_found", "model")
    strange = json.dumps({"model": "\ud800", "messages": QUESTION})
    reply = server.http.post("/v1/chat/completions", content=strange, headers={"Content-Type": "application/json"})
    assert reply.status_code == 404
    for method, path, status in (("GET", "/v1/nothing", 404), ("GET", "/v1/chat/completions", 405)):
        reply = server.http.request(method, path)
        assert reply.status_code == status
        assert reply.json()["error"]["type"] == "invalid_request_error"


def test_pages_that_may_call(server):
    asked = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization"}
    reply = server.http.options("/v1/chat/completions", headers=asked | {"Origin": "http://page.example"})
    assert reply.headers["access-control-allow-origin"] == "http://page.example"
    reply = server.http.options("/v1/chat/completions", headers=asked | {"Origin": "http://other.example"})
    assert "access-control-allow-origin" not in reply.headers


# ------------------------------------------------------------------------------- clients that connect and disconnect


def test_a_full_queue_and_clients_that_go_away(server):
    """Seven endless answers take all places, and an eighth client gets 429; when six disconnect, streaming or not,
    their places become free, and the seventh answer continues."""
    raw = [server.chat(stream=True, **ENDLESS) for _ in range(3)]
    for stream in raw:
        next(stream)
        next(stream)  # has a slot
    waiting = [server.chat(stream=True, **ENDLESS) for _ in range(2)]
    host, port = server.address.removeprefix("http://").split(":")
    whole = []
    for _ in range(2):
        connection = socket.create_connection((host, int(port)))
        body = json.dumps({"messages": QUESTION, "max_tokens": ENDLESS["max_tokens"]} | ENDLESS["extra_body"])
        lines = ["POST /v1/chat/completions HTTP/1.1", "Host: x", f"Authorization: Bearer {KEY}"]
        lines += ["Content-Type: application/json", f"Content-Length: {len(body)}", "", body]
        connection.sendall("\r\n".join(lines).encode())
        whole.append(connection)
    server.wait_until(unfinished=7)
    with pytest.raises(openai.RateLimitError) as caught:
        server.chat()
    assert 1 <= int(caught.value.response.headers["retry-after"]) <= 60
    assert caught.value.code == "queue_full"

    for stream in [*raw[1:], *waiting]:
        stream.close()
    for connection in whole:
        connection.close()
    server.wait_until(unfinished=1)
    assert server.chat(max_tokens=3, extra_body={"ignore_eos": True}).usage.completion_tokens == 3
    assert server.health()["running"] == 1  # the one that stayed, which began before all others
    raw[0].close()
    server.wait_until(unfinished=0)


def test_the_event_loop_is_never_blocked(server):
    """While answers are generated, requests that need no model are answered promptly."""
    streams = [server.chat(stream=True, **ENDLESS) for _ in range(3)]
    for stream in streams:
        next(stream)
        next(stream)
    assert [server.health()["running"] for _ in range(20)] == [3] * 20
    for stream in streams:
        stream.close()
    server.wait_until(unfinished=0)


def test_clients_at_once_each_get_their_own_answer(server, model, tiny_tokenizer):
    """Seven take all places; further clients are refused and retry until a place is free."""
    questions = [[{"role": "user", "content": f"{i} little birds count {i * i} apples."}] for i in range(12)]
    patient = server.openai.with_options(max_retries=1000)
    got: dict[int, str] = {}

    def client(i: int) -> None:
        settings = {"model": "minimind", "messages": questions[i], "temperature": 0, "max_tokens": 20}
        if i % 2:
            chunks = patient.chat.completions.create(stream=True, **settings)
            got[i] = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
        else:
            got[i] = patient.chat.completions.create(**settings).choices[0].message.content

    clients = [threading.Thread(target=client, args=(i,)) for i in range(len(questions))]
    for each in clients:
        each.start()
    for each in clients:
        each.join()
    right = [written(model, prompt_of(tiny_tokenizer, question), max_new_tokens=20) for question in questions]
    assert [got[i] for i in range(len(questions))] == [tiny_tokenizer.decode(tokens) for tokens in right]
    assert len(set(got.values())) > 1


def test_sigterm_finishes_what_has_come_and_refuses_what_is_new(out_dir, tokenizer_dir):
    """An answer that is still queued when the signal comes is generated to its end."""
    server = Started(*server_arguments(out_dir, tokenizer_dir), "--max_concurrency", "1", MINIMIND_API_KEY=KEY)
    first = server.chat(stream=True, **ENDLESS)
    next(first)
    second = server.chat(stream=True, max_tokens=5, extra_body={"ignore_eos": True})
    server.wait_until(unfinished=2)
    server.script.send(signal.SIGTERM)
    while server.http.get("/health").status_code != 503:
        time.sleep(0.005)
    with pytest.raises(openai.InternalServerError) as caught:
        server.chat(max_tokens=2)
    assert (caught.value.status_code, caught.value.code) == (503, "shutting_down")
    assert "retry-after" in caught.value.response.headers
    first.close()
    assert list(second)[-1].choices[0].finish_reason == "length"
    assert server.script.wait().returncode == 0


def test_sigterm_waits_no_longer_than_it_was_told(out_dir, tokenizer_dir):
    server = Started(*server_arguments(out_dir, tokenizer_dir), "--drain_seconds", "0.2", MINIMIND_API_KEY=KEY)
    stream = server.chat(stream=True, **ENDLESS)
    next(stream)
    server.script.send(signal.SIGTERM)
    with pytest.raises(openai.APIError, match="shut down before the answer was complete"):
        list(stream)
    assert server.script.wait().returncode == 0


# ----------------------------------------------------------------------------------------------------------- shutdown


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--dim", "48"), "full_sft_48.pth is missing"),
        (("--model_mode", "2"), "rlhf_32.pth is missing"),
        (("--lora_name", "nobody"), "nobody"),
        (("--port", "99999"), "--port 99999"),
        (("--host", "192.0.2.1"), "--host 192.0.2.1"),
        (("--fetch_images",), "needs --vlm"),
        (("--fetch_private",), "needs --fetch_images"),
        (("--keep_alive", "0"), "--keep_alive"),
        (("--vlm", "--vision_model", "nowhere"), "--vision_model nowhere"),
        (("--vlm", "--lora_name", "x"), "--lora_name"),
        (("--max_concurrency", "0"), "--max_concurrency"),
        (("--dtype", "float16"), "--dtype"),
    ],
)
def test_what_cannot_be_served_is_one_line(arguments, said, out_dir, tokenizer_dir, capsys):
    call_script("scripts/serve_openai_api.py", *server_arguments(out_dir, tokenizer_dir), *arguments, exit_code=2)
    printed = capsys.readouterr()
    (line,) = [line for line in printed.err.splitlines() if line.startswith("error: ")]
    assert said in line
    assert "Traceback" not in printed.err


def test_a_connection_is_kept_for_a_minute_and_more(monkeypatch):
    """Longer than a user pauses between two questions, and longer than clients keep theirs."""
    monkeypatch.setattr(sys, "argv", ["serve_openai_api.py"])
    assert serve_openai_api.get_args().keep_alive == 75
    configs = []
    monkeypatch.setattr("uvicorn.Server.run", lambda self, sockets: configs.append(self.config))
    with serve_openai_api.listen("127.0.0.1", 0) as sock:
        serve_openai_api.serve(lambda *_: None, None, sock, drain_seconds=1, keep_alive=33)
    assert configs[0].timeout_keep_alive == 33


def test_every_answer_says_how_long_its_connection_stays(server):
    """Streams and errors do, too; if the client asks to close the connection, the header is absent."""
    host, port = server.address.removeprefix("http://").split(":")
    key = {"Authorization": f"Bearer {KEY}", "Content-Type": "application/json"}
    body = json.dumps({"prompt": "a", "max_tokens": 2, "stream": True})
    with contextlib.closing(http.client.HTTPConnection(host, int(port), timeout=PATIENCE)) as connection:
        connection.connect()
        sock = connection.sock
        for method, path, sent in (
            ("POST", "/v1/completions", body),
            ("GET", "/v1/nothing", None),
            ("GET", "/health", None),
        ):
            connection.request(method, path, sent, key)
            reply = connection.getresponse()
            reply.read()
            assert (reply.headers["connection"], reply.headers["keep-alive"]) == ("keep-alive", "timeout=75")
            assert connection.sock is sock, "it was closed in between"
        connection.request("GET", "/health", headers={"Connection": "close"})
        reply = connection.getresponse()
        assert (reply.headers.get_all("connection"), reply.headers["keep-alive"]) == (["close"], None)
    with socket.create_connection((host, int(port)), timeout=PATIENCE) as old:
        old.sendall(b"GET /health HTTP/1.0\r\n\r\n")
        said = b"".join(iter(lambda: old.recv(65536), b""))
    assert b"keep-alive" not in said.lower()


def test_a_refusal_leaves_the_connection_to_be_used_again(server):
    """Even though the request's body has not been read."""
    with httpx.Client(base_url=server.address, timeout=PATIENCE) as stranger:
        for _ in range(3):
            reply = stranger.post("/v1/completions", json={"prompt": "x" * 2**20})
            assert reply.status_code == 401
        assert stranger.get("/health").status_code == 200


def test_what_is_sent_waits_for_no_receipt():
    """Connections inherit TCP_NODELAY from the listening socket; asyncio sets it only on sockets of its own."""
    with serve_openai_api.listen("127.0.0.1", 0) as listening, socket.create_connection(listening.getsockname()):
        connection, _ = listening.accept()
        with connection:
            assert connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


@pytest.mark.parametrize(
    ("host", "family"),
    [
        *(("127.0.0.1", socket.AF_INET), ("0.0.0.0", socket.AF_INET), ("localhost", socket.AF_INET)),
        *(("::1", socket.AF_INET6), ("::", socket.AF_INET6)),
    ],
)
def test_an_address_is_of_its_own_family_and_many_may_call_at_once(host, family, monkeypatch):
    """Checked by the arguments of the call, because not every machine has IPv6."""
    asked = []
    create = lambda *where, **how: asked.append((where, how)) or socket.socket()  # noqa: E731
    monkeypatch.setattr(socket, "create_server", create)
    with serve_openai_api.listen(host, 8000):
        assert asked == [(((host, 8000),), {"family": family, "backlog": 2048})]


def test_a_port_that_is_taken(server, out_dir, tokenizer_dir, capsys):
    port = server.address.rpartition(":")[2]
    arguments = (*server_arguments(out_dir, tokenizer_dir), "--port", port)
    call_script("scripts/serve_openai_api.py", *arguments, exit_code=2)
    assert f"--port {port}" in capsys.readouterr().err


# ----------------------------------------------------------------------------------------------------------- flags


@pytest.fixture
def started(monkeypatch):
    """Runs main with these flags and without a real server; returns what it would have served, and how."""

    def run(*flags, environment: str | None = None) -> dict:
        got = {}
        if environment is None:
            monkeypatch.delenv("MINIMIND_API_KEY", raising=False)
        else:
            monkeypatch.setenv("MINIMIND_API_KEY", environment)
        monkeypatch.setattr(sys, "argv", ["serve_openai_api.py", *flags])
        monkeypatch.setattr(serve_openai_api, "listen", lambda *at: got.update(at=at))
        monkeypatch.setattr(serve_openai_api, "load", lambda args: ("model", "tokenizer", None))
        monkeypatch.setattr(
            "trainer.loading.open_engine",
            lambda model, tokenizer, args, **how: got.update(engine=(model, tokenizer, args.dtype, how)),
        )
        thread = SimpleNamespace(close=lambda: got.update(closed=True))
        monkeypatch.setattr("model.inference.thread.EngineThread", lambda engine: thread)
        monkeypatch.setattr(
            "scripts.serving.app.make_app", lambda served, key, origins: got.update(key=key, origins=origins)
        )
        monkeypatch.setattr("scripts.serving.fetch_images.ImageFetcher", lambda private: ("fetches", private))
        monkeypatch.setattr(sys, "setswitchinterval", lambda seconds: got.update(switch=seconds))
        monkeypatch.setattr(
            serve_openai_api,
            "serve",
            lambda app, served, sock, *seconds: got.update(served=served, seconds=seconds),
        )
        serve_openai_api.main()
        return got

    return run


@pytest.mark.parametrize("vlm", [False, True])
def test_a_model_is_served_from_the_device(vlm, monkeypatch):
    moved = []
    model = SimpleNamespace(config=SimpleNamespace(image_tokens=4, max_seq_len=64))
    model.to = lambda device: moved.append(device.type) or model
    monkeypatch.setattr("trainer.loading.load_by_flags", lambda args: (model, "tokenizer"))
    monkeypatch.setattr("trainer.loading.load_vlm_by_flags", lambda args: (model, "tokenizer", "processor"))
    monkeypatch.setattr(sys, "argv", ["serve_openai_api.py", "--device", "cpu", "--vlm", str(int(vlm))])
    served, tokenizer, place_images = serve_openai_api.load(serve_openai_api.get_args())
    assert (served, tokenizer, place_images is not None, moved) == (model, "tokenizer", vlm, ["cpu"])


def test_what_is_served_where_nothing_is_said(started, capsys):
    got = started()
    served = got.pop("served")
    assert got == {
        **{"at": ("127.0.0.1", 8998), "key": None, "origins": (), "seconds": (30, 75), "switch": 0.001},
        **{"engine": ("model", "tokenizer", "float32", {"slots": 16, "compile_large": True}), "closed": True},
    }
    assert (served.capacity, served.reasoning, served.fetch) == (128, False, None)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("flags", "environment", "key"),
    [
        ((), "secret", "secret"),
        (("--api_key", "mine"), "secret", "mine"),
        (("--api_key", "mine"), None, "mine"),
        (("--api_key", ""), "", None),
    ],
)
def test_the_key_of_a_flag_comes_before_the_environments(started, flags, environment, key):
    assert started(*flags, environment=environment)["key"] == key


@pytest.mark.parametrize("key", ["schlüssel", "密钥", "a\nb", " a", "a\r", "\udcff"])
def test_a_key_that_no_client_could_send_is_refused_at_the_start(started, key):
    for flags, environment, named in ((("--api_key", key), None, "--api_key"), ((), key, "MINIMIND_API_KEY")):
        with pytest.raises(UserError, match=f"^{named} must be printable ASCII without spaces around it"):
            started(*flags, environment=environment)


@pytest.mark.parametrize(
    ("host", "key", "warned"),
    [
        *(("127.0.0.1", (), False), ("localhost", (), False), ("::1", (), False)),
        *(("0.0.0.0", (), True), ("192.168.1.9", (), True), ("0.0.0.0", ("--api_key", "k"), False)),
    ],
)
def test_an_open_server_without_a_key_is_told(started, capsys, host, key, warned):
    started("--host", host, *key)
    assert (f"--host {host} without a key: anyone who can reach this machine" in capsys.readouterr().err) is warned


def test_other_flags_reach_what_they_are_for(started):
    flags = ("--max_concurrency", "3", "--max_queue", "0", "--dtype", "bfloat16", "--cors", "a", "--cors", "b")
    got = started(*flags, "--drain_seconds", "1.5", "--keep_alive", "9", "--model_mode", "3")
    assert got["served"].capacity == 3
    assert got["engine"][2:] == ("bfloat16", {"slots": 3, "compile_large": True})
    assert (got["origins"], got["seconds"], got["served"].reasoning) == (["a", "b"], (1.5, 9), True)
    assert not started("--model_mode", "2")["served"].reasoning
    assert started("--vlm", "--fetch_images")["served"].fetch == ("fetches", False)
    assert started("--vlm", "--fetch_images", "--fetch_private")["served"].fetch == ("fetches", True)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ({"fetch_private": True}, "--fetch_private needs --fetch_images"),
        ({"fetch_private": True, "vlm": True}, "--fetch_private needs --fetch_images"),
        ({"fetch_images": True}, "--fetch_images needs --vlm"),
        ({"vlm": True, "lora_name": "x"}, "--vlm takes no --lora_name, and --model_mode 0, 1 or 2"),
        ({"vlm": True, "model_mode": 3}, "--vlm takes no --lora_name, and --model_mode 0, 1 or 2"),
    ],
)
def test_flags_that_do_not_go_together(flags, said):
    usual = {"fetch_private": False, "fetch_images": False, "vlm": False, "lora_name": None, "model_mode": 1}
    with pytest.raises(UserError, match=f"^{said}$"):
        serve_openai_api.load(SimpleNamespace(**usual | flags))


@pytest.mark.parametrize("mode", [0, 1, 2])
def test_images_are_placed_where_they_fit(mode, monkeypatch):
    """With a context of 16 tokens and images of 4 tokens, four images are read, and the prompt may have 15 tokens."""
    config = SimpleNamespace(image_tokens=4, max_seq_len=16)
    model, prompts = SimpleNamespace(config=config, to=lambda device: None), []
    monkeypatch.setattr("trainer.loading.load_vlm_by_flags", lambda args: (model, "tokenizer", "processor"))
    monkeypatch.setattr(
        "model.images.prepare_chat",
        lambda tokenizer, turns, config, processor, room: (
            prompts.append(room) or SimpleNamespace(input_ids=torch.zeros(1, turns[0]["length"], dtype=torch.long))
        ),
    )
    monkeypatch.setattr("model.images.prompt_embeddings", lambda model, prompt: "embeddings")
    args = SimpleNamespace(
        **{"fetch_private": False, "fetch_images": True, "vlm": True, "lora_name": None},
        **{"model_mode": mode, "device": "cpu"},
    )
    _, _, place = serve_openai_api.load(args)

    def turns(images: int, length: int) -> list[dict]:
        return [{"content": "text", "length": length}, {"content": [b"image"] * images + ["text"]}]

    assert place(turns(4, 15)) == ([0] * 15, "embeddings")
    assert place(turns(0, 16)) == ([0] * 16, None)
    assert prompts == [sys.maxsize] * 2
    with pytest.raises(ValueError, match=r"^5 images of 4 tokens are too many for the model's context of 16$"):
        place(turns(5, 1))


def test_a_second_signal_ends_at_once_and_a_first_one_waits_for_what_is_written(monkeypatch, capsys):
    servers, now = [], 100.0
    monkeypatch.setattr("uvicorn.Server.run", lambda self, sockets: servers.append(self))
    monkeypatch.setattr(serve_openai_api.time, "monotonic", lambda: now)
    closed = []
    served = SimpleNamespace(places=SimpleNamespace(draining=False, taken=2), close=lambda: closed.append(True))
    serve_openai_api.serve(lambda *_: None, served, None, drain_seconds=5, keep_alive=9)
    (server,) = servers
    assert server.config.timeout_graceful_shutdown == 5

    def tick() -> bool:
        asyncio.run(server.on_tick(1))
        return server.should_exit

    assert not tick()
    server.handle_exit(signal.SIGTERM, None)
    assert capsys.readouterr().err == "SIGTERM: finishing 2 answers (again: end at once)\n"
    assert served.places.draining
    now = 105.0  # the longest that is allowed
    assert not tick()
    assert closed == []
    now = 105.1
    assert tick()
    assert closed == [True]
    server.should_exit, now, served.places.taken = False, 101.0, 0  # everything is generated
    assert tick()
    assert not server.force_exit
    server.handle_exit(signal.SIGINT, None)
    assert server.force_exit
