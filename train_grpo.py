"""Reinforcement learning (GRPO): the model answers each question several times, rules score the answers, and those that
are better than the others of their group become more likely. No teacher, no reward model.

Learns from dataset/rl_math.jsonl ({"question" or "conversations", "answer"} lines), starts from out/reason_D.pth, which
stays as the frozen reference, writes out/grpo_D.pth. A step generates answers, scores them and learns from them
--updates_per_rollout times (default: once).

    python train_grpo.py                                      one GPU, or the CPU
    torchrun --nproc_per_node 2 train_grpo.py                 several GPUs (or processes): DDP
    deepspeed --num_gpus 2 train_grpo.py --deepspeed          DeepSpeed, ZeRO stage 2
"""

import copy
import math
import time

import trainer.start  # noqa: F401  (first of all: what to do where PyTorch, or a home folder, is missing)
import torch

from dataset.rl_dataset import asking_for
from model.fingerprint import hash_weights
from model.loss import IGNORE_INDEX, target_mask
from trainer.argument_types import non_negative_float, non_negative_int, positive_float, positive_int
from trainer.arguments import ROOT, check_training_arguments, training_parser
from trainer.checkpoint import Checkpoint
from trainer.data import count_steps, open_data
from trainer.errors import UserError, run_main
from trainer.metrics import Metrics
from trainer.parallel import should_compile, sync_gradients, wrap_model
from trainer.policy_losses import LOSSES, Clip, Share, clipped_tokens, kl_estimate
from trainer.policy_measures import LEARNING_METRICS, learning_sums, reference_log_probs, spread, step_values
from trainer.preference import token_log_probs
from trainer.rewards import read_rewards
from trainer.rollouts import Rollouts, evaluate_answers
from trainer.runtime import start_runtime
from trainer.schedule import cosine_schedule, make_optimizer, set_learning_rate
from trainer.weights import build_config, find_weights, load_tokenizer, load_weights


def get_args():
    parser = training_parser(
        __doc__,
        data_path=str(ROOT / "dataset" / "rl_math.jsonl"),
        max_seq_len=1024,
        batch_size=8,
        learning_rate=1e-5,
        warmup_iters=10,
        packing=False,
    )
    parser.add_argument("--from_weight", default="reason", help="stage, .pth or folder to start from, and reference")
    rl = parser.add_argument_group("reinforcement learning")
    rl.add_argument("--rewards", nargs="+", default=["format:0.2", "accuracy:1"], metavar="NAME:WEIGHT")
    rl.add_argument("--group_size", type=positive_int, default=8, help="answers per question")
    rl.add_argument("--max_new_tokens", type=positive_int, default=512, help="maximum answer length in tokens")
    rl.add_argument("--temperature", type=positive_float, default=1.0, help="sampling temperature")
    rl.add_argument("--loss", choices=tuple(LOSSES), default="grpo", help="objective; see trainer/policy_losses.py")
    rl.add_argument("--beta", type=non_negative_float, default=0.0, help="weight of the KL penalty; 0: none")
    rl.add_argument("--epsilon", type=positive_float, help="lower clip of the ratio (default: the paper's)")
    rl.add_argument("--epsilon_high", type=positive_float, help="upper clip of the ratio (default: the paper's)")
    rl.add_argument("--updates_per_rollout", type=positive_int, default=1, help="optimizer steps on the same answers")
    rl.add_argument(
        "--resample", type=non_negative_int, help="how often to replace a question whose rewards are all equal"
    )
    return parser.parse_args()


def check(args) -> None:
    check_training_arguments(args)
    if args.packing:
        raise UserError("--packing: each answer has a row to itself; leave it out")
    if args.group_size < 2:
        raise UserError("--group_size must be 2 or more: an answer is compared with the others of its group")
    if args.max_new_tokens >= args.max_seq_len:
        raise UserError(f"--max_new_tokens {args.max_new_tokens} leaves no room for a question in --max_seq_len")
    if args.deepspeed and args.zero_stage == 3:
        raise UserError("--zero_stage 3 shards the weights that generate the answers: use 2 or less")


def main():
    args = get_args()
    check(args)
    rewards, variant = read_rewards(args.rewards), LOSSES[args.loss]
    clip = Clip(args.epsilon or variant.clip.low, args.epsilon_high or args.epsilon or variant.clip.high)
    run = start_runtime(args)

    # Model
    tokenizer = load_tokenizer(args.tokenizer)
    config = build_config(args, tokenizer)
    start = find_weights(args.from_weight, args)
    model = load_weights(start, config, tokenizer).to(run.device)
    model.gradient_checkpointing = args.gradient_checkpointing
    start_hash = hash_weights(model.state_dict())
    checkpoint = Checkpoint(args, "grpo", config, tokenizer, run, reference=start.name, reference_hash=start_hash)
    frozen = copy.deepcopy(model).eval().requires_grad_(False) if args.beta else None

    # Data
    loader, held_out = open_data(asking_for(args.max_new_tokens), args, tokenizer, run)
    total_steps = count_steps(loader, args)
    resample = variant.resample if args.resample is None else args.resample
    rollouts = Rollouts(model, tokenizer, loader.dataset, args, rewards, args.group_size, variant.scale, resample)

    # Optimizer
    optimizer = make_optimizer(model, args)
    scaler = torch.amp.GradScaler(run.device.type, enabled=run.dtype == torch.float16)
    model, optimizer, scaler = wrap_model(model, optimizer, scaler, run, should_compile(args, run, total_steps))

    # Resume
    progress = checkpoint.load(model, optimizer, scaler, loader.dataset)
    metrics = Metrics(args, checkpoint.path, model, total_steps, progress, run)

    # Loop: a step is a list of micro-batches of questions; each becomes one of answers, (answers, n)
    model.train()
    for questions in loader.steps(progress.step, total_steps):
        lr = cosine_schedule(progress.step, total_steps, args.warmup_iters, args.learning_rate)
        set_learning_rate(optimizer, lr)
        batches, written = rollouts.write(model, questions, progress.step)
        totals = run.totals(batches)  # target tokens (those of answers) and rows (answers) on all ranks together
        share = Share(totals.rows, totals.target_tokens, args.max_new_tokens)
        learned = torch.zeros(len(LEARNING_METRICS), device=run.device)
        began, finite = time.monotonic(), True
        before = [None] * len(batches)  # log-probabilities under the policy that sampled, once known
        for _ in range(args.updates_per_rollout):
            step_loss = torch.zeros((), device=run.device)
            for i, batch in enumerate(batches):
                sync_gradients(model, last=i == len(batches) - 1)
                batch = run.to_device(batch)
                labels, advantages, _ = (batch.pop(name) for name in ("labels", "advantages", "rewards"))
                mask = labels[:, 1:] != IGNORE_INDEX  # (answers, n - 1)
                with run.autocast():
                    out = model(**batch, logits_to_keep=target_mask(labels))  # logits: (target tokens, vocab)
                    logits = out.logits / args.temperature  # as they were sampled from
                    log_probs = spread(token_log_probs(logits, labels), mask)  # (answers, n - 1), 0 outside
                    if before[i] is None:
                        before[i] = log_probs.detach()
                    losses, weights = variant.objective(log_probs, before[i], advantages, mask, share, clip)
                    loss, kl = (losses * weights).sum(), None
                    if frozen is not None:
                        kl = kl_estimate(log_probs, reference_log_probs(frozen, batch, labels, mask, args.temperature))
                        loss = loss + args.beta * (kl * weights).sum()
                    rows = batch["attention_mask"].any(1).sum()  # a rank without a question has an empty one
                    loss = loss + out.aux_loss * rows / totals.rows  # MoE's load balance, 0 in a dense model
                clipped = clipped_tokens(log_probs, before[i], advantages, mask, clip, args.loss)
                learned += learning_sums(loss, logits, clipped, kl)
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
            finite = finite and math.isfinite(loss + norm)

        # Log, save, evaluate: progress is saved before it is measured
        progress.advance(totals, skipped=not finite)
        stopping, saving = run.requests()
        if metrics.due(args.log_interval, stopping):
            seconds = time.monotonic() - began
            values = step_values(learned, written, totals, args.updates_per_rollout, seconds, run)
            metrics.log(**values, lr=lr, grad_norm=norm)
        if metrics.due(args.save_interval, saving):
            checkpoint.save(model, optimizer, scaler, progress, metrics.last)
        if held_out and metrics.due(args.eval_interval):
            metrics.log_evaluation(lambda: evaluate_answers(model, held_out, rollouts.writer, rewards, run, args))
            checkpoint.add_metrics(progress, metrics.last)
        if stopping:
            break
    checkpoint.wait()  # the last save is still being written
    metrics.close()
    run.finish(finished=progress.step >= total_steps)


if __name__ == "__main__":
    run_main(main)
