"""Generation 2 or 3: which layout learns better from the same text in the same time, at the same width and depth.

    python -m benchmarks.generations --data_path dataset/pretrain_hq.jsonl --size 26M --minutes 20 --seed 1
    python -m benchmarks.generations --data_path dataset/pretrain_hq.jsonl --size 26M --minutes 20 --seed 2

Each call trains both with one seed and prints the table of all results so far; an interrupted call continues from its
last save. Both see the same rows in the same order, but the faster one gets further. On a CPU, minutes are CPU time
summed over the cores, so that other work on the machine does not count; on a GPU they are wall-clock time. Measured:
nats per token on every hundredth sample, which is held out.
"""

from pathlib import Path

import trainer.start  # noqa: F401  (first of all: what to do where PyTorch, or a home folder, is missing)
import torch

from benchmarks.comparison.training_runs import SAVE_EVERY, computed, open_texts, read_results, save_table, spread
from dataset import PretrainDataset, StepLoader
from model import GENERATIONS, MiniMindLM, build_model
from model.loss import next_token_loss, target_mask
from trainer.architecture import config_from_sizes
from trainer.argument_types import non_negative_int, positive_float, positive_int
from trainer.arguments import ROOT, Parser, add_device_argument
from trainer.device import pick_device
from trainer.errors import UserError, run_main
from trainer.evaluation import evaluate
from trainer.files import save_json, save_tensors
from trainer.runtime import Runtime
from trainer.schedule import cosine_schedule, make_optimizer, set_learning_rate
from trainer.weights import load_tokenizer

SIZES = {"26M": {"dim": 512, "n_layers": 8}, "64M": {"dim": 768, "n_layers": 8}}
GRAIN = 1000  # steps that the schedule divides the minutes into
WARMUP = 20  # of them


def get_args():
    parser = Parser(__doc__)
    parser.add_argument("--data_path", required=True, help="pretraining texts, jsonl")
    parser.add_argument("--size", choices=SIZES, default="26M", help="dim 512 or 768, 8 layers; parameters differ")
    parser.add_argument("--minutes", type=positive_float, default=20.0, help="minutes of computing per generation")
    parser.add_argument("--seed", type=non_negative_int, default=1)
    parser.add_argument("--batch_size", type=positive_int, default=8, help="rows of a step")
    parser.add_argument("--max_seq_len", type=positive_int, default=512, help="row length in tokens")
    parser.add_argument("--learning_rate", type=positive_float, default=1e-3)
    parser.add_argument("--optimizer", choices=("adamw", "muon"), default="muon")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="autocast precision")
    parser.add_argument("--use_moe", type=int, choices=(0, 1), default=0, help="a mixture of experts")
    parser.add_argument("--tokenizer", default=None, metavar="DIR", help="tokenizer folder (default: the shipped one)")
    parser.add_argument("--out_dir", type=Path, default=ROOT / "out" / "generations")
    add_device_argument(parser)
    return parser.parse_args()


def train(model: MiniMindLM, rows: PretrainDataset, here: Runtime, args, state_file: Path) -> tuple[int, int]:
    """Train for the minutes, continuing from the state of an earlier call, if any; returns steps and tokens seen."""
    optimizer = make_optimizer(model, args)
    seconds, steps, tokens = 0.0, 0, 0
    if state_file.is_file():
        state = torch.load(state_file, map_location=here.device, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        seconds, steps, tokens = state["seconds"], state["steps"], state["tokens"]
        print(f"continues after {seconds / 60:.1f} minutes, {steps} steps", flush=True)
    budget, saved = 60 * args.minutes, seconds
    loader = StepLoader(rows, args.batch_size, 1, 1_000_000, args.seed)
    model.train()
    before = computed(here.device)
    for (batch,) in loader.steps(steps):
        if seconds >= budget:
            break
        set_learning_rate(optimizer, cosine_schedule(int(GRAIN * seconds / budget), GRAIN, WARMUP, args.learning_rate))
        batch = here.to_device(batch)
        labels = batch.pop("labels")
        learned = target_mask(labels)
        with here.autocast():
            out = model(**batch, logits_to_keep=learned)
            loss = next_token_loss(out.logits, labels) / learned.sum() + out.aux_loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        steps, tokens = steps + 1, tokens + int(batch["attention_mask"].sum())
        now = computed(here.device)
        seconds, before = seconds + now - before, now
        if seconds - saved >= SAVE_EVERY or seconds >= budget:
            about = {"seconds": seconds, "steps": steps, "tokens": tokens}
            save_tensors({"model": model.state_dict(), "optimizer": optimizer.state_dict()} | about, state_file)
            print(f"{seconds / 60:6.1f} of {args.minutes:g} minutes, step {steps}, loss {loss.item():.3f}", flush=True)
            saved, before = seconds, computed(here.device)  # writing a file is not learning
    return steps, tokens


def measure(generation: int, args, folder: Path) -> dict:
    """Train one generation, or continue training it, and evaluate it."""
    device = pick_device(args.device)
    here = Runtime(device, getattr(torch, args.dtype))
    tokenizer = load_tokenizer(args.tokenizer)
    sizes = SIZES[args.size] | {"use_moe": bool(args.use_moe), "generation": generation}
    torch.manual_seed(args.seed)
    model = build_model(config_from_sizes(sizes, tokenizer)).to(device)
    rows, held_out = open_texts(args.data_path, tokenizer, args.max_seq_len, seed=args.seed)
    name = f"generation_{generation}_seed_{args.seed}"
    print(f"\n{name}: {model.num_parameters() / 1e6:.1f} M parameters, {args.minutes:g} minutes on {device}")
    steps, tokens = train(model, rows, here, args, folder / f"{name}.state.pt")
    found = evaluate(model, held_out, tokenizer, here, args.batch_size)
    result = {"generation": generation, "seed": args.seed, "steps": steps, "tokens": tokens}
    result |= {"parameters": model.num_parameters(), **found}
    save_json(result, folder / f"{name}.json")
    (folder / f"{name}.state.pt").unlink()
    return result


def table(results: list[dict]) -> str:
    """The generations as a table, with mean and standard deviation over the seeds."""
    lines = [f"{'generation':<12}{'parameters':>12}{'seeds':>7}{'tokens seen':>16}{'held-out nats per token':>26}"]
    for generation in GENERATIONS:
        own = [result for result in results if result["generation"] == generation]
        if own:
            losses = spread([result["eval_loss"] for result in own], ".4f")
            tokens = sum(result["tokens"] for result in own) / len(own)
            parameters = f"{own[0]['parameters'] / 1e6:.1f} M"
            lines.append(f"{generation:<12}{parameters:>12}{len(own):>7}{tokens:>16,.0f}{losses:>26}")
    return "\n".join(lines)


def main():
    args = get_args()
    if not Path(args.data_path).is_file():
        raise UserError(f"--data_path {args.data_path} is missing")
    kind = f"{args.size}{'_moe' if args.use_moe else ''}_{args.minutes:g}min_{args.optimizer}_{args.learning_rate:g}"
    folder = args.out_dir / f"{kind}_{args.batch_size}x{args.max_seq_len}_{args.dtype}"
    folder.mkdir(parents=True, exist_ok=True)
    for generation in GENERATIONS:
        if not (folder / f"generation_{generation}_seed_{args.seed}.json").is_file():
            measure(generation, args, folder)
    results = read_results(folder)
    said = table(results)
    save_table(said, folder / "table.txt")
    print(f"\n{args.size}, {args.minutes:g} minutes each, {args.data_path}\n{said}")


if __name__ == "__main__":
    run_main(main)
