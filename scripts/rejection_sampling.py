"""Rejection sampling: a model answers each question several times; answers that pass every check are kept.

    python scripts/rejection_sampling.py dataset/rl_math.jsonl dataset/kept.jsonl --from_weight grpo
    python scripts/rejection_sampling.py dataset/rl_math.jsonl dataset/kept.jsonl --from_weight grpo
        --accept format:1 accuracy:1 my_checks:is_polite:0.5 --samples 8 --most 1 --pairs dataset/pairs.jsonl

A check is a rule of train_grpo.py's --rewards, or one of your own, and its minimum value. The kept answers are lines
for train_full_sft.py and train_distill_reason.py. --pairs also writes, for a question, an answer that passed and one
that did not: lines for train_reward.py and train_dpo.py.
"""

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import _repo  # noqa: F401  (lets `python scripts/rejection_sampling.py` find the packages)
from tqdm import tqdm

from trainer.argument_types import BooleanFlag, positive_float, positive_int, seed
from trainer.arguments import Parser, add_device_argument, add_model_arguments
from trainer.errors import UserError, print_notice, run_main


def get_args():
    parser = Parser(__doc__)
    parser.add_argument("questions", type=Path, help="jsonl of questions with their answers")
    parser.add_argument("answers", type=Path, help="jsonl to write")
    parser.add_argument("--from_weight", default="grpo", help="model that answers: stage, .pth or folder")
    add_model_arguments(parser)
    add_device_argument(parser)
    parser.add_argument("--accept", nargs="+", default=["format:1", "accuracy:1"], metavar="NAME:LEAST")
    parser.add_argument(
        "--pairs", type=Path, default=None, metavar="FILE", help="also write pairs of an accepted and a rejected answer"
    )
    parser.add_argument("--samples", type=positive_int, default=8, help="answers to each question")
    parser.add_argument("--most", type=positive_int, default=1, help="most different answers kept per question")
    parser.add_argument("--temperature", type=positive_float, default=1.0)
    parser.add_argument("--max_new_tokens", type=positive_int, default=512, help="maximum answer length in tokens")
    parser.add_argument("--max_seq_len", type=positive_int, default=1024, help="maximum tokens of question and answer")
    parser.add_argument("--batch_size", type=positive_int, default=16, help="questions answered at once")
    parser.add_argument("--limit", type=positive_int, default=None, help="ask only this many questions")
    parser.add_argument("--seed", type=seed, default=42)
    parser.add_argument("--skip_bad_lines", action=BooleanFlag, help="count and report bad lines instead of stopping")
    parser.add_argument("--overwrite", action=BooleanFlag, help="replace an earlier file")
    return parser.parse_args()


def sort_out(replies: Sequence, checks: Sequence) -> tuple[list[str], list[str]]:
    """The texts that pass, for which each rule reaches its minimum, and those that do not; each text once.

    Args:
        replies: the `Reply`s to one question; checks: `WeighedReward`s, whose weight is the minimum.
    """
    from trainer.rewards import judge

    passed: dict[str, bool] = {}
    for reply in replies:
        values = judge(reply, checks)
        passed[reply.text] = all(value >= check.weight for value, check in zip(values, checks, strict=True))
    return [text for text, ok in passed.items() if ok], [text for text, ok in passed.items() if not ok]


def answered(question: Sequence[dict], text: str) -> list[dict]:
    """A chat with an answer added."""
    return [*question, {"role": "assistant", "content": text}]


def main():
    args = get_args()
    for path in filter(None, (args.answers, args.pairs)):
        if path.exists() and not args.overwrite:
            raise UserError(f"{path} already exists: use --overwrite to replace it, or name another file")
    if args.max_new_tokens >= args.max_seq_len:
        raise UserError(f"--max_new_tokens {args.max_new_tokens} leaves no room for a question in --max_seq_len")
    from dataset.rl_dataset import RLDataset  # imported late, so that --help is quick
    from trainer.device import pick_device
    from trainer.files import replacing
    from trainer.loading import load_for_inference
    from trainer.rewards import Reply, read_rewards
    from trainer.rollouts import Writer, reply_of, sampling_seed
    from trainer.weights import find_weights

    checks = read_rewards(args.accept)
    model, tokenizer = load_for_inference(find_weights(args.from_weight, args), args.tokenizer)
    model.to(pick_device(args.device))
    room = {"max_new_tokens": args.max_new_tokens, "skip_bad_lines": args.skip_bad_lines}
    data = RLDataset(args.questions, tokenizer, min(args.max_seq_len, model.config.max_seq_len), False, **room)
    print_notice(data.summary)
    writer = Writer(model, tokenizer, args.batch_size * args.samples, data.max_seq_len, args.max_new_tokens)
    numbers = [int(number) for number in data.numbers][: args.limit]

    def sampled() -> Iterator[list[Reply]]:
        """The sampled replies to each question."""
        for start in tqdm(range(0, len(numbers), args.batch_size), unit="batch", disable=None):
            asked = [number for number in numbers[start : start + args.batch_size] for _ in range(args.samples)]
            seeds = [sampling_seed(args.seed, 0, number, n % args.samples) for n, number in enumerate(asked)]
            answers = writer.write([data.prompt(number) for number in asked], seeds, args.temperature)
            replies = [reply_of(data, *pair, args.max_new_tokens) for pair in zip(asked, answers, strict=True)]
            yield from (replies[first : first + args.samples] for first in range(0, len(replies), args.samples))

    kept, pairs, solved = [], [], Counter()
    for replies in sampled():
        question = replies[0].question
        right, wrong = sort_out(replies, checks)
        solved[bool(right)] += 1
        kept += [{"conversations": answered(question, text)} for text in right[: args.most]]
        if right and (worse := next((text for text in wrong if text.strip()), None)):
            pairs.append({"chosen": answered(question, right[0]), "rejected": answered(question, worse)})
    total = solved.total()
    if not kept:
        raise UserError(f"no answer to any of {total} questions passed {' '.join(args.accept)}: nothing is written")
    for path, lines in ((args.answers, kept), (args.pairs, pairs)):
        if path is not None:
            with replacing(path) as temporary:
                text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
                temporary.write_text(text, encoding="utf-8")
    told = f"{len(kept)} answers kept, to {solved[True]} of {total} questions ({solved[True] / total:.1%})"
    print(f"{args.answers}: {told}" + (f"; {args.pairs}: {len(pairs)} pairs" if args.pairs else ""))


if __name__ == "__main__":
    run_main(main)
