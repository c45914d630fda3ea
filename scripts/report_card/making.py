"""From an out folder to its report."""

import datetime
from pathlib import Path

from dataset.jsonl import DataError
from scripts.report_card.contents import sections
from scripts.report_card.examining import Benchmarks, examine, held_out_text, kept_of, parts_of
from scripts.report_card.loss_curves import draw_losses, read_curves
from scripts.report_card.rendering import MARK, as_html, as_markdown
from scripts.report_card.stages_found import find_stages
from trainer.arguments import ROOT
from trainer.errors import UserError, print_notice, shown
from trainer.files import replacing


def make_report(
    out_dir: Path,
    ppl: Path | None = None,
    data_dir: Path | None = None,
    num_fewshot: int = 0,
    limit: int | None = None,
    tokenizer: str | None = None,
    device: str | None = None,
) -> Path:
    """Evaluate the models in a folder as far as results are missing, and write report.md and report.html there.

    Results are stored in `report/NAME.json`; a model that cannot be evaluated is named in the report, and the others
    are evaluated.

    Args:
        ppl: the text to predict; None: for the demo's models their pretraining's held-out text.
        data_dir: see `Benchmarks`; None: no benchmarks.
        num_fewshot, limit: for the benchmarks: examples before a question, and only the first N questions of a subject.
        tokenizer: as in `load_for_inference`.

    Returns:
        the URL of report.html.

    Raises:
        UserError, DataError: there is nothing to evaluate, or the text to predict is malformed.
    """
    stages = find_stages(out_dir)
    pages = [out_dir / "report.md", out_dir / "report.html"]
    for page in pages:
        if page.exists() and MARK not in page.read_text(encoding="utf-8", errors="replace")[:200]:
            raise UserError(f"{page} was not written by this script: move it, since the report would replace it")
    held_out = held_out_text(ppl, stages)
    benchmarks = Benchmarks(data_dir, num_fewshot, limit) if data_dir else None

    results, problems = {}, {}
    for found in stages:
        try:
            if found.problem:
                raise UserError(found.problem)
            kept = kept_of(found, out_dir, tokenizer)
            results[found.name] = examine(found, parts_of(found, held_out, benchmarks), kept, tokenizer, device)
        except (UserError, DataError) as error:
            print_notice(f"{found.name} cannot be evaluated: {error}")
            problems[found.name] = str(error)

    curves = {found.name: read_curves(found.path.with_suffix(".metrics.jsonl")) for found in stages}
    png = out_dir / "report" / "losses.png"
    svg = draw_losses(curves, png) if any(map(any, curves.values())) else ""
    text = [*sections(stages, results, problems, held_out and held_out.title, drawn=bool(svg))]
    place = out_dir.resolve()
    place = place.relative_to(ROOT) if place.is_relative_to(ROOT) else place
    head = f"Report: {shown(place)}", f"Written on {datetime.date.today():%d %B %Y} by scripts/report.py"
    contents = as_markdown(*head, text, f"report/{png.name}"), as_html(*head, text, svg)
    for page, content in zip(pages, contents, strict=True):
        with replacing(page) as temporary:
            temporary.write_text(content, encoding="utf-8", errors="backslashreplace")
    return pages[-1].resolve()
