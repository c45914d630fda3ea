"""Training speed, side by side with a plain `transformers` loop and with the fastest plain PyTorch: non-padding tokens
per second, padding not counted.

    python -m benchmarks.train_throughput                  the 26M shape on ../shared/data, else on the demo's data
    python -m benchmarks.train_throughput --dim 256 --rounds 3
    python -m benchmarks.train_throughput --dim 640 --use_moe
    python -m benchmarks.train_throughput --stage lora --data_path ../shared/data/lora_medical.jsonl
    python -m benchmarks.train_throughput --stage vlm --data_path ../shared/data/sft_mini_512.jsonl --max_seq_len 640
    python -m benchmarks.train_throughput --peak_tflops 989 --batch_size 32

The first peer is a LlamaForCausalLM of the same shape (with --use_moe a Qwen2MoeForCausalLM, with --stage lora one with
peft's adapter, with --stage vlm one that reads projected features), SDPA, fp32, torch's AdamW, one sample a row, padded
to --max_seq_len. "Bare" is the same decoder with speed alone in mind: fused matrices, model and loss compiled together,
texts joined end to end without borders (benchmarks/throughput/). All contenders take turns, round after round, so that
a noisy machine disturbs them alike; a figure is the median of the rounds. Tokenising, compiling and the first steps are
not timed.

Utilisation is the operations of the tokens' matrix products (Chowdhery et al. 2022, arXiv:2204.02311, appendix B: 6 a
token and active parameter, and attention) beside the rate of a large matrix product, measured here, or beside
--peak_tflops.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import trainer.start  # noqa: F401  (first of all: what to do where PyTorch, or a home folder, is missing)
import torch

from benchmarks.throughput.steps import Step, bare_step, our_step, peer_step
from benchmarks.throughput.vlm_peer import chats_with_pictures, picture_rows
from dataset import PretrainDataset, SFTDataset
from model import LMConfig
from scripts.planning.sizes import training_flops
from trainer.argument_types import BooleanFlag, positive_float, positive_int
from trainer.arguments import ROOT
from trainer.device import DTYPES, default_dtype, pick_device
from trainer.errors import run_main
from trainer.weights import load_tokenizer

SHORT = {"float32": "fp32", "bfloat16": "bf16"}
WARM_UP = 2  # steps
PRODUCT_SIDE = 1024  # of square matrices on a CPU, and eight times as long elsewhere
PRODUCT_SECONDS = 0.5  # for which matrix products are timed


def measure(
    contenders: dict[str, Step], rounds: int, seconds: float, synchronize: Callable[[], None]
) -> dict[str, float]:
    """Let the contenders take turns and print their medians; the others are compared with the first one.

    Returns:
        the non-padding tokens per second of each.
    """
    for name, step in contenders.items():
        started = time.perf_counter()
        for _ in range(WARM_UP):
            step()
        synchronize()
        print(f"  warm-up of {name}: {time.perf_counter() - started:.1f} s", flush=True)
    speeds: dict[str, list[tuple[float, float]]] = {name: [] for name in contenders}
    for _ in range(rounds):
        for name, step in contenders.items():
            real = computed = 0
            started = time.perf_counter()
            while time.perf_counter() - started < seconds:
                step_real, step_computed = step()
                real, computed = real + step_real, computed + step_computed
            synchronize()
            elapsed = time.perf_counter() - started
            speeds[name].append((real / elapsed, computed / elapsed))
    first = [real for real, _ in next(iter(speeds.values()))]
    print(f"\n{'':<44}{'non-padding tokens/s':>14}{'positions/s':>13}{'ratio':>8}   ratio, round by round")
    for name, rows in speeds.items():
        ratios = [real / peer for (real, _), peer in zip(rows, first, strict=True)]
        real, computed = (statistics.median(column) for column in zip(*rows, strict=True))
        each = " ".join(f"{ratio:.2f}" for ratio in ratios)
        print(f"{name:<44}{real:>14,.0f}{computed:>13,.0f}{statistics.median(ratios):>8.2f}   {each}")
    return {name: statistics.median(real for real, _ in rows) for name, rows in speeds.items()}


def product_rate(device: torch.device, dtype: torch.dtype, synchronize: Callable[[], None]) -> float:
    """The floating-point operations per second of large matrix products, best of several."""
    n = PRODUCT_SIDE if device.type == "cpu" else 8 * PRODUCT_SIDE
    x, y = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    x @ y
    synchronize()
    best, begun = 0.0, time.perf_counter()
    while time.perf_counter() - begun < PRODUCT_SECONDS or not best:
        started = time.perf_counter()
        for _ in range(5):
            x @ y
        synchronize()
        best = max(best, 5 * 2 * n**3 / (time.perf_counter() - started))
    return best


def get_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    shared = ROOT.parent / "shared" / "data" / "pretrain_hq.jsonl"
    demo = ROOT / "dataset" / "demo" / "pretrain_hq.jsonl"
    parser.add_argument("--data_path", type=Path, default=shared if shared.is_file() else demo)
    parser.add_argument("--stage", choices=("pretrain", "lora", "vlm"), default="pretrain", help="lora, vlm: on chats")
    parser.add_argument("--dim", type=positive_int, default=512)
    parser.add_argument("--n_layers", type=positive_int, default=8)
    parser.add_argument("--use_moe", action=BooleanFlag, help="a mixture of experts, also of the first peer")
    parser.add_argument("--batch_size", type=positive_int, default=8, help="rows a step, for every contender")
    parser.add_argument("--max_seq_len", type=positive_int, default=512)
    parser.add_argument("--rounds", type=positive_int, default=5)
    parser.add_argument("--seconds", type=float, default=12, help="how long each contender runs per round")
    parser.add_argument(
        "--compile", action=BooleanFlag, default=True, help="also measure the compiled form (default: on)"
    )
    parser.add_argument(
        "--optimizer", choices=("adamw", "muon"), default="adamw", help="optimizer of MiniMind's contenders"
    )
    parser.add_argument(
        "--dtype", choices=SHORT, help="precision of the contenders that are not fp32 (default: the machine's own)"
    )
    parser.add_argument(
        "--peak_tflops", type=positive_float, help="the device's peak (default: that of a large matrix product)"
    )
    parser.add_argument("--device", default=None)
    return parser.parse_args()


def compare(args: argparse.Namespace, folder: Path) -> None:
    """Let all contenders of a stage train, and print the results.

    Args:
        folder: a folder for temporary files.
    """
    args.device = pick_device(args.device)
    args.learning_rate = 1e-4

    torch.manual_seed(0)
    tokenizer = load_tokenizer()
    config = LMConfig(dim=args.dim, n_layers=args.n_layers, use_moe=args.use_moe, vocab_size=len(tokenizer))
    rows_of = {"pretrain": PretrainDataset, "lora": SFTDataset, "vlm": picture_rows}[args.stage]
    if args.stage == "vlm":
        args.data_path = chats_with_pictures(args.data_path, folder)
    packed = rows_of(args.data_path, tokenizer, args.max_seq_len)
    single = rows_of(args.data_path, tokenizer, args.max_seq_len, packing=False)
    print(f"packed: {packed.summary}\nsingle: {single.summary}")
    usual = args.dtype or default_dtype(args.device)
    usual = usual if usual in SHORT else "float32"
    print(f"{torch.get_num_threads()} threads, {args.device}, {usual}, torch {torch.__version__}")
    fp32, dtype, short = torch.float32, DTYPES[usual], SHORT[usual]

    peer = "Qwen2-MoE" if args.use_moe else "Llama"
    contenders = {f"transformers {peer}, fp32, padded": peer_step(single, config, args, fp32)}
    if dtype != fp32:
        contenders[f"transformers {peer}, {short}, padded"] = peer_step(single, config, args, dtype)
    if args.stage == "pretrain" and not args.use_moe:
        how = "compiled" if args.compile else "eager"
        contenders[f"bare, {short}, joined, {how}"] = bare_step(packed, config, args, dtype, args.compile)
    contenders[f"MiniMind, {short}, --no-packing"], _ = our_step(single, config, args, dtype, False)
    if dtype != fp32:
        contenders["MiniMind, fp32, packed"], _ = our_step(packed, config, args, fp32, False)
    best = f"MiniMind, {short}, packed"
    contenders[best], times = our_step(packed, config, args, dtype, False)
    if args.compile:
        best = f"MiniMind, {short}, packed, compiled (default)"
        contenders[best], times = our_step(packed, config, args, dtype, True)

    synchronize = torch.accelerator.synchronize if args.device.type != "cpu" else lambda: None
    before = product_rate(args.device, dtype, synchronize)
    speeds = measure(contenders, args.rounds, args.seconds, synchronize)
    peak = args.peak_tflops * 1e12 if args.peak_tflops else max(before, product_rate(args.device, dtype, synchronize))
    context = round(mean_context(single))
    each = training_flops(config, context) / context
    print(f"\n{each / 1e6:,.0f} M operations per token; matrix products: {peak / 1e12:,.3f} TFLOPS in {short}")
    for name, speed in speeds.items():
        if args.stage == "pretrain":  # an adapter's step leaves out products that nothing needs
            print(f"{name:<44}{speed * each / peak:>8.1%} of them")
    waited, took = (sum(column) for column in zip(*times[WARM_UP:], strict=True))
    print(f"{best}: waits for its rows {waited / took:.2%} of a step")


def mean_context(rows: PretrainDataset) -> float:
    """The mean length of a token's sample, over the tokens of the first rows."""
    lengths = [len(rows[number]["input_ids"]) for number in range(min(len(rows), 1000))]
    return sum(length**2 for length in lengths) / sum(lengths)


def main():
    args = get_args()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:  # Windows: what is mapped stays
        compare(args, Path(folder))


if __name__ == "__main__":
    run_main(main)
