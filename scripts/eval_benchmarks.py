"""Evaluate models on standard benchmarks: C-Eval, CMMLU, OpenBookQA, ARC, HellaSwag, PIQA, SIQA, SciQ and others.

    python scripts/eval_benchmarks.py --tasks cmmlu --data_dir DIR --num_fewshot 5 --weights out/full_sft_512.pth
    python scripts/eval_benchmarks.py --tasks ceval openbookqa --weights out/full_sft_512.pth SmolLM2-135M-Instruct
    python scripts/eval_benchmarks.py --tasks mine.jsonl --prompt raw chat --output results.json
    python scripts/eval_benchmarks.py --ppl held_out.jsonl --weights out/pretrain_512.pth out/full_sft_512.pth
    python scripts/eval_benchmarks.py --compare before.json after.json

EleutherAI's harness supplies the tasks and prompts, and MiniMind's own engine scores them. Every score comes with its
standard error, the chance level, and the significance of the difference. Without --data_dir the harness downloads the
questions; with it they are read from the published files, DIR/NAME/….
"""

import itertools
import json
from pathlib import Path

import _repo  # noqa: F401  (lets `python scripts/eval_benchmarks.py` find the packages)

from scripts.evaluation import require_harness
from trainer.argument_types import BooleanFlag, non_negative_int, positive_int, seed
from trainer.arguments import Parser, add_device_argument, add_model_arguments, add_untold_arguments
from trainer.errors import UserError, print_notice, run_main
from trainer.inference_arguments import add_adapter_argument, add_stage_arguments


def get_args():
    parser = Parser(__doc__)
    what = parser.add_argument_group("what to evaluate")
    what.add_argument("--tasks", nargs="+", default=[], metavar="NAME", help="benchmarks, or .jsonl files of your own")
    what.add_argument("--data_dir", type=Path, metavar="DIR", help="folder of the published files (default: download)")
    what.add_argument("--num_fewshot", type=non_negative_int, default=0, help="examples before a question")
    what.add_argument("--limit", type=positive_int, help="ask only the first N questions of each subject or task")
    what.add_argument("--prompt", nargs="+", choices=("raw", "chat"), default=["raw"], help="as text, as a chat, both")
    what.add_argument("--control", choices=("shuffle",), help="shuffle: each question's options under another question")
    what.add_argument("--seed", type=seed, default=1234, help="random seed of the examples, and of --control")
    what.add_argument(
        "--ppl", nargs="+", type=Path, default=[], metavar="FILE", help="perplexity on these .jsonl or .txt"
    )
    what.add_argument(
        "--window", type=positive_int, default=512, help="window in tokens for --ppl; windows overlap by half"
    )
    what.add_argument(
        "--compare", nargs="+", type=Path, metavar="JSON", help="compare the models of one or two --output files"
    )
    who = parser.add_argument_group("which model", "--weights, or the flags that select a model in eval_model.py")
    who.add_argument("--weights", nargs="+", default=[], metavar="W", help=".pth files, or transformers folders")
    add_stage_arguments(who)
    add_adapter_argument(who)
    who.add_argument("--batch_size", type=positive_int, default=16, help="questions at once")
    add_model_arguments(parser)
    add_untold_arguments(parser)
    add_device_argument(who)
    out = parser.add_argument_group("output")
    out.add_argument("--output", type=Path, metavar="JSON", help="results; a chart, NAME.png, is drawn beside it")
    out.add_argument(
        "--log_samples", type=Path, metavar="JSONL", help="one line per question, with every log-likelihood"
    )
    out.add_argument(
        "--submission", type=Path, metavar="JSON", help="answers to C-Eval's test split, for its site to grade"
    )
    out.add_argument("--resume", action=BooleanFlag, help="continue an interrupted run")
    out.add_argument("--overwrite", action=BooleanFlag, help="replace the output of an earlier run")
    return parser.parse_args()


def check(args) -> None:
    """Refuse what cannot be done, or would replace something, before anything is loaded."""
    require_harness()
    if args.compare:
        return
    if not args.tasks and not args.ppl:
        raise UserError("nothing to evaluate: give --tasks NAME, --ppl FILE or --compare JSON")
    if args.submission and (args.tasks != ["ceval"] or len(args.weights) > 1 or len(args.prompt) > 1):
        raise UserError("--submission is for --tasks ceval only, with one model and one --prompt")
    if args.resume and (not args.output or args.overwrite):
        raise UserError("--resume continues the run of an --output, and --overwrite replaces it: choose one")
    chart = args.output and args.output.with_suffix(".png")
    for path in filter(None, (args.output, chart, args.log_samples, args.submission)):
        if path.exists() and not args.overwrite:
            raise UserError(f"{path} already exists: choose another name, or use --overwrite to replace it")
    if args.output and partial_of(args.output).exists():
        if args.overwrite:
            partial_of(args.output).unlink()
        elif not args.resume:
            raise UserError(f"{args.output}: a run was interrupted; --resume continues it, --overwrite replaces it")


def partial_of(output: Path) -> Path:
    """The file of the answers so far, used until `output` is written."""
    return output.with_name(f"{output.name}.partial.jsonl")


def examine(args) -> None:
    """Ask every model everything, show the tables, write the files."""
    from scripts.evaluation.charts import score_chart
    from scripts.evaluation.examination import ask, worded
    from scripts.evaluation.journal import Journal, Resumed
    from scripts.evaluation.opening import fingerprint, open_models
    from scripts.evaluation.perplexity import perplexity, read_texts
    from scripts.evaluation.results import positions_of, results_of, right_answers, submission
    from scripts.evaluation.tables import position_table, predicted_table, score_table
    from scripts.evaluation.tasks import open_exams
    from trainer.files import replacing, save_json

    split = "test" if args.submission else None
    exams = list(open_exams(args.tasks, args.data_dir, args.num_fewshot, args.seed, split))
    shuffle = args.seed if args.control == "shuffle" else None
    models, lines = {}, []
    for name, open_model in open_models(args):
        lm = open_model()
        key = fingerprint(lm)
        journal = Journal(partial_of(args.output), key) if args.output else None
        asked = Resumed(lm, journal, lambda n, of: print_notice(f"{n} of {of} are known")) if journal else lm
        for prompt in args.prompt if exams else ():
            column = name if len(args.prompt) == 1 else f"{name} ({prompt})"
            print_notice(f"asking {column}")
            answers = ask(worded(exams, lm, prompt == "chat", args.limit, shuffle), asked)
            results = results_of(exams, answers)
            models[column] = {"results": results, "positions": positions_of(exams, answers)}
            models[column] |= {"right": right_answers(answers), "fingerprint": key}
            lines += [{"model": column} | answer.line() for answer in answers]
            if args.submission:
                save_json(submission(answers), args.submission)
        for file in args.ppl:
            found = perplexity(lm, itertools.islice(read_texts(file), args.limit), args.window)
            about = found._asdict() | {"bits_per_byte": found.bits_per_byte, "nats_per_token": found.nats_per_token}
            models.setdefault(name, {}).setdefault("ppl", {})[str(file)] = about
            print(predicted_table([(name, str(file), found)]))
        if journal:
            journal.close()

    scored = {name: found["results"] for name, found in models.items() if "results" in found}
    if scored and not args.submission:
        print(score_table(scored))
        print(position_table({name: models[name]["positions"] for name in scored}))
    if args.log_samples:
        with replacing(args.log_samples) as temporary, open(temporary, "w", encoding="utf-8") as file:
            file.writelines(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    if args.output:
        settings = ("tasks", "num_fewshot", "limit", "prompt", "control", "seed", "window")
        about = {"settings": {name: getattr(args, name) for name in settings}}
        one = next(iter(models.values())) if len(models) == 1 else {"models": models}
        save_json(one | about, args.output)
        if scored:
            score_chart(scored, args.output.with_suffix(".png"))
        partial_of(args.output).unlink(missing_ok=True)


def compare_files(paths: list[Path]) -> None:
    """Test the models of the first file against those of the second, or of one file against each other."""
    from scripts.evaluation.results import compare, read_results
    from scripts.evaluation.tables import compared_table

    if len(paths) > 2:
        raise UserError("--compare takes one file of several models, or two files")
    models = [list(read_results(path).items()) for path in paths]
    pairs = list(itertools.product(*models) if len(models) == 2 else itertools.combinations(models[0], 2))
    if not pairs:
        raise UserError(f"--compare {paths[0]}: it has only one model; name a second file")
    print(compared_table((first, second, compare(a, b)) for (first, a), (second, b) in pairs))


def main():
    args = get_args()
    check(args)
    if args.compare:
        compare_files(args.compare)
        return
    import datasets
    from transformers.utils import logging as transformers_logging

    datasets.disable_progress_bars()  # of a few rows each
    transformers_logging.disable_progress_bar()
    examine(args)


if __name__ == "__main__":
    run_main(main)
