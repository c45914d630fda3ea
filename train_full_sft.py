"""Supervised fine-tuning: from a model that continues text to one that answers, by learning the assistant's turns.

Learns from dataset/sft_mini_512.jsonl ({"conversations": [...]} lines), starts from out/pretrain_D.pth,
writes out/full_sft_D.pth.

    python train_full_sft.py                                       one GPU, or the CPU
    torchrun --nproc_per_node 2 train_full_sft.py                  several GPUs (or processes): DDP
    deepspeed --num_gpus 2 train_full_sft.py --deepspeed           DeepSpeed, ZeRO stage 2
"""

import trainer.start  # noqa: F401  (first of all: what to do where PyTorch, or a home folder, is missing)
import torch

from dataset import SFTDataset
from model.loss import next_token_loss, target_mask
from trainer.arguments import ROOT, check_training_arguments, training_parser
from trainer.checkpoint import Checkpoint
from trainer.data import count_steps, open_data
from trainer.errors import run_main
from trainer.evaluation import evaluate
from trainer.metrics import Metrics
from trainer.parallel import deepspeed_backward, deepspeed_step, should_compile, wrap_model
from trainer.runtime import start_runtime
from trainer.schedule import cosine_schedule, make_optimizer, set_learning_rate
from trainer.weights import build_config, find_weights, load_tokenizer, load_weights


def get_args():
    parser = training_parser(
        __doc__,
        data_path=str(ROOT / "dataset" / "sft_mini_512.jsonl"),
        batch_size=16,
        learning_rate=3e-4,
        warmup_iters=20,
    )
    parser.add_argument("--from_weight", default="pretrain", help="stage, .pth or folder to start from")
    return parser.parse_args()


def main():
    args = get_args()
    check_training_arguments(args)
    run = start_runtime(args)

    # Model
    tokenizer = load_tokenizer(args.tokenizer)
    config = build_config(args, tokenizer)
    checkpoint = Checkpoint(args, "full_sft", config, tokenizer, run)
    model = load_weights(find_weights(args.from_weight, args), config, tokenizer).to(run.device)
    model.gradient_checkpointing = args.gradient_checkpointing

    # Data
    loader, held_out = open_data(SFTDataset, args, tokenizer, run)
    total_steps = count_steps(loader, args)

    # Optimizer
    optimizer = make_optimizer(model, args)
    scaler = torch.amp.GradScaler(run.device.type, enabled=args.dtype == "float16")
    model, optimizer = wrap_model(model, optimizer, run, should_compile(args, run, total_steps))

    # Resume
    progress = checkpoint.load(model, optimizer, scaler, loader.dataset)
    metrics = Metrics(args, checkpoint.path, model, total_steps, progress, run)

    # Loop: an optimizer step is a list of micro-batches
    model.train()
    for batches in loader.steps(progress.step, total_steps):
        lr = cosine_schedule(progress.step, total_steps, args.warmup_iters, args.learning_rate)
        set_learning_rate(optimizer, lr)
        totals = run.totals(batches)
        step_loss = torch.zeros((), device=run.device)
        for batch in batches:
            last = batch is batches[-1]
            batch = run.to_device(batch)
            labels = batch.pop("labels")
            with run.gradients_synced(model, last):
                with run.autocast():
                    out = model(**batch, logits_to_keep=target_mask(labels))
                    loss = next_token_loss(out.logits, labels) / totals.target_tokens
                    loss = loss + out.aux_loss * batch["attention_mask"].any(1).sum() / totals.rows
                step_loss += loss.detach()
                loss = loss * run.world_size  # the ranks' gradients are averaged, and the step wants their sum
                if args.deepspeed:
                    deepspeed_backward(model, loss, scaler, last)
                else:
                    scaler.scale(loss).backward()
        (loss,) = run.sum(step_loss)
        if args.deepspeed:  # clips, steps and zeroes by itself, and skips what is not finite
            norm = deepspeed_step(model, scaler)
            run.is_finite(norm, loss)
        else:
            scaler.unscale_(optimizer)
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), args.grad_clip)
            if run.is_finite(norm, loss):
                scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad(set_to_none=True)

        # Log, save, evaluate: what is learned is safe before it is measured
        progress.advance(totals, run.non_finite)
        stopping = run.asked_to_stop
        if metrics.due(args.log_interval, stopping):
            metrics.log(loss=loss, lr=lr, grad_norm=float(norm))
        if metrics.due(args.save_interval, stopping):
            checkpoint.save(model, optimizer, scaler, progress, metrics.last)
        if held_out and metrics.due(args.eval_interval):
            metrics.log_evaluation(lambda: evaluate(model, held_out, tokenizer, run, args.batch_size))
            checkpoint.add_metrics(progress, metrics.last)
        if stopping:
            break
    metrics.close()
    run.finish(finished=progress.step >= total_steps)


if __name__ == "__main__":
    run_main(main)
