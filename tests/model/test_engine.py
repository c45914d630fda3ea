"""model/inference/scheduler.py: an answer in a batch equals the answer that the model generates for it alone."""

import queue
import threading
import time

import pytest
import torch

from model import MiniMindLM
from model.inference.answer import Answer
from model.inference.detokenizer import Detokenizer
from model.inference.request import Piece, Request, Token
from model.inference.scheduler import Engine
from model.inference.thread import EngineThread
from model.model_lora import apply_lora, lora_state_dict
from model.model_vlm import MiniMindVLM, VLMConfig
from model.tokenizer import token_bytes
from tests.model.networks import network
from tests.running import PATIENCE

KINDS = ("dense", "moe", "lora")


def network_of(kind: str, vocab_size: int) -> MiniMindLM:
    model = network(vocab_size=vocab_size, max_seq_len=160, use_moe=kind == "moe")
    if kind == "lora":
        apply_lora(model, rank=4)
        for value in lora_state_dict(model).values():
            value.normal_(std=0.3, generator=torch.Generator().manual_seed(value.numel()))
    return model


@pytest.fixture(scope="module")
def models(tiny_tokenizer) -> dict[str, MiniMindLM]:
    return {kind: network_of(kind, len(tiny_tokenizer)) for kind in KINDS}


@pytest.fixture
def engine(models, tiny_tokenizer) -> Engine:
    return Engine(models["dense"], tiny_tokenizer, slots=3, token_budget=24)


def prompt_of(length: int, seed: int = 0) -> list[int]:
    return torch.randint(8, 580, (length,), generator=torch.Generator().manual_seed(1000 * seed + length)).tolist()


def alone(model, request: Request) -> list[int]:
    """The oracle: the model's plain generation loop for a single request."""
    names = ("temperature", "top_k", "top_p", "repetition_penalty", "seed", "eos_token_id")
    settings = {name: getattr(request, name) for name in names}
    stream = model.stream(torch.tensor([request.prompt]), max_new_tokens=request.max_new_tokens, **settings)
    return [int(token) for token in stream]


def ids(answer: Answer) -> list[int]:
    return [token.id for token in answer.tokens]


def finish(engine: Engine) -> None:
    while engine.running or engine.waiting:
        engine.step()


# ------------------------------------------------------------------------------------------------------- in a batch


@pytest.mark.parametrize("kind", KINDS)
def test_an_answer_is_the_same_alone_and_in_company(kind, models, tiny_tokenizer):
    """Greedy and seeded requests of many lengths join a running batch at different steps; some are cancelled."""
    model = models[kind]
    engine = Engine(model, tiny_tokenizer, slots=4, token_budget=20)
    common = {"eos_token_id": ()}
    settings = [
        common,
        common | {"repetition_penalty": 1.4},
        common | {"temperature": 0.9, "seed": 3},
        common | {"temperature": 1.3, "top_k": 30, "top_p": 0.8, "seed": 4, "repetition_penalty": 1.2},
    ]
    requests = [
        Request(prompt=prompt_of(n, seed=n), max_new_tokens=5 + 7 * i % 23, **settings[i % 4])
        for i, n in enumerate((1, 50, 9, 20, 33, 2, 71, 19, 21, 5, 60, 12))
    ]
    answers, doomed = [], []
    for i, request in enumerate(requests):
        answers.append(engine.submit(request))
        if i % 3 == 0:
            doomed.append(engine.submit(Request(prompt=prompt_of(30, seed=i), eos_token_id=())))
        for _ in range(i % 5):
            engine.step()
        if i % 4 == 3:
            engine.cancel(doomed.pop())
    for answer in doomed:
        engine.cancel(answer)
    finish(engine)
    for request, answer in zip(requests, answers, strict=True):
        assert ids(answer) == alone(model, request)
        assert answer.finish_reason == "length"
        assert answer.text == tiny_tokenizer.decode(ids(answer), skip_special_tokens=True)
    assert len({token for answer in answers for token in ids(answer)}) > 50


def test_images_are_read_in_place_of_their_ids(clip_dir, tiny_tokenizer):
    model = network(vocab_size=len(tiny_tokenizer), max_seq_len=160)
    vlm = MiniMindVLM(VLMConfig(**model.config.to_dict() | {"image_token_id": 7}), vision_model=clip_dir).eval()
    vlm.load_state_dict(model.state_dict(), strict=False)  # all but the projection
    torch.nn.init.normal_(vlm.vision_proj.vision_proj[0].weight, generator=torch.Generator().manual_seed(0))
    engine = Engine(vlm, tiny_tokenizer, slots=3, token_budget=10)
    requests, right = [], []
    for seed in range(4):
        images = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(seed % 2))
        prompt = prompt_of(6) + [7] * 4 + prompt_of(5 + seed // 2)
        input_ids = torch.tensor([prompt])
        with torch.no_grad():
            embeddings = vlm.embed(input_ids, pixel_values=images)[0]
        requests.append(Request(prompt=prompt, max_new_tokens=12, embeddings=embeddings, eos_token_id=()))
        requests.append(Request(prompt=prompt, max_new_tokens=12, eos_token_id=()))
        right.append(vlm.generate(input_ids, pixel_values=images, max_new_tokens=12, eos_token_id=())[0, len(prompt) :])
        right.append(vlm.generate(input_ids, max_new_tokens=12, eos_token_id=())[0, len(prompt) :])
    answers = engine.run(requests)
    assert [ids(answer) for answer in answers] == [row.tolist() for row in right]
    assert ids(answers[0]) != ids(answers[2]), "the test needs an image that matters"


def test_every_token_is_read_once_within_the_budget_and_writers_never_wait(engine, monkeypatch):
    passes = []
    read = engine.decoder.read
    monkeypatch.setattr(engine.decoder, "read", lambda spans: passes.append(spans) or read(spans))
    first = engine.submit(Request(prompt=prompt_of(5), max_new_tokens=30, eos_token_id=()))
    engine.step()
    others = [
        engine.submit(Request(prompt=prompt_of(60, seed), max_new_tokens=10, eos_token_id=())) for seed in (1, 2, 3)
    ]
    before = first.count
    for step in range(1, 6):
        engine.step()
        assert first.count == before + step
    finish(engine)
    sizes = [sum(len(span.tokens) for span in spans) for spans in passes]
    assert max(sizes) <= 24
    assert sum(sizes) == 5 + 30 - 1 + 3 * (60 + 10 - 1)
    assert all(answer.finish_reason == "length" for answer in [first, *others])


def test_a_lone_answer_in_a_high_slot_and_a_few_far_apart_end_up_side_by_side(models, tiny_tokenizer):
    engine = Engine(models["dense"], tiny_tokenizer, slots=8)
    lengths = (3, 40, 3, 3, 3, 3, 3, 41)
    requests = [
        Request(prompt=prompt_of(6, seed), max_new_tokens=n, eos_token_id=()) for seed, n in enumerate(lengths, 1)
    ]
    answers = [engine.submit(request) for request in requests]
    for _ in range(6):
        engine.step()
    assert engine.running == 2
    assert abs(answers[1].slot.number - answers[7].slot.number) == 1
    finish(engine)
    assert [ids(answer) for answer in answers] == [alone(models["dense"], request) for request in requests]


@pytest.mark.parametrize(("moved", "kept"), [(90, 4), (4, 90)], ids=["long beside short", "short beside long"])
def test_slots_that_change_places_keep_all_that_they_hold(moved, kept, models, tiny_tokenizer):
    """A decoding answer moves, and the slot that it moves to caches the beginning of a later prompt."""
    engine = Engine(models["dense"], tiny_tokenizer, slots=8, token_budget=1000)
    lengths = (25, 3, 3, 3, 3, 3, 3, 25)
    prompts = [prompt_of(n, seed) for seed, n in enumerate((3, kept, 3, 3, 3, 3, 3, moved), 1)]
    requests = [
        Request(prompt=prompt, max_new_tokens=n, eos_token_id=()) for prompt, n in zip(prompts, lengths, strict=True)
    ]
    answers = [engine.submit(request) for request in requests]
    at = {}
    while engine.running or engine.waiting:
        engine.step()
        at[len(answers[7].ids)] = answers[7].slot and answers[7].slot.number
    assert [at[moved + 1], at[moved + 20]] == [7, 1], "the test needs a slot that moves"
    again = Request(prompt=[*prompts[1], *ids(answers[1]), 9], max_new_tokens=9, eos_token_id=())
    answers += engine.run([again])
    assert answers[8].reused == kept + 2
    assert [ids(answer) for answer in answers] == [alone(models["dense"], r) for r in [*requests, again]]


# ---------------------------------------------------------------------------------------------------- prefix reuse


def test_a_prompt_that_begins_alike_is_read_only_where_it_differs(engine, models):
    chat = Request(prompt=prompt_of(40), max_new_tokens=10, eos_token_id=())
    (first,) = engine.run([chat])
    assert first.reused == 0
    turn = Request(prompt=[*chat.prompt, *ids(first), *prompt_of(7, 1)], max_new_tokens=8, eos_token_id=())
    (second,) = engine.run([turn])
    assert second.reused == 40 + 9  # the last generated token was never processed
    (third,) = engine.run([turn])
    assert third.reused == len(turn.prompt) - 1
    assert ids(second) == ids(third) == alone(models["dense"], turn)
    (other,) = engine.run([Request(prompt=[9, *turn.prompt[1:]], max_new_tokens=3)])
    assert other.reused == 0


def test_the_slot_that_nobody_used_for_longest_is_taken(engine):
    requests = [Request(prompt=prompt_of(30, seed), max_new_tokens=2, eos_token_id=()) for seed in range(4)]
    for request in requests:  # one after the other, in three slots
        engine.run([request])
    assert [engine.run([requests[seed]])[0].reused for seed in (1, 2, 3, 0)] == [29, 29, 29, 0]


def test_a_long_text_is_not_given_up_for_a_short_one_that_begins_alike(engine):
    long = Request(prompt=prompt_of(90), max_new_tokens=2, eos_token_id=())
    engine.run([long])
    (short,) = engine.run([Request(prompt=[*long.prompt[:10], 9], max_new_tokens=2, eos_token_id=())])
    assert short.reused == 10
    assert engine.run([long])[0].reused == 89


def test_prompts_are_read_in_the_order_they_came(engine):
    first, second = (engine.submit(Request(prompt=prompt_of(60, seed), eos_token_id=())) for seed in (1, 2))
    for _ in range(3):
        engine.step()
    assert (first.count, second.count) == (1, 0)
    assert len(second.slot.holds) == 3 * 24 - 60


def test_a_prompt_is_copied_from_an_answer_that_is_being_written(engine, models):
    request = Request(prompt=prompt_of(70), max_new_tokens=12, eos_token_id=())
    answers = [engine.submit(request)]
    for _ in range(5):
        engine.step()
    longer = Request(prompt=[*request.prompt[:50], *prompt_of(9, 2)], max_new_tokens=12, eos_token_id=())
    answers += [engine.submit(request), engine.submit(longer)]
    finish(engine)
    assert [answer.reused for answer in answers] == [0, 69, 50]
    assert ids(answers[0]) == ids(answers[1]) == alone(models["dense"], request)
    assert ids(answers[2]) == alone(models["dense"], longer)


def test_choices_for_one_long_prompt_wait_until_it_is_read_once(models, tiny_tokenizer):
    engine = Engine(models["dense"], tiny_tokenizer, slots=3, token_budget=100)
    requests = [
        Request(prompt=prompt_of(90), max_new_tokens=9, temperature=1.0, seed=seed, eos_token_id=())
        for seed in range(3)
    ]
    answers = engine.run(requests)
    assert [answer.reused for answer in answers] == [0, 89, 89]
    assert [ids(answer) for answer in answers] == [alone(models["dense"], request) for request in requests]
    assert len({tuple(ids(answer)) for answer in answers}) == 3


# ------------------------------------------------------------------------------------------------- ends of answers


def test_an_answer_ends_at_its_stop_token_which_is_no_part_of_it(engine, models):
    request = Request(prompt=prompt_of(5), max_new_tokens=30, eos_token_id=())
    written = alone(models["dense"], request)
    end = max(written, key=written.index)  # the token whose first occurrence is latest
    before = written.index(end)
    assert before > 2
    for eos in (end, [end, 585]):
        (answer,) = engine.run([Request(prompt=request.prompt, max_new_tokens=30, eos_token_id=eos)])
        assert (ids(answer), answer.finish_reason, answer.count) == (written[:before], "stop", before + 1)


def test_room_ends_an_answer_too(engine):
    (answer,) = engine.run([Request(prompt=prompt_of(150), eos_token_id=())])
    assert (answer.count, answer.finish_reason) == (10, "length")
    (answer,) = engine.run([Request(prompt=prompt_of(159), max_new_tokens=99, eos_token_id=())])
    assert answer.count == 1


@pytest.mark.parametrize("cut", range(1, 9))
def test_stop_strings_cut_the_text_wherever_tokens_end(cut, engine, tiny_tokenizer):
    """Each substring of the answer is tried as a stop string: across tokens, within one, at the start."""
    (free,) = engine.run([Request(prompt=prompt_of(8), max_new_tokens=14, eos_token_id=())])
    for start in range(0, len(free.text) - cut, 3):
        stop = free.text[start : start + cut]
        if "\ufffd" in stop:
            continue
        request = Request(prompt=prompt_of(8), max_new_tokens=14, eos_token_id=(), stop=["no such text", stop])
        pieces = list(engine.stream(request))
        text = "".join(piece.text for piece in pieces)
        assert text == free.text[: free.text.index(stop)]
        assert pieces[-1].finish_reason == "stop"
        assert all(piece.finish_reason is None for piece in pieces[:-1])
        tokens = [token.id for piece in pieces for token in piece.tokens]
        assert tokens == ids(free)[: len(tokens)]
        assert tiny_tokenizer.decode(tokens).startswith(text)
        if text and text[-1] != "\ufffd":  # half a character is also shown like this
            assert not tiny_tokenizer.decode(tokens[:-1]).startswith(text)


@pytest.mark.parametrize("stop", [["three", "two"], ["two", "three"], ["two three", "three", "two"]])
def test_of_several_stop_strings_the_first_in_the_text_counts(stop):
    spelling = Detokenizer([b"one ", b"two three four"], stop)
    assert [spelling.push(Token(id))[0] for id in (0, 1)] == ["one ", ""]
    assert spelling.stopped
    held = Detokenizer([b"one t", b"hree two"], stop)  # "t" may begin either stop string
    assert "".join(held.push(Token(id))[0] for id in (0, 1)) == ("one " if "three" in stop else "one three ")


def test_what_only_looks_like_a_stop_string_is_held_back_and_then_given(engine):
    request = Request(prompt=prompt_of(8), max_new_tokens=14, eos_token_id=())
    (free,) = engine.run([request])
    plain = [piece.text for piece in engine.stream(request)]
    stop = plain[3] + "\u2603"  # the fourth token may be its start, until the fifth is there
    pieces = list(engine.stream(Request(prompt=prompt_of(8), max_new_tokens=14, eos_token_id=(), stop=[stop])))
    assert "".join(piece.text for piece in pieces) == free.text
    assert [token for piece in pieces for token in piece.tokens] == free.tokens
    assert len("".join(piece.text for piece in pieces[:4])) < len("".join(plain[:4]))
    ending = Request(prompt=prompt_of(8), max_new_tokens=14, eos_token_id=(), stop=[free.text[-1] + "\u2603"])
    assert "".join(piece.text for piece in engine.stream(ending)) == free.text


def test_pieces_never_hold_half_a_character(tiny_tokenizer):
    """Chinese and an emoji, one byte per token; one character may be the beginning of a stop string."""
    table = token_bytes(tiny_tokenizer)
    text = "你好，世界🙂世"
    spelling = Detokenizer(table, ["世界！"])
    given = [spelling.push(Token(table.index(bytes([byte]))))[0] for byte in text.encode()]
    assert [piece for piece in given if piece] == ["你", "好", "，", "世界🙂"]
    assert spelling.flush()[0] == "世"
    assert not spelling.stopped
    broken, half, special = Detokenizer(table, []), Token(table.index(b"\xe4")), Token(0)
    assert broken.push(special) == broken.push(half) == ("", ())
    assert broken.flush() == ("\ufffd", (special, half))


def test_cancelling_frees_the_slot_for_the_very_next_step(engine):
    answers = [engine.submit(Request(prompt=prompt_of(5, seed), eos_token_id=())) for seed in range(5)]
    engine.step()
    assert (engine.running, engine.waiting) == (3, 2)
    engine.cancel(answers[1])
    engine.cancel(answers[4])
    news = dict(engine.step())
    assert news[answers[1]].finish_reason == news[answers[4]].finish_reason == "cancelled"
    assert answers[3].count == 1
    assert (engine.running, engine.waiting) == (3, 0)
    for answer in answers:
        engine.cancel(answer)
    engine.step()
    assert (engine.running, engine.waiting) == (0, 0)
    assert engine.step() == []


def test_the_first_reason_to_end_an_answer_counts(engine):
    answer = engine.submit(Request(prompt=prompt_of(5), eos_token_id=()))
    engine.cancel(answer, "timeout")
    engine.cancel(answer)
    assert [piece.finish_reason for _, piece in engine.step()] == ["timeout"]


def test_leaving_a_stream_early_frees_its_slot(engine):
    stream = engine.stream(Request(prompt=prompt_of(5), eos_token_id=()))
    next(stream)
    assert engine.running == 1
    stream.close()
    engine.step()
    assert engine.running == 0


@pytest.mark.parametrize(("name", "grows"), [("frequency_penalty", True), ("presence_penalty", False)])
def test_a_frequency_penalty_grows_with_each_time_a_token_is_written(engine, monkeypatch, name, grows):
    row = torch.zeros(1, engine.decoder.config.vocab_size)
    row[0, 2:5] = torch.tensor([10.0, 9.0, 8.0])
    monkeypatch.setattr(engine.decoder, "logits", lambda hidden: row.repeat(len(hidden), 1))
    settings = {"temperature": 0, "max_new_tokens": 12, "eos_token_id": (), name: 0.3}
    (answer,) = engine.run([Request(prompt=prompt_of(5), **settings)])
    scores, expected = [10.0, 9.0, 8.0], []
    for _ in range(12):
        best = scores.index(max(scores))
        if grows or best + 2 not in expected:
            scores[best] -= 0.3
        expected.append(best + 2)
    assert ids(answer) == expected


def test_what_has_no_seed_is_another_each_time(engine):
    asked = [Request(prompt=prompt_of(5), max_new_tokens=20, temperature=2.0, eos_token_id=()) for _ in range(3)]
    assert len({tuple(ids(answer)) for answer in engine.run(asked)}) == 3


def test_a_deadline_ends_what_is_written_and_what_waits(engine, monkeypatch):
    now = 100.0
    monkeypatch.setattr("model.inference.scheduler.time.monotonic", lambda: now)
    answers = [engine.submit(Request(prompt=prompt_of(5), eos_token_id=(), timeout=5.0)) for _ in range(4)]
    for _ in range(3):
        engine.step()
    now = 105.0
    engine.step()
    assert [answer.finish_reason for answer in answers] == ["timeout"] * 4
    assert [answer.count for answer in answers] == [3, 3, 3, 0]
    assert engine.running == engine.waiting == 0
    none_left = engine.submit(Request(prompt=prompt_of(5), eos_token_id=(), timeout=0.0))
    engine.step()
    assert (none_left.finish_reason, none_left.count) == ("timeout", 0)


# ------------------------------------------------------------------------------------------------ log-probabilities


def test_log_probabilities_are_the_models_own(engine, models):
    prompt = prompt_of(40)
    request = Request(
        prompt=prompt, max_new_tokens=6, temperature=0.8, seed=1, logprobs=3, prompt_logprobs=True, eos_token_id=()
    )
    company = [
        Request(prompt=prompt_of(9, seed), max_new_tokens=8, logprobs=seed, eos_token_id=()) for seed in range(3)
    ]
    *others, answer = engine.run([*company, request])
    with torch.no_grad():
        right = models["dense"](torch.tensor([prompt + ids(answer)])).logits[0].log_softmax(-1)
    tokens = answer.prompt_tokens + answer.tokens
    assert [token.id for token in tokens] == prompt + ids(answer)
    assert tokens[0] == (prompt[0], None, ())
    for token, row in zip(tokens[1:], right[:-1], strict=True):
        assert token.logprob == pytest.approx(row[token.id].item(), abs=1e-4)
        best = row.topk(3)
        assert [id for id, _ in token.top] == best.indices.tolist()
        assert [value for _, value in token.top] == pytest.approx(best.values.tolist(), abs=1e-4)
    for seed, other in enumerate(others):
        assert all(len(token.top) == seed and token.logprob < 0 for token in other.tokens)
        assert other.prompt_tokens == []


PENALTIES = {"repetition_penalty": 1.7, "frequency_penalty": 2.0, "presence_penalty": 1.5}


@pytest.mark.parametrize("company", [0, 2])
def test_log_probabilities_are_taken_before_penalties_and_temperature(company, engine, models):
    shaped = {"temperature": 1.5, "top_k": 20, "top_p": 0.9, "seed": 2, "logprobs": 4, "eos_token_id": ()}
    request = Request(prompt=prompt_of(9), max_new_tokens=12, **shaped, **PENALTIES)
    others = [Request(prompt=prompt_of(9, seed), max_new_tokens=12, eos_token_id=()) for seed in range(1, company + 1)]
    answer = engine.run([request, *others])[0]
    with torch.no_grad():
        right = models["dense"](torch.tensor([[*request.prompt, *ids(answer)]])).logits[0, 8:].log_softmax(-1)
    for token, row in zip(answer.tokens, right[:-1], strict=True):
        assert token.logprob == pytest.approx(row[token.id].item(), abs=1e-4)
        assert [value for _, value in token.top] == pytest.approx(row.topk(4).values.tolist(), abs=1e-4)


def test_a_prompt_can_be_scored_without_writing(engine, models):
    prompts = [prompt_of(160), prompt_of(30), prompt_of(1)]
    answers = engine.run(
        [Request(prompt=prompt, max_new_tokens=0, logprobs=0, prompt_logprobs=True) for prompt in prompts]
    )
    for prompt, answer in zip(prompts, answers, strict=True):
        assert (answer.count, answer.text, answer.tokens, answer.finish_reason) == (0, "", [], "length")
        with torch.no_grad():
            right = models["dense"](torch.tensor([prompt])).logits[0].log_softmax(-1)
        values = [token.logprob for token in answer.prompt_tokens]
        assert values[1:] == pytest.approx([right[i, id].item() for i, id in enumerate(prompt[1:])], abs=1e-4)


def test_frequency_and_presence_penalties_by_hand(engine, models):
    settings = {"max_new_tokens": 12, "frequency_penalty": 0.7, "presence_penalty": 0.9, "eos_token_id": ()}
    (answer,) = engine.run([Request(prompt=prompt_of(5), **settings)])
    written: list[int] = []
    for _ in range(12):
        with torch.no_grad():
            logits = models["dense"](torch.tensor([prompt_of(5) + written])).logits[0, -1]
        for token in set(written):
            logits[token] -= 0.7 * written.count(token) + 0.9
        written.append(int(logits.argmax()))
    assert ids(answer) == written
    assert written != alone(models["dense"], Request(prompt=prompt_of(5), max_new_tokens=12, eos_token_id=()))


# -------------------------------------------------------------------------------------------------- refused requests


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"prompt": []}, "the prompt is empty"),
        ({"prompt": [3, 600]}, "outside 0 to 588"),
        ({"prompt": [3, -1]}, "outside 0 to 588"),
        ({"prompt": [3] * 160}, "the prompt has 160 tokens, but prompt and answer together may have 160"),
        ({"max_new_tokens": -1}, "max_new_tokens cannot be -1"),
        ({"temperature": -0.1}, "temperature cannot be -0.1"),
        ({"temperature": float("nan")}, "temperature cannot be nan"),
        ({"temperature": float("inf")}, "temperature cannot be inf"),
        ({"top_k": -1}, "top_k cannot be -1"),
        ({"top_p": 0.0}, "top_p cannot be 0.0"),
        ({"top_p": 1.1}, "top_p cannot be 1.1"),
        ({"repetition_penalty": 0.0}, "repetition_penalty cannot be 0.0"),
        ({"frequency_penalty": float("inf")}, "frequency_penalty cannot be inf"),
        ({"presence_penalty": float("nan")}, "presence_penalty cannot be nan"),
        ({"stop": ["a", ""]}, "stop cannot be"),
        ({"stop": "abc"}, "stop cannot be"),
        ({"logprobs": -1}, "logprobs cannot be -1"),
        ({"prompt_logprobs": True}, "prompt_logprobs cannot be True"),
        ({"timeout": -1.0}, "timeout cannot be -1.0"),
        ({"embeddings": torch.zeros(2, 32)}, "embeddings cannot be"),
    ],
)
def test_what_cannot_be_done_is_refused_at_once(settings, said, engine):
    request = Request(**{"prompt": [3, 4, 5]} | settings)
    for refusing in (engine.submit, engine.stream, lambda request: engine.run([request])):
        with pytest.raises(ValueError, match=said):
            refusing(request)
    assert engine.waiting == 0


def test_of_several_requests_none_is_queued_where_one_is_refused(engine):
    with pytest.raises(ValueError, match="the prompt is empty"):
        engine.run([Request(prompt=[3, 4]), Request(prompt=[])])
    assert engine.waiting == 0


def test_an_engine_needs_a_slot_and_a_budget(models, tiny_tokenizer):
    for settings in ({"slots": 0}, {"token_budget": 0}):
        with pytest.raises(ValueError, match="must be at least 1"):
            Engine(models["dense"], tiny_tokenizer, **settings)


@pytest.mark.parametrize(
    "settings",
    [
        {"temperature": 1e-300},
        {"temperature": 1e30},
        {"temperature": 1.0, "top_p": 1e-9},
        {"temperature": 1.0, "top_k": 10**9, "seed": -(10**30)},
        {"repetition_penalty": 1e-30},
        {"frequency_penalty": 1e30, "presence_penalty": -1e30},
    ],
)
def test_extreme_settings_still_write_tokens(settings, engine):
    (answer,) = engine.run([Request(prompt=prompt_of(5), max_new_tokens=5, eos_token_id=(), **settings)])
    assert answer.count == 5


# ------------------------------------------------------------------------------------------------------ in a thread


def collect(pieces: queue.SimpleQueue, thread: EngineThread) -> list[Piece]:
    """All pieces of an answer; fails as soon as the engine's thread has ended."""
    got: list[Piece] = []
    deadline = time.monotonic() + PATIENCE
    while not got or got[-1].finish_reason is None:
        writes = thread._thread.is_alive()  # before it checks, so that it misses nothing
        try:
            got.append(pieces.get(timeout=0.1))
        except queue.Empty:
            assert writes, "the engine's thread has died"
            assert time.monotonic() < deadline
    return got


@pytest.fixture
def thread(engine):
    thread = EngineThread(engine)
    yield thread
    thread.close()


def test_many_threads_may_ask_one_engine(thread, models):
    requests = [Request(prompt=prompt_of(n), max_new_tokens=15, eos_token_id=()) for n in range(4, 12)]
    results: dict[int, list[Piece]] = {}

    def client(number: int) -> None:
        pieces: queue.SimpleQueue[Piece] = queue.SimpleQueue()
        thread.submit(requests[number], pieces.put)
        results[number] = collect(pieces, thread)

    clients = [threading.Thread(target=client, args=(number,)) for number in range(8)]
    for each in clients:
        each.start()
    for each in clients:
        each.join()
    for number, request in enumerate(requests):
        assert [token.id for piece in results[number] for token in piece.tokens] == alone(models["dense"], request)


class Reader:
    """Takes the pieces of an answer, and blocks the engine's thread at the first one until `go` is set."""

    def __init__(self):
        self.pieces: queue.SimpleQueue[Piece] = queue.SimpleQueue()
        self.go = threading.Event()

    def __call__(self, piece: Piece) -> None:
        self.pieces.put(piece)
        self.go.wait(PATIENCE)


def test_a_thread_hears_of_a_cancel_while_it_writes(thread, engine):
    reader = Reader()
    answer = thread.submit(Request(prompt=prompt_of(4), eos_token_id=()), reader)
    reader.pieces.get(timeout=PATIENCE)
    thread.cancel(answer)
    reader.go.set()
    assert collect(reader.pieces, thread)[-1].finish_reason == "cancelled"
    assert answer.count == 1
    assert engine.running == 0


def test_a_step_that_fails_ends_its_answers_and_not_the_thread(thread, engine, monkeypatch, models):
    read, failing = engine.decoder.read, threading.Event()

    def sometimes(spans):
        if failing.is_set():
            failing.clear()
            raise RuntimeError("no memory")
        return read(spans)

    monkeypatch.setattr(engine.decoder, "read", sometimes)
    request = Request(prompt=prompt_of(4), max_new_tokens=150, eos_token_id=())
    readers = [Reader() for _ in range(4)]
    for reader in readers:
        thread.submit(request, reader)
    readers[0].pieces.get(timeout=PATIENCE)
    failing.set()
    for reader in readers:
        reader.go.set()
    assert [collect(reader.pieces, thread)[-1].finish_reason for reader in readers] == ["error"] * 4
    again: queue.SimpleQueue[Piece] = queue.SimpleQueue()
    answer = thread.submit(Request(prompt=prompt_of(4), max_new_tokens=9, eos_token_id=()), again.put)
    collect(again, thread)
    assert ids(answer) == alone(models["dense"], answer.request)
    assert answer.reused == 0


def test_a_reader_that_fails_is_left_and_the_others_go_on(thread, engine):
    def broken(piece: Piece) -> None:
        raise RuntimeError("gone")

    pieces: queue.SimpleQueue[Piece] = queue.SimpleQueue()
    left = thread.submit(Request(prompt=prompt_of(4), eos_token_id=()), broken)
    thread.submit(Request(prompt=prompt_of(5), max_new_tokens=20, eos_token_id=()), pieces.put)
    assert collect(pieces, thread)[-1].finish_reason == "length"
    assert left.finish_reason == "cancelled"


def test_closing_ends_what_runs(models, tiny_tokenizer):
    thread = EngineThread(Engine(models["dense"], tiny_tokenizer, slots=2))
    streams = [queue.SimpleQueue() for _ in range(3)]
    for pieces in streams:
        thread.submit(Request(prompt=prompt_of(4), eos_token_id=()), pieces.put)
    thread.close()
    assert [collect(pieces, thread)[-1].finish_reason for pieces in streams] == ["cancelled"] * 3
