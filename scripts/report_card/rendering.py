"""A report as an HTML page, and as Markdown. Texts from models and files are shown literally in both."""

import re
from collections.abc import Sequence
from pathlib import Path

from jinja2 import Environment

from scripts.report_card.contents import Cell, Section

MARK = "<!-- written by scripts/report.py -->"  # so that a file of the user's own is never replaced
PAGE = Path(__file__).with_name("report.html.jinja")
CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f\ud800-\udfff]")  # which no page and no editor shows


def as_html(title: str, subtitle: str, sections: Sequence[Section], svg: str) -> str:
    """The page, self-contained with its styles and its picture."""
    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters["clean"] = _clean
    template = environment.from_string(PAGE.read_text(encoding="utf-8"))
    return template.render(mark=MARK, title=title, subtitle=subtitle, sections=sections, svg=svg) + "\n"


def as_markdown(title: str, subtitle: str, sections: Sequence[Section], png: str) -> str:
    """The same as Markdown, with the picture as a separate file."""
    lines = [MARK, f"# {_plain(title)}", "", _plain(subtitle), ""]
    for section in sections:
        lines += [f"## {_plain(section.title)}", ""]
        if section.note:
            lines += [_plain(section.note), ""]
        if section.picture:
            lines += [f"![{_plain(section.title)}]({png})", ""]
        if section.columns:
            lines += [_row(map(Cell, section.columns)), f"| --- |{' ---: |' * (len(section.columns) - 1)}"]
            lines += [*map(_row, section.rows), ""]
        for question, answers in section.answers:
            lines += [f"**{_plain(question)}**", ""]
            lines += [*(f"- {_plain(model)}: {_plain(answer)}" for model, answer in answers), ""]
        if section.points:
            lines += [*(f"- {_plain(what)}: {_plain(word)}" for what, word in section.points), ""]
    return "\n".join(lines)


def _row(cells) -> str:
    return f"| {' | '.join(_plain(cell.text) for cell in cells)} |"


def _clean(text: str) -> str:
    return CONTROLS.sub("\ufffd", text)


def _plain(text: str) -> str:
    """Text escaped so that Markdown shows it literally."""
    text = _clean(text.strip()).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    text = re.sub(r"([\\`*\[\]|~$])|(?<!\w)(_)|(_)(?!\w)", lambda found: f"\\{found[0]}", text)
    return "<br>".join(text.splitlines())
