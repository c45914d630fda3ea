"""How good the models in a folder are, on one page: report.html, and report.md, beside the weights. `make report`.

    python scripts/report.py
    python scripts/report.py --out_dir out --ppl held_out.jsonl --data_dir DIR --num_fewshot 5

For each stage: training time and tokens, losses, bits per byte on one text, benchmarks, the demo's tests if it is the
demo's model, and its answers to a few questions. Results of an earlier call are not computed again, and an interrupted
call continues.
"""

from pathlib import Path

import _repo  # noqa: F401  (lets `python scripts/report.py` find the packages)

from trainer.argument_types import non_negative_int, positive_int
from trainer.arguments import ROOT, Parser, add_device_argument
from trainer.errors import run_main


def default_folder() -> Path:
    """The demo's folder if it has weights, else out/."""
    demo = ROOT / "out" / "demo"
    return demo if any(demo.glob("*.pth")) else ROOT / "out"


def get_args():
    parser = Parser(__doc__)
    parser.add_argument(
        "--out_dir", type=Path, help="folder of the weights (default: out/demo if it has any, else out)"
    )
    parser.add_argument("--tokenizer", metavar="DIR", help="tokenizer folder (default: the shipped one)")
    parser.add_argument("--ppl", type=Path, metavar="FILE", help="score this .jsonl or .txt (default: the demo's own)")
    parser.add_argument("--data_dir", type=Path, metavar="DIR", help="run the benchmarks whose files are in DIR/NAME/")
    parser.add_argument(
        "--num_fewshot", type=non_negative_int, default=0, help="examples before a benchmark's question"
    )
    parser.add_argument(
        "--limit", type=positive_int, help="ask only the first N questions of each benchmark or subject"
    )
    add_device_argument(parser)
    return parser.parse_args()


def main():
    args = get_args()
    from scripts.report_card.making import make_report  # imported late, so that --help is quick

    settings = vars(args) | {"out_dir": args.out_dir or default_folder()}
    print(f"report: {make_report(**settings)}")


if __name__ == "__main__":
    run_main(main)
