"""Generating an answer for a page, tested without the page."""

import gc
import itertools
import os
import threading
import time
from pathlib import Path

import openai
import pytest

from model.images import prepare_chat
from scripts.serving import page_models as web_answer
from scripts.serving.client import answer_parts
from scripts.serving.page_models import Answer, RemoteModel, adapters_for, connect, load_local, weights_in
from tests.running import PATIENCE
from tests.scripts.openai_double import http_server, openai_double
from tests.scripts.vlm_weights import picture, save_vlm
from trainer.errors import UserError


def wait(answer: Answer) -> Answer:
    end = time.monotonic() + PATIENCE
    while not answer.ended:
        assert time.monotonic() < end
        answer.watch(0.01)
    return answer


def test_thinking_text_and_history_are_told_apart():
    parts = [("token", "<think>a"), ("thinking", "a"), ("token", "</think>b"), ("raw", "c"), ("answer", "bc")]
    answer = wait(Answer(iter_closing(parts)))
    assert (answer.thinking, answer.text, answer.raw) == ("a", "bc", "<think>a</think>bc")
    assert (answer.tokens, answer.error, answer.stopped) == (2, None, False)


def test_a_stop_keeps_what_is_there_and_closes_the_source():
    closed = []

    def endless():
        try:
            while True:
                yield "answer", "x"
                time.sleep(0.005)
        finally:
            closed.append(True)

    answer = Answer(endless())
    while not answer.text:
        answer.watch(0.01)
    answer.stop()
    kept = answer.text
    assert answer.ended
    assert answer.stopped
    end = time.monotonic() + PATIENCE
    while not closed:
        assert time.monotonic() < end
        time.sleep(0.01)
    assert answer.text == kept or answer.text == kept + "x"  # one piece may have been on its way


def test_an_answer_nobody_watches_ends(monkeypatch):
    monkeypatch.setattr(web_answer, "UNWATCHED", 0.05)

    def endless():
        while True:
            yield "answer", "x"
            time.sleep(0.01)

    answer = Answer(endless())
    end = time.monotonic() + PATIENCE
    while not answer.ended:
        assert time.monotonic() < end
        time.sleep(0.01)
    assert answer.stopped


def test_a_process_that_ends_waits_for_no_answer():
    def told():
        yield "answer", f"daemon: {threading.current_thread().daemon}"

    assert wait(Answer(told())).text == "daemon: True"


def test_an_error_is_kept_with_what_came_before():
    def broken():
        yield "answer", "half"
        raise ValueError("the rest is lost")

    answer = wait(Answer(broken()))
    assert (answer.text, answer.error) == ("half", "the rest is lost")


def iter_closing(parts):
    yield from parts


def test_only_weights_to_chat_with_are_offered_chat_stages_first(tmp_path):
    for name in (
        *("pretrain_512.pth", "full_sft_512.pth", "demo/full_sft_256.pth", "reason_512.pth", "mine.pth"),
        *("lora/me_512.pth", "full_sft_512.resume/step_1/model.pth", "sft_vlm_512.pth", "full_sft_512.json"),
        *("lora/me_640_moe.pth", "lora/big_640.pth"),
    ):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    names = [str(path.relative_to(tmp_path)) for path in weights_in(tmp_path, vision=False)]
    assert set(names[:1]) == {"mine.pth"}
    assert set(names[1:3]) == {"full_sft_512.pth", "demo/full_sft_256.pth"}
    assert names[3:] == ["reason_512.pth", "pretrain_512.pth"]
    assert [path.name for path in weights_in(tmp_path, vision=True)] == ["sft_vlm_512.pth"]
    assert [path.name for path in adapters_for(tmp_path / "full_sft_512.pth")] == ["me_512.pth"]
    assert [path.name for path in adapters_for(tmp_path / "rlhf_640_moe.pth")] == ["me_640_moe.pth"]
    assert weights_in(tmp_path / "nothing", vision=False) == []


def test_of_one_kind_the_newest_weights_are_offered_first(tmp_path):
    for age, name in enumerate(("full_sft_1.pth", "full_sft_3.pth", "full_sft_2.pth", "pretrain_1.pth", "rlhf_1.pth")):
        (tmp_path / name).touch()
        os.utime(tmp_path / name, (1000 - age, 1000 - age))
    names = [path.name for path in weights_in(tmp_path, vision=False)]
    assert names == ["full_sft_1.pth", "full_sft_3.pth", "full_sft_2.pth", "rlhf_1.pth", "pretrain_1.pth"]


def test_a_pretrained_model_continues_the_text_itself(tiny_out, tokenizer_dir, tiny_tokenizer):
    import torch

    from model.chat import render_text

    backend = load_local(tiny_out / "pretrain_32.pth", None, str(tokenizer_dir), "cpu", None)
    wishes = {"max_new_tokens": 12, "temperature": 0.0}
    written = "".join(
        text for part, text in backend.parts([], [{"content": "The little"}], wishes) if part in ("token", "raw")
    )
    ids = torch.tensor([render_text(tiny_tokenizer, ["The little"])[0][:-1]])
    right = backend.model.generate(ids, max_new_tokens=12)[0, ids.size(1) :]
    assert written == tiny_tokenizer.decode(right, skip_special_tokens=True)


def test_several_pages_ask_at_once_and_a_model_nobody_holds_ends_its_thread(tiny_out, tokenizer_dir):
    backend = load_local(tiny_out / "pretrain_32.pth", None, str(tokenizer_dir), "cpu", None)
    wishes = {"max_new_tokens": 12, "temperature": 0.0}
    asked = [backend.parts([], [{"content": text}], wishes) for text in ("The little", "你好", "A teacher")]
    together = [[] for _ in asked]
    for parts in itertools.zip_longest(*asked):
        for number, part in enumerate(parts):
            together[number].append(part)
    for text, got in zip(("The little", "你好", "A teacher"), together, strict=True):
        alone = [*backend.parts([], [{"content": text}], wishes)]
        assert [part for part in got if part] == alone
    thread = backend._thread._thread
    del backend, asked
    gc.collect()
    thread.join(PATIENCE)
    assert not thread.is_alive()


def test_an_address_says_which_models_it_has_or_what_is_wrong():
    with openai_double() as double:
        assert connect(double.address, "")[1] == ["double"]
    with pytest.raises(UserError, match="nothing answers at"):
        connect(double.address, "")
    for address, key in (("http://[::1", ""), ("127.0.0.1:8998", ""), ("ftp://a/v1", ""), ("http://a:99999", "")):
        with pytest.raises(UserError, match="not an API base URL"):
            connect(address, key)
    with pytest.raises(UserError, match="ASCII"):
        connect("http://127.0.0.1:9/v1", "ключ")


def test_a_web_site_is_no_api():
    with http_server(b"<html>Welcome</html>", "text/html") as address:
        with pytest.raises(UserError, match="does it end in /v1"):
            connect(address, "")
        client = openai.OpenAI(base_url=address, api_key="none")
        for stream in (False, True):
            with pytest.raises(UserError, match="does its address end in /v1"):
                list(answer_parts(client, "m", [{"role": "user", "content": "hi"}], stream))


def test_weights_that_are_gone_are_named():
    with pytest.raises(UserError, match="is missing"):
        load_local(Path("nothing_512.pth"), None, None, "cpu", None)


def test_a_model_that_sees_is_shown_the_pictures_of_the_talk(clip_dir, tokenizer_dir, tiny_tokenizer, tmp_path):
    save_vlm(tiny_tokenizer, clip_dir, tmp_path / "sft_vlm_32.pth")
    backend = load_local(tmp_path / "sft_vlm_32.pth", None, str(tokenizer_dir), "cpu", str(clip_dir))
    turns = [
        {"role": "user", "content": [picture("red"), "What colour?"]},
        {"role": "assistant", "content": "Red."},
        {"role": "user", "content": [picture("blue"), picture("green"), "And these?"]},
    ]
    wishes = {"max_new_tokens": 12, "temperature": 0.0}
    written = "".join(text for part, text in backend.parts([], turns, wishes) if part in ("token", "raw"))
    prompt = prepare_chat(tiny_tokenizer, turns, backend.model.config, backend.processor)
    assert prompt.images["pixel_values"].size(0) == 3
    right = backend.model.generate(prompt.input_ids, max_new_tokens=12, **prompt.images)[0, prompt.input_ids.size(1) :]
    assert written == tiny_tokenizer.decode(right, skip_special_tokens=True)
    with pytest.raises(ValueError, match="not an image"):
        list(backend.parts([], [{"role": "user", "content": [b"GIF89a?", "What?"]}], wishes))


def test_a_server_gets_pictures_as_data_addresses():
    with openai_double() as double:
        backend = RemoteModel(connect(double.address, "")[0], "double")
        double.reply = lambda body: ["seen"]
        parts = backend.parts([], [{"role": "user", "content": [b"\x89PNG", "What?"]}], {"temperature": 0.0})
        assert list(parts) == [("raw", "seen"), ("answer", "seen")]
        assert double.requests[0]["messages"][0]["content"] == [
            {"type": "image_url", "image_url": {"url": "data:image;base64,iVBORw=="}},
            {"type": "text", "text": "What?"},
        ]


class Said(Exception):
    message = "what the server says"


@pytest.mark.parametrize(
    ("error", "told"),
    [(ValueError("lost"), "lost"), (ValueError(), "ValueError"), (Said("longer"), "what the server says")],
)
def test_what_is_told_of_an_error(error, told):
    def broken():
        yield "answer", "half"
        raise error

    assert wait(Answer(broken())).error == told


def test_seconds_are_those_until_the_last_piece(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(web_answer.time, "monotonic", lambda: now[0])

    def parts():
        for second in (3.0, 7.0):
            now[0] = 100.0 + second
            yield "token", "x"
        now[0] = 119.0

    answer = Answer(parts())
    assert answer._ended.wait(PATIENCE)
    assert (answer.seconds, answer.tokens, answer.stopped) == (7.0, 2, False)


@pytest.mark.parametrize(("late", "kept"), [(20.0, "xy"), (20.1, "x")])
def test_an_answer_is_worth_writing_on_for_twenty_seconds(late, kept, monkeypatch):
    now = [100.0]
    monkeypatch.setattr(web_answer.time, "monotonic", lambda: now[0])

    def parts():
        yield "answer", "x"
        now[0] = 100.0 + late
        yield "answer", "y"

    answer = Answer(parts())
    assert answer._ended.wait(PATIENCE)
    assert (answer.text, answer.stopped) == (kept, kept == "x")


def test_what_has_ended_is_not_stopped():
    answer = wait(Answer(iter_closing([("answer", "x")])))
    answer.stop()
    assert not answer.stopped


def test_every_kind_has_its_place_in_the_list(tmp_path):
    kinds = ["full_sft", "rlhf", "full_dist", "reason", "pretrain"]
    for kind in ("mine", *kinds):
        (tmp_path / f"{kind}_512.pth").touch()
    (tmp_path / "full_sft_512.pth.resume").mkdir()
    (tmp_path / "full_sft_512.pth.resume" / "full_sft_9.pth").touch()
    names = [path.name.removesuffix("_512.pth") for path in weights_in(tmp_path, vision=False)]
    assert names == ["mine", *kinds]


def test_an_engine_writes_four_answers_at_a_time(tiny_out, tokenizer_dir, monkeypatch):
    slots = []
    monkeypatch.setattr("model.inference.scheduler.Engine", lambda *given, **how: slots.append(how))

    class Thread:
        def close(self):
            pass

    monkeypatch.setattr("model.inference.thread.EngineThread", lambda engine: Thread())
    chats = load_local(tiny_out / "full_sft_32.pth", None, str(tokenizer_dir), "cpu", None)
    continues = load_local(tiny_out / "pretrain_32.pth", None, str(tokenizer_dir), "cpu", None)
    assert slots == [{"slots": 4}] * 2
    assert (chats.pretrained, continues.pretrained, chats.processor) == (False, True, None)


def test_a_server_is_waited_for_ten_minutes_and_its_door_for_five_seconds():
    with openai_double() as double:
        client, _ = connect(double.address, "")
    assert (client.timeout.read, client.timeout.connect, client.max_retries, client.api_key) == (600, 5, 0, "none")
