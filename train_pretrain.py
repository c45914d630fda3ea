"""Pretraining: from scratch to a model that continues text, by predicting each next token.

Learns from dataset/pretrain_hq.jsonl ({"text": ...} lines), writes out/pretrain_D.pth. With --from_weight it continues
from existing weights (continued pretraining), with --mix it trains on several files at once.

    python train_pretrain.py                                       one GPU, or the CPU
    torchrun --nproc_per_node 2 train_pretrain.py                  several GPUs (or processes): DDP
    deepspeed --num_gpus 2 train_pretrain.py --deepspeed           DeepSpeed, ZeRO stage 2
"""

import math

import trainer.start  # noqa: F401  (first of all: what to do where PyTorch, or a home folder, is missing)
import torch

from dataset import PretrainDataset
from model import build_model
from model.loss import next_token_loss, target_mask
from trainer.arguments import (
    ROOT,
    add_fsdp_argument,
    add_mix_argument,
    add_stream_arguments,
    check_training_arguments,
    training_parser,
)
from trainer.balancing import balance_experts
from trainer.checkpoint import Checkpoint
from trainer.data import count_steps, open_data
from trainer.errors import run_main
from trainer.evaluation import evaluate
from trainer.metrics import Metrics
from trainer.parallel import should_compile, sync_gradients, wrap_model
from trainer.runtime import start_runtime
from trainer.schedule import cosine_schedule, make_optimizer, set_learning_rate
from trainer.variant_arguments import add_variant_arguments, check_variant_arguments, check_variant_engine
from trainer.weights import build_config, find_weights, load_tokenizer, load_weights


def get_args():
    parser = training_parser(
        __doc__,
        data_path=str(ROOT / "dataset" / "pretrain_hq.jsonl"),
        batch_size=32,
        accumulation_steps=2,  # 32k tokens a step on one device
        learning_rate=1e-3,
        warmup_iters=50,
    )
    parser.add_argument(
        "--from_weight", default="none", help="stage, .pth or folder to continue from (none: train from scratch)"
    )
    add_mix_argument(parser)
    add_stream_arguments(parser)
    add_fsdp_argument(parser)
    add_variant_arguments(parser)
    return parser.parse_args()


def main():
    args = get_args()
    check_training_arguments(args)
    check_variant_arguments(args)
    run = start_runtime(args)

    # Model
    tokenizer = load_tokenizer(args.tokenizer)
    config = build_config(args, tokenizer)
    check_variant_engine(config, args)
    checkpoint = Checkpoint(args, "pretrain", config, tokenizer, run)
    if args.from_weight == "none":
        model = build_model(config)
    else:
        model = load_weights(find_weights(args.from_weight, args), config, tokenizer)
    if config.mtp_depth:
        model.mtp.learn(args.mtp_weight)
    model.to(run.device)
    model.gradient_checkpointing = args.gradient_checkpointing

    # Data
    loader, held_out = open_data(PretrainDataset, args, tokenizer, run)
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
                nats = next_token_loss(out.logits, labels)  # a sum over the tokens
                if out.mtp_loss is not None:  # with --mtp_depth, another sum
                    nats = nats + out.mtp_loss
                loss = nats / totals.target_tokens
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
        measured = {}
        if config.balance == "bias":  # no gradient leads there
            measured["violation"] = balance_experts(model, args.balance_rate * math.isfinite(loss + norm), run)

        # Log, save, evaluate: progress is saved before it is measured
        progress.advance(totals, skipped=not math.isfinite(loss + norm))
        stopping, saving = run.requests()
        if metrics.due(args.log_interval, stopping):
            metrics.log(loss=loss, lr=lr, grad_norm=norm, **measured)
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
