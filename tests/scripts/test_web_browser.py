"""The chat page in a real browser."""

import base64
import threading

import pytest

from tests.running import PATIENCE
from tests.scripts.browser import Page, chromium, streamlit, wait_for
from tests.scripts.openai_double import openai_double
from tests.scripts.vlm_weights import picture, save_vlm

EVIL = '<b>world</b> <img src=x onerror="document.title=1"> **stars** [a](javascript:alert(1))'


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    with chromium(tmp_path_factory.mktemp("browser")) as browser:
        yield browser


def test_a_person_types_sees_the_answer_grow_and_stops_another(browser, tiny_out, tokenizer_dir, tmp_path):
    go_on = threading.Event()

    def in_two_halves(body):
        yield "thinking", "let me see"
        yield "Hello "
        assert go_on.wait(PATIENCE)
        yield EVIL

    def endless(body):
        yield "again and again and "
        while True:  # slowly: the button must not move away from the pointer
            yield "."
            yield 0.5

    options = ("--out_dir", tiny_out, "--tokenizer", tokenizer_dir, "--device", "cpu")
    with (
        openai_double() as double,
        streamlit("web_demo.py", *options, "--base_url", double.address, log=tmp_path / "log") as address,
    ):
        page = Page(browser, address)
        page.say("What is the capital?")
        page.wait_to_see("tokens/s")
        assert page.messages()[0].endswith("\nWhat is the capital?")  # after its icon

        page.click("OpenAI API")
        wait_for(lambda: page.all("[data-testid=stSidebar] input[value=double]"))
        double.reply = in_two_halves
        page.say("<i>hi</i>")
        half = page.wait_to_see("Hello")
        assert "world" not in half
        assert "let me see" not in half  # folded away
        go_on.set()
        page.wait_to_see(EVIL)
        assert "<i>hi</i>" in page.messages()[2]
        for tag in ("b", "i", "img[src=x]", "a[href^=javascript]", "strong"):
            assert not page.all(f"[data-testid=stChatMessage] {tag}"), tag
        page.click("Thinking")
        page.wait_to_see("let me see")

        double.reply = endless
        page.say("talk")
        page.wait_to_see("again and again and")
        page.click_in_the_chat("Stop")
        page.wait_to_see("stopped")
        assert double.abandoned.wait(PATIENCE)
        page.click("中文")
        page.wait_to_see("已停止")
        assert len(page.messages()) == 6
        assert browser.save_screenshot(str(tmp_path / "page.png"))
    assert colours(tmp_path / "page.png") > 20


def test_a_person_attaches_a_picture_and_asks_about_it(browser, tiny_tokenizer, tokenizer_dir, clip_dir, tmp_path):
    save_vlm(tiny_tokenizer, clip_dir, tmp_path / "out" / "sft_vlm_32.pth")
    (tmp_path / "red.png").write_bytes(picture("red"))
    (tmp_path / "broken.png").write_bytes(b"no picture")
    options = ("--out_dir", tmp_path / "out", "--tokenizer", tokenizer_dir, "--vision_model", clip_dir)
    with (
        openai_double() as double,
        streamlit("web_demo_vlm.py", *options, "--base_url", double.address, log=tmp_path / "log") as address,
    ):
        page = Page(browser, address)
        page.attach(tmp_path / "red.png")
        page.say("What colour is it?")
        page.wait_to_see("tokens/s", 1)
        assert page.messages()[0].endswith("What colour is it?")
        shown = page.all("[data-testid=stChatMessage] img")
        assert browser.execute_script("return arguments[0].naturalWidth", shown[0]) == 48

        page.click("OpenAI API")
        wait_for(lambda: page.all("[data-testid=stSidebar] input[value=double]"))
        double.reply = lambda body: ["I see."]
        page.attach(tmp_path / "broken.png")
        page.say("And this?")
        page.wait_to_see("I see.", 3)
        assert "not an image in a supported format" in page.messages()[2]
        sent = double.requests[0]["messages"]
        assert base64.b64decode(sent[0]["content"][0]["image_url"]["url"].partition(",")[2]) == picture("red")
        assert sent[2]["content"][1] == {"type": "text", "text": "And this?"}
        browser.save_screenshot(str(tmp_path / "page.png"))
    assert colours(tmp_path / "page.png") > 20


def colours(picture) -> int:
    """The number of different colours in a PNG: a blank page has one."""
    from PIL import Image

    with Image.open(picture) as image:
        return len(image.convert("RGB").getcolors(1 << 24))
