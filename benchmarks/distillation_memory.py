"""Peak memory and time of one distillation step (forward and backward), in three forms with the same loss.

    python -m benchmarks.distillation_memory                     student 26M, teacher 104M, 8 rows of 512 tokens
    python -m benchmarks.distillation_memory --batch_size 32

all logits       the student's and the teacher's logits of every position, then the loss at the target tokens
learned logits   only the positions that predict an answer token, of both models, all at once
in parts         what train_distillation.py does: the teacher a few rows at a time

Memory is what the step needs above the two models: torch's own count on a GPU, the process's peak (Linux) on a CPU.
"""

import time
from functools import partial
from pathlib import Path

import trainer.start  # noqa: F401  (first of all: what to do where PyTorch, or a home folder, is missing)
import torch
from torch import Tensor

from model import LMConfig, MiniMindLM
from model.loss import target_mask
from train_distillation import distillation_loss
from trainer.argument_types import positive_int
from trainer.arguments import Parser
from trainer.chunked import sum_over_rows
from trainer.device import DTYPES, pick_device
from trainer.errors import run_main
from trainer.teacher import teacher_logits

SIZES = {"student": {"dim": 512, "n_layers": 8}, "teacher": {"dim": 768, "n_layers": 16}}


def all_logits(student: MiniMindLM, teacher: MiniMindLM, batch: dict, labels: Tensor, loss_of) -> Tensor:
    logits = student(**batch).logits
    with torch.no_grad():
        taught = teacher(**batch).logits
    learned = target_mask(labels)
    return loss_of(logits[learned], taught[learned], labels[:, 1:][learned[:, :-1]])


def learned_logits(student: MiniMindLM, teacher: MiniMindLM, batch: dict, labels: Tensor, loss_of) -> Tensor:
    learned = target_mask(labels)
    logits = student(**batch, logits_to_keep=learned).logits
    taught = teacher_logits(teacher, batch, learned, logits.size(-1))
    return loss_of(logits, taught, labels[:, 1:][learned[:, :-1]])


def in_parts(student: MiniMindLM, teacher: MiniMindLM, batch: dict, labels: Tensor, loss_of) -> Tensor:
    logits = student(**batch, logits_to_keep=target_mask(labels)).logits

    def loss_of_rows(logits: Tensor, batch: dict, labels: Tensor) -> Tensor:
        learned = target_mask(labels)
        return loss_of(logits, teacher_logits(teacher, batch, learned, logits.size(-1)), labels[:, 1:][learned[:, :-1]])

    return sum_over_rows(loss_of_rows, logits, batch, labels)


class PeakMemory:
    """`with PeakMemory(device) as peak: …`; then `peak.mebibytes` is the most that was held above the start."""

    def __init__(self, device: torch.device):
        self.device = device

    def __enter__(self) -> "PeakMemory":
        if self.device.type == "cuda":
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            self._before = torch.cuda.memory_allocated()
        else:
            Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the peak starts anew
            self._before = self._status("VmRSS")
        return self

    def __exit__(self, *_) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        peak = torch.cuda.max_memory_allocated() if self.device.type == "cuda" else self._status("VmHWM")
        self.mebibytes = (peak - self._before) / 2**20

    @staticmethod
    def _status(name: str) -> int:
        status = Path("/proc/self/status").read_text(encoding="utf-8")
        line = next(line for line in status.splitlines() if line.startswith(name))
        return int(line.split()[1]) * 1024


def main():
    parser = Parser(__doc__)
    parser.add_argument("--batch_size", type=positive_int, default=8)
    parser.add_argument("--max_seq_len", type=positive_int, default=512)
    parser.add_argument("--learned", type=float, default=0.5, help="share of the tokens that are answers")
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16", help="precision of autocast")
    parser.add_argument("--device", default=None)
    parser.add_argument("--rounds", type=positive_int, default=3)
    args = parser.parse_args()
    device = pick_device(args.device)
    torch.manual_seed(0)
    student, teacher = (MiniMindLM(LMConfig(**size)).to(device) for size in SIZES.values())
    teacher.requires_grad_(False).eval()

    ids = torch.randint(3, student.config.vocab_size, (args.batch_size, args.max_seq_len), device=device)
    place = torch.arange(args.max_seq_len, device=device)
    labels = torch.where(place >= args.max_seq_len * (1 - args.learned), ids, -100)
    real = torch.ones_like(ids, dtype=torch.bool)
    batch = {"input_ids": ids, "position_ids": place.expand_as(ids), "attention_mask": real}
    loss_of = partial(distillation_loss, alpha=0.0, temperature=1.0)

    forms = {"all logits": all_logits, "learned logits": learned_logits, "in parts": in_parts}
    results = {name: [] for name in forms}
    for _ in range(args.rounds):  # in turns, so that noise affects all equally
        for name, form in forms.items():
            with PeakMemory(device) as peak:
                started = time.monotonic()
                with torch.autocast(device.type, DTYPES[args.dtype], enabled=args.dtype != "float32"):
                    loss = form(student, teacher, batch, labels, loss_of) / target_mask(labels).sum()
                loss.backward()
            norm = torch.nn.utils.get_total_norm([p.grad for p in student.parameters()])
            results[name].append((peak.mebibytes, time.monotonic() - started, float(loss.detach()), float(norm)))
            del loss
            student.zero_grad(set_to_none=True)

    print(f"{args.batch_size} rows of {args.max_seq_len} tokens, {args.learned:.0%} learned, {args.dtype}, {device}")
    print(f"{'form':<16}{'peak MiB':>10}{'seconds':>10}{'loss':>10}{'gradient':>12}")
    for name, rounds in results.items():
        memory, seconds, loss, norm = (sorted(column)[len(column) // 2] for column in zip(*rounds, strict=True))
        print(f"{name:<16}{memory:>10,.0f}{seconds:>10.2f}{loss:>10.4f}{norm:>12.5f}")


if __name__ == "__main__":
    run_main(main)
