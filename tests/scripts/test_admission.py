"""Checks of a request before it costs anything, with doubles for the expensive parts: scripts/serving/app.py,
admission.py and requests.py in this process."""

import asyncio
import json
import threading
import time

import pytest
from fastapi.testclient import TestClient

from model.inference.scheduler import Engine
from model.inference.thread import EngineThread
from scripts.serving import admission as openai_admission
from scripts.serving.admission import Places
from scripts.serving.app import make_app
from scripts.serving.requests import ServerState
from scripts.serving.schema import ApiError
from tests.model.networks import network
from tests.running import PATIENCE

QUESTION = [{"role": "user", "content": "What is a bird?"}]
PATHS = {"/v1/chat/completions": {"messages": QUESTION}, "/v1/completions": {"prompt": "A bird"}}


@pytest.fixture(scope="module")
def model(tiny_tokenizer):
    return network(vocab_size=len(tiny_tokenizer), max_seq_len=512)


@pytest.fixture
def serve(model, tiny_tokenizer):
    """Makes an app around a model, and closes its engine at the end."""
    threads = []

    def make(slots: int = 4, slot_len: int = 128, **settings) -> ServerState:
        threads.append(EngineThread(Engine(model, tiny_tokenizer, slots=slots, slot_len=slot_len)))
        return ServerState(threads[-1], tiny_tokenizer, **settings)

    yield make
    for thread in threads:
        thread.close()


def client_of(served: ServerState) -> TestClient:
    return TestClient(make_app(served), raise_server_exceptions=False)


def settle(served: ServerState) -> None:
    """Wait until no request holds a place any more."""
    deadline = time.monotonic() + PATIENCE
    while served.places.taken:
        assert time.monotonic() < deadline, f"{served.places.taken} places are never free again"
        time.sleep(0.005)


def ask(app, path: str, receive, **headers: str) -> tuple[int, dict]:
    """The status and the body of the app's answer to a request whose body comes from `receive`."""
    given = [(name.replace("_", "-").encode(), value.encode()) for name, value in headers.items()]
    scope = {"type": "http", "method": "POST", "path": path, "raw_path": path.encode(), "query_string": b""}
    scope |= {"headers": given, "http_version": "1.1", "scheme": "http", "server": ("x", 80), "client": ("y", 1)}
    said = []

    async def send(message):
        said.append(message)

    asyncio.run(app(scope, receive, send))
    return said[0]["status"], json.loads(b"".join(message.get("body", b"") for message in said[1:]))


@pytest.mark.parametrize("error", [ValueError, asyncio.CancelledError, SystemExit])
def test_places_are_free_again_whatever_ends_a_preparation(error):
    places = Places(3)
    preparing = places.taking(2)
    preparing.__enter__()
    assert places.taken == 2
    assert not preparing.__exit__(error, error(), None)
    assert places.taken == 0
    with places.taking(3):
        pass
    assert places.taken == 3
    with pytest.raises(ApiError) as refused, places.taking(1):
        pytest.fail("there is no place")
    assert refused.value.status_code == 429
    assert places.taken == 3


async def unread():
    pytest.fail("the body is read")


JSON = {"content_type": "application/json"}


@pytest.mark.parametrize("path", PATHS)
def test_the_key_is_asked_before_the_body_is_read(path, serve):
    app = make_app(serve(), api_key="right")
    for headers in ({}, {"authorization": "Bearer wrong"}, {"content_length": str(2**25), "authorization": "x"}):
        status, body = ask(app, path, unread, **JSON, **headers)
        assert (status, body["error"]["code"]) == (401, "invalid_api_key")


@pytest.mark.parametrize("path", PATHS)
def test_a_server_that_shuts_down_reads_no_body(path, serve):
    served = serve()
    served.places.draining = True
    status, body = ask(make_app(served), path, unread, **JSON)
    assert (status, body["error"]["code"]) == (503, "shutting_down")


@pytest.mark.parametrize("path", PATHS)
def test_a_body_whose_length_is_too_much_is_not_read(path, serve):
    status, body = ask(make_app(serve()), path, unread, **JSON, content_length=str(2**25 + 1))
    assert (status, body["error"]["message"]) == (413, "the body is larger than 32 MiB")


@pytest.mark.parametrize("path", PATHS)
def test_a_body_without_a_length_is_read_no_further_than_the_limit(path, serve, monkeypatch):
    monkeypatch.setattr(openai_admission, "parse", lambda *_: pytest.fail("it is parsed"))
    monkeypatch.setattr(openai_admission, "LARGEST_BODY", 4 * 2**20)
    read = []

    async def endless():
        read.append(2**20)
        return {"type": "http.request", "body": bytes(2**20), "more_body": True}

    assert ask(make_app(serve()), path, endless, **JSON)[0] == 413
    assert len(read) == 5


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", ""])
def test_a_body_that_calls_itself_something_else_is_not_read(kind, serve):
    """A web page may send such a body anywhere without a preflight request."""
    status, body = ask(make_app(serve()), "/v1/completions", unread, content_type=kind)
    assert status == 400
    assert "application/json" in body["error"]["message"]


def test_a_client_that_hangs_up_in_the_middle_of_its_body_is_no_error_of_ours(serve):
    async def gone():
        return {"type": "http.disconnect"}

    assert ask(make_app(serve()), "/v1/completions", gone, **JSON)[0] == 400


@pytest.mark.parametrize("kind", ["application/json; charset=utf-8", "Application/JSON", "application/vnd.api+json"])
def test_json_by_its_other_names(kind, serve):
    reply = client_of(serve()).post(
        "/v1/completions", content=json.dumps({"max_tokens": 1}), headers={"Content-Type": kind}
    )
    assert reply.status_code == 200


@pytest.mark.parametrize(("path", "body"), PATHS.items())
def test_a_body_is_parsed_beside_the_event_loop(path, body, serve, monkeypatch):
    parse, threads = openai_admission.parse, []

    def noting(kind, data):
        threads.append(threading.current_thread())
        with pytest.raises(RuntimeError):
            asyncio.get_running_loop()
        return parse(kind, data)

    monkeypatch.setattr(openai_admission, "parse", noting)
    assert client_of(serve()).post(path, json=body | {"max_tokens": 1}).status_code == 200
    assert len(threads) == 1


# ---------------------------------------------------------------------------------------------- places in the queue


@pytest.mark.parametrize(("path", "body"), PATHS.items())
def test_a_full_queue_costs_no_tokens_and_no_looking(path, body, serve, monkeypatch):
    for name in ("render_chat", "render_text", "read_turns"):
        monkeypatch.setattr(f"scripts.serving.app.{name}", lambda *_, **__: pytest.fail("it is prepared"))
    served = serve(capacity=4)
    client = client_of(served)
    served.places.taken = 3
    reply = client.post(path, json=body | {"n": 2})
    assert (reply.status_code, reply.json()["error"]["code"]) == (429, "queue_full")
    assert 1 <= int(reply.headers["retry-after"]) <= 60
    reply = client.post(path, json=body | {"n": 5})
    assert (reply.status_code, reply.json()["error"]["param"]) == (400, "n")
    assert served.places.taken == 3


@pytest.mark.parametrize(("path", "body"), PATHS.items())
def test_a_place_is_taken_for_each_answer_from_the_preparation_on(path, body, serve, monkeypatch):
    served, taken = serve(capacity=6), []
    from scripts.serving import app as serving_app

    for name in ("render_chat", "render_text"):
        right = getattr(serving_app, name)

        def noting(*args, right=right, **settings):
            taken.append(served.places.taken)
            return right(*args, **settings)

        monkeypatch.setattr(serving_app, name, noting)
    several = {"prompt": ["a", "b", "c"]} if "prompt" in body else {}
    reply = client_of(served).post(path, json=body | several | {"n": 2, "max_tokens": 2})
    assert len(reply.json()["choices"]) == taken[0] == (6 if several else 2)
    settle(served)
    assert served.unfinished == set()


@pytest.mark.parametrize(
    ("path", "body", "status"),
    [
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "\ud800"}]}, 400),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "bird " * 200}]}, 400),
        ("/v1/completions", {"prompt": "\ud800"}, 400),
        ("/v1/completions", {"prompt": [99_999]}, 400),
        ("/v1/completions", {"prompt": [5] * 129}, 400),
    ],
)
def test_what_cannot_be_prepared_leaves_its_places(path, body, status, serve):
    served = serve(capacity=2)
    client = client_of(served)
    for _ in range(3):
        reply = client.post(path, content=json.dumps(body | {"n": 2}), headers={"Content-Type": "application/json"})
        assert reply.status_code == status
        assert served.places.taken == 0


def test_an_engine_that_takes_only_the_first_of_two_leaves_both_places(serve, monkeypatch):
    served = serve(capacity=2)
    client, submit, submitted = client_of(served), served.thread.submit, []

    def failing(request, deliver):
        if submitted:
            raise RuntimeError("out of memory")
        submitted.append(submit(request, deliver))
        return submitted[0]

    monkeypatch.setattr(served.thread, "submit", failing)
    body = {"messages": QUESTION, "n": 2, "ignore_eos": True}
    assert client.post("/v1/chat/completions", json=body).status_code == 500
    assert served.places.taken == 0
    monkeypatch.setattr(served.thread, "submit", submit)
    assert client.post("/v1/chat/completions", json=body).status_code == 200
    settle(served)
    assert served.places.taken == 0


def test_what_was_prepared_when_the_server_closed_is_told_so(serve, monkeypatch):
    served = serve()
    from scripts.serving import app as serving_app

    def closing(*args, right=serving_app.render_chat, **settings):
        served.places.draining = True
        served.close()
        return right(*args, **settings)

    monkeypatch.setattr(serving_app, "render_chat", closing)
    reply = client_of(served).post("/v1/chat/completions", json={"messages": QUESTION})
    assert (reply.status_code, reply.json()["error"]["code"]) == (503, "shutting_down")
    assert served.places.taken == 0


def test_images_are_looked_at_one_request_after_another(serve, tiny_tokenizer):
    """Each takes up to half a gigabyte while it is decoded."""
    inside, most = threading.Semaphore(1), []

    def look(turns):
        most.append(inside.acquire(blocking=False))
        time.sleep(0.02)
        if most[-1]:
            inside.release()
        return [1, 5], None

    served = serve(place_images=look)
    part = {"type": "image_url", "image_url": {"url": "data:image/png;base64,aGk="}}
    body = {"messages": [{"role": "user", "content": [part]}], "max_tokens": 1}
    with client_of(served) as client:  # one event loop for all requests
        asking = [
            threading.Thread(target=client.post, args=("/v1/chat/completions",), kwargs={"json": body})
            for _ in range(4)
        ]
        for each in asking:
            each.start()
        for each in asking:
            each.join()
    assert most == [True] * 4


# ---------------------------------------------------------------------------------------------------------- generation


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("path", "body"), PATHS.items())
def test_one_answers_failure_ends_its_siblings(path, body, stream, serve, monkeypatch):
    served = serve(slot_len=512)
    engine, answers = served.thread.engine, []
    logits = served.thread.engine.decoder.logits

    def failing(hidden):
        if len(served.unfinished) == 3 and not answers:
            answers.extend(sorted(served.unfinished, key=lambda answer: answer.number))
        if answers and answers[2].count > 2:
            engine.cancel(answers[1], "error")
            time.sleep(0.02)  # slow, so that there is time for the disconnection to arrive
        return logits(hidden)

    monkeypatch.setattr(engine.decoder, "logits", failing)
    with client_of(served) as client:
        reply = client.post(path, json=body | {"n": 3, "ignore_eos": True, "max_tokens": 400, "stream": stream})
        if stream:
            assert json.loads(reply.text.split("\n\n")[-2].removeprefix("data: "))["error"]["code"] == "failed"
        else:
            assert (reply.status_code, reply.json()["error"]["code"]) == (500, "failed")
        settle(served)
    assert [answer.finish_reason for answer in answers] == ["cancelled", "error", "cancelled"]


def test_minus_one_writes_as_long_as_there_is_room(serve):
    client = client_of(serve())
    for path, body in PATHS.items():
        usage = client.post(path, json=body | {"max_tokens": -1, "ignore_eos": True}).json()["usage"]
        assert usage["total_tokens"] == 128
        assert usage["completion_tokens"] > 16
    body = PATHS["/v1/chat/completions"] | {"max_completion_tokens": -1, "ignore_eos": True}
    assert client.post("/v1/chat/completions", json=body).json()["usage"]["total_tokens"] == 128


def test_minus_one_chooses_among_all_tokens_and_by_any_seed(serve):
    client, body = client_of(serve()), {"prompt": "A bird", "max_tokens": 20, "temperature": 2, "top_p": 1}

    def text(**settings) -> str:
        return client.post("/v1/completions", json=body | settings).json()["choices"][0]["text"]

    assert text(seed=5, top_k=-1) == text(seed=5, top_k=0) == text(seed=5) != text(seed=5, top_k=1)
    assert len({text(seed=-1) for _ in range(3)}) > 1
    assert text(seed=-2) == text(seed=-2)


# -------------------------------------------------------------------------------------------------------- unknown paths


@pytest.mark.parametrize(
    "path",
    ["embeddings", "responses", "images/generations", "audio/speech", "moderations", "files", "rerank", "nothing"],
)
@pytest.mark.parametrize("method", ["GET", "POST"])
def test_what_the_server_does_not_have_is_said_with_what_it_has(path, method, serve):
    reply = client_of(serve()).request(method, f"/v1/{path}", content=b"{}")
    assert reply.status_code == 404
    error = reply.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert error["type"] == "invalid_request_error"
    assert error["message"].startswith(f"this server has no /v1/{path}; it has /v1/chat/completions, /v1/completions")


def test_an_address_without_v1_is_told_of_it(serve):
    assert "/v1/chat/completions" in client_of(serve()).post("/chat/completions").json()["error"]["message"]


def test_health_counts_what_is_being_prepared(serve):
    served = serve()
    served.places.taken = 3
    assert client_of(served).get("/health").json() == {"status": "ok", "running": 0, "waiting": 3}
