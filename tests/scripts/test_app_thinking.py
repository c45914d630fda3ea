"""MiniMind-3 over the API: its own chat template, and chat_template_kwargs.open_thinking."""

from types import SimpleNamespace

import pytest
from fastapi.testclient import TestClient

from model import MiniMind3Config, MiniMind3LM
from model.inference.scheduler import Engine
from model.inference.thread import EngineThread
from scripts.serving.app import make_app
from scripts.serving.page_models import LocalModel
from scripts.serving.requests import ServerState
from tests.model.networks import network
from tests.scripts.test_app import QUESTION, chat, events, writes
from trainer.weights import load_tokenizer

OPEN = {"chat_template_kwargs": {"open_thinking": True}}


@pytest.fixture(scope="module")
def tokenizer(shared):
    folder = shared / "fixtures" / "minimind3_tokenizer"
    if not folder.is_dir():
        pytest.skip("no tokenizer of MiniMind-3")
    return load_tokenizer(folder)


@pytest.fixture
def client(tokenizer):
    config = MiniMind3Config(dim=32, n_layers=1, n_heads=4, n_kv_heads=2, vocab_size=len(tokenizer), max_seq_len=256)
    engine = Engine(MiniMind3LM(config).eval(), tokenizer, slots=2)
    thread = EngineThread(engine)
    app = make_app(ServerState(thread, tokenizer))
    app.state.engine = engine
    yield TestClient(app, raise_server_exceptions=False)
    thread.close()


def test_a_thought_is_opened_and_told_apart(client, tokenizer, monkeypatch):
    writes(monkeypatch, client, "12 + 30\n= 42\n</think>\n\nforty-two", tokenizer)
    message = chat(client, max_tokens=99, **OPEN).json()["choices"][0]["message"]
    assert message == {"role": "assistant", "content": "forty-two", "reasoning_content": "12 + 30\n= 42"}
    chunks = events(chat(client, max_tokens=99, stream=True, **OPEN))
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks[:-1]]
    streamed = {name: "".join(d.get(name) or "" for d in deltas) for name in ("content", "reasoning_content")}
    assert streamed == {"content": "forty-two", "reasoning_content": "12 + 30\n= 42"}


@pytest.mark.parametrize("settings", [{}, {"chat_template_kwargs": {"open_thinking": False}}, OPEN])
def test_the_prompt_is_its_templates(client, tokenizer, settings):
    expected = tokenizer.apply_chat_template(
        QUESTION, add_generation_prompt=True, return_dict=False, open_thinking=settings == OPEN
    )
    reply = chat(client, max_tokens=1, **settings)
    assert reply.json()["usage"]["prompt_tokens"] == len(expected)
    held = client.app.state.engine._slots[0].holds
    assert held[: len(expected)] == expected


@pytest.mark.parametrize("wrong", [{"enable_thinking": True}, {"open_thinking": "yes"}, {"open_thinking": 1}, ["x"]])
def test_other_settings_of_the_template_are_refused(client, wrong):
    reply = chat(client, chat_template_kwargs=wrong)
    assert reply.status_code == 400
    assert "chat_template_kwargs" in reply.json()["error"]["param"]


def test_a_model_of_another_layout_opens_no_thought(tiny_tokenizer):
    thread = EngineThread(Engine(network(vocab_size=len(tiny_tokenizer)), tiny_tokenizer, slots=1))
    try:
        reply = chat(TestClient(make_app(ServerState(thread, tiny_tokenizer))), **OPEN)
    finally:
        thread.close()
    assert reply.status_code == 400
    assert reply.json()["error"]["message"] == "open_thinking: this model's chat template has no thinking"


def test_the_page_can_have_it_think(tokenizer, monkeypatch):
    config = MiniMind3Config(dim=32, n_layers=1, n_heads=4, n_kv_heads=2, vocab_size=len(tokenizer), max_seq_len=256)
    backend = LocalModel(MiniMind3LM(config).eval(), tokenizer)
    assert backend.opens_thoughts
    engine = backend._thread.engine
    app = SimpleNamespace(app=SimpleNamespace(state=SimpleNamespace(engine=engine)))
    writes(monkeypatch, app, "12 + 30\n</think>\n\n42", tokenizer)
    asked = []
    right = engine.prepare
    monkeypatch.setattr(engine, "prepare", lambda request: asked.append(list(request.prompt)) or right(request))
    shown = []
    for more in ({}, {"open_thinking": True}):
        parts = [*backend.parts([], QUESTION, {"temperature": 0.0, "max_new_tokens": 99} | more)]
        shown.append({kind: "".join(text for part, text in parts if part == kind) for kind in ("thinking", "answer")})
    assert shown[1] == {"thinking": "12 + 30", "answer": "42"}
    assert shown[0]["thinking"] == ""
    assert [tokenizer.decode(ids).endswith("<think>\n") for ids in asked] == [False, True]
