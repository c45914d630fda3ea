"""A process's rank in a run, from the environment; incomplete settings end in a line that says what to do."""

import pytest

from trainer.errors import UserError
from trainer.launcher import Place, read_place

# torchrun's environment for the second of two processes
WHOLE = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}


def without(*names: str, **changes: str) -> dict[str, str]:
    return {name: value for name, value in WHOLE.items() if name not in names} | changes


@pytest.mark.parametrize(
    ("environment", "place"),
    [
        ({}, Place(0, 1, None, launched=False)),
        ({"WORLD_SIZE": "1"}, Place(0, 1, None, launched=False)),
        ({"LOCAL_RANK": "3", "MASTER_ADDR": "host"}, Place(0, 1, None, launched=False)),
        (WHOLE, Place(1, 2, 1, launched=True)),
        (without("LOCAL_RANK"), Place(1, 2, None, launched=True)),
        (without(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0"), Place(0, 1, 0, launched=True)),
    ],
)
def test_a_place(environment, place):
    assert read_place(environment) == place


@pytest.mark.parametrize(
    ("environment", "told"),
    [
        ({"WORLD_SIZE": "4"}, "WORLD_SIZE is 4 in the environment, but there is no RANK: torchrun .*unset WORLD_SIZE"),
        (without("WORLD_SIZE"), "RANK is 1 in the environment, but there is no WORLD_SIZE: torchrun .*unset RANK"),
        (without("MASTER_ADDR"), "no MASTER_ADDR: torchrun"),
        (without("MASTER_ADDR", "MASTER_PORT"), "no MASTER_ADDR and no MASTER_PORT: torchrun"),
        (without(MASTER_ADDR=""), "no MASTER_ADDR: torchrun"),
        (without(RANK="2"), "RANK is 2 and WORLD_SIZE 2 .*count from 0"),
        (without(RANK="-1"), "RANK is -1 and WORLD_SIZE 2"),
        (without(LOCAL_RANK="-1"), "LOCAL_RANK is -1"),
        (without(RANK="one"), "RANK is 'one' .*not an integer"),
        (without(WORLD_SIZE="2.0"), "WORLD_SIZE is '2.0'"),
        (without(MASTER_PORT="http"), "MASTER_PORT is 'http'"),
        (without(LOCAL_RANK=""), "LOCAL_RANK is ''"),
    ],
)
def test_half_a_place(environment, told):
    with pytest.raises(UserError, match=told):
        read_place(environment)


def test_what_accelerate_was_asked_for_in_vain_is_told(capsys, monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    nothing = {"ACCELERATE_MIXED_PRECISION": "no", "ACCELERATE_DYNAMO_BACKEND": "NO", "ACCELERATE_USE_CPU": "True"}
    assert read_place(WHOLE | nothing) == Place(1, 2, 1, launched=True)
    assert capsys.readouterr().err == ""
    read_place(nothing | {"ACCELERATE_MIXED_PRECISION": "fp16", "ACCELERATE_USE_DEEPSPEED": "true"})
    assert capsys.readouterr().err.splitlines() == [
        "accelerate's --mixed_precision fp16 has no effect: use --dtype",
        "accelerate's --use_deepspeed true has no effect: use --deepspeed",
    ]


@pytest.mark.parametrize(
    ("name", "launcher"), [("SLURM_STEP_NUM_TASKS", "srun"), ("OMPI_COMM_WORLD_SIZE", "mpirun"), ("PMI_SIZE", "mpirun")]
)
def test_copies_that_know_nothing_of_each_other_are_told(name, launcher, capsys, monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    assert read_place({name: "1"}) == Place()
    assert capsys.readouterr().err == ""
    assert read_place({name: "4"}) == Place()
    assert capsys.readouterr().err.startswith(f"{launcher} started 4 copies of this script, each training alone")
    read_place(WHOLE | {name: "4"})  # srun has started torchrun
    assert capsys.readouterr().err == ""
