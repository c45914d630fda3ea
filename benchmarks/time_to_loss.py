"""Which recipe learns fastest: held-out bits per byte after equal tokens, and the compute time that they took.

    python -m benchmarks.time_to_loss --data_path ../shared/data/pretrain_hq.jsonl --variant muon --seed 1
    python -m benchmarks.time_to_loss --data_path ../shared/data/pretrain_hq.jsonl --variant polar --seed 1
    python -m benchmarks.time_to_loss --data_path ../shared/data/pretrain_hq.jsonl --table

Each call trains one variant with one seed, or continues from its last save, and prints the table of all results so
far. A seed sets the initial weights and the order of the rows, the same for every variant, so that variants are
compared seed by seed. On a CPU, seconds are the CPU time of all threads, so that other work on the machine does not
count. Bits per byte are measured on every hundredth sample, which no variant is trained on.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import trainer.start  # noqa: F401  (first of all: what to do where PyTorch, or a home folder, is missing)
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

from benchmarks.comparison.training_runs import SAVE_EVERY, computed, open_texts, read_results, save_table, spread
from dataset import PretrainDataset, StepLoader
from model import MiniMindLM, build_model
from model.loss import next_token_loss, target_mask
from trainer.architecture import config_from_sizes
from trainer.argument_types import BooleanFlag, non_negative_int, positive_float, positive_int
from trainer.arguments import ROOT, Parser, add_device_argument
from trainer.device import DTYPES, default_dtype, pick_device
from trainer.errors import UserError, run_main
from trainer.evaluation import evaluate
from trainer.files import save_json, save_tensors
from trainer.muon import POLAR_EXPRESS
from trainer.runtime import Runtime
from trainer.schedule import cosine_schedule, make_optimizer, set_learning_rate, wsd_schedule
from trainer.weights import load_tokenizer

SIZES = {"2M": {"dim": 128}, "7M": {"dim": 256}, "26M": {"dim": 512}}  # of 8 layers each
TAIL = 0.2  # the share of the steps whose weights are averaged


@dataclass
class Variant:
    """The differences of a variant from --optimizer muon with its cosine schedule."""

    about: str
    optimizer: str = "muon"
    options: dict = field(default_factory=dict)  # of `Muon`
    schedule: Callable[[int, int, int, float], float] = cosine_schedule
    averages: bool = False  # the weights of the tail, equally weighted (Izmailov et al. 2018, arXiv:1803.05407)


NEURONS, CAUTIOUS, POLAR = {"neuron_decay": 0.95}, {"cautious": True}, {"polynomials": POLAR_EXPRESS}
VARIANTS = {
    "muon": Variant("Muon with Jordan's polynomials"),
    "adamw": Variant("AdamW for every matrix", optimizer="adamw"),
    "polar": Variant("Polar Express, five polynomials", options=POLAR),
    "polar4": Variant("Polar Express, the first four", options={"polynomials": POLAR_EXPRESS[:4]}),
    "normuon": Variant("NorMuon", options=NEURONS),
    "cautious": Variant("cautious weight decay", options=CAUTIOUS),
    "wsd": Variant("warm-up, stable, decay", schedule=wsd_schedule),
    "average": Variant("the weights of the last fifth averaged", averages=True),
    "stable_average": Variant(
        "no decay, the last fifth averaged", schedule=partial(wsd_schedule, decay=0.0), averages=True
    ),
    "normuon_polar": Variant("NorMuon with Polar Express", options=NEURONS | POLAR),
    "normuon_cautious": Variant("NorMuon, cautious weight decay", options=NEURONS | CAUTIOUS),
    "normuon_wsd": Variant("NorMuon; warm-up, stable, decay", options=NEURONS, schedule=wsd_schedule),
    "all": Variant("NorMuon with Polar Express, cautious decay", options=NEURONS | POLAR | CAUTIOUS),
}


def get_args():
    parser = Parser(__doc__)
    parser.add_argument("--variant", choices=VARIANTS, default="muon")
    add_run_arguments(parser)
    parser.add_argument("--out_dir", type=Path, default=ROOT / "out" / "time_to_loss")
    return parser.parse_args()


def add_run_arguments(parser: Parser) -> None:
    """The flags of one training run: its data, its seed, and what `train` reads."""
    parser.add_argument("--data_path", type=Path, required=True, help="pretraining texts, jsonl")
    parser.add_argument("--table", action=BooleanFlag, help="only print the results so far")
    parser.add_argument("--seed", type=non_negative_int, default=1, help="seed of the initial weights and the order")
    parser.add_argument("--size", choices=SIZES, default="7M", help="dim 128, 256 or 512, 8 layers")
    parser.add_argument("--tokens", type=positive_int, default=400_000, help="training tokens, in whole rows")
    parser.add_argument("--batch_size", type=positive_int, default=8, help="rows per step")
    parser.add_argument("--max_seq_len", type=positive_int, default=512, help="row length in tokens")
    parser.add_argument("--learning_rate", type=positive_float, default=2e-3)
    parser.add_argument("--warmup_iters", type=non_negative_int, default=10)
    parser.add_argument("--tokenizer", default=None, metavar="DIR", help="tokenizer folder (default: the shipped one)")
    add_device_argument(parser)


def settings_name(args) -> str:
    """The settings that results must share to be compared, as the name of their folder."""
    shape = f"{args.size}_{args.tokens}_{args.batch_size}x{args.max_seq_len}"
    return f"{shape}_{args.learning_rate:g}_{args.warmup_iters}"


def train(variant: Variant, model: MiniMindLM, rows: PretrainDataset, here: Runtime, args, state_file: Path):
    """Train for --tokens, continuing from the state of an earlier call, if any.

    Returns:
        the model to evaluate; and the run's steps, non-padding tokens, seconds of computing, and seconds of those in
        the optimizer.
    """
    args.optimizer = variant.optimizer
    optimizer = make_optimizer(model, args, **variant.options)
    average = AveragedModel(model) if variant.averages else None
    parts = {"model": model, "optimizer": optimizer} | ({"average": average} if average else {})
    about = {"steps": 0, "tokens": 0, "seconds": 0.0, "optimizer_seconds": 0.0}
    if state_file.is_file():
        state = torch.load(state_file, map_location=here.device, weights_only=True)
        for name, part in parts.items():
            part.load_state_dict(state[name])
        about = state["about"]
        print(f"continuing after step {about['steps']}", flush=True)
    steps = math.ceil(args.tokens / (args.batch_size * args.max_seq_len))
    loader = StepLoader(rows, args.batch_size, 1, 1_000_000, args.seed)
    model.train()
    before, saved = computed(here.device), about["seconds"]
    for (batch,) in loader.steps(about["steps"], steps):
        rate = variant.schedule(about["steps"], steps, args.warmup_iters, args.learning_rate)
        set_learning_rate(optimizer, rate)
        about["tokens"] += int(batch["attention_mask"].sum())
        batch = here.to_device(batch)
        labels = batch.pop("labels")
        learned = target_mask(labels)
        with here.autocast():
            loss = next_token_loss(model(**batch, logits_to_keep=learned).logits, labels) / learned.sum()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        begun = computed(here.device)
        optimizer.step()
        about["optimizer_seconds"] += computed(here.device) - begun
        optimizer.zero_grad(set_to_none=True)
        about["steps"] += 1
        if average is not None and about["steps"] > (1 - TAIL) * steps:
            average.update_parameters(model)
        now = computed(here.device)
        about["seconds"], before = about["seconds"] + now - before, now
        if about["seconds"] - saved >= SAVE_EVERY or about["steps"] == steps:
            content = {name: part.state_dict() for name, part in parts.items()} | {"about": dict(about)}
            save_tensors(content, state_file)
            print(f"step {about['steps']} of {steps}, loss {loss.item():.3f}", flush=True)
            saved, before = about["seconds"], computed(here.device)  # writing a file is not learning
    return (average.module if average else model), about


def measure(args, result_file: Path) -> None:
    """Train one variant, or continue, and evaluate it."""
    device = pick_device(args.device)
    here = Runtime(device, DTYPES[default_dtype(device)])
    tokenizer = load_tokenizer(args.tokenizer)
    torch.manual_seed(args.seed)
    model: nn.Module = build_model(config_from_sizes({"n_layers": 8} | SIZES[args.size], tokenizer)).to(device)
    train_rows, held_out = open_texts(args.data_path, tokenizer, args.max_seq_len)
    millions = model.num_parameters() / 1e6
    print(f"{result_file.stem}: {millions:.1f} M parameters on {device}, {here.dtype_name}", flush=True)
    state_file = result_file.with_suffix(".state.pt")
    examined, about = train(VARIANTS[args.variant], model, train_rows, here, args, state_file)
    found = evaluate(examined, held_out, tokenizer, here, args.batch_size)
    save_json({"variant": args.variant, "seed": args.seed, **about, **found}, result_file)
    state_file.unlink()


def table(results: list[dict]) -> str:
    """The variants, best first, each compared with Muon at the same seeds: mean and standard deviation over seeds."""
    by_variant: dict[str, dict[int, dict]] = {}
    for result in results:
        by_variant.setdefault(result["variant"], {})[result["seed"]] = result
    base = by_variant.get("muon", {})
    head = f"{'variant':<17}{'seeds':>6}{'bits per byte':>18}{'minus muon':>20}{'seconds':>9}{'optimizer':>11}"
    lines = []
    for name, by_seed in by_variant.items():
        bits = {seed: result["eval_bits_per_byte"] for seed, result in by_seed.items()}
        shared = [bits[seed] - base[seed]["eval_bits_per_byte"] for seed in bits if seed in base]
        seconds, in_optimizer = (
            sum(result[column] for result in by_seed.values()) / len(by_seed)
            for column in ("seconds", "optimizer_seconds")
        )
        less = spread(shared, ".4f") if shared and name != "muon" else ""
        mean = sum(bits.values()) / len(bits)
        line = f"{name:<17}{len(bits):>6}{spread(list(bits.values()), '.4f'):>18}{less:>20}{seconds:>9.0f}"
        lines.append((mean, f"{line}{in_optimizer / seconds:>11.1%}"))
    return "\n".join([head, *(line for _, line in sorted(lines))])


def main():
    args = get_args()
    if not args.data_path.is_file():
        raise UserError(f"--data_path {args.data_path} is missing")
    folder = args.out_dir / settings_name(args)
    folder.mkdir(parents=True, exist_ok=True)
    result_file = folder / f"{args.variant}_seed_{args.seed}.json"
    if not (args.table or result_file.is_file()):
        measure(args, result_file)
    results = read_results(folder)
    if not results:
        raise UserError(f"{folder} holds no results yet: leave out --table")
    said = table(results)
    save_table(said, folder / "table.txt")
    print(f"\n{args.size}, {args.tokens:,} tokens each, {args.data_path}\n{said}")


if __name__ == "__main__":
    run_main(main)
