"""Reinforcement learning with a critic (PPO): a second network estimates the value of each token of an answer.

Learns from dataset/rl_math.jsonl ({"question" or "conversations", "answer"} lines), starts from out/reason_D.pth, which
stays as the frozen reference, writes out/ppo_D.pth: the policy alone. The critic is saved in out/ppo_D.resume. Answers
are scored by rules, or with --reward_model by out/reward_D.pth.

    python train_ppo.py                                       one GPU, or the CPU
    torchrun --nproc_per_node 2 train_ppo.py                  several GPUs (or processes): DDP
"""

import math
import time

import trainer.start  # noqa: F401  (first of all: what to do where PyTorch, or a home folder, is missing)
import torch

from dataset.rl_dataset import asking_for
from model.actor_critic import CRITIC, ActorCritic
from model.fingerprint import hash_weights
from model.loss import IGNORE_INDEX, target_mask
from trainer.advantages import AdaptiveKL, clipped_policy_loss, clipped_value_loss
from trainer.argument_types import non_negative_float, positive_float, positive_int, probability
from trainer.arguments import ROOT, check_training_arguments, training_parser
from trainer.checkpoint import Checkpoint
from trainer.data import count_steps, open_data
from trainer.errors import UserError, run_main
from trainer.experience import WithCritic, answers_alone, gather_experience
from trainer.metrics import Metrics
from trainer.parallel import should_compile, sync_gradients, wrap_model
from trainer.policy_losses import Clip, clipped_tokens
from trainer.policy_measures import LEARNING_METRICS, learning_sums, spread, step_values
from trainer.preference import token_log_probs
from trainer.reward_model import reward_by_model
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
        batch_size=64,
        learning_rate=1e-5,
        warmup_iters=10,
        packing=False,
    )
    parser.add_argument("--from_weight", default="reason", help="stage, .pth or folder to start from, and reference")
    rl = parser.add_argument_group("reinforcement learning")
    rl.add_argument("--rewards", nargs="*", default=["format:0.2", "accuracy:1"], metavar="NAME:WEIGHT")
    rl.add_argument("--reward_model", metavar="WEIGHTS", help="reward model whose score is added to the rules'")
    rl.add_argument("--max_new_tokens", type=positive_int, default=512, help="maximum answer length in tokens")
    rl.add_argument("--temperature", type=positive_float, default=1.0, help="sampling temperature")
    rl.add_argument("--gamma", type=probability, default=1.0, help="discount factor of later rewards")
    rl.add_argument("--gae_lambda", type=probability, default=0.95, help="1: trust rewards; near 0: trust the critic")
    rl.add_argument("--epsilon", type=positive_float, default=0.2, help="clip of the policy's ratio")
    rl.add_argument(
        "--value_epsilon", type=positive_float, default=0.2, help="clip of the change in the critic's values"
    )
    rl.add_argument("--value_weight", type=positive_float, default=0.5, help="weight of the critic's loss")
    rl.add_argument("--beta", type=non_negative_float, default=0.05, help="initial weight of the KL penalty")
    rl.add_argument(
        "--kl_target", type=positive_float, default=0.05, help="target KL that the weight adapts to, nats/token"
    )
    rl.add_argument("--updates_per_rollout", type=positive_int, default=2, help="optimizer steps on the same answers")
    return parser.parse_args()


def check(args) -> None:
    check_training_arguments(args)
    if args.packing:
        raise UserError("--packing: each answer has a row to itself; leave it out")
    if not args.rewards and not args.reward_model:
        raise UserError("--rewards is empty: name a rule, or give a --reward_model")
    if args.max_new_tokens >= args.max_seq_len:
        raise UserError(f"--max_new_tokens {args.max_new_tokens} leaves no room for a question in --max_seq_len")
    if args.deepspeed:
        raise UserError("--deepspeed: this stage trains two networks at once; use torchrun without it (DDP)")


def main():
    args = get_args()
    check(args)
    rewards, clip = read_rewards(args.rewards), Clip(args.epsilon, args.epsilon)
    run = start_runtime(args)

    # Model
    tokenizer = load_tokenizer(args.tokenizer)
    config = build_config(args, tokenizer)
    start = find_weights(args.from_weight, args)
    model = load_weights(start, config, tokenizer, (CRITIC,), ActorCritic).to(run.device)
    model.copy_policy_to_critic()
    model.gradient_checkpointing = model.critic.gradient_checkpointing = args.gradient_checkpointing
    facts = {"reference": start.name, "reference_hash": hash_weights(model.state_dict())}
    checkpoint = Checkpoint(args, "ppo", config, tokenizer, run, keep=lambda key: not key.startswith(CRITIC), **facts)
    frozen = load_weights(start, config, tokenizer).to(run.device).eval().requires_grad_(False)
    if args.reward_model:
        rewards.append(reward_by_model(find_weights(args.reward_model, args), tokenizer, run.device))

    # Data
    loader, held_out = open_data(asking_for(args.max_new_tokens), args, tokenizer, run)
    total_steps = count_steps(loader, args)
    rollouts = Rollouts(model, tokenizer, loader.dataset, args, rewards, group_size=1)

    # Optimizer
    kl_weight = AdaptiveKL(args.beta, args.kl_target)
    optimizer = WithCritic(make_optimizer(model, args), model, kl_weight)
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
        began, finite = time.monotonic(), True
        known, kl = gather_experience(model, frozen, batches, kl_weight.coefficient, args, run)
        learned = torch.zeros(len(LEARNING_METRICS), device=run.device)
        for _ in range(args.updates_per_rollout):
            step_loss = torch.zeros((), device=run.device)
            for i, (batch, before) in enumerate(zip(batches, known, strict=True)):
                sync_gradients(model, last=i == len(batches) - 1)
                batch = answers_alone(run.to_device(batch))
                labels = batch.pop("labels")
                mask = labels[:, 1:] != IGNORE_INDEX  # (answers, n - 1)
                with run.autocast():
                    out, values = model(**batch, logits_to_keep=target_mask(labels))  # logits: (target tokens, vocab)
                    logits = out.logits / args.temperature  # as they were sampled from
                    log_probs = spread(token_log_probs(logits, labels), mask)  # (answers, n - 1), 0 outside
                    values = spread(values, mask)
                    policy = clipped_policy_loss(log_probs, before.log_probs, before.advantages, mask, args.epsilon)
                    value = clipped_value_loss(values, before.values, before.returns, mask, args.value_epsilon)
                    loss = (policy + args.value_weight * value).sum() / totals.target_tokens
                    rows = batch["attention_mask"].any(1).sum()  # a rank without a question has an empty one
                    loss = loss + out.aux_loss * rows / totals.rows  # MoE's load balance, 0 in a dense model
                clipped = clipped_tokens(log_probs, before.log_probs, before.advantages, mask, clip)
                learned += learning_sums(loss, logits, clipped)
                step_loss += loss.detach()
                scaler.scale(loss * run.world_size).backward()  # DDP averages over the ranks; a step is their sum
            loss = run.sum(step_loss)
            scaler.unscale_(optimizer)
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), args.grad_clip).item()
            if math.isfinite(loss + norm):
                scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad(set_to_none=True)
            finite = finite and math.isfinite(loss + norm)
        kl_weight.update(kl)

        # Log, save, evaluate: progress is saved before it is measured
        progress.advance(totals, skipped=not finite)
        stopping, saving = run.requests()
        if metrics.due(args.log_interval, stopping):
            seconds = time.monotonic() - began
            values = step_values(learned, written, totals, args.updates_per_rollout, seconds, run)
            metrics.log(**values | {"kl": kl, "kl_weight": kl_weight.coefficient}, lr=lr, grad_norm=norm)
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
