"""The page and the Markdown: both contain everything as text, and the page is self-contained."""

import re
from html.parser import HTMLParser

import pytest

from scripts.report_card.contents import Cell, Section
from scripts.report_card.loss_curves import draw_losses
from scripts.report_card.rendering import MARK, as_html, as_markdown

HOSTILE = '<script>alert("1")</script> & <img src=x onerror=y> "\' </dd> | `a` *b* $c$\x00\nsecond line'
SECTIONS = (
    Section("Scores", "A note.", ("", "accuracy"), [[Cell("full_sft_8"), Cell("26.4% ± 1.3%", 0.264, 0.25)]]),
    Section("Losses", picture=True),
    Section("Answers", answers=[("Who?", [("full_sft_8", "I."), ("<b>_8", HOSTILE)])]),
    Section("Not evaluated", points=[("x_8", "it is <damaged>")]),
)


class Elements(HTMLParser):
    """Collects the elements of a page, and its text."""

    def __init__(self, page: str):
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += attributes

    def handle_data(self, data):
        self.text += data


@pytest.fixture(scope="module")
def page(tmp_path_factory) -> str:
    curves = {"full_sft_<script>8": ([(1, 3.0), (10, 2.0)], [(10, 2.5)]), "_a$b$": ([(1, 0.7)], [])}
    svg = draw_losses(curves, tmp_path_factory.mktemp("curves") / "losses.png")
    return as_html("Report: out/<i>", "Today", SECTIONS, svg)


def test_the_page_says_it_all(page):
    text = Elements(page).text
    for said in ("Report: out/<i>", "A note.", "26.4% ± 1.3%", "Who?", "it is <damaged>", "second line"):
        assert said in text
    assert "--share:26.4;--chance:25.0" in page
    assert MARK in page[:200]


def test_what_a_model_says_is_text_on_the_page(page):
    found = Elements(page)
    assert not {"script", "img", "i", "damaged", "b"} & set(found.tags)
    assert not [name for name, _ in found.attributes if name.startswith("on")]
    assert HOSTILE.replace("\x00", "\ufffd") in found.text


def test_the_page_asks_for_nothing_else(page):
    found = Elements(page)
    assert not {"link", "iframe", "object", "base"} & set(found.tags)
    for name, value in found.attributes:
        if name in ("src", "href", "xlink:href", "data", "action"):
            assert value.startswith("#")
    assert not re.search(r"@import|url\((?!#)", page)
    assert {"default-src 'none'; style-src 'unsafe-inline'"} <= {value for _, value in found.attributes}


def test_the_picture_takes_the_colours_of_the_page_and_the_names_of_the_models(page):
    assert "currentColor" in page
    svg = page[page.index("<svg") : page.index("</svg>")]
    assert "full_sft_&lt;script&gt;8" in svg
    assert "a$b$" in svg
    assert "http://www.w3.org/2000/svg" in svg
    assert "matplotlib.org" not in svg


def test_the_markdown_says_it_all_as_text():
    text = as_markdown("Report: out", "Today", SECTIONS, "report/losses.png")
    assert text.startswith(MARK)
    assert "| full_sft_8 | 26.4% ± 1.3% |" in text
    assert "![Losses](report/losses.png)" in text
    assert "- full_sft_8: I." in text
    assert "<script" not in text
    assert "<img" not in text
    assert r"\| \`a\` \*b\* \$c\$" in text
    assert "<br>second line" in text


def test_losses_below_zero_and_empty_curves_are_drawn(tmp_path):
    curves = {"grpo_8": ([(1, -0.1), (2, 0.2)], []), "nothing_8": ([], [])}
    svg = draw_losses(curves, tmp_path / "losses.png")
    assert "grpo_8" in svg
    assert "nothing_8" not in svg
    assert (tmp_path / "losses.png").read_bytes().startswith(b"\x89PNG")
