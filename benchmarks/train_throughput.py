"""Training speed, side by side with a plain `transformers` loop: non-padding tokens per second, padding not counted.

    python -m benchmarks.train_throughput                  the 26M shape on ../shared/data, else on the demo's data
    python -m benchmarks.train_throughput --dim 256 --rounds 3

The peer is a LlamaForCausalLM of the same shape, SDPA, fp32, torch's AdamW, a sample per row, padded to --max_seq_len.
All contenders take turns, round after round, so that a noisy machine disturbs them alike; a figure is the median of
the rounds. Tokenising, compiling and the first steps are not timed.
"""

import argparse
import itertools
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import trainer.start  # noqa: F401  (first of all: what to do where PyTorch, or a home folder, is missing)
import torch
from torch.utils.data import DataLoader
from transformers import LlamaConfig, LlamaForCausalLM

from dataset import PretrainDataset, StepLoader, collate
from model import LMConfig, MiniMindLM
from model.loss import next_token_loss, target_mask
from trainer.argument_types import BooleanFlag, positive_int
from trainer.arguments import ROOT
from trainer.device import DTYPES, pick_device
from trainer.errors import run_main
from trainer.schedule import make_optimizer
from trainer.weights import load_tokenizer

Step = Callable[[], tuple[int, int]]  # one optimizer step -> (non-padding tokens, positions computed)


def peer_step(data: PretrainDataset, config: LMConfig, args, dtype: torch.dtype) -> Step:
    """A step of the plain loop: transformers' Llama, every sample padded to the row length."""
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=config.vocab_size,
            hidden_size=config.dim,
            intermediate_size=config.hidden_dim,
            num_hidden_layers=config.n_layers,
            num_attention_heads=config.n_heads,
            num_key_value_heads=config.n_kv_heads,
            max_position_embeddings=config.max_seq_len,
            rope_theta=config.rope_theta,
            rms_norm_eps=config.norm_eps,
            tie_word_embeddings=True,
            attn_implementation="sdpa",
        )
    ).to(args.device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    loader = DataLoader(
        data,
        args.batch_size,
        shuffle=True,
        drop_last=True,
        collate_fn=lambda rows: collate(rows, args.max_seq_len),
        generator=torch.Generator().manual_seed(0),
    )
    batches = endless(loader)

    def step() -> tuple[int, int]:
        batch = {name: tensor.to(args.device) for name, tensor in next(batches).items()}
        real = batch["attention_mask"]
        with torch.autocast(args.device.type, dtype, enabled=dtype != torch.float32):
            loss = model(batch["input_ids"], attention_mask=real.long(), labels=batch["labels"]).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return int(real.sum()), real.numel()

    return step


def our_step(data: PretrainDataset, config: LMConfig, args, dtype: torch.dtype, compiled: bool) -> Step:
    """A step of train_pretrain.py's loop, on packed rows or, like MiniMind2, one sample a row."""
    model = MiniMindLM(config).to(args.device).train()
    if compiled:
        for block in model.layers:
            block.compile()
    optimizer = make_optimizer(model, args)
    loader = StepLoader(data, args.batch_size, 1, epochs=1, seed=0)
    batches = itertools.chain.from_iterable(endless_steps(loader))

    def step() -> tuple[int, int]:
        batch = {name: tensor.to(args.device) for name, tensor in next(batches).items()}
        labels, real = batch.pop("labels"), batch["attention_mask"]
        with torch.autocast(args.device.type, dtype, enabled=dtype != torch.float32):
            learned = target_mask(labels)
            loss = next_token_loss(model(**batch, logits_to_keep=learned).logits, labels) / learned.sum()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return int(real.sum()), real.numel()

    return step


def endless(loader: DataLoader) -> Iterator[dict[str, torch.Tensor]]:
    while True:
        yield from loader


def endless_steps(loader: StepLoader) -> Iterator[list[dict[str, torch.Tensor]]]:
    while True:
        yield from loader.steps()


def measure(contenders: dict[str, Step], rounds: int, seconds: float, synchronize: Callable[[], None]) -> None:
    """Let the contenders take turns and print their medians; the first one is what the others are compared with."""
    for name, step in contenders.items():
        started = time.perf_counter()
        step()
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


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    shared = ROOT.parent / "shared" / "data" / "pretrain_hq.jsonl"
    demo = ROOT / "dataset" / "demo" / "pretrain_hq.jsonl"
    parser.add_argument("--data_path", type=Path, default=shared if shared.is_file() else demo)
    parser.add_argument("--dim", type=positive_int, default=512)
    parser.add_argument("--n_layers", type=positive_int, default=8)
    parser.add_argument("--use_moe", action=BooleanFlag, help="only MiniMind's contenders; the peer stays dense")
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
    parser.add_argument("--device", default=None)
    args = parser.parse_args()
    args.device = pick_device(args.device)
    args.learning_rate = 1e-4

    torch.manual_seed(0)
    tokenizer = load_tokenizer()
    config = LMConfig(dim=args.dim, n_layers=args.n_layers, use_moe=args.use_moe, vocab_size=len(tokenizer))
    packed = PretrainDataset(args.data_path, tokenizer, args.max_seq_len)
    single = PretrainDataset(args.data_path, tokenizer, args.max_seq_len, packing=False)
    print(f"packed: {packed.summary}\nsingle: {single.summary}")
    print(f"{torch.get_num_threads()} threads, {args.device}, torch {torch.__version__}")
    fp32, bf16 = DTYPES["float32"], DTYPES["bfloat16"]
    contenders = {
        "transformers Llama, fp32, padded": peer_step(single, config, args, fp32),
        "transformers Llama, bf16, padded": peer_step(single, config, args, bf16),
        "MiniMind, bf16, --no-packing": our_step(single, config, args, bf16, False),
        "MiniMind, fp32, packed": our_step(packed, config, args, fp32, False),
        "MiniMind, bf16, packed": our_step(packed, config, args, bf16, False),
    }
    if args.compile:
        contenders["MiniMind, bf16, packed, compiled (default)"] = our_step(packed, config, args, bf16, True)
    synchronize = torch.accelerator.synchronize if args.device.type != "cpu" else lambda: None
    measure(contenders, args.rounds, args.seconds, synchronize)


if __name__ == "__main__":
    run_main(main)
