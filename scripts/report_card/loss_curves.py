"""The losses of all stages in one picture."""

import io
import itertools
import math
import re
from collections.abc import Mapping
from pathlib import Path

from matplotlib.figure import Figure  # not pyplot, which keeps every figure and wants a display

from trainer.errors import shown
from trainer.files import replacing
from trainer.metrics import read_metrics

Curve = list[tuple[int, float]]  # (step, loss)
COLOURS = ("#3b82f6", "#f59e0b", "#10b981", "#ec4899", "#8b5cf6", "#06b6d4", "#ef4444", "#84cc16")  # on white and black
INK = "#707172"  # of axes and words; in a page it becomes the page's own
SVG_SETTINGS = {"svg.fonttype": "none", "svg.hashsalt": "minimind"}  # words stay words; the same picture, the same file


def read_curves(metrics: Path) -> tuple[Curve, Curve]:
    """The training and held-out losses in a metrics file, without lines that have no finite loss."""
    lines = read_metrics(metrics)
    return tuple(
        [(line["step"], line[name]) for line in lines if line["step"] > 0 and isinstance(line.get(name), int | float)]
        for name in ("loss", "eval_loss")
    )


def draw_losses(curves: Mapping[str, tuple[Curve, Curve]], png: Path) -> str:
    """Write a PNG, and return the same picture as an SVG whose axes have the colour of the surrounding text.

    Args:
        curves: the curves by model; at least one is not empty.
    """
    import matplotlib

    figure = Figure(figsize=(5, 3.6), layout="constrained", facecolor="none")
    axes = figure.subplots()
    axes.set_facecolor("none")
    drawn = {name: both for name, both in curves.items() if any(both)}
    handles = []
    styles = itertools.product(("-", "--", ":"), COLOURS)  # colours first
    for (trained, held_out), (style, colour) in zip(drawn.values(), itertools.cycle(styles), strict=False):
        (line,) = axes.plot(*_columns(trained), color=colour, linestyle=style, linewidth=1.3)
        axes.plot(*_columns(held_out), color=colour, linestyle="none", marker="o", markersize=3.5)
        handles.append(line)
    losses = [loss for both in drawn.values() for curve in both for _, loss in curve]
    axes.set_xscale("log")
    axes.set_yscale("log" if min(losses) > 0 else "linear")  # a reward's or a policy's loss may be below 0
    axes.tick_params(which="both", colors=INK, labelsize=9)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(matplotlib.ticker.FuncFormatter(lambda value, _: f"{value:,.10g}"))
        axis.label.set_color(INK)
    axes.xaxis.set_minor_formatter(matplotlib.ticker.FuncFormatter(lambda *_: ""))
    axes.yaxis.set_minor_formatter(matplotlib.ticker.FuncFormatter(_if_few(min(losses), max(losses))))
    axes.set(xlabel="optimizer step", ylabel="loss")
    axes.spines[:].set_color(INK)
    axes.grid(color=INK, alpha=0.2)
    labels = [shown(name).lstrip("_").replace("$", r"\$") for name in drawn]  # $ would begin a formula
    figure.legend(handles, labels, loc="outside lower center", ncols=2, frameon=False, labelcolor=INK, fontsize=9)

    written = io.StringIO()
    no_dates = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    with matplotlib.rc_context(SVG_SETTINGS):
        figure.savefig(written, format="svg", metadata=no_dates)
    with replacing(png) as temporary:
        figure.savefig(temporary, format="png", dpi=140, facecolor="white")
    svg = written.getvalue()
    svg = svg[svg.index("<svg") :].replace(INK, "currentColor")
    return re.sub(r'(<svg[^>]*?) width="[^"]*"|(<svg[^>]*?) height="[^"]*"', r"\1\2", svg, count=2)


def _columns(curve: Curve) -> tuple[list, list]:
    return [step for step, _ in curve], [loss for _, loss in curve]


def _if_few(least: float, most: float):
    """A formatter for a logarithmic axis that labels more minor ticks the less the axis spans."""
    span = most / least if least > 0 else math.inf
    digits = "23456789" if span < 3 else "235" if span < 100 else ""
    return lambda value, _: f"{value:,.3g}" if f"{value:e}"[0] in digits else ""
