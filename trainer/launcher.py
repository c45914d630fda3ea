"""Each process's rank and the number of processes, as set by the launcher (torchrun, deepspeed, accelerate)."""

from collections.abc import Mapping
from typing import NamedTuple

from trainer.errors import UserError, print_notice

HOW = "torchrun --nproc_per_node N train_….py starts N processes and sets them all"
COPIES = {"SLURM_STEP_NUM_TASKS": "srun", "OMPI_COMM_WORLD_SIZE": "mpirun", "PMI_SIZE": "mpirun"}
# What `accelerate launch` hands to its own library, which we do not use: the value that asks for nothing, accelerate's
# flag, and ours
ACCELERATE = {
    "ACCELERATE_MIXED_PRECISION": ("no", "--mixed_precision", "--dtype"),
    "ACCELERATE_USE_DEEPSPEED": ("false", "--use_deepspeed", "--deepspeed"),
    "ACCELERATE_DYNAMO_BACKEND": ("no", "--dynamo_backend", "--compile"),
    "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": ("1", "--gradient_accumulation_steps", "--accumulation_steps"),
}


class Place(NamedTuple):
    """A process among those of a run; `local_rank` is its number on its machine, None if the launcher sets none."""

    rank: int = 0
    world_size: int = 1
    local_rank: int | None = None
    launched: bool = False


def read_place(environment: Mapping[str, str]) -> Place:
    """The place given by the environment; without a launcher a process is alone.

    Raises:
        UserError: the environment is incomplete or inconsistent.
    """
    _tell_accelerate(environment)
    numbers = {name: _number(name, environment) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT")}
    rank, world_size, local_rank = (numbers[name] for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
    if rank is None:
        if (world_size or 1) > 1:
            raise UserError(
                f"WORLD_SIZE is {world_size} in the environment, but there is no RANK: {HOW}; to train in this "
                "process alone, `unset WORLD_SIZE`"
            )
        _tell_copies(environment)
        return Place()
    lacking = [name for name in ("WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT") if not environment.get(name)]
    if lacking:
        raise UserError(
            f"RANK is {rank} in the environment, but there is no {' and no '.join(lacking)}: {HOW}; to train in this "
            "process alone, `unset RANK`"
        )
    if not 0 <= rank < world_size:
        raise UserError(f"RANK is {rank} and WORLD_SIZE {world_size} in the environment: ranks count from 0; {HOW}")
    if local_rank is not None and local_rank < 0:
        raise UserError(f"LOCAL_RANK is {local_rank} in the environment: it counts from 0; {HOW}")
    return Place(rank, world_size, local_rank, launched=True)


def _number(name: str, environment: Mapping[str, str]) -> int | None:
    text = environment.get(name)
    if text is None:
        return None
    try:
        return int(text)
    except ValueError:
        raise UserError(f"{name} is {text!r} in the environment, which is not an integer: {HOW}") from None


def _tell_accelerate(environment: Mapping[str, str]) -> None:
    """Name the settings of `accelerate launch` that were given but have no effect here."""
    for name, (nothing, theirs, ours) in ACCELERATE.items():
        value = environment.get(name, nothing)
        if value.lower() not in (nothing, ""):
            print_notice(f"accelerate's {theirs} {value} has no effect: use {ours}")


def _tell_copies(environment: Mapping[str, str]) -> None:
    """Warn that srun or mpirun has started independent copies, which is seldom intended."""
    for name, launcher in COPIES.items():
        if environment.get(name, "1") not in ("0", "1"):
            print_notice(
                f"{launcher} started {environment[name]} copies of this script, each training alone: for one run on "
                f"all of them, have {launcher} start torchrun once per machine"
            )
            return
