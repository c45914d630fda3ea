"""LoRA: teach a model one more thing (who it is, a field of knowledge) with a low-rank update; its weights stay fixed.

Learns from dataset/lora_identity.jsonl or lora_medical.jsonl ({"conversations": [...]} lines), starts from
out/full_sft_D.pth, writes only the adapter to out/lora/NAME_D.pth. `eval_model.py --lora_name NAME` uses both.

    python train_lora.py --lora_name identity                           one GPU, or the CPU
    torchrun --nproc_per_node 2 train_lora.py --lora_name identity      several GPUs (or processes): DDP
    deepspeed --num_gpus 2 train_lora.py --deepspeed                    DeepSpeed, ZeRO stage 2
"""

import math
import re

import trainer.start  # noqa: F401  (first of all: what to do where PyTorch, or a home folder, is missing)
import torch

from dataset import SFTDataset
from model.loss import next_token_loss, target_mask
from model.model_lora import apply_lora, base_hash, is_lora
from model.nf4 import describe_nf4, quantize_nf4
from trainer.argument_types import positive_int
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
        data_path=str(ROOT / "dataset" / "lora_identity.jsonl"),
        epochs=10,
        batch_size=16,
        learning_rate=1e-3,
        warmup_iters=10,
    )
    parser.add_argument("--from_weight", default="full_sft", help="stage, .pth or folder to start from")
    add_mix_argument(parser)
    lora = parser.add_argument_group("lora")
    lora.add_argument("--lora_name", default="identity", help="adapter name: out/lora/NAME_512.pth")
    lora.add_argument("--rank", type=positive_int, default=16, help="rank of the update (alpha / rank) B A")
    lora.add_argument("--alpha", type=float, default=None, help="(default: rank)")
    lora.add_argument(
        "--target_modules",
        type=lambda names: names.replace(" ", "").split(","),
        metavar="wq,wk,wv,wo,w1,w2,w3",
        help="Linears to adapt, also in experts (default: all square ones: wq and wo; generation 3: q_proj and o_proj)",
    )
    lora.add_argument("--quantize", choices=("nf4",), help="QLoRA: freeze the blocks' weights in 4 bits while training")
    return parser.parse_args()


def main():
    args = get_args()
    check_training_arguments(args)
    if not re.fullmatch(r"[\w.-]+", args.lora_name) or args.lora_name.endswith(".pth"):
        raise UserError(
            f"--lora_name {args.lora_name!r} must be letters, digits, '_', '-' and '.', without .pth at the end"
        )
    run = start_runtime(args)

    # Model
    tokenizer = load_tokenizer(args.tokenizer)
    config = build_config(args, tokenizer)
    base = find_weights(args.from_weight, args)
    model = load_weights(base, config, tokenizer)
    model.gradient_checkpointing = args.gradient_checkpointing
    facts = {"base": base.name, "base_hash": base_hash(model)}
    try:
        rank, alpha, targets = apply_lora(model, args.rank, args.alpha, args.target_modules)
        if args.quantize:
            quantize_nf4(model)
            run.print(describe_nf4(model))
    except ValueError as error:
        raise UserError(f"--rank, --alpha, --target_modules, --quantize: {error}") from None
    model.to(run.device)  # now: the adapter starts from the same numbers on every device
    facts |= {"rank": rank, "alpha": alpha, "targets": list(targets)}
    checkpoint = Checkpoint(args, f"lora/{args.lora_name}", config, tokenizer, run, keep=is_lora, **facts)

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
