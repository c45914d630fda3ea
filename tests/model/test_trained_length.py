"""A model's maximum position and the length it was trained on: beyond the latter it warns, once."""

import pytest

from model import LMConfig, MiniMind3Config, generation
from model.inference.request import Request
from model.inference.scheduler import Engine
from tests.model.networks import network, random_ids


@pytest.mark.parametrize(
    ("settings", "positions"),
    [
        ({}, None),
        ({"trained_seq_len": 340}, 340),
        ({"trained_seq_len": 340, "rope_scaling": {"rope_type": "ntk", "factor": 4.0}}, 340),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4, "original_max_position_embeddings": 340}}, 1360),
        (
            {
                "trained_seq_len": 2048,
                "rope_scaling": {"rope_type": "linear", "factor": 4, "original_max_position_embeddings": 340},
            },
            2048,
        ),
    ],
)
def test_what_training_has_made_good(settings, positions):
    assert LMConfig(**settings).learned_positions == positions


def test_minimind3s_own_scaling_promises_what_it_stretches():
    assert MiniMind3Config(inference_rope_scaling=True).learned_positions == 32768


@pytest.fixture(autouse=True)
def short_texts_count(monkeypatch):
    monkeypatch.setattr(generation, "UNTOLD_LENGTH", 0)


def said(caplog) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name == "minimind"]


@pytest.mark.parametrize("prompt", [8, 20])
def test_generation_beyond_it_warns_once(prompt, caplog):
    model = network(trained_seq_len=16)
    ids = random_ids(1, prompt)
    model.generate(ids, max_new_tokens=16 - prompt if prompt < 16 else 1, eos_token_id=())
    assert len(said(caplog)) == (prompt > 16)
    caplog.clear()
    model.generate(ids, max_new_tokens=20, eos_token_id=())
    (told,) = said(caplog)
    assert "trained on rows of 16" in told


def test_so_does_the_engine(tiny_tokenizer, caplog):
    model = network(vocab_size=len(tiny_tokenizer), trained_seq_len=16)
    engine = Engine(model, tiny_tokenizer, slots=2)
    short, long = ([5] * 8, [5] * 30)
    engine.run([Request(prompt=short, max_new_tokens=8, eos_token_id=())])
    assert said(caplog) == []
    for _ in range(2):
        engine.run([Request(prompt=ids, max_new_tokens=12, eos_token_id=()) for ids in (short, long)])
    (told,) = said(caplog)
    assert "trained on rows of 16" in told


def test_a_model_that_nobody_knows_the_training_of_says_nothing(caplog):
    network().generate(random_ids(1, 100), max_new_tokens=20, eos_token_id=())
    assert said(caplog) == []
