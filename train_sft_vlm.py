"""Vision fine-tuning: from a model that describes images to one that answers questions about them, mixed with text.

Learns from dataset/sft_vlm_data.jsonl ({"image": ..., "conversations": [...]} lines, images in dataset/sft_images/),
starts from out/pretrain_vlm_D.pth, writes out/sft_vlm_D.pth. The projection and the language model are trained,
the tower is not. With --multi, several images a line: sft_vlm_data_multi.jsonl, sft_multi_images/, sft_vlm_multi_D.pth.

    python train_sft_vlm.py                                        one GPU, or the CPU
    torchrun --nproc_per_node 2 train_sft_vlm.py                   several GPUs (or processes): DDP
    deepspeed --num_gpus 2 train_sft_vlm.py --deepspeed            DeepSpeed, ZeRO stage 2
"""

import math

import trainer.start  # noqa: F401  (first of all: what to do where PyTorch, or a home folder, is missing)
import torch

from model.loss import next_token_loss, target_mask
from trainer.argument_types import BooleanFlag
from trainer.arguments import ROOT, add_vision_arguments, check_training_arguments, training_parser
from trainer.checkpoint import Checkpoint
from trainer.data import count_steps, open_data
from trainer.errors import run_main
from trainer.evaluation import evaluate
from trainer.metrics import Metrics
from trainer.parallel import should_compile, sync_gradients, wrap_model
from trainer.runtime import start_runtime
from trainer.schedule import cosine_schedule, make_optimizer, set_learning_rate
from trainer.vision import cache_features, image_data, load_vlm, open_vision
from trainer.weights import build_config, find_weights, load_tokenizer


def get_args():
    parser = training_parser(
        __doc__,
        data_path=None,
        epochs=6,
        batch_size=8,
        learning_rate=1e-4,
        warmup_iters=20,
        max_seq_len=1536,
    )
    add_vision_arguments(parser, images_path=None)
    parser.add_argument("--from_weight", default="pretrain_vlm", help="stage, .pth or folder to start from")
    parser.add_argument("--multi", action=BooleanFlag, help="several images per line: different data and weights")
    args = parser.parse_args()
    data, images = (
        ("sft_vlm_data_multi.jsonl", "sft_multi_images") if args.multi else ("sft_vlm_data.jsonl", "sft_images")
    )
    args.data_path = args.data_path or str(ROOT / "dataset" / data)
    args.images_path = args.images_path or str(ROOT / "dataset" / images)
    return args


def main():
    args = get_args()
    check_training_arguments(args)
    run = start_runtime(args)

    # Model
    tokenizer = load_tokenizer(args.tokenizer)
    config = build_config(args, tokenizer)
    vision = open_vision(args.vision_model)
    stage = "sft_vlm_multi" if args.multi else "sft_vlm"
    checkpoint = Checkpoint(args, stage, config, tokenizer, run, vision_tower=vision.hash)
    model = load_vlm(find_weights(args.from_weight, args), config, tokenizer, vision).to(run.device)
    model.gradient_checkpointing = args.gradient_checkpointing

    # Data
    loader, held_out = open_data(image_data(args, vision), args, tokenizer, run)
    if args.cache_features:
        cache_features(model, (loader.dataset, held_out), args, vision, run)
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
                loss = next_token_loss(out.logits, labels) / totals.target_tokens  # a sum over the tokens
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
