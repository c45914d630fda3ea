"""A reward model: from pairs of answers, a better and a worse one, learn to score an answer.

Learns from dataset/dpo.jsonl ({"chosen": [...], "rejected": [...]} lines), starts from out/full_sft_D.pth, writes
out/reward_D.pth: the same parameters, and score.weight (1, dim), read at the last </s>.

    python train_reward.py                                    one GPU, or the CPU
    torchrun --nproc_per_node 2 train_reward.py               several GPUs (or processes): DDP
    deepspeed --num_gpus 2 train_reward.py --deepspeed        DeepSpeed, ZeRO stage 2
"""

import math

import trainer.start  # noqa: F401  (first of all: what to do where PyTorch, or a home folder, is missing)
import torch
import torch.nn.functional as F
from torch import Tensor

from dataset import DPODataset
from model.model_reward import SCORE, MiniMindReward, answer_scores
from trainer.arguments import ROOT, check_training_arguments, training_parser
from trainer.checkpoint import Checkpoint
from trainer.data import count_steps, open_data
from trainer.errors import run_main
from trainer.metrics import Metrics
from trainer.parallel import should_compile, sync_gradients, wrap_model
from trainer.preference import count_pairs
from trainer.reward_model import REWARD_METRICS, evaluate_scores, reward_metrics
from trainer.runtime import start_runtime
from trainer.schedule import cosine_schedule, make_optimizer, set_learning_rate
from trainer.weights import build_config, find_weights, load_tokenizer, load_weights


def get_args():
    parser = training_parser(
        __doc__,
        data_path=str(ROOT / "dataset" / "dpo.jsonl"),
        max_seq_len=1024,
        batch_size=4,
        learning_rate=1e-4,
        warmup_iters=20,
    )
    parser.add_argument("--from_weight", default="full_sft", help="stage, .pth or folder to start from")
    return parser.parse_args()


def bradley_terry_loss(scores: Tensor) -> Tensor:
    """-log sigmoid(score of the chosen answer - score of the rejected one): how improbable the choice is if the odds of
    an answer are the exponential of its score (Bradley & Terry 1952; InstructGPT, Ouyang et al. 2022, arXiv:2203.02155,
    equation 1).

    Args:
        scores: (pairs, 2) fp32: chosen, rejected.

    Returns:
        each pair's loss in nats, (pairs,).
    """
    return -F.logsigmoid(scores[:, 0] - scores[:, 1])


def main():
    args = get_args()
    check_training_arguments(args)
    run = start_runtime(args)

    # Model
    tokenizer = load_tokenizer(args.tokenizer)
    config = build_config(args, tokenizer)
    checkpoint = Checkpoint(args, "reward", config, tokenizer, run)
    model = load_weights(find_weights(args.from_weight, args), config, tokenizer, (SCORE,), MiniMindReward)
    model = model.to(run.device)
    model.gradient_checkpointing = args.gradient_checkpointing

    # Data
    loader, held_out = open_data(DPODataset, args, tokenizer, run)
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
        pairs = run.sum(count_pairs(batches))  # a row holds whole pairs: chosen, rejected, chosen, rejected, …
        step_metrics = torch.zeros(len(REWARD_METRICS), device=run.device)
        for batch in batches:
            sync_gradients(model, last=batch is batches[-1])
            batch = run.to_device(batch)
            labels = batch.pop("labels")  # the input ids, not shifted; -100 where there is no target
            with run.autocast():
                scores, aux_loss = answer_scores(model, batch, labels)  # read at each answer's last token
                scores = scores.view(-1, 2)  # (pairs, 2): chosen, rejected
                losses = bradley_terry_loss(scores)  # (pairs,)
                loss = losses.sum() / pairs
                rows = batch["attention_mask"].any(1).sum()  # the last batch of an epoch is filled up with empty ones
                loss = loss + aux_loss * rows / totals.rows  # MoE's load balance, 0 in a dense model
            step_metrics += reward_metrics(losses, scores) / pairs
            scaler.scale(loss * run.world_size).backward()  # DDP averages over the ranks; a step is their sum
        values = dict(zip(REWARD_METRICS, run.sums(*step_metrics.tolist()), strict=True))
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
            metrics.log_evaluation(lambda: evaluate_scores(model, held_out, run, args.batch_size, bradley_terry_loss))
            checkpoint.add_metrics(progress, metrics.last)
        if stopping:
            break
    checkpoint.wait()  # the last save is still being written
    metrics.close()
    run.finish(finished=progress.step >= total_steps)


if __name__ == "__main__":
    run_main(main)
