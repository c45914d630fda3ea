"""Longer texts than those trained on: perplexity by position, and a needle in a haystack, for each position scaling.

    python -m benchmarks.long_context --weights out/pretrain_512.pth --data_path held_out.jsonl
    python -m benchmarks.long_context --weights out/pretrain_512.pth --data_path held_out.jsonl --finetune_steps 100

The texts of the file are joined into rows of the greatest length, and the loss is reported by position: beyond the
trained length it shows how well the model copes. A packed training row holds several samples, each with its own
positions: a model trained on short samples has seen fewer positions than its rows have, and long texts are more
informative than many short ones joined. The needle is a fact about an invented place, somewhere among true statements
of the demo's data; at the end the model is asked for it, and is right if its most likely next tokens are the answer.
With --finetune_steps each variant is then trained on rows of --finetune_len tokens, joined texts and haystacks in
turn, and tested again. Results go to a json, a table and a plot.
"""

import json
import math
import random
from pathlib import Path

import trainer.start  # noqa: F401  (first of all: what to do where PyTorch, or a home folder, is missing)
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedTokenizerBase

from model import MiniMindLM
from model.chat import render_text
from model.rope_scaling import checked_scaling
from scripts.demo.world import relations
from trainer.argument_types import non_negative_int, positive_float, positive_int
from trainer.argument_types import seed as any_seed
from trainer.arguments import ROOT, Parser, add_device_argument
from trainer.device import pick_device
from trainer.errors import UserError, run_main
from trainer.files import replacing, save_json
from trainer.loading import load_for_inference

WAYS = ("none", "linear", "ntk", "yarn")
EDGES = (256, 512, 1024, 2048, 4096, 8192)  # ends of the stretches of positions that are counted together
DEPTHS = (0.1, 0.5, 0.9)  # of the needle in the haystack
PLACES = "Zembla Quorra Yllis Vantor Brisk Oldun Marrow Telk Sorrin Pexley Ganth Iridel Nassau Womble Kyrrin".split()
WORDS = "seven yellow river stone bird moon tree salt iron glass wind rain".split()


def get_args():
    parser = Parser(__doc__)
    parser.add_argument("--weights", type=Path, required=True, help="a pretrained model, with the json beside it")
    parser.add_argument("--data_path", type=Path, required=True, help="held-out texts, jsonl")
    parser.add_argument("--tokenizer", default=None, metavar="DIR", help="tokenizer folder (default: the shipped one)")
    parser.add_argument("--trained", type=positive_int, help="rows it was trained on (default: as its json says)")
    parser.add_argument("--longest", type=positive_int, default=8192, help="length of the longest text, in tokens")
    parser.add_argument("--rows", type=positive_int, default=4, help="texts of that length")
    parser.add_argument("--needles", type=positive_int, default=8, help="haystacks of each length and depth")
    parser.add_argument("--finetune_steps", type=non_negative_int, default=0, help="steps on long rows; 0: none")
    parser.add_argument("--finetune_len", type=positive_int, default=2048, help="length of such a row, in tokens")
    parser.add_argument("--learning_rate", type=positive_float, default=2e-4)
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--seed", type=any_seed, default=1)
    parser.add_argument("--out_dir", type=Path, default=ROOT / "out" / "long_context")
    add_device_argument(parser)
    return parser.parse_args()


def joined_texts(path: Path, tokenizer: PreTrainedTokenizerBase, length: int, rows: int, skip: int = 0) -> Tensor:
    """A file's texts, joined and cut into rows, (rows, length) int64, after the first `skip` tokens.

    Raises:
        UserError: there are too few texts.
    """
    needed, ids = skip + length * rows, []
    with open(path, encoding="utf-8") as file:
        for line in file:
            if len(ids) >= needed:
                break
            ids += render_text(tokenizer, [json.loads(line)["text"]])[0]
    if len(ids) < needed:
        raise UserError(f"{path} has {len(ids):,} tokens, but {needed:,} are needed: lower --longest or --rows")
    return torch.tensor(ids[skip:needed]).view(rows, length)


@torch.inference_mode()
def nats_by_position(model: MiniMindLM, ids: Tensor) -> list[float]:
    """Mean nats per token in each range of positions, for rows (rows, length)."""
    sums = torch.zeros(len(EDGES), dtype=torch.float64)
    counts = torch.zeros(len(EDGES), dtype=torch.float64)
    for row in ids:
        logits = model(row[None]).logits[0, :-1].float()
        per_token = F.cross_entropy(logits, row[1:], reduction="none").double().cpu()
        first = 0
        for number, end in enumerate(EDGES):
            part = per_token[first : min(end, len(row)) - 1]
            sums[number] += part.sum()
            counts[number] += len(part)
            first = end - 1
    return [float(s / c) if c else math.nan for s, c in zip(sums, counts, strict=True)]


def haystack(chance: random.Random, tokenizer: PreTrainedTokenizerBase, length: int, depth: float) -> tuple[list, list]:
    """A prompt of at most `length` tokens that ends with a question, and the answer's tokens."""
    place, word = chance.choice(PLACES), chance.choice(WORDS)
    needle, question, answer = f"The secret word of {place} is {word}.", f"The secret word of {place} is", f" {word}"
    statements = [s for r in relations() if r.lang == "en" for s in _statements(r)]
    ends = [render_text(tokenizer, [text])[0][1:-1] for text in (f" {needle}", f" {question}", answer)]
    room, hay, middle = length - sum(map(len, ends)) - 1, [], None
    while True:
        more = render_text(tokenizer, [f" {chance.choice(statements)}"])[0][1:-1]
        if len(hay) + len(more) > room:
            break
        if middle is None and len(hay) >= depth * room:
            middle = len(hay)
        hay += more
    middle = len(hay) if middle is None else middle
    return [tokenizer.bos_token_id, *hay[:middle], *ends[0], *hay[middle:], *ends[1]], ends[2]


def _statements(relation) -> list[str]:
    return [form.format(x=x, y=answers[0]) for x, answers in relation.rows for form in relation.stated]


@torch.inference_mode()
def found_needles(model: MiniMindLM, tokenizer: PreTrainedTokenizerBase, lengths: list[int], args) -> dict[str, float]:
    """The share of needles found, by length."""
    found = {}
    for length in lengths:
        chance, right = random.Random(args.seed), 0
        for depth in DEPTHS:
            for _ in range(args.needles):
                prompt, answer = haystack(chance, tokenizer, length, depth)
                ids = torch.tensor([[*prompt, *answer]], device=model.device)
                likeliest = model(ids, logits_to_keep=len(answer) + 1).logits[0, :-1].argmax(-1)
                right += likeliest.tolist() == answer
        found[str(length)] = right / (len(DEPTHS) * args.needles)
    return found


def finetune(model: MiniMindLM, tokenizer: PreTrainedTokenizerBase, rows: Tensor, args) -> None:
    """One step per long row, every second one a haystack, whose answer has as much weight as all its other tokens."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.learning_rate)
    chance = random.Random(f"{args.seed} learned")  # other haystacks than those of the examination
    model.train()
    for step in range(args.finetune_steps):
        optimizer.param_groups[0]["lr"] = args.learning_rate * min(1.0, (step + 1) / 10)
        row = rows[step // 2 % len(rows)][None]
        labels = row
        if step % 2:
            prompt, answer = haystack(chance, tokenizer, args.finetune_len, chance.random())
            row = torch.tensor([[*prompt, *answer]], device=model.device)
            labels = torch.full_like(row, -100)
            labels[:, -len(answer) :] = row[:, -len(answer) :]
        model(row, labels=labels).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    model.eval()


def opened(way: str, trained: int, args) -> tuple[MiniMindLM, PreTrainedTokenizerBase]:
    """The model with its positions scaled to the longest text."""
    sizes = {"max_seq_len": args.longest}
    if way != "none":
        factor = max(1.0, args.longest / trained)
        sizes["rope_scaling"] = {"rope_type": way, "factor": factor, "original_max_position_embeddings": trained}
        checked_scaling(sizes["rope_scaling"])
    model, tokenizer = load_for_inference(args.weights, args.tokenizer, **sizes)
    return model.to(pick_device(args.device)), tokenizer


def examine(model, tokenizer, ids: Tensor, lengths: list[int], args) -> dict:
    return {"nats": nats_by_position(model, ids), "needles": found_needles(model, tokenizer, lengths, args)}


def table(results: dict[str, dict], lengths: list[int], trained: int) -> str:
    """A table of perplexity by position, and of needles found by length."""
    lines = [f"trained on rows of {trained}", f"{'perplexity up to position':<28}" + "".join(f"{e:>9}" for e in EDGES)]
    for name, found in results.items():
        cells = ("" if math.isnan(nats) else f"{math.exp(min(nats, 50)):.1f}" for nats in found["nats"])
        lines.append(f"{name:<28}" + "".join(f"{cell:>9}" for cell in cells))
    lines.append(f"{'needles found, of length':<28}" + "".join(f"{length:>9}" for length in lengths))
    for name, found in results.items():
        lines.append(f"{name:<28}" + "".join(f"{found['needles'][str(length)]:>9.0%}" for length in lengths))
    return "\n".join(lines)


def plot(results: dict[str, dict], trained: int, path: Path) -> None:
    """Plot perplexity over position as a PNG, on logarithmic axes, before and after fine-tuning."""
    from matplotlib.figure import Figure  # not pyplot, which keeps every figure and wants a display
    from matplotlib.ticker import NullLocator

    panels = [""] + ([", fine-tuned"] if any("fine-tuned" in name for name in results) else [])
    figure = Figure(figsize=(5 * len(panels), 3.6), layout="constrained")
    for axes, panel in zip(figure.subplots(1, len(panels), sharey=True, squeeze=False)[0], panels, strict=True):
        for way in WAYS:
            if found := results.get(way + panel):
                axes.plot(EDGES, [math.exp(min(nats, 50)) for nats in found["nats"]], marker="o", label=way)
        axes.axvline(trained, color="grey", linestyle="--", linewidth=1)
        axes.set(xscale="log", yscale="log", xlabel="up to position", title=panel.removeprefix(", ") or "as trained")
        axes.set_xticks(EDGES, [str(edge) for edge in EDGES])
        axes.xaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter("{x:g}")
    figure.axes[0].set(ylabel="perplexity")
    figure.axes[-1].legend()
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120)


def main():
    args = get_args()
    plain, tokenizer = opened("none", args.longest, args)
    trained = args.trained or plain.config.trained_seq_len
    if not trained:
        raise UserError(f"{args.weights} does not record the row length it was trained on: give --trained")
    lengths = [edge for edge in EDGES if edge <= args.longest]
    ids = joined_texts(args.data_path, tokenizer, args.longest, args.rows).to(plain.device)
    long_rows = None
    if args.finetune_steps:
        several = math.ceil(args.finetune_steps / 2)
        long_rows = joined_texts(args.data_path, tokenizer, args.finetune_len, several, skip=ids.numel()).to(ids.device)
    results: dict[str, dict] = {}
    for way in args.ways:
        model, _ = opened(way, trained, args)
        results[way] = examine(model, tokenizer, ids, lengths, args)
        print(f"{way}: {results[way]}", flush=True)
        if long_rows is not None:
            finetune(model, tokenizer, long_rows, args)
            results[f"{way}, fine-tuned"] = examine(model, tokenizer, ids, lengths, args)
            print(f"{way}, fine-tuned: {results[f'{way}, fine-tuned']}", flush=True)
    args.out_dir.mkdir(parents=True, exist_ok=True)
    save_json({"weights": str(args.weights), "trained": trained, "results": results}, args.out_dir / "results.json")
    plot(results, trained, args.out_dir / "long_context.png")
    print(f"\n{table(results, lengths, trained)}\n{args.out_dir / 'long_context.png'}")


if __name__ == "__main__":
    run_main(main)
