"""Results as a chart."""

from collections.abc import Mapping
from pathlib import Path

from scripts.evaluation.results import Results
from trainer.files import replacing

ROW = 0.3  # inches


def score_chart(models: Mapping[str, Results], path: Path) -> None:
    """Draw a PNG with a bar for each exam and model, its standard error, and the chance level."""
    from matplotlib.figure import Figure  # not pyplot, which keeps every figure and wants a display

    results = next(iter(models.values()))
    names = list(results)
    height = 0.8 / len(models)
    figure = Figure(figsize=(8, 1.6 + ROW * len(names) * max(1, len(models) / 2)), layout="constrained")
    axes = figure.subplots()
    for number, (model, found) in enumerate(models.items()):
        places = [row + height * (number - (len(models) - 1) / 2) for row in range(len(names))]
        shares = [100 * found[name]["acc"] for name in names]
        errors = [100 * found[name]["stderr"] for name in names]
        axes.barh(places, shares, height, xerr=errors, label=model, error_kw={"elinewidth": 0.8})
    label = "chance"
    for row, name in enumerate(names):
        if (chance := results[name]["chance"]) is not None:
            axes.plot(
                [100 * chance] * 2, [row - 0.5, row + 0.5], color="black", linestyle="--", linewidth=1, label=label
            )
            label = None  # once
    axes.set_yticks(range(len(names)), [name.replace("/", ": ") for name in names])
    axes.set(ylim=(len(names) - 0.5, -0.5), xlabel="accuracy in %, with its standard error")
    figure.legend(loc="outside upper right", ncols=3)
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120)
