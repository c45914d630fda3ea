"""From raw text to training data: recognised, cleaned, deduplicated, mixed, shuffled, split and counted.

    python scripts/prepare_data.py wiki/ books/*.txt.gz --stage pretrain --out dataset/pretrain_hq.jsonl
    python scripts/prepare_data.py chats.json alpaca.parquet --stage sft --out dataset/sft_mini_512.jsonl
    python scripts/prepare_data.py pairs.csv --map "user=q chosen=good rejected=bad" --stage dpo --out dataset/dpo.jsonl
    python scripts/prepare_data.py --mix zh.jsonl:0.7 en.jsonl:0.3 --stage pretrain --out dataset/mixed.jsonl

Reads json, jsonl, csv, tsv, parquet, txt and md, plain or compressed (.gz, .zst, .xz, .bz2), in the usual shapes: plain
text, Alpaca, ShareGPT, OpenAI's messages, question and answer, preferences, reasoning, ours. The shape is
detected line by line; if that fails, --map names the keys. A broken line is dropped, and so is the rest of a corrupt
archive; both are counted and reported.

Writes OUT.jsonl, OUT.val.jsonl with the held-out lines, and OUT.report.md with OUT.report.png: what came in,
what each filter removed, with examples, and what is left. A run that was stopped continues where it was when it is
started again with the same arguments. The same seed gives the same bytes, for any number of --workers. docs/data.md
has all filters and their defaults.
"""

import os
import shlex
import sys

import _repo  # noqa: F401  (lets `python scripts/prepare_data.py` find the packages)

from scripts.preparing.options import add_arguments, check
from trainer.arguments import Parser
from trainer.errors import UserError, run_main


def get_args():
    parser = Parser(__doc__)
    add_arguments(parser, cores=os.cpu_count() or 1)
    return parser.parse_args()


def main():
    args = get_args()
    settings = check(args)
    try:
        prepare(args, settings)
    except OSError as error:
        where = f" ({error.filename})" if error.filename else ""
        raise UserError(
            f"stopped by a disk error: {error.strerror or error}{where}; finished work is kept: free some space, or "
            "fix that, and run again"
        ) from error


def prepare(args, settings):
    from scripts.preparing.passes import Preparation  # imported late, so that --help is quick
    from scripts.preparing.reporting import Figures, describe, write_report

    licences = dict(one.rpartition(":")[::2] for one in args.source)
    command = shlex.join(["python", "scripts/prepare_data.py", *sys.argv[1:]])
    run = Preparation(args.inputs, args.out, settings, args.workers, args.device, args.overwrite)
    with run.pool:
        run.clean()
        run.compare()
        run.judge()
    chosen = run.write()
    figures = Figures(run, chosen)
    written = run.place(lambda folder: write_report(run, figures, licences, folder, command))
    print("\n".join([*describe(run, figures), f"written: {', '.join(map(str, written))}"]))


if __name__ == "__main__":
    run_main(main)
