"""Evaluation speed, side by side with the harness's own `hf` model: CMMLU, few-shot, fp32, the same batch size.

    python -m benchmarks.eval_speed --data_dir DIR              26M, 5-shot, 16 questions of each subject in DIR/cmmlu
    python -m benchmarks.eval_speed --data_dir DIR --use_moe --limit 8

Weights are random, which does not affect the time. The peer runs the same network as transformers' own class (Llama;
Qwen2-MoE for a mixture of experts). Both take turns, round after round; a figure is the median of the rounds, and a
ratio the median of each round's own. Only answering is timed: from the texts of all questions to their log-likelihoods.
"""

import statistics
import tempfile
import time
from pathlib import Path

import trainer.start  # noqa: F401  (first of all: what to do where PyTorch, or a home folder, is missing)
import torch

from model import LMConfig, MiniMindLM
from scripts.evaluation import require_harness
from scripts.formats.transformers_folder import write_folder
from trainer.argument_types import BooleanFlag, non_negative_int, positive_int
from trainer.arguments import Parser, add_device_argument
from trainer.device import pick_device
from trainer.errors import run_main
from trainer.weights import load_tokenizer


def main():
    parser = Parser(__doc__)
    parser.add_argument("--data_dir", type=Path, required=True, metavar="DIR", help="DIR/cmmlu/{dev,test}/*.csv")
    parser.add_argument("--dim", type=positive_int, default=512)
    parser.add_argument("--n_layers", type=positive_int, default=8)
    parser.add_argument("--use_moe", action=BooleanFlag)
    parser.add_argument("--num_fewshot", type=non_negative_int, default=5)
    parser.add_argument("--limit", type=positive_int, default=16, help="questions of each subject")
    parser.add_argument("--batch_size", type=positive_int, default=16)
    parser.add_argument("--rounds", type=positive_int, default=3)
    add_device_argument(parser)
    args = parser.parse_args()
    require_harness()
    import datasets  # after the arguments: --help need not wait for these
    from lm_eval.models.huggingface import HFLM

    from scripts.evaluation.examination import worded
    from scripts.evaluation.harness_model import MiniMindHarness
    from scripts.evaluation.tasks import open_exams

    device = pick_device(args.device)
    datasets.disable_progress_bars()

    tokenizer = load_tokenizer()
    torch.manual_seed(0)
    sizes = {"dim": args.dim, "n_layers": args.n_layers, "use_moe": args.use_moe, "vocab_size": len(tokenizer)}
    model = MiniMindLM(LMConfig(**sizes)).to(device).eval()
    with tempfile.TemporaryDirectory() as folder:
        write_folder(model, tokenizer, Path(folder))
        peer = HFLM(folder, device=str(device), dtype="float32", batch_size=args.batch_size)
    contenders = {"harness's hf": peer, "MiniMind": MiniMindHarness(model, tokenizer, args.batch_size)}

    exams = open_exams(["cmmlu"], args.data_dir, args.num_fewshot, seed=0)
    asked = worded(exams, peer, limit=args.limit)
    requests = [request for question in asked for request in question.requests]
    size = sum(parameter.numel() for parameter in model.parameters()) / 1e6
    where = f"{torch.get_num_threads()} threads" if device.type == "cpu" else str(device)
    what = f"{len(asked)} questions of CMMLU, {args.num_fewshot}-shot, batches of {args.batch_size}"
    print(f"{size:.1f} M parameters on {where}, {what}, {args.rounds} rounds")

    seconds, found = {name: [] for name in contenders}, {}
    for lm in contenders.values():  # a warm-up for one-time preparations
        lm.loglikelihood(requests[: 4 * args.batch_size], disable_tqdm=True)
    for _ in range(args.rounds):
        for name, lm in contenders.items():
            started = time.perf_counter()
            found[name] = lm.loglikelihood(requests, disable_tqdm=True)
            seconds[name].append(time.perf_counter() - started)
    for name, times in seconds.items():
        print(f"  {name:<14}{len(asked) / statistics.median(times):>8.1f} questions/s")
    ratio = statistics.median(theirs / ours for theirs, ours in zip(*seconds.values(), strict=True))
    both = list(zip(*found.values(), strict=True))
    print(f"  {ratio:.1f} x the harness's hf")
    print(f"  largest difference of {len(both):,} log-likelihoods: {max(abs(a - b) for (a, _), (b, _) in both):.1e}")


if __name__ == "__main__":
    run_main(main)
