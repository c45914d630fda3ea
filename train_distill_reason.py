"""Reasoning: a model that thinks before it answers, trained on answers that show their thinking.

Answers read <think>\\n…\\n</think>\\n<answer>\\n…\\n</answer>; the few tag tokens weigh more in the loss than others.

Learns from dataset/r1_mix_1024.jsonl ({"conversations": [...]} lines), starts from out/rlhf_D.pth,
writes out/reason_D.pth.

    python train_distill_reason.py                                 one GPU, or the CPU
    torchrun --nproc_per_node 2 train_distill_reason.py            several GPUs (or processes): DDP
    deepspeed --num_gpus 2 train_distill_reason.py --deepspeed     DeepSpeed, ZeRO stage 2
"""

import math

import trainer.start  # noqa: F401  (first of all: what to do where PyTorch, or a home folder, is missing)
import torch
from torch import Tensor
from torch.nn import functional as F

from dataset import SFTDataset
from model.loss import IGNORE_INDEX, target_mask
from model.reasoning import tag_sequences
from trainer.arguments import ROOT, add_mix_argument, check_training_arguments, training_parser
from trainer.checkpoint import Checkpoint
from trainer.data import count_steps, open_data
from trainer.errors import UserError, run_main
from trainer.evaluation import evaluate
from trainer.metrics import Metrics
from trainer.parallel import should_compile, sync_gradients, wrap_model
from trainer.runtime import start_runtime
from trainer.schedule import cosine_schedule, make_optimizer, set_learning_rate
from trainer.weights import build_config, find_weights, load_tokenizer, load_weights


def get_args():
    parser = training_parser(
        __doc__,
        data_path=str(ROOT / "dataset" / "r1_mix_1024.jsonl"),
        max_seq_len=1024,
        batch_size=8,
        learning_rate=3e-4,
        warmup_iters=20,
    )
    parser.add_argument("--from_weight", default="rlhf", help="stage, .pth or folder to start from")
    add_mix_argument(parser)
    parser.add_argument(
        "--tag_weight", type=float, default=10.0, help="loss weight of a tag token (a plain token has 1)"
    )
    return parser.parse_args()


def tag_weights(labels: Tensor, tags: list[list[int]], weight: float) -> Tensor:
    """The loss weight of each label: `weight` inside a tag, 1 in the rest of an answer, 0 outside the loss.

    A tag matches only as a whole sequence of ids, so a piece of it inside another word has weight 1.

    Args:
        labels: (batch, n) int64, -100 = ignored.
        tags: the ids of each tag, see `tag_sequences`.

    Returns:
        (batch, n) fp32.
    """
    weights = (labels != IGNORE_INDEX).float()
    for tag in tags:
        if labels.size(1) < len(tag):
            continue
        begins = (labels.unfold(1, len(tag), 1) == labels.new_tensor(tag)).all(-1)
        for place in range(len(tag)):
            weights[:, place : place + begins.size(1)][begins] = weight
    return weights


def weighted_next_token_loss(logits: Tensor, labels: Tensor, weights: Tensor) -> Tensor:
    """sum_t w_t * -log p(label_t), in nats: weighted cross-entropy.

    The loop divides it by the number of target tokens, not by the sum of their weights: a tag's weight takes nothing
    away from the others.

    Args:
        logits: (target tokens, vocab) at `target_mask(labels)`, any float dtype; the softmax is taken in fp32.
        labels: (batch, n) int64, not shifted; -100 is ignored.
        weights: (batch, n) fp32.

    Returns:
        fp32 scalar.
    """
    learned = target_mask(labels)[:, :-1]
    nats = F.cross_entropy(logits.float(), labels[:, 1:][learned], reduction="none")
    return (nats * weights[:, 1:][learned]).sum()


def main():
    args = get_args()
    check_training_arguments(args)
    if not 0 <= args.tag_weight < math.inf:
        raise UserError(f"--tag_weight {args.tag_weight:g} must be 0 or more; 1 is plain fine-tuning")
    run = start_runtime(args)

    # Model
    tokenizer = load_tokenizer(args.tokenizer)
    config = build_config(args, tokenizer)
    checkpoint = Checkpoint(args, "reason", config, tokenizer, run, tag_weight=args.tag_weight)
    model = load_weights(find_weights(args.from_weight, args), config, tokenizer).to(run.device)
    model.gradient_checkpointing = args.gradient_checkpointing
    tags = tag_sequences(tokenizer)

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
                weights = tag_weights(labels, tags, args.tag_weight)
                loss = weighted_next_token_loss(out.logits, labels, weights) / totals.target_tokens
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
