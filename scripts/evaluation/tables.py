"""Results as tables for a terminal."""

from collections.abc import Iterable, Mapping

from scripts.evaluation.perplexity import Predicted
from scripts.evaluation.results import Results
from scripts.evaluation.statistics import ALPHA, Paired

WIDTH = 31  # of a model's column
LEGEND = (
    "acc: share of right answers, in %, with its standard error; norm: by log-likelihood per character;\n"
    f"p: of chance alone (exact, two-sided; adjusted by Holm over the subjects of a benchmark); * below {ALPHA}"
)


def score_table(models: Mapping[str, Results]) -> str:
    """A table with a line per exam and a column per model."""
    results = next(iter(models.values()))
    longest = max(map(len, map(_indented, results)))
    lines = [f"{'':<{longest}}{'':>17}  " + "".join(f"{_short(name):<{WIDTH}}" for name in models)]
    head = f"{'acc':>6} {'':<7}{'norm':>6}{'p':>9}"
    lines.append(f"{'':<{longest}}{'n':>8}{'chance':>9}  " + "".join(f"{head:<{WIDTH}}" for _ in models))
    for name, found in results.items():
        line = f"{_indented(name):<{longest}}{found['n']:>8,}{_percent(found['chance']):>9}  "
        lines.append(line + "".join(f"{_cell(model[name]):<{WIDTH}}" for model in models.values()))
    return "\n".join([*(line.rstrip() for line in lines), LEGEND])


def _cell(found: dict) -> str:
    p = found.get("p_holm", found["p"])
    shown = "" if p is None else f"{p:.2g}{'*' if p < ALPHA else ' '}"
    error = f"± {100 * found['stderr']:.1f}"
    return f"{_percent(found['acc']):>6} {error:<7}{_percent(found['acc_norm']):>6}{shown:>10}"


def _indented(name: str) -> str:
    _, slash, part = name.partition("/")
    return f"  {part}" if slash else name


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.1f}"


def _short(name: str) -> str:
    return name if len(name) < WIDTH else f"…{name[2 - WIDTH :]}"


def position_table(models: Mapping[str, Mapping[str, dict]]) -> str:
    """For each model and benchmark: how often each position was chosen, and how often it was right."""
    lines = ["share of answers by place: chosen / right"]
    for name, benchmarks in models.items():
        for benchmark, shares in benchmarks.items():
            places = (f"{letter} {_percent(s['chosen'])} / {_percent(s['right'])}" for letter, s in shares.items())
            lines.append(f"  {_short(name)}, {benchmark}: {', '.join(places)}")
    return "\n".join(lines)


def predicted_table(rows: Iterable[tuple[str, str, Predicted]]) -> str:
    """A table with a line for each (model, file)."""
    lines = [f"{'':<{WIDTH}}{'bits/byte':>10}{'nats/token':>12}{'tokens':>12}{'bytes':>13}  file"]
    for name, file, found in rows:
        numbers = f"{found.bits_per_byte:>10.4f}{found.nats_per_token:>12.4f}{found.tokens:>12,}{found.bytes:>13,}"
        lines.append(f"{_short(name):<{WIDTH}}{numbers}  {file}")
    return "\n".join(lines)


def compared_table(pairs: Iterable[tuple[str, str, Mapping[str, Paired]]]) -> str:
    """For each pair of models a line per benchmark: the second's accuracy minus the first's, in points."""
    lines = []
    for first, second, found in pairs:
        lines.append(f"{second} against {first}")
        for benchmark, pair in found.items():
            points = f"{100 * pair.difference:+.1f} ± {100 * pair.stderr:.1f} points"
            alone = f"right alone {pair.only_second:,} and {pair.only_first:,} of {pair.n:,}"
            lines.append(f"  {benchmark}: {points}, {alone}, p {pair.p:.2g}{'*' if pair.p < ALPHA else ''}")
    return "\n".join([*lines, f"p: McNemar's exact test; * below {ALPHA}"])
