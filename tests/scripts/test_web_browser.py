"""The chat page as a person sees it."""

import threading

from tests.running import PATIENCE
from tests.scripts.browsing import Page, chromium, streamlit, wait_for
from tests.scripts.openai_double import openai_double

EVIL = '<b>world</b> <img src=x onerror="document.title=1"> **stars** [a](javascript:alert(1))'


def test_a_person_types_sees_the_answer_grow_and_stops_another(tiny_out, tokenizer_dir, tmp_path):
    go_on = threading.Event()

    def in_two_halves(body):
        yield "thinking", "let me see"
        yield "Hello "
        assert go_on.wait(PATIENCE)
        yield EVIL

    def endless(body):
        while True:
            yield "again and "
            yield 0.05

    options = ("--out_dir", tiny_out, "--tokenizer", tokenizer_dir, "--device", "cpu")
    with (
        chromium(tmp_path / "profile") as browser,
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
        page.click("Stop")
        page.wait_to_see("stopped")
        assert double.abandoned.wait(PATIENCE)
        page.click("中文")
        page.wait_to_see("已停止")
        assert len(page.messages()) == 6
        assert browser.save_screenshot(str(tmp_path / "page.png"))
    assert colours(tmp_path / "page.png") > 20


def colours(picture) -> int:
    """How many different pixels a PNG has: a blank page has one."""
    from PIL import Image

    with Image.open(picture) as image:
        return len(image.convert("RGB").getcolors(1 << 24))
