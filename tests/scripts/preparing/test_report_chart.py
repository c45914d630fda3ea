"""The picture of a report: a bar for all that became of the lines, each with its own number."""

from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
from matplotlib.axes import Axes

from scripts.preparing.report_chart import draw_chart


@pytest.fixture
def drawn(monkeypatch) -> dict:
    """What is drawn while a test runs: {name: (value, label)} of the bars that have names."""
    shown, waiting = {}, []

    def recording(method):
        def draw(self, *given, **how):
            if given and isinstance(given[0][0], str):  # those of a histogram have places
                waiting.append([*zip(*given, strict=True)])
            return method(self, *given, **how)

        return draw

    def label(self, container, labels, right=Axes.bar_label, **how):
        bars = waiting.pop()
        shown.update({name: (value, text) for (name, value), text in zip(bars, labels, strict=True)})
        return right(self, container, labels=labels, **how)

    monkeypatch.setattr(Axes, "barh", recording(Axes.barh))
    monkeypatch.setattr(Axes, "bar", recording(Axes.bar))
    monkeypatch.setattr(Axes, "bar_label", label)
    return shown


def test_each_bar_has_the_number_of_its_own(drawn, tmp_path):
    totals = {"removed": Counter(length=3, refusals=0), "bad": Counter(a=4, b=1), "unusable": Counter(c=7)}
    found = SimpleNamespace(total=totals.__getitem__, dropped=Counter({"exact duplicates": 2, "contaminated": 0}))
    languages = Counter(English=900, Chinese=100)
    figures = SimpleNamespace(lines=1000, tokens=np.array([1, 5, 700]), sampled=True, languages=languages)
    draw_chart(found, figures, tmp_path / "chart.png")
    assert drawn == {
        **{"written": (1000, "1,000"), "not usable": (7, "7"), "bad lines": (5, "5"), "length": (3, "3")},
        **{"exact duplicates": (2, "2"), "English": (0.9, "90%"), "Chinese": (0.1, "10%")},
    }
    assert (tmp_path / "chart.png").read_bytes().startswith(b"\x89PNG")
