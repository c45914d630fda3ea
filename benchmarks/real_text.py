"""LoRA, DPO and reasoning on real text: each stage's own measure before and after it, on held-out lines.

    python -m benchmarks.real_text --data_dir ../shared/data          trains a model of the demo's size first

Trains on pretrain_hq, sft_mini_512, lora_medical, dpo and r1_mix_1024 (.jsonl) of a folder; the last lines of each
are held out. The model and the split files are in out/real_text; a second call reuses what is there.
"""

from pathlib import Path

import trainer.start  # noqa: F401  (first of all: what to do where PyTorch, or a home folder, is missing)
import torch

from dataset import DPODataset, SFTDataset
from model.model_lora import load_lora
from model.reasoning import is_well_formed
from scripts.demo.exam import answer, open_model, read_lines, run
from scripts.demo.measures import with_error
from train_dpo import dpo_loss
from trainer.argument_types import positive_int
from trainer.arguments import ROOT, Parser
from trainer.errors import UserError, run_main
from trainer.evaluation import evaluate
from trainer.preference import evaluate_pairs, sum_per_answer
from trainer.runtime import Runtime

HELD_OUT_LINES = 200  # lines of each file
OUT = ROOT / "out" / "real_text"
COMMON = ("--dim", "256", "--out_dir", str(OUT), "--accumulation_steps", "1", "--eval_interval", "0", "--resume")
BY_MUON = ("--batch_size", "8", "--optimizer", "muon", "--warmup_iters", "20")
STAGES = {  # script, file, steps as a share of --steps, flags
    "train_pretrain.py": ("pretrain_hq", 1.0, (*BY_MUON, "--learning_rate", "2e-3", "--max_seq_len", "512")),
    "train_full_sft.py": ("sft_mini_512", 0.5, (*BY_MUON, "--learning_rate", "1e-3", "--max_seq_len", "512")),
    "train_lora.py": (
        "lora_medical",
        0.5,
        ("--lora_name", "medical", "--batch_size", "8", "--learning_rate", "3e-3", "--max_seq_len", "512"),
    ),
    "train_dpo.py": ("dpo", 0.4, ("--batch_size", "4", "--learning_rate", "2e-5")),
    "train_distill_reason.py": (
        "r1_mix_1024",
        1.5,
        (*BY_MUON, "--learning_rate", "1e-3", "--max_seq_len", "512", "--from_weight", "full_sft"),
    ),
}


def split(source: Path) -> tuple[Path, Path]:
    """Split a file into all lines but the last HELD_OUT_LINES, and those, as files in OUT.

    Raises:
        UserError: the file does not exist or has too few lines.
    """
    if not source.is_file():
        raise UserError(f"{source} is missing: --data_dir names the folder that has it")
    if source.parent.resolve() == OUT.resolve():
        raise UserError(f"--data_dir {source.parent} is where the split files go: name the folder of the whole ones")
    with open(source, encoding="utf-8-sig") as file:
        lines = file.readlines()
    if len(lines) <= HELD_OUT_LINES:
        raise UserError(f"{source} has {len(lines)} lines: {HELD_OUT_LINES} are held out, and none would be left")
    learned, kept = OUT / source.name, OUT / f"eval_{source.name}"
    learned.write_text("".join(lines[:-HELD_OUT_LINES]), encoding="utf-8")
    kept.write_text("".join(lines[-HELD_OUT_LINES:]), encoding="utf-8")
    return learned, kept


def main():
    parser = Parser(__doc__)
    parser.add_argument("--data_dir", type=Path, required=True)
    parser.add_argument(
        "--steps", type=positive_int, default=120, help="steps of pretraining; the other stages take fewer"
    )
    args = parser.parse_args()
    OUT.mkdir(parents=True, exist_ok=True)
    kept = {}
    for script, (name, share, flags) in STAGES.items():
        learned, kept[name] = split(args.data_dir / f"{name}.jsonl")
        steps = ("--epochs", "99", "--max_steps", str(max(1, round(share * args.steps))))
        run(script, "--data_path", str(learned), *COMMON, *steps, *flags)

    start, tokenizer = open_model(OUT / "full_sft_256.pth")
    here = Runtime(start.device, torch.float32)

    def loss(model, name: str) -> float:
        rows = SFTDataset(kept[name], tokenizer, 512)
        return evaluate(model, rows, tokenizer, here, 8)["eval_loss"]

    def accuracy(model) -> float:
        pairs = DPODataset(kept["dpo"], tokenizer, 1024)
        return evaluate_pairs(model, model, pairs, here, 8, sum_per_answer, dpo_loss, beta=0.1)["eval_accuracy"]

    def form(model) -> str:
        questions = [line["conversations"][0]["content"] for line in read_lines(kept["r1_mix_1024"])]
        replies, _ = answer(model, tokenizer, questions, max_new_tokens=400)
        return with_error(sum(map(is_well_formed, replies)), len(replies))

    after_dpo, reasons = (open_model(OUT / f"{name}_256.pth")[0] for name in ("rlhf", "reason"))
    before = loss(start, "lora_medical"), accuracy(start), loss(start, "sft_mini_512"), form(start)
    load_lora(start, OUT / "lora" / "medical_256.pth")
    print(f"\n{HELD_OUT_LINES} lines of each file held out")
    print(f"LoRA       nats per token, lora_medical        {before[0]:.3f} -> {loss(start, 'lora_medical'):.3f}")
    print(f"DPO        better answer likelier, dpo       {before[1]:.1%} -> {accuracy(after_dpo):.1%}")
    print(f"           nats per token, sft_mini_512        {before[2]:.3f} -> {loss(after_dpo, 'sft_mini_512'):.3f}")
    print(f"reasoning  form right, r1_mix_1024           {before[3]} -> {form(reasons)}")


if __name__ == "__main__":
    run_main(main)
