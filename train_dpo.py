"""Preference learning: from pairs of answers, a better and a worse one, learn to prefer the better; no reward model.

Learns from dataset/dpo.jsonl ({"chosen": [...], "rejected": [...]} lines), starts from out/full_sft_D.pth, which stays
as the frozen reference, writes out/rlhf_D.pth.

    python train_dpo.py                                       one GPU, or the CPU
    torchrun --nproc_per_node 2 train_dpo.py                  several GPUs (or processes): DDP
    deepspeed --num_gpus 2 train_dpo.py --deepspeed           DeepSpeed, ZeRO stage 2
"""

import copy
import math

import trainer.start  # noqa: F401  (first of all: what to do where PyTorch, or a home folder, is missing)
import torch
import torch.nn.functional as F
from torch import Tensor

from dataset import DPODataset
from dataset.caches import limit_caches
from model.fingerprint import hash_weights
from model.loss import target_mask
from trainer.argument_types import BooleanFlag, positive_float
from trainer.arguments import ROOT, check_training_arguments, training_parser
from trainer.checkpoint import Checkpoint
from trainer.data import count_steps, open_data
from trainer.errors import run_main
from trainer.metrics import Metrics
from trainer.parallel import should_compile, sync_gradients, wrap_model
from trainer.preference import (
    DPO_METRICS,
    attach_reference_log_probs,
    count_pairs,
    dpo_metrics,
    evaluate_pairs,
    mean_per_answer,
    reference_token_log_probs,
    sum_per_answer,
    token_log_probs,
)
from trainer.runtime import start_runtime
from trainer.schedule import cosine_schedule, make_optimizer, set_learning_rate
from trainer.weights import build_config, find_weights, load_tokenizer, load_weights


def get_args():
    parser = training_parser(
        __doc__,
        data_path=str(ROOT / "dataset" / "dpo.jsonl"),
        max_seq_len=1024,
        epochs=2,
        batch_size=4,
        learning_rate=1e-5,
        warmup_iters=20,
    )
    parser.add_argument("--from_weight", default="full_sft", help="stage, .pth or folder to start from, and reference")
    dpo = parser.add_argument_group("dpo")
    dpo.add_argument(
        "--beta", type=positive_float, default=0.1, help="strength of the pull towards the reference model"
    )
    dpo.add_argument("--length_normalize", action=BooleanFlag, help="use an answer's mean log-probability, not its sum")
    dpo.add_argument(
        "--cache_reference",
        action=BooleanFlag,
        default=True,
        help="run the reference once, before training, and cache its log-probabilities (default: on)",
    )
    return parser.parse_args()


def dpo_loss(policy: Tensor, reference: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """Direct preference optimisation (Rafailov et al. 2023, arXiv:2305.18290, equation 7):

        -log sigmoid(margin),  margin = beta (log pi(w) - log pi_ref(w)) - beta (log pi(l) - log pi_ref(l))

    with w the chosen and l the rejected answer; beta log(pi / pi_ref) is the reward that pi implies.

    Args:
        policy, reference: log-probabilities of the answers, (pairs, 2) fp32: chosen, rejected.

    Returns:
        each pair's loss in nats, and its margin, (pairs,).
    """
    rewards = beta * (policy - reference)
    margins = rewards[:, 0] - rewards[:, 1]
    return -F.logsigmoid(margins), margins


def main():
    args = get_args()
    check_training_arguments(args)
    run = start_runtime(args)

    # Model
    tokenizer = load_tokenizer(args.tokenizer)
    config = build_config(args, tokenizer)
    start = find_weights(args.from_weight, args)
    model = load_weights(start, config, tokenizer).to(run.device)
    model.gradient_checkpointing = args.gradient_checkpointing
    start_hash = hash_weights(model.state_dict())
    checkpoint = Checkpoint(args, "rlhf", config, tokenizer, run, reference=start.name, reference_hash=start_hash)

    # Data
    loader, held_out = open_data(DPODataset, args, tokenizer, run)
    total_steps = count_steps(loader, args)
    frozen = None if args.cache_reference else copy.deepcopy(model).eval().requires_grad_(False)
    if args.cache_reference:  # each batch then brings the reference's log-probabilities along
        for dataset in filter(None, (loader.dataset, held_out)):
            attach_reference_log_probs(dataset, model, start_hash, run, args.batch_size)
    limit_caches([args.data_path], args.cache_limit)  # delete the least recently used
    per_answer = mean_per_answer if args.length_normalize else sum_per_answer  # of its tokens' log-probabilities

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
        pairs = run.sum(count_pairs(batches))  # a row holds whole pairs: chosen, rejected, chosen, rejected, …
        step_metrics = torch.zeros(len(DPO_METRICS), device=run.device)
        for batch in batches:
            sync_gradients(model, last=batch is batches[-1])
            batch = run.to_device(batch)
            labels = batch.pop("labels")  # the input ids, not shifted; -100 where there is no target
            cached = batch.pop("reference", None)  # log-probabilities, where they were computed beforehand
            with run.autocast():
                out = model(**batch, logits_to_keep=target_mask(labels))  # logits: (target tokens, vocab)
                log_probs = token_log_probs(out.logits, labels)  # (target tokens,)
                reference_log_probs = reference_token_log_probs(cached, frozen, batch, labels)  # as many; no gradient
                policy = per_answer(log_probs, batch, labels)  # (pairs, 2): chosen, rejected
                reference = per_answer(reference_log_probs, batch, labels)  # (pairs, 2)
                losses, margins = dpo_loss(policy, reference, args.beta)  # (pairs,)
                loss = losses.sum() / pairs
                rows = batch["attention_mask"].any(1).sum()  # the last batch of an epoch is filled up with empty ones
                loss = loss + out.aux_loss * rows / totals.rows  # MoE's load balance, 0 in a dense model
            step_metrics += dpo_metrics(losses, margins, policy, log_probs - reference_log_probs, batch, labels) / pairs
            scaler.scale(loss * run.world_size).backward()  # DDP averages over the ranks; a step is their sum
        values = dict(zip(DPO_METRICS, run.sums(*step_metrics.tolist()), strict=True))
        if run.sharded:  # DeepSpeed and FSDP2 clip, step and zero the gradients in one
            norm = scaler.clip_and_step()
        else:
            scaler.unscale_(optimizer)
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), args.grad_clip).item()
            if math.isfinite(values["loss"] + norm):
                scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad(set_to_none=True)

        # Log, save, evaluate: progress is saved before it is measured
        progress.advance(totals, skipped=not math.isfinite(values["loss"] + norm))
        stopping, saving = run.requests()
        if metrics.due(args.log_interval, stopping):
            metrics.log(**values, lr=lr, grad_norm=norm)
        if metrics.due(args.save_interval, saving):
            checkpoint.save(model, optimizer, scaler, progress, metrics.last)
        if held_out and metrics.due(args.eval_interval):
            metrics.log_evaluation(
                lambda: evaluate_pairs(model, frozen, held_out, run, args.batch_size, per_answer, dpo_loss, args.beta)
            )
            checkpoint.add_metrics(progress, metrics.last)
        if stopping:
            break
    checkpoint.wait()  # the last save is still being written
    metrics.close()
    run.finish(finished=progress.step >= total_steps)


if __name__ == "__main__":
    run_main(main)
