"""model/inference/ when something fails, ends or changes between two steps: no caller waits for ever."""

import queue
import threading

import pytest
import torch

from model.inference.request import Piece, Request
from model.inference.scheduler import Engine
from model.inference.thread import EngineThread
from model.model_lora import apply_lora, lora_state_dict
from tests.model.networks import network
from tests.model.test_engine import Reader, alone, collect, ids, prompt_of
from tests.running import PATIENCE


@pytest.fixture(scope="module")
def model(tiny_tokenizer):
    return network(vocab_size=len(tiny_tokenizer), max_seq_len=160)


@pytest.fixture
def engine(model, tiny_tokenizer) -> Engine:
    return Engine(model, tiny_tokenizer, slots=3, token_budget=24)


@pytest.fixture
def thread(engine):
    thread = EngineThread(engine)
    yield thread
    assert closes(thread)


def closes(thread: EngineThread) -> bool:
    """Whether `close` returns within a time limit."""
    closing = threading.Thread(target=thread.close, daemon=True)
    closing.start()
    closing.join(PATIENCE)
    return not closing.is_alive()


def request_of(seed: int, **settings) -> Request:
    return Request(**{"prompt": prompt_of(5, seed), "max_new_tokens": 150, "eos_token_id": ()} | settings)


class Failing:
    """Replaces a method: once set, its next call raises; after that it works again."""

    def __init__(self, method, error: type[BaseException] = RuntimeError):
        self.method, self.error = method, error
        self.set = False

    def __call__(self, *args):
        if self.set:
            self.set = False
            raise self.error("no memory")
        return self.method(*args)


@pytest.fixture
def failing(engine, monkeypatch) -> Failing:
    failing = Failing(engine.decoder.read)
    monkeypatch.setattr(engine.decoder, "read", failing)
    return failing


# -------------------------------------------------------------------------------------------------- failing steps


def test_what_a_failing_step_had_ended_already_is_heard_of(engine, failing):
    answers = [engine.submit(request_of(seed)) for seed in range(5)]  # three run, two are queued
    engine.step()
    engine.cancel(answers[0])
    engine.cancel(answers[4])
    failing.set = True
    with pytest.raises(RuntimeError, match="no memory"):
        engine.step()
    ends = {answer.number: piece.finish_reason for answer, piece in engine.step()}
    assert ends == {0: "cancelled", 1: "error", 2: "error", 3: "error", 4: "cancelled"}
    assert ends == {answer.number: answer.finish_reason for answer in answers}
    assert engine.step() == []


def test_what_a_failing_step_had_written_already_is_heard_of(engine, model, monkeypatch):
    """Recording the second answer's token fails after the first answer's last token has been recorded."""
    first, second = engine.submit(request_of(1, max_new_tokens=2)), engine.submit(request_of(2))
    engine.step()
    monkeypatch.setattr(second, "write", Failing(second.write))
    second.write.set = True
    with pytest.raises(RuntimeError, match="no memory"):
        engine.step()
    news = engine.step()
    assert [(answer, piece.finish_reason) for answer, piece in news] == [(first, "length"), (second, "error")]
    assert ids(first) == alone(model, first.request)
    assert [token for _, piece in news[:1] for token in piece.tokens] == first.tokens[-1:]


def test_an_engine_goes_on_after_a_step_that_failed(engine, model, failing):
    (before,) = engine.run([request_of(1, max_new_tokens=9)])
    failing.set = True
    with pytest.raises(RuntimeError, match="no memory"):
        engine.run([request_of(seed) for seed in range(5)])
    assert engine.running == engine.waiting == 0
    (after,) = engine.run([before.request])
    assert ids(after) == ids(before) == alone(model, before.request)
    assert after.reused == 0, "what the slots hold after a failure is not to be trusted"


def test_a_cancelled_answer_hears_its_end_though_the_step_fails(thread, failing):
    readers = [Reader() for _ in range(3)]
    answers = [thread.submit(request_of(seed), reader) for seed, reader in enumerate(readers)]
    readers[0].pieces.get(timeout=PATIENCE)  # the thread is blocked in the first step
    thread.cancel(answers[0])
    thread.cancel(answers[2])
    failing.set = True
    for reader in readers:
        reader.go.set()
    assert [collect(reader.pieces, thread)[-1].finish_reason for reader in readers] == [
        "cancelled",
        "error",
        "cancelled",
    ]


@pytest.mark.parametrize("broken", [False, True])
def test_a_thread_knows_whether_its_device_is_broken(broken, thread, engine, failing, monkeypatch):
    monkeypatch.setattr(engine, "computes", lambda: not broken)
    pieces: queue.SimpleQueue[Piece] = queue.SimpleQueue()
    failing.set = True
    thread.submit(request_of(1), pieces.put)
    collect(pieces, thread)
    assert thread.broken == broken


def test_an_idle_thread_stands_still(thread, engine, failing, monkeypatch):
    """Also after a failure: it neither steps nor polls."""
    steps = []
    step = engine.step
    monkeypatch.setattr(engine, "step", lambda: steps.append(1) or step())
    pieces: queue.SimpleQueue[Piece] = queue.SimpleQueue()
    failing.set = True
    answer = thread.submit(request_of(1), pieces.put)
    assert collect(pieces, thread)[-1].finish_reason == "error"
    taken = len(steps)
    thread.cancel(answer)  # an answer that has ended, twice
    thread.cancel(answer)
    thread.submit(request_of(2, max_new_tokens=3), pieces.put)
    assert collect(pieces, thread)[-1].finish_reason == "length"
    assert len(steps) == taken + 3


@pytest.mark.parametrize("error", [RuntimeError, SystemExit, KeyboardInterrupt])
def test_a_reader_that_fails_in_any_way_is_left_alone(thread, error):
    def broken(piece: Piece) -> None:
        raise error("gone")

    left = thread.submit(request_of(1), broken)
    pieces: queue.SimpleQueue[Piece] = queue.SimpleQueue()
    thread.submit(request_of(2, max_new_tokens=20), pieces.put)
    assert collect(pieces, thread)[-1].finish_reason == "length"
    assert left.finish_reason == "cancelled"


@pytest.mark.parametrize("settings", [{"stop": [1]}, {"top_k": 2.5}, {"max_new_tokens": 2.5}, {"logprobs": 1.5}])
def test_a_setting_that_would_fail_in_a_step_fails_before_it_joins_the_others(engine, settings):
    name = next(iter(settings))
    with pytest.raises(ValueError, match=f"{name} cannot be"):
        engine.submit(request_of(1, **settings))


# --------------------------------------------------------------------------------------------------------- closing


def test_what_comes_too_late_ends_at_once(thread):
    thread.close()
    pieces: queue.SimpleQueue[Piece] = queue.SimpleQueue()
    answer = thread.submit(request_of(1), pieces.put)
    assert collect(pieces, thread) == [Piece(finish_reason="cancelled")]
    thread.cancel(answer)
    thread.close()


def test_what_is_asked_while_the_thread_closes_ends_too(thread):
    reader = Reader()
    thread.submit(request_of(1), reader)
    reader.pieces.get(timeout=PATIENCE)  # the thread is blocked in its first step
    closing = threading.Thread(target=thread.close)
    closing.start()
    while not thread._calls.qsize():  # until it has requested the lock
        pass
    late = Reader()
    late.go.set()
    thread.submit(request_of(2), late)
    reader.go.set()
    assert collect(late.pieces, thread) == [Piece(finish_reason="cancelled")]
    assert collect(reader.pieces, thread)[-1].finish_reason == "cancelled"
    closing.join(PATIENCE)
    assert not closing.is_alive()


def test_the_engine_is_its_threads_alone_until_that_has_ended(thread, monkeypatch):
    """Also while it takes its last step: what is called meanwhile waits for it."""
    stepping, go, ran, step = threading.Event(), threading.Event(), [], thread._step

    def slowly() -> None:
        stepping.set()
        assert go.wait(PATIENCE)
        step()

    monkeypatch.setattr(thread, "_step", slowly)
    closing = threading.Thread(target=thread.close)
    closing.start()
    assert stepping.wait(PATIENCE)
    try:
        thread._call(lambda: ran.append(threading.current_thread()))
        assert ran == []
    finally:
        go.set()
        closing.join(PATIENCE)
    assert ran == [thread._thread]


def test_a_thread_may_be_closed_from_within(thread):
    """By a reader, or by the finalizer of the thread's owner, wherever garbage is collected."""
    ended = threading.Event()

    def closing(piece: Piece) -> None:
        thread.close()
        if piece.finish_reason:
            ended.set()

    answer = thread.submit(request_of(1), closing)
    assert ended.wait(PATIENCE)
    assert answer.finish_reason == "cancelled"
    thread._thread.join(PATIENCE)
    assert not thread._thread.is_alive()


def test_closing_returns_though_the_last_step_fails(thread, failing):
    reader = Reader()
    thread.submit(request_of(1), reader)
    thread.submit(request_of(2), reader)
    reader.pieces.get(timeout=PATIENCE)
    closing = threading.Thread(target=thread.close)
    closing.start()
    failing.set = True
    reader.go.set()
    closing.join(PATIENCE)
    assert not closing.is_alive()
    assert {collect(reader.pieces, thread)[-1].finish_reason for _ in range(2)} <= {"cancelled", "error"}


# ----------------------------------------------------------------------------------------------------- new weights


def changed(model, tiny_tokenizer, kind: str):
    """The same model with other weights, and with an adapter if `kind` says so."""
    other = network(seed=1, vocab_size=len(tiny_tokenizer), max_seq_len=160)
    if kind == "lora":
        apply_lora(other, rank=4)
        for value in lora_state_dict(other).values():
            value.normal_(std=0.3, generator=torch.Generator().manual_seed(value.numel()))
    return other


@pytest.mark.parametrize("kind", ["plain", "lora"])
def test_after_a_refresh_an_engine_is_a_fresh_one(kind, engine, model, tiny_tokenizer):
    other = changed(model, tiny_tokenizer, kind)
    requests = [request_of(seed, prompt=prompt_of(40, seed), max_new_tokens=20, logprobs=2) for seed in range(3)]
    old = engine.run(requests)
    engine.refresh(other)
    new, fresh = engine.run(requests), Engine(other, tiny_tokenizer, slots=3, token_budget=24).run(requests)
    assert [answer.tokens for answer in new] == [answer.tokens for answer in fresh], "log-probabilities included"
    assert [answer.reused for answer in new] == [0, 0, 0]
    assert all(ids(a) != ids(b) for a, b in zip(old, new, strict=True))


def test_what_is_being_written_goes_on_with_the_new_weights(engine, model, tiny_tokenizer):
    """With half its prompt prefilled, or some tokens decoded: each continues as in a fresh engine."""
    other = changed(model, tiny_tokenizer, "plain")
    written = engine.submit(request_of(1, max_new_tokens=20))
    for _ in range(6):
        engine.step()
    read = engine.submit(request_of(2, prompt=prompt_of(60, 2), max_new_tokens=9, logprobs=0, prompt_logprobs=True))
    engine.step()
    assert 0 < len(read.slot.holds) < 60
    engine.refresh(other)
    before = ids(written)
    while written.finish_reason is None or read.finish_reason is None:
        engine.step()
    going_on = Request(prompt=[*written.request.prompt, *before], max_new_tokens=20 - len(before), eos_token_id=())
    assert ids(written) == before + alone(other, going_on)
    assert ids(read) == alone(other, read.request)
    assert [token.id for token in read.prompt_tokens] == read.request.prompt
    assert all(token.logprob is not None for token in read.prompt_tokens[1:])


@pytest.mark.parametrize("error", [ValueError, SystemExit])
def test_a_refresh_that_fails_in_any_way_fails_for_the_caller_alone(thread, engine, model, error, monkeypatch):
    monkeypatch.setattr(engine, "refresh", Failing(engine.refresh, error))
    engine.refresh.set, heard = True, []

    def refresh() -> None:
        try:
            thread.refresh(model)
        except BaseException as failure:
            heard.append(type(failure))

    caller = threading.Thread(target=refresh, daemon=True)
    caller.start()
    while caller.is_alive():
        assert thread._thread.is_alive(), "the caller waits for ever"
        caller.join(0.05)
    assert heard == [error]
    pieces: queue.SimpleQueue[Piece] = queue.SimpleQueue()
    thread.submit(request_of(2, max_new_tokens=3), pieces.put)
    assert collect(pieces, thread)[-1].finish_reason == "length"


def test_a_thread_takes_new_weights_between_two_steps(thread, model, tiny_tokenizer):
    other = changed(model, tiny_tokenizer, "plain")
    reader = Reader()
    answer = thread.submit(request_of(1, max_new_tokens=12), reader)
    reader.pieces.get(timeout=PATIENCE)
    reader.go.set()
    thread.refresh(other)
    written = ids(answer)
    collect(reader.pieces, thread)
    pieces: queue.SimpleQueue[Piece] = queue.SimpleQueue()
    again = thread.submit(request_of(1, max_new_tokens=12), pieces.put)
    collect(pieces, thread)
    assert ids(again) == alone(other, again.request)
    assert written[:1] == alone(model, again.request)[:1]
    with pytest.raises(ValueError, match="n_layers"):
        thread.refresh(network(vocab_size=len(tiny_tokenizer), max_seq_len=160, n_layers=3))
    pieces = queue.SimpleQueue()
    unharmed = thread.submit(again.request, pieces.put)
    collect(pieces, thread)
    assert ids(unharmed) == ids(again)
