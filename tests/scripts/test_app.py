"""scripts/serving/app.py in this process: reasoning, images, failures while streaming, and bodies of every kind."""

import asyncio
import base64
import io
import json
import random
import sys
from types import SimpleNamespace

import pytest
import torch
from fastapi.testclient import TestClient
from PIL import Image

from model.images import image_processor, prepare_chat
from model.inference.request import Token
from model.inference.scheduler import Engine
from model.inference.thread import EngineThread
from model.model_vlm import MiniMindVLM, VLMConfig
from model.reasoning import split_reasoning
from model.tokenizer import tokenizer_hash
from scripts import serve_openai_api
from scripts.serving import schema as schema
from scripts.serving.app import choices, completion_requests, make_app, new_tokens, sampling, texts_or_ids
from scripts.serving.fetch_images import ImageFetcher
from scripts.serving.requests import FAILURES, ServerState
from scripts.serving.responses import CompletionPrompt, completion_logprobs, event, finite, usage
from scripts.serving.responses import events as event_stream
from tests.model.networks import network
from tests.scripts.malformed import bodies_by_schema, malformed_bodies

QUESTION = [{"role": "user", "content": "What is a bird?"}]
JSON = {"Content-Type": "application/json"}


@pytest.fixture
def serve(tiny_tokenizer):
    """Makes a client for an app around a model, and closes its engine at the end."""
    threads = []

    def make(model, slots: int = 4, slot_len: int | None = None, api_key: str | None = None, **settings) -> TestClient:
        engine = Engine(model, tiny_tokenizer, slots=slots, slot_len=slot_len)
        threads.append(EngineThread(engine))
        app = make_app(ServerState(threads[-1], tiny_tokenizer, **settings), api_key)
        app.state.engine = engine
        return TestClient(app, raise_server_exceptions=False)

    yield make
    for thread in threads:
        thread.close()


@pytest.fixture(scope="module")
def model(tiny_tokenizer):
    return network(vocab_size=len(tiny_tokenizer), max_seq_len=512)


def chat(client, messages=QUESTION, **settings):
    return client.post(
        "/v1/chat/completions", json={"messages": messages, "temperature": 0, "max_tokens": 8} | settings
    )


def events(reply) -> list:
    assert reply.headers["content-type"].startswith("text/event-stream")
    lines = [event.removeprefix("data: ") for event in reply.text.split("\n\n") if event]
    return [line if line == "[DONE]" else json.loads(line) for line in lines]


# -------------------------------------------------------------------------------------------------------- reasoning


def writes(monkeypatch, client, text: str, tokenizer) -> None:
    """Let the engine's model generate this text, whatever the prompt."""
    ids = [*tokenizer.encode(text, add_special_tokens=False), tokenizer.eos_token_id]
    engine = client.app.state.engine

    def logits(hidden):
        predicted = [slot.answer for slot in engine._slots if slot.answer]
        rows = torch.full((len(hidden), len(tokenizer)), -50.0)
        for row, answer in enumerate(predicted):
            rows[row, ids[min(answer.count, len(ids) - 1)]] = 50.0
        return rows

    monkeypatch.setattr(engine.decoder, "logits", logits)


@pytest.mark.parametrize("reasoning", [True, False])
def test_a_reasoning_models_thinking_stands_beside_its_answer(reasoning, serve, model, tiny_tokenizer, monkeypatch):
    text = "<think>\n12 + 30\n= 42\n</think>\n<answer>\nforty-two < 43\n</answer>"
    client = serve(model, reasoning=reasoning)
    writes(monkeypatch, client, text, tiny_tokenizer)
    message = chat(client, max_tokens=200).json()["choices"][0]["message"]
    chunks = events(chat(client, max_tokens=200, stream=True))
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks[:-1]]
    streamed = {name: "".join(d.get(name) or "" for d in deltas) for name in ("content", "reasoning_content")}
    if reasoning:
        thinking, answer = split_reasoning(text)
        assert (thinking, answer) == ("12 + 30\n= 42", "forty-two < 43")
        assert message == {"role": "assistant", "content": answer, "reasoning_content": thinking}
        assert streamed == {"content": answer, "reasoning_content": thinking}
    else:
        assert message == {"role": "assistant", "content": text}
        assert streamed == {"content": text, "reasoning_content": ""}
    assert chunks[-2]["choices"][0]["finish_reason"] == "stop"


def test_log_probabilities_of_a_reasoning_model_cover_its_tags(serve, model, tiny_tokenizer, monkeypatch):
    client = serve(model, reasoning=True)
    writes(monkeypatch, client, "<think>\nx\n</think>\n<answer>\ny\n</answer>", tiny_tokenizer)
    whole = chat(client, max_tokens=50, logprobs=True).json()["choices"][0]["logprobs"]["content"]
    chunks = events(chat(client, max_tokens=50, logprobs=True, stream=True))[:-1]
    streamed = [token for c in chunks for token in (c["choices"][0]["logprobs"] or {"content": []})["content"]]
    assert streamed == whole
    assert whole[0]["token"] == "<think>"


@pytest.mark.parametrize("stream", [False, True])
def test_a_completions_end_has_its_log_probability(stream, serve, model, tiny_tokenizer, monkeypatch):
    """lm-evaluation-harness asks for one token and always drops the last entry."""
    client = serve(model)
    end = torch.full((len(tiny_tokenizer),), -50.0)
    end[tiny_tokenizer.eos_token_id] = 50.0
    monkeypatch.setattr(client.app.state.engine.decoder, "logits", lambda hidden: end.repeat(len(hidden), 1))
    ids = tiny_tokenizer.encode("The sky", add_special_tokens=False)
    body = {"prompt": ids, "max_tokens": 1, "echo": True, "logprobs": 1, "temperature": 0, "stream": stream}
    reply = client.post("/v1/completions", json=body)
    chunks = events(reply)[:-1] if stream else [reply.json()]
    choices = [chunk["choices"][0] for chunk in chunks]
    assert "".join(choice["text"] for choice in choices) == "The sky"
    assert choices[-1]["finish_reason"] == "stop"
    tokens, scores, offsets = (
        [entry for choice in choices for entry in choice["logprobs"][name]]
        for name in ("tokens", "token_logprobs", "text_offset")
    )
    assert len(tokens) == len(scores) == len(offsets) == len(ids) + 1
    assert (tokens[-1], scores[-1], offsets[-1]) == ("</s>", pytest.approx(0.0), len("The sky"))


# ----------------------------------------------------------------------------------------------------------- images


@pytest.fixture
def vlm(model, clip_dir, tiny_tokenizer):
    settings = {"image_token_id": tiny_tokenizer.convert_tokens_to_ids("<image>")}
    vlm = MiniMindVLM(VLMConfig(**model.config.to_dict() | settings), vision_model=clip_dir).eval()
    vlm.load_state_dict(model.state_dict(), strict=False)  # all but the projection
    torch.nn.init.normal_(vlm.vision_proj.vision_proj[0].weight, generator=torch.Generator().manual_seed(0))
    return vlm


def picture(colour: str) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (40, 50), colour).save(file, "png")
    return file.getvalue()


def image_part(data: bytes, kind: str = "image/png") -> dict:
    return {"type": "image_url", "image_url": {"url": f"data:{kind};base64,{base64.b64encode(data).decode()}"}}


@pytest.fixture
def seeing(serve, vlm, clip_dir, tiny_tokenizer):
    processor = image_processor(clip_dir, 32)

    @torch.no_grad()
    def place_images(turns):
        prompt = prepare_chat(tiny_tokenizer, turns, vlm.config, processor, room=10**9)
        return prompt.input_ids[0].tolist(), vlm.embed(prompt.input_ids, **prompt.images)[0]

    pages = {"http://pictures.example/red": picture("red")}
    return serve(vlm, place_images=place_images, fetch=lambda urls: [pages[url] for url in urls])


def test_image_parts_are_what_the_model_sees(seeing, vlm, clip_dir, tiny_tokenizer):
    processor, said = image_processor(clip_dir, 32), []
    for colours in (["red"], ["blue"], ["red", "blue"], ["blue", "red"]):
        parts = [image_part(picture(colour)) for colour in colours] + [{"type": "text", "text": "What is it?"}]
        reply = chat(seeing, [{"role": "user", "content": parts}]).json()
        turns = [{"role": "user", "content": [*map(picture, colours), "What is it?"]}]
        prompt = prepare_chat(tiny_tokenizer, turns, vlm.config, processor)
        right = vlm.generate(prompt.input_ids, max_new_tokens=8, **prompt.images)[0, prompt.input_ids.size(1) :]
        said.append(reply["choices"][0]["message"]["content"])
        assert said[-1] == tiny_tokenizer.decode(right, skip_special_tokens=True)
        assert reply["usage"]["prompt_tokens"] == prompt.input_ids.size(1)
    assert len(set(said)) == 4, "the test needs images that matter"
    fetched = [{"type": "image_url", "image_url": {"url": "http://pictures.example/red"}}, parts[-1]]
    assert chat(seeing, [{"role": "user", "content": fetched}]).json()["choices"][0]["message"]["content"] == said[0]


def test_a_typed_image_marker_is_text(seeing, tiny_tokenizer):
    plain = chat(seeing, [{"role": "user", "content": "<image> What is it?"}]).json()
    parts = [{"type": "text", "text": "<image> What "}, {"type": "text", "text": "is it?"}]
    assert (
        chat(seeing, [{"role": "user", "content": parts}]).json()["choices"][0]["message"]
        == (plain["choices"][0]["message"])
    )


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("data:image/png;base64,%%%", "base64"),
        ("data:image/png;base64,", "image"),
        ("data:image/png;base64,aGVsbG8=", "not an image in a supported format"),
        ("data:text/plain,hello", "data:image/png;base64"),
        ("data:", "data:image/png;base64"),
        ("ftp://x/y", "data: URL"),
        ("", "data: URL"),
        ("file:///etc/passwd", "data: URL"),
        ("/etc/passwd", "data: URL"),
    ],
)
def test_what_is_no_image_is_refused(url, said, seeing):
    reply = chat(seeing, [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": url}}]}])
    assert reply.status_code == 400
    assert said in reply.json()["error"]["message"]
    assert reply.json()["error"]["param"] == "messages"


def test_truncated_images_and_text_models(seeing, serve, model):
    cut = [{"role": "user", "content": [image_part(picture("red")[:60])]}]
    assert "cannot be read" in chat(seeing, cut).json()["error"]["message"]
    reply = chat(serve(model), [{"role": "user", "content": [image_part(picture("red"))]}])
    assert reply.status_code == 400
    assert "text only" in reply.json()["error"]["message"]


def test_fetching_is_off_unless_switched_on(serve, vlm):
    client = serve(vlm, place_images=lambda turns: pytest.fail("must not come this far"))
    part = {"type": "image_url", "image_url": {"url": "http://pictures.example/red"}}
    reply = chat(client, [{"role": "user", "content": [part]}])
    assert reply.status_code == 400
    assert "does not fetch URLs" in reply.json()["error"]["message"]


def test_half_a_character_in_an_address_is_quoted_in_a_refusal(serve, vlm):
    client = serve(vlm, place_images=lambda turns: pytest.fail("must not come this far"), fetch=ImageFetcher())
    part = {"type": "image_url", "image_url": {"url": "http://\ud800.example/red"}}
    body = json.dumps({"messages": [{"role": "user", "content": [part]}]})  # in ASCII, because UTF-8 cannot encode it
    reply = client.post("/v1/chat/completions", content=body, headers=JSON)
    assert reply.status_code == 400
    assert r"http://\ud800.example/red" in reply.json()["error"]["message"]


@pytest.fixture
def loaded(vlm, clip_dir, tokenizer_dir, tiny_tokenizer, tmp_path, monkeypatch):
    """What the server's script loads with --vlm."""
    torch.save(vlm.state_dict(), tmp_path / "sft_vlm_32.pth")
    settings = {"config": vlm.config.to_dict(), "tokenizer": tokenizer_hash(tiny_tokenizer)}
    (tmp_path / "sft_vlm_32.json").write_text(json.dumps(settings))
    flags = ("--out_dir", tmp_path, "--tokenizer", tokenizer_dir, "--vision_model", clip_dir, "--device", "cpu")
    monkeypatch.setattr(sys, "argv", ["serve_openai_api.py", "--vlm", "--dim", "32", *map(str, flags)])
    return serve_openai_api.load(serve_openai_api.get_args())


def test_a_vision_model_is_loaded_to_see(loaded, vlm, clip_dir, tiny_tokenizer):
    model, _, place_images = loaded
    turns = [{"role": "user", "content": [picture("red"), "Or", picture("blue"), "?"]}]
    ids, embeddings = place_images(turns)
    prompt = prepare_chat(tiny_tokenizer, turns, vlm.config, image_processor(clip_dir, 32))
    assert ids == prompt.input_ids[0].tolist()
    with torch.no_grad():
        torch.testing.assert_close(embeddings, vlm.embed(prompt.input_ids, **prompt.images)[0])
    assert model.config.max_seq_len == 512
    with pytest.raises(ValueError, match="200 images of 4 tokens are too many for the model's context of 512"):
        place_images([{"role": "user", "content": [b"which nobody reads"] * 200}])


# --------------------------------------------------------------------------------------------------------- failures


def test_a_failure_in_the_middle_is_an_object_and_the_server_goes_on(serve, model, monkeypatch):
    client = serve(model)
    right = chat(client).json()["choices"][0]["message"]
    decoder = client.app.state.engine.decoder
    read, passes = decoder.read, iter(range(10))

    def failing(spans):
        if next(passes) in (4, 6):
            raise RuntimeError("no memory")
        return read(spans)

    monkeypatch.setattr(decoder, "read", failing)
    *chunks, last = events(chat(client, stream=True))
    begun = "".join(chunk["choices"][0]["delta"]["content"] for chunk in chunks)
    assert right["content"].startswith(begun)
    assert begun not in ("", right["content"])
    assert last["error"]["code"] == "failed"
    assert last["error"].keys() == {"message", "type", "param", "code"}
    reply = chat(client)
    assert (reply.status_code, reply.json()["error"]["type"]) == (500, "server_error")
    monkeypatch.setattr(decoder, "read", read)
    assert chat(client).json()["choices"][0]["message"] == right


def test_health_tells_when_the_device_computes_no_more(serve, model, monkeypatch):
    client = serve(model)
    engine, computes = client.app.state.engine, torch.ones

    def dead(*_, **__):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(engine.decoder, "read", dead)
    assert chat(client).status_code == 500
    assert client.get("/health").status_code == 200, "the step failed, the device did not"
    monkeypatch.setattr(torch, "ones", dead)
    assert chat(client).status_code == 500
    monkeypatch.setattr(torch, "ones", computes)
    reply = client.get("/health")
    assert (reply.status_code, reply.json()["error"]["code"]) == (503, "broken")


def test_a_prompts_log_probabilities_come_though_nothing_can_be_shown_yet(serve, model, tiny_tokenizer, monkeypatch):
    """The first token is half a character, and the prompt contains no text."""
    client = serve(model)
    writes(monkeypatch, client, "€", tiny_tokenizer)
    assert len(tiny_tokenizer.encode("€", add_special_tokens=False)) > 1
    asked = {"prompt": [tiny_tokenizer.bos_token_id], "echo": True, "logprobs": 0, "max_tokens": 9}
    whole = client.post("/v1/completions", json=asked).json()["choices"][0]
    said = events(client.post("/v1/completions", json=asked | {"stream": True}))[:-1]
    parts = [event["choices"][0] for event in said]
    assert "".join(part["text"] for part in parts) == whole["text"]
    for name in ("tokens", "token_logprobs", "text_offset"):
        assert [value for part in parts for value in (part["logprobs"] or {}).get(name, [])] == whole["logprobs"][name]


def test_a_wrong_key_of_any_letters_is_told_so(serve, model):
    for key in ("secret", "schlüssel"):
        client = serve(model, api_key=key)
        for given in ("é", key.upper(), key[:-1], key + "é", ""):
            reply = client.get("/v1/models", headers={"Authorization": f"Bearer {given}".encode()})
            assert (reply.status_code, reply.json()["error"]["code"]) == (401, "invalid_api_key"), given
        assert client.get("/health").status_code == 200


def test_what_can_be_got_can_be_asked_for_by_head(serve, model):
    """As load balancers do; what it would have said is left out, and the key is asked for."""
    client = serve(model, api_key="right")
    right = {"Authorization": "Bearer right"}
    for path, headers in (("/health", {}), ("/v1/models", right), ("/v1/models/minimind", right)):
        assert client.head(path, headers=headers).status_code == 200, path
    assert client.head("/v1/models").status_code == 401
    assert "head" not in str(client.get("/openapi.json").json()["paths"])


def test_an_error_of_our_own_is_an_object_too(serve, model, monkeypatch):
    client = serve(model)
    monkeypatch.setattr("scripts.serving.app.render_chat", lambda *_, **__: 1 / 0)
    reply = chat(client)
    assert reply.status_code == 500
    assert reply.json()["error"] == {
        "message": "internal server error; see the server's log",
        "type": "server_error",
        "param": None,
        "code": "internal",
    }
    assert client.get("/health").status_code == 200


# ------------------------------------------------------------------------------------------------- bodies of any kind


def right_body(path: str) -> dict:
    common = {"max_tokens": 2, "temperature": 0.5, "seed": 1, "stop": ["x"], "n": 1}
    if path.endswith("chat/completions"):
        return common | {"messages": [{"role": "user", "content": [{"type": "text", "text": "hi"}]}], "logprobs": True}
    return common | {"prompt": ["hi"], "echo": True, "logprobs": 1}


ANSWERS = {
    "/v1/chat/completions": schema.ChatCompletion,
    "/v1/completions": schema.Completion,
}


def check_reply(reply, kind: type, sent: bytes) -> bool:
    """Check that the response has a documented form; returns whether the request was accepted."""
    if reply.status_code == 200:
        if reply.headers["content-type"].startswith("text/event-stream"):
            assert events(reply)[-1] == "[DONE]", sent
        else:
            kind.model_validate_json(reply.content, strict=True)
        return True
    assert 400 <= reply.status_code < 500, (reply.status_code, reply.text, sent)
    schema.ErrorBody.model_validate_json(reply.content, strict=True)
    return False


@pytest.mark.parametrize("path", ANSWERS)
def test_malformed_bodies_never_harm_the_server(path, serve, model):
    client = serve(model, slot_len=64)
    taken = [
        check_reply(client.post(path, content=body, headers={"Content-Type": "application/json"}), ANSWERS[path], body)
        for body in malformed_bodies(right_body(path), 300, seed=1)
    ]
    assert 10 < sum(taken) < 290, "most should be refused, and some mutations be harmless"
    assert client.post(path, json=right_body(path)).status_code == 200


FORMS = (
    *("response_format", "regex", "choice", "structured_outputs", "guided_json", "guided_regex", "guided_choice"),
    *("tools", "tool_choice", "functions", "function_call", "tool_calls", "tool_call_id"),
)


@pytest.mark.parametrize("path", ANSWERS)
def test_bodies_drawn_from_the_openapi_document_get_documented_answers(path, serve, model):
    client = serve(model, slot_len=192)
    document = client.get("/openapi.json").json()
    operation = document["paths"][path]["post"]
    assert {"200", "4XX", "5XX"} == operation["responses"].keys()
    taken = [
        check_reply(client.post(path, content=body, headers=JSON), ANSWERS[path], body)
        for body in map(json.dumps, bodies_by_schema(document, operation, 150, 2, FORMS))
    ]
    assert sum(taken) > 15


def test_random_bytes_and_random_paths(serve, model):
    client, order = serve(model), random.Random(3)
    for _ in range(60):
        body = order.randbytes(order.randrange(60))
        method = order.choice(["GET", "POST", "PUT", "DELETE", "PATCH", "OPTIONS", "HEAD"])
        path = order.choice(["/", "/v1", "/v1/models/" + "".join(order.choices("a/%?é\u2603.", k=5)), *ANSWERS])
        kind = order.choice(
            ["application/json", "text/plain", "multipart/form-data", "application/x-www-form-urlencoded"]
        )
        reply = client.request(method, path, content=body, headers={"Content-Type": kind})
        listed = method in ("GET", "HEAD") and path.partition("?")[0].rstrip("/") == "/v1/models"  # redirected there
        assert listed or 400 <= reply.status_code < 500, (method, path, reply.status_code)
        if method != "HEAD":
            schema.ErrorBody.model_validate_json(reply.content, strict=True)


# --------------------------------------------------------------------------------------- from a body to the engine


def asked(**fields) -> schema.CompletionRequest:
    return schema.CompletionRequest.model_validate(fields)


@pytest.mark.parametrize(
    ("fields", "settings"),
    [
        ({}, {"temperature": 0.85, "top_p": 0.85, "stop": []}),
        ({"temperature": 0, "top_p": 1}, {"temperature": 0, "top_p": 1, "stop": []}),
        ({"top_k": -1}, {"temperature": 0.85, "top_p": 0.85, "stop": [], "top_k": 0}),
        ({"top_k": 5}, {"temperature": 0.85, "top_p": 0.85, "stop": [], "top_k": 5}),
        ({"stop": "a"}, {"temperature": 0.85, "top_p": 0.85, "stop": ["a"]}),
        ({"stop": ["a", "b"]}, {"temperature": 0.85, "top_p": 0.85, "stop": ["a", "b"]}),
        ({"ignore_eos": True}, {"temperature": 0.85, "top_p": 0.85, "stop": [], "eos_token_id": ()}),
        ({"ignore_eos": False}, {"temperature": 0.85, "top_p": 0.85, "stop": []}),
        (
            {"repetition_penalty": 1.5, "frequency_penalty": 0.5, "presence_penalty": -0.5},
            {
                **{"temperature": 0.85, "top_p": 0.85, "stop": [], "repetition_penalty": 1.5},
                **{"frequency_penalty": 0.5, "presence_penalty": -0.5},
            },
        ),
    ],
)
def test_settings_of_a_body_for_the_engine(fields, settings):
    assert sampling(asked(**fields)) == settings


@pytest.mark.parametrize(
    ("fields", "seeds"),
    [
        ({}, [None]),
        ({"n": 2}, [None, None]),
        ({"seed": 0}, [0]),
        ({"seed": 7, "n": 3}, [7, 8, 9]),
        ({"seed": -1, "n": 2}, [None, None]),
        ({"seed": -2}, [-2]),
    ],
)
def test_seeds_of_several_choices(fields, seeds):
    assert [request.seed for request in choices(asked(**fields), prompt=[1])] == seeds


@pytest.mark.parametrize(
    ("given", "usual", "limit"),
    [(None, None, None), (None, 16, 16), (0, 16, 0), (5, 16, 5), (-1, 16, None), (-1, None, None)],
)
def test_how_long_an_answer_may_be(given, usual, limit):
    assert new_tokens(given, usual) == limit


@pytest.mark.parametrize(
    ("prompt", "several"),
    [
        ("a", ["a"]),
        (["a", "b"], ["a", "b"]),
        ([1, 2], [[1, 2]]),
        ([[1], [2, 3]], [[1], [2, 3]]),
    ],
)
def test_prompts_of_every_form(prompt, several):
    assert texts_or_ids(asked(prompt=prompt)) == several


@pytest.mark.parametrize(
    ("fields", "logprobs", "of_prompt"),
    [
        ({}, None, False),
        ({"echo": True}, None, False),
        ({"logprobs": 0}, 0, False),
        ({"echo": True, "logprobs": 0}, 0, True),
        ({"echo": False, "logprobs": 2}, 2, False),
    ],
)
def test_a_prompt_is_scored_where_it_is_echoed_with_log_probabilities(fields, logprobs, of_prompt):
    (request,) = completion_requests(asked(**fields), [CompletionPrompt([1, 2], "ab", 0)])
    assert (request.logprobs, request.prompt_logprobs, request.max_new_tokens) == (logprobs, of_prompt, 16)


@pytest.mark.parametrize(
    ("fields", "limit"),
    [
        ({}, None),
        ({"max_tokens": 3}, 3),
        ({"max_completion_tokens": 4}, 4),
        ({"max_tokens": 3, "max_completion_tokens": 4}, 4),
        ({"max_tokens": -1}, None),
    ],
)
def test_the_newer_name_of_a_chats_limit_counts_and_without_one_there_is_room(fields, limit, serve, model, monkeypatch):
    client = serve(model)
    engine, seen = client.app.state.engine, []
    prepare = engine.prepare
    monkeypatch.setattr(engine, "prepare", lambda request: seen.append(request) or prepare(request))
    body = {"messages": QUESTION, "temperature": 0, "stop": ["e", " ", "a", "o"]} | fields
    assert client.post("/v1/chat/completions", json=body).status_code == 200
    assert [request.max_new_tokens for request in seen] == [limit]


# ------------------------------------------------------------------------------------------ from the engine to a body


def test_a_prompt_with_several_choices_is_counted_once():
    answers = [SimpleNamespace(count=count, reused=reused) for count, reused in ((1, 10), (2, 20), (4, 40), (8, 80))]
    assert usage(answers, [[0] * 100, [0] * 1000]) == {
        **{"prompt_tokens": 1100, "completion_tokens": 15, "total_tokens": 1115},
        "prompt_tokens_details": {"cached_tokens": 50},  # each prompt's first answer
    }
    assert usage(answers, [[0] * 100])["prompt_tokens_details"] == {"cached_tokens": 10}


def test_a_log_probability_that_json_cannot_say_has_openais_stand_in():
    assert [finite(value) for value in (float("-inf"), -10_000.0, -9998.5, 0.0)] == [-9999.0, -9999.0, -9998.5, 0.0]


def test_an_event_to_the_letter():
    assert event("[DONE]") == "data: [DONE]\n\n"
    assert event({"a": "你", "b": None}) == 'data: {"a": "你", "b": null}\n\n'


def test_the_scores_of_a_completion_by_hand(serve, model, tiny_tokenizer):
    server = SimpleNamespace(
        thread=SimpleNamespace(engine=serve(model).app.state.engine), spelling=lambda token: (f"<{token}>", [])
    )
    a, b = (tiny_tokenizer.encode(text, add_special_tokens=False)[0] for text in ("a", "b"))
    tokens = [Token(a), Token(b, -1.5, ((b, -1.5), (a, float("-inf")))), Token(a, float("-inf"))]
    assert completion_logprobs(server, tokens, 7) == {
        "tokens": [f"<{a}>", f"<{b}>", f"<{a}>"],
        "token_logprobs": [None, -1.5, -9999.0],
        "top_logprobs": [None, {f"<{b}>": -1.5, f"<{a}>": -9999.0}, {}],
        "text_offset": [7, 8, 9],
    }


def test_how_a_token_is_spelled(serve, model, tiny_tokenizer):
    state = ServerState(SimpleNamespace(engine=serve(model).app.state.engine), tiny_tokenizer)
    (a,) = tiny_tokenizer.encode("a", add_special_tokens=False)
    half = tiny_tokenizer.convert_tokens_to_ids("\u00e4")  # the byte 0xe4, which begins many Chinese characters
    assert state.spelling(a) == ("a", [97])
    assert state.spelling(half) == ("bytes:\\xe4", [0xE4])
    assert state.spelling(tiny_tokenizer.eos_token_id)[0] == "</s>"
    assert (state.capacity, state.reasoning, state.fetch, state.place_images) == (80, False, None, None)


def test_the_statuses_of_answers_that_did_not_end():
    assert {reason: (status, code) for reason, (status, _, _, code) in FAILURES.items()} == {
        "error": (500, "failed"),
        "cancelled": (503, "shutting_down"),
    }


@pytest.mark.parametrize(("length", "new", "fits"), [(15, 1, True), (16, 1, False), (16, 0, True), (17, 0, False)])
def test_a_prompt_as_long_as_the_context(length, new, fits, serve, model):
    client = serve(model, slot_len=16)
    body = {"prompt": [1] * length, "max_tokens": new, "echo": True, "logprobs": 0}
    reply = client.post("/v1/completions", json=body)
    assert reply.status_code == (200 if fits else 400), reply.text
    if not fits:
        error = reply.json()["error"]
        assert (error["code"], error["param"]) == ("context_length_exceeded", "prompt")


def test_a_stream_that_its_reader_leaves_stops_writing():
    """The client is gone after one event: what it asked for must not be written to its end."""
    cancelled = []

    async def chunks():
        while True:
            yield {"n": 1}

    async def leave() -> str:
        stream = event_stream(SimpleNamespace(cancel=lambda: cancelled.append(True)), chunks())
        first = await anext(stream)
        assert not cancelled
        await stream.aclose()
        return first

    assert asyncio.run(leave()) == event({"n": 1})
    assert cancelled == [True]
