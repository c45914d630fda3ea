"""Launchers other than torchrun on one machine: two machines (both this one), and `accelerate launch`."""

import importlib.util
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.running import ROOT, free_port
from tests.stages.test_resume import assert_equal
from tests.stages.training import distance, losses, weights

FOUR_STEPS = ("--max_steps", "4", "--batch_size", "2")


@pytest.fixture(scope="module")
def ddp(pretrain, tmp_path_factory):
    out = tmp_path_factory.mktemp("ddp")
    pretrain(out, *FOUR_STEPS, processes=2)
    return out


def on_two_machines(stage, out, *flags) -> str:
    """The output of rank 0 of a run with one rank on each of two machines, here both this one."""
    common = ("--nnodes", "2", "--nproc_per_node", "1", "--master_addr", "127.0.0.1", "--master_port", free_port())

    def machine(rank: int) -> str:
        launcher = ("-m", "torch.distributed.run", *map(str, common), "--node_rank", str(rank))
        return stage(out, *flags, launcher=launcher).stdout

    with ThreadPoolExecutor(2) as machines:
        first, _ = machines.map(machine, range(2))
    return first


def test_two_machines_with_ddp(pretrain, ddp, tmp_path):
    assert "DDP on 2 processes" in on_two_machines(pretrain, tmp_path, *FOUR_STEPS)
    assert_equal(weights(tmp_path), weights(ddp))


def test_two_machines_with_zero(pretrain, ddp, tmp_path):
    printed = on_two_machines(pretrain, tmp_path, *FOUR_STEPS, "--deepspeed", "--zero_stage", "3")
    assert "DeepSpeed ZeRO-3 on 2 processes" in printed
    assert losses(tmp_path) == pytest.approx(losses(ddp), abs=1e-4)
    assert distance(weights(tmp_path), weights(ddp)) < 1e-3


def test_two_machines_with_fsdp(pretrain, ddp, tmp_path):
    printed = on_two_machines(pretrain, tmp_path, *FOUR_STEPS, "--fsdp")
    assert "FSDP2 on 2 processes" in printed
    assert losses(tmp_path) == pytest.approx(losses(ddp), abs=1e-4)
    assert distance(weights(tmp_path), weights(ddp)) < 1e-3


@pytest.mark.skipif(importlib.util.find_spec("accelerate") is None, reason="accelerate is not installed")
def test_accelerate_launch_starts_two_processes(pretrain, ddp, tmp_path):
    """Its --multi_gpu starts several processes, with or without GPUs."""
    launcher = ("-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1")
    more = ("--mixed_precision", "bf16", "--dynamo_backend", "no", "--main_process_port", str(free_port()))
    done = pretrain(tmp_path, *FOUR_STEPS, launcher=(*launcher, *more))
    assert "DDP on 2 processes" in done.stdout
    assert "accelerate's --mixed_precision bf16 has no effect: use --dtype" in done.stderr
    assert_equal(weights(tmp_path), weights(ddp))


@pytest.mark.parametrize("script", sorted(path.name for path in ROOT.glob("train_*.py")))
def test_every_stage_finds_its_place_in_the_one_way(script):
    assert "run = start_runtime(args)" in (ROOT / script).read_text(encoding="utf-8")
