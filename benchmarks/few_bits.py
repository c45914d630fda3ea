"""What 8 and 4 bits cost: bits per byte of a text as saved, in int8 and in int4, and a plot of the weights.

    python -m benchmarks.few_bits out/pretrain_512.pth --ppl ../shared/data/pretrain_hq.jsonl --limit 300
    python -m benchmarks.few_bits out/full_sft_512.pth qat/full_sft_512.pth --ppl FILE --plot weights.png

Several models can be compared, such as one trained with `train_full_sft.py --qat int4` and one without. The plot
shows the first model's weights over the largest of those that share their scale: a row's in int8, a group's in int4.
"""

import copy
import itertools
from pathlib import Path

import trainer.start  # noqa: F401  (first of all: what to do where PyTorch, or a home folder, is missing)
import torch

from model import MiniMindLM
from model.quantization import BITS, GROUP, is_quantized, quantize_weights
from scripts.evaluation.perplexity import read_texts
from scripts.report_card.examining import predict
from trainer.argument_types import positive_int
from trainer.arguments import Parser
from trainer.errors import UserError, run_main
from trainer.loading import load_for_inference


def bits_per_byte(model: MiniMindLM, tokenizer, texts: list[str]) -> dict[str, float]:
    """Bits per byte of the texts under the model as it is, and with its weights rounded to each precision."""
    found = {"as saved": predict(texts, model, tokenizer).bits_per_byte}
    for name, bits in BITS.items():
        rounded = copy.deepcopy(model)
        quantize_weights(rounded, bits)
        found[name] = predict(texts, rounded, tokenizer).bits_per_byte
    return found


def relative_weights(model: MiniMindLM) -> dict[str, torch.Tensor]:
    """All quantised weights, flat, relative to the largest of their row, and of their group."""
    matrices = [weight.detach().float() for name, weight in model.named_parameters() if is_quantized(name, weight)]
    groups = [weight.view(-1, GROUP) for weight in matrices]
    return {
        "int8: of its row": torch.cat([(w / w.abs().amax(1, keepdim=True)).flatten() for w in matrices]),
        f"int4: of its {GROUP} neighbours": torch.cat([(g / g.abs().amax(1, keepdim=True)).flatten() for g in groups]),
    }


def draw(model: MiniMindLM, path: Path) -> None:
    """A histogram of `relative_weights` with the steps of each precision."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(10, 3.5), sharey=True)
    for axis, (title, values), steps in zip(axes, relative_weights(model).items(), (127, 8), strict=True):
        axis.hist(values.numpy(), bins=127, range=(-1, 1), density=True, color="#4477aa")
        if steps < 20:
            for step in range(-steps, steps + 1):
                axis.axvline(step / steps, color="#cc6677", linewidth=0.6)
        axis.set_title(f"a weight over the largest {title.partition(': ')[2]} ({title.partition(':')[0]})", fontsize=10)
        axis.set_xlabel(f"{2 * steps} steps" if steps > 20 else "red: the 16 values that int4 has")
    axes[0].set_ylabel("density")
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main():
    parser = Parser(__doc__)
    parser.add_argument("weights", nargs="+", help="a .pth or a folder; several are compared side by side")
    parser.add_argument("--ppl", type=Path, required=True, metavar="FILE", help="text to score: .jsonl or plain")
    parser.add_argument("--limit", type=positive_int, help="only the first texts of FILE")
    parser.add_argument("--tokenizer", default=None, metavar="DIR", help="tokenizer folder (default: the shipped one)")
    parser.add_argument("--plot", type=Path, metavar="PNG", help="plot the distribution of the first model's weights")
    args = parser.parse_args()
    texts = list(itertools.islice(read_texts(args.ppl), args.limit))
    if not any(texts):
        raise UserError(f"--ppl {args.ppl} contains no text")
    print(f"bits per byte of {len(texts):,} texts of {args.ppl.name}")
    for number, weights in enumerate(args.weights):
        model, tokenizer = load_for_inference(weights, args.tokenizer)
        if args.plot and not number:
            draw(model, args.plot)
        found = bits_per_byte(model, tokenizer, texts)
        for name, value in found.items():
            more = "" if name == "as saved" else f"  {100 * (value / found['as saved'] - 1):+.2f} %"
            print(f"  {weights:<40} {name:<9} {value:.4f}{more}")


if __name__ == "__main__":
    run_main(main)
