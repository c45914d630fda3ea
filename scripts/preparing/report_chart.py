"""OUT.report.png: kept and removed lines, their lengths, and their languages."""

from collections import Counter
from pathlib import Path

import numpy as np

KEPT, REMOVED = "#2a7f62", "#b5523b"


def draw_chart(found, figures, path: Path) -> None:
    """Draw three panels: kept and removed lines, tokens per line, languages.

    Args:
        found: the `Findings` of the passes.
        figures: the `Figures` of the report.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 4.2), layout="constrained")
    where, lengths, languages = figure.subplots(1, 3, width_ratios=(1.5, 1.3, 0.7))
    counts = found.total("removed") + Counter({name: n for name, n in found.dropped.items() if n})
    counts += Counter({"bad lines": found.total("bad").total(), "not usable": found.total("unusable").total()})
    bars = [("written", figures.lines), *((name, n) for name, n in counts.most_common(12) if n)]
    names, values = zip(*reversed(bars), strict=True)
    shown = [name if len(name) < 34 else name[:33] + "…" for name in names]
    drawn = where.barh(shown, values, color=[*[REMOVED] * (len(bars) - 1), KEPT])
    where.bar_label(drawn, labels=[f"{value:,}" for value in values], padding=3, fontsize=8)
    where.set(title="Lines", xscale="symlog", xlim=(0, max(values) * 6))
    edges = np.geomspace(1, max(2, figures.tokens.max()), 40)
    lengths.hist(figures.tokens, bins=edges, color=KEPT)
    lengths.set(title="Tokens of a line", xscale="log", xlabel="tokens", ylabel="lines" + " sampled" * figures.sampled)
    for row in (512, 1024, 2048):
        if row < figures.tokens.max():
            lengths.axvline(row, color=REMOVED, linewidth=1)
            lengths.annotate(f"{row:,}", (row, 1), xycoords=("data", "axes fraction"), ha="center", fontsize=7)
    shares = figures.languages.most_common()
    drawn = languages.bar([name for name, _ in shares], [n / figures.lines for _, n in shares], color=KEPT)
    languages.bar_label(drawn, labels=[f"{n / figures.lines:.0%}" for _, n in shares], fontsize=8)
    languages.set(title="Languages", ylim=(0, 1.1))
    for panel in (where, lengths, languages):
        panel.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=110)
