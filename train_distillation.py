"""White-box distillation: a small model learns a larger one's probabilities of all next tokens, not only the right one.

Learns from dataset/sft_1024.jsonl ({"conversations": [...]} lines) and from the teacher, which is any MiniMind of
the same tokenizer (full_sft_768, a .pth, with its json beside it) or any local transformers folder with that tokenizer;
starts from out/full_sft_D.pth, writes out/full_dist_D.pth.

    python train_distillation.py --teacher_weight full_sft_768     one GPU, or the CPU
    torchrun --nproc_per_node 2 train_distillation.py              several GPUs (or processes): DDP
    deepspeed --num_gpus 2 train_distillation.py --deepspeed       DeepSpeed, ZeRO stage 2

Black-box distillation needs no stage of its own: scripts/collect_teacher_answers.py, then train_full_sft.py.
"""

import math

import trainer.start  # noqa: F401  (first of all: what to do where PyTorch, or a home folder, is missing)
import torch
from torch import Tensor
from torch.nn import functional as F

from dataset import SFTDataset
from model.fingerprint import hash_weights
from model.loss import target_mask
from trainer.argument_types import positive_float
from trainer.arguments import ROOT, add_mix_argument, check_training_arguments, training_parser
from trainer.checkpoint import Checkpoint
from trainer.chunked import sum_over_rows
from trainer.data import count_steps, open_data
from trainer.errors import UserError, run_main
from trainer.evaluation import evaluate
from trainer.metrics import Metrics
from trainer.parallel import should_compile, sync_gradients, wrap_model
from trainer.runtime import start_runtime
from trainer.schedule import cosine_schedule, make_optimizer, set_learning_rate
from trainer.teacher import load_teacher, teacher_logits
from trainer.weights import build_config, find_weights, load_tokenizer, load_weights


def get_args():
    parser = training_parser(
        __doc__,
        data_path=str(ROOT / "dataset" / "sft_1024.jsonl"),
        batch_size=16,
        learning_rate=3e-4,
        warmup_iters=20,
    )
    parser.add_argument("--from_weight", default="full_sft", help="stage, .pth or folder the student starts from")
    add_mix_argument(parser)
    parser.add_argument("--teacher_weight", default="full_sft_768", help="stage, name in --out_dir, .pth or folder")
    parser.add_argument(
        "--alpha", type=float, default=0.0, help="weight of the cross-entropy loss; the rest is the teacher's"
    )
    parser.add_argument(
        "--temperature",
        type=positive_float,
        default=1.0,
        help="softmax temperature; above 1 it softens both distributions",
    )
    return parser.parse_args()


def distillation_loss(student: Tensor, teacher: Tensor, targets: Tensor, alpha: float, temperature: float) -> Tensor:
    """alpha * CE + (1 - alpha) * T² * KL(teacher_T || student_T), summed over tokens, in nats.

    x_T is softmax(x / T); T² keeps the gradient's size when T changes (Hinton et al. 2015, arXiv:1503.02531).

    Args:
        student, teacher: (tokens, vocab) logits, any float dtype; the softmaxes are taken in fp32.
        targets: (tokens,) int64, the tokens that followed.

    Returns:
        fp32 scalar.
    """
    student, teacher = student.float(), teacher.float()
    cross_entropy = F.cross_entropy(student, targets, reduction="sum")
    log_q = (student / temperature).log_softmax(-1)
    log_p = (teacher / temperature).log_softmax(-1)
    kl = (log_p.exp() * (log_p - log_q)).sum()
    return alpha * cross_entropy + (1 - alpha) * temperature**2 * kl


def main():
    args = get_args()
    check_training_arguments(args)
    if not 0 <= args.alpha <= 1:
        raise UserError(f"--alpha {args.alpha:g} must be from 0 (the teacher alone) to 1 (no teacher)")
    run = start_runtime(args)

    # Student and teacher
    tokenizer = load_tokenizer(args.tokenizer)
    config = build_config(args, tokenizer)
    teacher = load_teacher(find_weights(args.teacher_weight, args), tokenizer, args.max_seq_len)
    facts = {name: getattr(args, name) for name in ("teacher_weight", "alpha", "temperature")}
    facts["teacher_hash"] = hash_weights(teacher.state_dict())
    checkpoint = Checkpoint(args, "full_dist", config, tokenizer, run, **facts)
    model = load_weights(find_weights(args.from_weight, args), config, tokenizer).to(run.device)
    model.gradient_checkpointing = args.gradient_checkpointing
    teacher.to(run.device)

    def loss_of(logits: Tensor, batch: dict[str, Tensor], labels: Tensor) -> Tensor:
        learned = target_mask(labels)
        taught = teacher_logits(teacher, batch, learned, logits.size(-1))  # (target tokens, vocab), as the student's
        return distillation_loss(logits, taught, labels[:, 1:][learned[:, :-1]], args.alpha, args.temperature)

    # Data
    loader, held_out = open_data(SFTDataset, args, tokenizer, run)
    total_steps = count_steps(loader, args)

    # Optimizer
    optimizer = make_optimizer(model, args)
    scaler = torch.amp.GradScaler(run.device.type, enabled=run.dtype == torch.float16)
    model, optimizer, scaler = wrap_model(model, optimizer, scaler, run, should_compile(args, run, total_steps))

    # Resume
    progress = checkpoint.load(model, optimizer, scaler, loader.dataset)
    metrics = Metrics(args, checkpoint.path, model, total_steps, progress, run)

    # Loop: an optimizer step is a list of micro-batches, (rows, n) each
    model.train()
    for batches in loader.steps(progress.step, total_steps):
        lr = cosine_schedule(progress.step, total_steps, args.warmup_iters, args.learning_rate)
        set_learning_rate(optimizer, lr)
        totals = run.totals(batches)  # target tokens and rows of the whole step, over all ranks
        step_loss = torch.zeros((), device=run.device)
        for batch in batches:
            sync_gradients(model, last=batch is batches[-1])
            batch = run.to_device(batch)
            labels = batch.pop("labels")  # the input ids, not shifted; -100 where there is no target
            with run.autocast():
                out = model(**batch, logits_to_keep=target_mask(labels))  # logits: (target tokens, vocab)
                # loss_of(out.logits, batch, labels), a few rows at a time: 287 MiB at the peak instead of 549
                loss = sum_over_rows(loss_of, out.logits, batch, labels) / totals.target_tokens
                rows = batch["attention_mask"].any(1).sum()  # the last batch of an epoch is filled up with empty ones
                loss = loss + out.aux_loss * rows / totals.rows  # MoE's load balance, 0 in a dense model
            step_loss += loss.detach()
            scaler.scale(loss * run.world_size).backward()  # DDP averages over the ranks; a step is their sum
        loss = run.sum(step_loss)
        if run.sharded:  # DeepSpeed and FSDP2 clip, step and zero the gradients in one
            norm = scaler.clip_and_step()
        else:
            scaler.unscale_(optimizer)
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), args.grad_clip).item()
            if math.isfinite(loss + norm):
                scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad(set_to_none=True)

        # Log, save, evaluate: progress is saved before it is measured
        progress.advance(totals, skipped=not math.isfinite(loss + norm))
        stopping, saving = run.requests()
        if metrics.due(args.log_interval, stopping):
            metrics.log(loss=loss, lr=lr, grad_norm=norm)
        if metrics.due(args.save_interval, saving):
            checkpoint.save(model, optimizer, scaler, progress, metrics.last)
        if held_out and metrics.due(args.eval_interval):
            metrics.log_evaluation(lambda: evaluate(model, held_out, tokenizer, run, args.batch_size))
            checkpoint.add_metrics(progress, metrics.last)
        if stopping:
            break
    checkpoint.wait()  # the last save is still being written
    metrics.close()
    run.finish(finished=progress.step >= total_steps)


if __name__ == "__main__":
    run_main(main)
