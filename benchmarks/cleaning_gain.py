"""Does cleaner data train better? One text as it is, made dirty, and cleaned again by `scripts/prepare_data.py`.

    python -m benchmarks.cleaning_gain --data_path ../shared/data/pretrain_hq.jsonl --seed 1
    python -m benchmarks.cleaning_gain --data_path ../shared/data/pretrain_hq.jsonl --table

Each call trains one model on each of the three with one seed, for the same number of steps, and prints the table of
all results so far. The dirt is the same for every seed: of the lines, 10% are wrongly decoded, 10% carry a line of
boilerplate, 5% are refusals in place of the answer; then copies are added until 20% of the file are duplicates. Bits
per byte are measured on every hundredth line of the original, which none of the three contains.
"""

import json
import random
import subprocess
import sys
from pathlib import Path

import trainer.start  # noqa: F401  (first of all: what to do where PyTorch, or a home folder, is missing)
import torch

from benchmarks.comparison.training_runs import read_results, save_table
from benchmarks.distillation_gain import spread
from benchmarks.time_to_loss import SIZES, VARIANTS, add_run_arguments, settings_name, train
from dataset import PretrainDataset
from model import build_model
from trainer.architecture import config_from_sizes
from trainer.arguments import ROOT, Parser
from trainer.device import DTYPES, default_dtype, pick_device
from trainer.errors import UserError, run_main
from trainer.evaluation import evaluate
from trainer.files import replacing, save_json
from trainer.runtime import Runtime
from trainer.weights import load_tokenizer

TEXTS = ("original", "dirty", "cleaned")
MOJIBAKE, BOILERPLATE, REFUSED, DUPLICATES = 0.10, 0.10, 0.05, 0.20  # shares of the lines of the dirty file
PAGE_FURNITURE = (
    "点击这里关注我们的公众号，获取更多精彩内容！",
    "本文来源于网络，如有侵权请联系管理员删除。",
    "Click here to subscribe to our newsletter and never miss an update!",
    "Home | About us | Contact | Privacy policy | Terms of service",
)
REFUSALS = (
    "很抱歉，作为一个人工智能语言模型，我无法回答这个问题。",
    "I'm sorry, but as an AI language model I cannot help with that request.",
)


def get_args():
    parser = Parser(__doc__)
    add_run_arguments(parser)
    parser.set_defaults(tokens=131_072, batch_size=4)
    parser.add_argument("--out_dir", type=Path, default=ROOT / "out" / "cleaning_gain")
    return parser.parse_args()


def mojibake(text: str, rng: random.Random) -> str:
    """UTF-8 that was read as Latin-1, or as GBK."""
    if rng.random() < 0.5:
        return text.encode().decode("latin-1")
    return text.encode().decode("gbk", errors="replace")


def make_dirty(texts: list[str], seed: int = 0) -> list[str]:
    """Add the dirt to texts: in place, then copies of random lines; the whole shuffled."""
    rng = random.Random(seed)
    dirty = list(texts)
    not_ascii = [place for place, text in enumerate(texts) if not text.isascii()]
    wrongly_decoded = rng.sample(not_ascii, min(len(not_ascii), round(MOJIBAKE * len(texts))))
    for place in wrongly_decoded:
        dirty[place] = mojibake(dirty[place], rng)
    rest = sorted(set(range(len(texts))) - set(wrongly_decoded))
    n_boilerplate, n_refused = round(BOILERPLATE * len(texts)), round(REFUSED * len(texts))
    chosen = rng.sample(rest, n_boilerplate + n_refused)
    for place in chosen[:n_boilerplate]:
        furniture = rng.choice(PAGE_FURNITURE)
        dirty[place] = "\n".join(rng.choice([(furniture, dirty[place]), (dirty[place], furniture)]))
    for place in chosen[n_boilerplate:]:
        question = dirty[place].partition("\n")[0]
        dirty[place] = f"{question}\n{rng.choice(REFUSALS)}"
    dirty += rng.choices(dirty, k=round(len(dirty) * DUPLICATES / (1 - DUPLICATES)))
    rng.shuffle(dirty)
    return dirty


def write_texts(texts: list[str], file: Path) -> None:
    with replacing(file) as temporary:
        lines = (json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts)
        temporary.write_text("".join(lines), encoding="utf-8")


def make_files(data_path: Path, folder: Path) -> None:
    """original.jsonl, dirty.jsonl, cleaned.jsonl and held_out.jsonl, where they are not there yet.

    Raises:
        UserError: too few lines to hold any out.
    """
    if (folder / "cleaned.jsonl").is_file():
        return
    with open(data_path, encoding="utf-8") as file:
        texts = [json.loads(line)["text"] for line in file]
    if len(texts) < 200:
        raise UserError(f"{data_path} has fewer than 200 lines: none is held out")
    write_texts(texts[::100], folder / "held_out.jsonl")
    training = [text for number, text in enumerate(texts) if number % 100]
    write_texts(training, folder / "original.jsonl")
    write_texts(make_dirty(training), folder / "dirty.jsonl")
    script, out = ROOT / "scripts" / "prepare_data.py", folder / "cleaned.jsonl"
    flags = ("--stage", "pretrain", "--val_share", "0", "--out", str(out))
    subprocess.run([sys.executable, str(script), str(folder / "dirty.jsonl"), *flags], check=True)


def measure(text: str, args, files: Path, result_file: Path) -> None:
    """Train on one of the three texts, or continue, and evaluate on what was held out."""
    device = pick_device(args.device)
    here = Runtime(device, DTYPES[default_dtype(device)])
    tokenizer = load_tokenizer(args.tokenizer)
    torch.manual_seed(args.seed)
    model = build_model(config_from_sizes({"n_layers": 8} | SIZES[args.size], tokenizer)).to(device)
    rows, held_out = (
        PretrainDataset(files / f"{name}.jsonl", tokenizer, args.max_seq_len) for name in (text, "held_out")
    )
    print(f"{result_file.stem}: {model.num_parameters() / 1e6:.1f} M parameters on {device}", flush=True)
    state_file = result_file.with_suffix(".state.pt")
    model, about = train(VARIANTS["muon"], model, rows, here, args, state_file)
    found = evaluate(model, held_out, tokenizer, here, args.batch_size)
    save_json({"text": text, "seed": args.seed, **about, **found}, result_file)
    state_file.unlink()


def table(results: list[dict]) -> str:
    """Bits per byte of the three, and the two differences that the question is about, seed by seed."""
    bits = {text: {r["seed"]: r["eval_bits_per_byte"] for r in results if r["text"] == text} for text in TEXTS}
    lines = [f"{'trained on':<22}{'seeds':>6}{'held-out bits per byte':>26}"]
    for text, by_seed in bits.items():
        if by_seed:
            lines.append(f"{text:<22}{len(by_seed):>6}{spread(list(by_seed.values()), '.4f'):>26}")
    for one, other in (("cleaned", "original"), ("dirty", "cleaned")):
        both = [bits[one][seed] - bits[other][seed] for seed in bits[one] if seed in bits[other]]
        if both:
            lines.append(f"{f'{one} - {other}':<22}{len(both):>6}{spread(both, '.4f'):>26}")
    return "\n".join(lines)


def main():
    args = get_args()
    if not args.data_path.is_file():
        raise UserError(f"--data_path {args.data_path} is missing")
    files = args.out_dir / args.data_path.stem
    folder = files / settings_name(args)
    folder.mkdir(parents=True, exist_ok=True)
    if not args.table:
        make_files(args.data_path, files)
        for text in TEXTS:
            result_file = folder / f"{text}_seed_{args.seed}.json"
            if not result_file.is_file():
                measure(text, args, files, result_file)
    results = read_results(folder)
    if not results:
        raise UserError(f"{folder} holds no results yet: leave out --table")
    said = table(results)
    save_table(said, folder / "table.txt")
    print(f"\n{args.size}, {args.tokens:,} tokens each, {args.data_path}\n{said}")


if __name__ == "__main__":
    run_main(main)
