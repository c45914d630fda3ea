"""A plan as readable lines."""

import math

from model import LMConfig
from scripts.planning.estimates import ROOM, Machines, sent_bytes
from scripts.planning.memory import Engine, saved_bytes, state_bytes, working_bytes
from scripts.planning.recommending import Plan
from scripts.planning.sizes import count_active, count_parameters, forward_flops, training_flops

TOKENS_PER_PARAMETER = 20  # about what Hoffmann et al. 2022 (arXiv:2203.15556) found best for a given compute


def describe_model(config: LMConfig, n: int) -> str:
    """Parameters and operations."""
    parameters = count_parameters(config)
    active = f", {count_active(config) / 1e6:,.1f} M of them for each token" if config.use_moe else ""
    return "\n".join(
        [
            f"parameters    {parameters.total:,}{active}: embedding {parameters.embedding:,}, attention "
            f"{parameters.attention:,}, feed-forward {parameters.feed_forward:,}, norms {parameters.norms:,}",
            f"operations    {forward_flops(config, n) / n / 1e6:,.1f} M per token forward, "
            f"{training_flops(config, n) / n / 1e6:,.1f} M per token of training, "
            f"{training_flops(config, n, True) / n / 1e6:,.1f} M with --gradient_checkpointing (rows of {n})",
        ]
    )


def describe_plans(
    config: LMConfig, plans: list[tuple[Engine, Plan | None]], machines: Machines, optimizer: str
) -> str:
    """A table of each engine's memory per GPU in GB, and time per step."""
    columns = ("engine", "weights", "gradients", "optimizer", "copies", "batch", "saved", "working", "peak")
    lines = [
        f"memory of each GPU in GB, of {machines.gpu.memory / 1e9:,.0f} (a run should stay below {ROOM:.0%} of it)",
        "  ".join(f"{name:>11}" for name in (*columns, "sent/step", "step")),
    ]
    for engine, plan in plans:
        state = state_bytes(config, engine, machines.gpus, optimizer)
        cells = [engine.name, *(f"{size / 1e9:,.2f}" for size in state)]
        if plan is None:
            lines.append("  ".join(f"{cell:>11}" for cell in (*cells, "does not fit")))
            continue
        work = plan.work
        saved = saved_bytes(config, work.rows, work.n, work.half, work.checkpointing, packed=True)
        working = working_bytes(config, work.rows, work.n, work.half)
        batch = f"{work.rows} x {work.accumulation}{'*' if work.checkpointing else ''}"
        sent = sent_bytes(config, engine, machines.gpus, work.accumulation)
        cells += [batch, *(f"{size / 1e9:,.2f}" for size in (saved, working, plan.step.memory, sent))]
        lines.append("  ".join(f"{cell:>11}" for cell in (*cells, _seconds(plan.step.seconds))))
    lines.append("batch: rows of a micro-batch x accumulation; *: with --gradient_checkpointing")
    return "\n".join(lines)


def describe_run(config: LMConfig, plan: Plan | None, machines: Machines, args, per_machine: int) -> str:
    """The recommended engine, the command, time and price."""
    if plan is None:
        return (
            "recommended   none of these engines: not even one row fits. Use more GPUs, or larger ones, or tensor and "
            "pipeline parallelism (docs/scaling.md says which engine has them)"
        )
    work = plan.work
    step_tokens = work.n * work.rows * work.accumulation * machines.gpus
    tokens = args.tokens or TOKENS_PER_PARAMETER * count_parameters(config).total
    steps = math.ceil(tokens / step_tokens)
    hours = steps * plan.step.seconds / 3600
    bound = "sending" if plan.step.sending > plan.step.computing else "computing"
    price = f", {hours * machines.gpus * args.price:,.0f} at {args.price:g} per hour" if args.price else ""
    return "\n".join(
        [
            f"recommended   {plan.engine.name}: {_command(plan, machines.gpus, args, per_machine)}",
            f"run           {tokens:,} tokens in {steps:,} steps of {step_tokens:,}",
            f"estimated     {_seconds(plan.step.seconds)} for a step, bound by {bound} ({machines.mfu:.0%} of "
            f"{machines.gpu.flops / 1e12:,.0f} TFLOPS, {machines.bandwidth / 1e9:g} GB/s); "
            f"{_hours(hours)} in all, {hours * machines.gpus:,.1f} GPU hours{price}",
        ]
    )


def _command(plan: Plan, gpus: int, args, per_machine: int) -> str:
    flags = [f"--dim {args.dim} --n_layers {args.n_layers}", *(["--use_moe"] if args.use_moe else [])]
    flags += [f"--max_seq_len {args.max_seq_len}", f"--batch_size {plan.work.rows}"]
    flags += [f"--accumulation_steps {plan.work.accumulation}", f"--dtype {args.dtype}"]
    flags += ["--gradient_checkpointing"] if plan.work.checkpointing else []
    flags += [f"--optimizer {args.optimizer}"] if args.optimizer != "adamw" else []
    flags += [plan.engine.flags] if plan.engine.flags else []
    launcher = "python"
    if gpus > 1:
        nodes = math.ceil(gpus / per_machine)
        machines = f"--nnodes {nodes} --node_rank N --master_addr A --master_port P " if nodes > 1 else ""
        launcher = f"torchrun {machines}--nproc_per_node {min(gpus, per_machine)}"
    return f"{launcher} train_pretrain.py {' '.join(flags)}"


def _seconds(seconds: float) -> str:
    return f"{seconds * 1000:,.0f} ms" if seconds < 1 else f"{seconds:,.1f} s"


def _hours(hours: float) -> str:
    if hours < 1:
        return f"{hours * 60:,.0f} minutes"
    return f"{hours:,.1f} hours" if hours < 72 else f"{hours / 24:,.0f} days"
