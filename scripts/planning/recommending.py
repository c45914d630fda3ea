"""Recommends engine, micro-batch and accumulation: those with the shortest estimated time that fit."""

import math
from typing import NamedTuple

from model import LMConfig
from scripts.planning.estimates import ROOM, Machines, Step, Work, estimate_step
from scripts.planning.memory import ALONE, ENGINES, Engine

MOST_ROWS = 256  # of a micro-batch: more gain nothing
AS_FAST = 1.02  # times the fastest: then the simplest of them is recommended


class Plan(NamedTuple):
    engine: Engine
    work: Work
    step: Step


def best_plan(
    config: LMConfig, engine: Engine, machines: Machines, n: int, step_rows: int, half: bool, optimizer: str
) -> Plan | None:
    """The engine's plan with the largest micro-batch that fits, without gradient checkpointing if possible; None if not
    even one row fits.

    Args:
        step_rows: rows of an optimizer step on each GPU.
    """
    for checkpointing in (False, True):
        rows = 1 << (min(step_rows, MOST_ROWS).bit_length() - 1)
        while rows:
            work = Work(n, rows, math.ceil(step_rows / rows), checkpointing, half)
            step = estimate_step(config, engine, machines, work, optimizer)
            if step.memory <= ROOM * machines.gpu.memory:
                return Plan(engine, work, step)
            rows //= 2
    return None


def all_plans(
    config: LMConfig, machines: Machines, n: int, step_rows: int, half: bool, optimizer: str
) -> list[tuple[Engine, Plan | None]]:
    """The best plan of every engine for this number of GPUs, the simplest engine first."""
    engines = [ALONE] if machines.gpus == 1 else [engine for engine in ENGINES if engine is not ALONE]
    if optimizer != "adamw":  # ZeRO shards that alone
        engines = [engine for engine in engines if not engine.splits_optimizer]
    return [(engine, best_plan(config, engine, machines, n, step_rows, half, optimizer)) for engine in engines]


def recommend(plans: list[tuple[Engine, Plan | None]]) -> Plan | None:
    """The simplest plan of those about as fast as the fastest; None if none fits."""
    fitting = [plan for _, plan in plans if plan is not None]
    if not fitting:
        return None
    fastest = min(plan.step.seconds / (plan.work.rows * plan.work.accumulation) for plan in fitting)
    return next(
        plan for plan in fitting if plan.step.seconds / (plan.work.rows * plan.work.accumulation) <= AS_FAST * fastest
    )
