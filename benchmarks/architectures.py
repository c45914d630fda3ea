"""The variants of docs/architectures.md beside the plain decoder: bits per byte of models of about 7M parameters.

    python -m benchmarks.architectures --data_path dataset/demo/pretrain_hq.jsonl --row gqa --seed 1
    python -m benchmarks.architectures --data_path dataset/demo/pretrain_hq.jsonl --row mla --seed 1 --steps 300

Each call trains one row with one seed and prints the table of all results so far; an interrupted call continues from
its last save, and a finished one only prints. All rows have the same number of parameters, apart from the modules that
multi-token prediction needs only in training. All see the same text in the same order, for the same minutes or, with
--steps, the same tokens. Minutes are CPU time summed over the cores, so that other work on the machine does not count;
on a GPU they are wall-clock time. Bits per byte are measured on every hundredth sample, which no row is trained on.
"""

from pathlib import Path

import trainer.start  # noqa: F401  (first of all: what to do where PyTorch, or a home folder, is missing)
import torch
from torch import nn

from benchmarks.comparison.training_runs import SAVE_EVERY, computed, open_texts, read_results, save_table, spread
from dataset import PretrainDataset, StepLoader
from model import LMConfig, MiniMindLM
from model.feed_forward import Router
from model.loss import next_token_loss, target_mask
from model.self_speculation import write_with_drafts
from trainer.architecture import config_from_sizes
from trainer.argument_types import non_negative_int, positive_float, positive_int
from trainer.arguments import ROOT, Parser, add_device_argument
from trainer.balancing import balance_experts
from trainer.device import pick_device
from trainer.errors import UserError, run_main
from trainer.evaluation import evaluate
from trainer.files import replacing, save_json, save_tensors
from trainer.runtime import Runtime
from trainer.schedule import cosine_schedule, make_optimizer, set_learning_rate
from trainer.weights import load_tokenizer

DENSE = {"dim": 256, "n_layers": 8, "n_heads": 8, "n_kv_heads": 2, "hidden_dim": 704}
COARSE = DENSE | {"use_moe": True, "n_routed_experts": 4, "num_experts_per_tok": 2, "hidden_dim": 144}
FINE = COARSE | {"n_routed_experts": 16, "shared_width": 4, "num_experts_per_tok": 8, "hidden_dim": 36}
ROWS = {  # feed-forwards as much narrower as the attention is larger
    "gqa": DENSE,
    "mha": DENSE | {"n_kv_heads": 8, "hidden_dim": 576},
    "mla": DENSE | {"attention": "mla", "hidden_dim": 640},
    "moe_sequence": COARSE,
    "moe_batch": COARSE | {"seq_aux": False},
    "moe_none": COARSE | {"aux_loss_alpha": 0.0},
    "moe_bias": COARSE | {"balance": "bias"},
    "fine_sequence": FINE,
    "fine_bias": FINE | {"balance": "bias"},
    "mtp_1": DENSE | {"mtp_depth": 1},
    "mtp_2": DENSE | {"mtp_depth": 2},
    "mtp_parallel_2": DENSE | {"mtp_depth": 2, "mtp": "parallel"},
}
GRAIN, WARMUP = 1000, 20  # parts of the schedule, and of its warm-up
PROMPTS, PROMPT_TOKENS, WRITTEN_TOKENS = 16, 32, 64  # of the text that is written with drafts


def get_args():
    parser = Parser(__doc__)
    parser.add_argument("--data_path", required=True, help="pretraining texts, jsonl")
    parser.add_argument("--row", choices=ROWS, required=True)
    parser.add_argument("--seed", type=non_negative_int, default=1)
    parser.add_argument("--minutes", type=positive_float, default=4.0, help="compute time")
    parser.add_argument("--steps", type=non_negative_int, default=0, help="steps instead of minutes; 0: use --minutes")
    parser.add_argument("--batch_size", type=positive_int, default=8, help="rows per step")
    parser.add_argument("--max_seq_len", type=positive_int, default=256, help="row length in tokens")
    parser.add_argument("--learning_rate", type=positive_float, default=2e-3)
    parser.add_argument("--optimizer", choices=("adamw", "muon"), default="muon")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="autocast precision")
    parser.add_argument("--balance_rate", type=positive_float, default=0.001)
    parser.add_argument("--mtp_weight", type=positive_float, default=0.3)
    parser.add_argument("--tokenizer", default=None, metavar="DIR", help="tokenizer folder (default: the shipped one)")
    parser.add_argument("--out_dir", type=Path, default=ROOT / "out" / "architectures")
    add_device_argument(parser)
    return parser.parse_args()


class Loads:
    """Counts the tokens that every router assigns to each of its experts, including padding."""

    def __init__(self, model: MiniMindLM):
        self._k = model.config.num_experts_per_tok
        self._counts: dict[nn.Module, torch.Tensor] = {}
        for module in model.layers.modules():
            if isinstance(module, Router):
                module.register_forward_hook(self._count)

    def _count(self, router: nn.Module, _, scores: torch.Tensor) -> None:
        chosen = (scores.detach() + getattr(router, "expert_bias", 0)).topk(self._k, -1).indices
        counts = torch.bincount(chosen.flatten(), minlength=scores.size(-1))
        self._counts[router] = self._counts.get(router, 0) + counts

    def take(self) -> list[list[float]]:
        """Each layer's loads since the last call, relative to the mean; empty without experts."""
        parts = [(counts / counts.float().mean()).tolist() for counts in self._counts.values()]
        taken = [[round(part, 2) for part in layer] for layer in parts]
        self._counts.clear()
        return taken


def largest_violation(loads: list[list[float]]) -> float | None:
    """The excess of the fullest expert of any layer over the mean load, relative to it; None without experts."""
    return max(map(max, loads)) - 1 if loads else None


def train(model: MiniMindLM, rows: PretrainDataset, here: Runtime, args, state_file: Path) -> dict:
    """Train for the minutes or steps, continuing from the state of an earlier call, if any."""
    optimizer, loads = make_optimizer(model, args), Loads(model)
    done = {"seconds": 0.0, "steps": 0, "tokens": 0, "loads": []}
    if state_file.is_file():
        state = torch.load(state_file, map_location=here.device, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        done = {name: state[name] for name in done}
        print(f"continuing after {done['seconds'] / 60:.1f} minutes, {done['steps']} steps", flush=True)
    saved = done["seconds"]

    def part() -> float:
        """The completed fraction of the training, 0 to 1."""
        return done["steps"] / args.steps if args.steps else done["seconds"] / (60 * args.minutes)

    loader = StepLoader(rows, args.batch_size, 1, 1_000_000, args.seed)
    model.train()
    before = computed(here.device)
    for (batch,) in loader.steps(done["steps"]):
        if part() >= 1:
            break
        set_learning_rate(optimizer, cosine_schedule(int(GRAIN * part()), GRAIN, WARMUP, args.learning_rate))
        batch = here.to_device(batch)
        labels = batch.pop("labels")
        learned = target_mask(labels)
        with here.autocast():
            out = model(**batch, logits_to_keep=learned)
            loss = next_token_loss(out.logits, labels) / learned.sum()
            total = loss + out.aux_loss
            if out.mtp_loss is not None:
                total = total + out.mtp_loss / learned.sum()
        total.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if model.config.balance == "bias":
            balance_experts(model, args.balance_rate, here)
        done["steps"] += 1
        done["tokens"] += int(batch["attention_mask"].sum())
        if taken := loads.take():
            done["loads"].append(taken)
        now = computed(here.device)
        done["seconds"], before = done["seconds"] + now - before, now
        if done["seconds"] - saved >= SAVE_EVERY or part() >= 1:
            save_tensors({"model": model.state_dict(), "optimizer": optimizer.state_dict()} | done, state_file)
            print(f"{done['seconds'] / 60:6.1f} minutes, step {done['steps']}, loss {loss.item():.3f}", flush=True)
            saved, before = done["seconds"], computed(here.device)  # writing a file is not learning
    return done


def cached_numbers(config: LMConfig) -> int:
    """The number of cached values per token, over all layers."""
    if config.attention == "mla":
        return config.n_layers * (config.kv_latent_dim + config.rope_head_dim)
    return config.n_layers * 2 * config.n_kv_heads * config.head_dim


def draft(model: MiniMindLM, held_out: PretrainDataset) -> dict:
    """Statistics of generating with the model's own drafts, from prompts that are beginnings of held-out rows."""
    rows = [held_out[i]["input_ids"][:PROMPT_TOKENS].tolist() for i in range(min(PROMPTS, len(held_out)))]
    texts = [write_with_drafts(model.eval(), row, WRITTEN_TOKENS) for row in rows]
    guessed = [sum(each) for each in zip(*(text.guessed for text in texts), strict=True)]
    right = [sum(each) for each in zip(*(text.right for text in texts), strict=True)]
    tokens_a_pass = sum(len(text.tokens) for text in texts) / sum(text.passes for text in texts)
    return {"kept": [r / g for r, g in zip(right, guessed, strict=True)], "tokens_a_pass": tokens_a_pass}


def measure(args, folder: Path) -> None:
    """Train the row, or continue, and evaluate it."""
    device = pick_device(args.device)
    here = Runtime(device, getattr(torch, args.dtype))
    tokenizer = load_tokenizer(args.tokenizer)
    torch.manual_seed(args.seed)
    model = MiniMindLM(config_from_sizes(ROWS[args.row], tokenizer))
    if model.mtp is not None:
        model.mtp.learn(args.mtp_weight)
    model.to(device)
    rows, held_out = open_texts(args.data_path, tokenizer, args.max_seq_len, seed=args.seed)
    name = f"{args.row}_seed_{args.seed}"
    parameters = sum(p.numel() for name, p in model.named_parameters() if not name.startswith("mtp."))
    print(f"{name}: {parameters / 1e6:.2f} M parameters on {device}", flush=True)
    state_file = folder / f"{name}.state.pt"
    result = {"row": args.row, "seed": args.seed, "parameters": parameters, "cached": cached_numbers(model.config)}
    result |= train(model, rows, here, args, state_file)
    loads = Loads(model)
    result |= evaluate(model, held_out, tokenizer, here, args.batch_size)
    result["violation"] = largest_violation(loads.take())
    if model.mtp is not None:
        result |= draft(model, held_out)
    save_json(result, folder / f"{name}.json")
    state_file.unlink(missing_ok=True)


def table(results: list[dict]) -> str:
    """The rows as a table, with mean and standard deviation over the seeds."""
    heads = ("row", "parameters", "cache, bytes per token (fp32)", "seeds", "tokens seen", "bits per byte")
    heads += ("largest violation", "drafts accepted", "tokens per pass")
    lines = [f"| {' | '.join(heads)} |", "| --- " * len(heads) + "|"]
    for row in ROWS:
        own = [result for result in results if result["row"] == row]
        if not own:
            continue

        def of(name: str, form: str, own: list[dict] = own) -> str:
            values = [result[name] for result in own if result.get(name) is not None]
            return spread(values, form) if values else "-"

        kept = "-"
        if "kept" in own[0]:
            kept = ", ".join(
                f"{sum(values) / len(values):.0%}" for values in zip(*(r["kept"] for r in own), strict=True)
            )
        tokens = sum(result["tokens"] for result in own) / len(own)
        lines.append(
            f"| {row} | {own[0]['parameters'] / 1e6:.2f} M | {4 * own[0]['cached']:,} | {len(own)} | {tokens:,.0f} | "
            f"{of('eval_bits_per_byte', '.4f')} | {of('violation', '.2f')} | {kept} | {of('tokens_a_pass', '.2f')} |"
        )
    return "\n".join(lines)


def plot(results: list[dict], image: Path) -> None:
    """Plot the largest violation over the steps for each row with experts, with its first seed."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), dpi=120, layout="constrained")
    axes = figure.subplots()
    drawn = set()
    for result in results:
        if result["loads"] and result["row"] not in drawn:
            drawn.add(result["row"])
            axes.plot([largest_violation(loads) for loads in result["loads"]], label=result["row"], linewidth=0.8)
    if not drawn:
        return
    axes.set(xlabel="optimizer step", ylabel="largest violation", title="load of the busiest expert above the mean")
    axes.grid(alpha=0.3)
    axes.legend()
    with replacing(image) as temporary:
        figure.savefig(temporary, format="png")


def main():
    args = get_args()
    if not Path(args.data_path).is_file():
        raise UserError(f"--data_path {args.data_path} is missing")
    length = f"{args.steps}steps" if args.steps else f"{args.minutes:g}min"
    kind = f"{length}_{args.optimizer}_{args.learning_rate:g}_{args.batch_size}x{args.max_seq_len}_{args.dtype}"
    folder = args.out_dir / kind
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / f"{args.row}_seed_{args.seed}.json").is_file():
        measure(args, folder)
    results = read_results(folder)
    said = table(results)
    save_table(said, folder / "table.md")
    plot(results, folder / "violation.png")
    print(f"\n{kind}, {args.data_path}\n{said}")


if __name__ == "__main__":
    run_main(main)
