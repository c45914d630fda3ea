"""--fsdp with two processes on a CPU: the same numbers as DDP, and states that any engine can resume."""

import pytest
import torch

from tests.running import call_script
from tests.stages.test_resume import assert_equal
from tests.stages.training import distance, losses, reports, weights
from trainer.weights import load_weights

# 22 rows in steps of 4: the sixth step has one micro-batch, in which rank 1 has only padding
TEN_STEPS = ("--epochs", "4", "--max_steps", "10", "--batch_size", "1", "--accumulation_steps", "2")


@pytest.fixture(scope="module")
def ddp(pretrain, tmp_path_factory):
    out = tmp_path_factory.mktemp("ddp")
    pretrain(out, *TEN_STEPS, processes=2)
    return out


@pytest.fixture(scope="module")
def fsdp(pretrain, tmp_path_factory):
    out = tmp_path_factory.mktemp("fsdp")
    held_out = ("--eval_interval", "10", "--eval_path", pretrain.data_path)
    done = pretrain(out, *TEN_STEPS, "--fsdp", *held_out, processes=2)
    assert "eager, FSDP2 on 2 processes" in done.stdout
    assert "step 10  held out: " in done.stdout
    return out


def test_it_follows_ddp(fsdp, ddp, tiny_tokenizer):
    ours = [report for report in reports(fsdp) if "loss" in report]
    assert losses(fsdp) == pytest.approx(losses(ddp), abs=1e-4)
    assert [report["grad_norm"] for report in ours] == pytest.approx(
        [report["grad_norm"] for report in reports(ddp)], rel=1e-3
    )
    assert distance(weights(fsdp), weights(ddp)) < 1e-4
    assert {value.dtype for value in weights(fsdp).values()} == {torch.float32}
    assert load_weights(fsdp / "pretrain_32.pth", None, tiny_tokenizer).config.n_layers == 2


def test_it_resumes_as_if_never_stopped(pretrain, fsdp, tmp_path):
    flags = (*TEN_STEPS, "--fsdp")
    pretrain.interrupted(tmp_path, "SIGTERM", "log", 4, *flags, processes=2, exit_code=143)
    done = pretrain(tmp_path, *flags, "--resume", processes=2)
    assert "resumed at step" in done.stdout
    assert_equal(weights(tmp_path), weights(fsdp))


def test_other_engines_go_on_from_it_and_it_from_them(pretrain, ddp, tmp_path):
    """With the same rows in each step: FSDP2, then one process, then FSDP2 again."""
    pretrain(tmp_path, *TEN_STEPS, "--max_steps", "3", "--fsdp", processes=2)
    alone = ("--epochs", "4", "--max_steps", "6", "--batch_size", "1", "--accumulation_steps", "4")
    pretrain(tmp_path, *alone, "--resume")
    done = pretrain(tmp_path, *TEN_STEPS, "--fsdp", "--resume", processes=2)
    assert "resumed at step 6" in done.stdout
    assert len(losses(tmp_path)) == 10
    assert losses(tmp_path)[:3] == pytest.approx(losses(ddp)[:3], abs=0.05)  # its learning rate falls sooner


@pytest.mark.parametrize("more", [("--use_moe",), ("--gradient_checkpointing",), ("--dtype", "float16")], ids=str)
def test_what_it_goes_with(pretrain, tmp_path, more):
    flags = ("--max_steps", "3", "--batch_size", "2", *more)
    pretrain(tmp_path / "ddp", *flags, processes=2)
    pretrain(tmp_path / "fsdp", *flags, "--fsdp", processes=2)
    name = "pretrain_32_moe" if "--use_moe" in more else "pretrain_32"
    close = 0.02 if "float16" in more else 1e-4
    assert losses(tmp_path / "fsdp", name) == pytest.approx(losses(tmp_path / "ddp", name), abs=close)


def test_a_rank_that_holds_nothing_of_a_small_tensor(pretrain, tmp_path):
    """The routers have four rows each, which three processes share out as two, two and none."""
    flags = ("--max_steps", "2", "--batch_size", "2", "--use_moe")
    pretrain(tmp_path / "ddp", *flags, processes=3)
    pretrain(tmp_path / "fsdp", *flags, "--fsdp", processes=3)
    name = "pretrain_32_moe"
    assert distance(weights(tmp_path / "fsdp", name), weights(tmp_path / "ddp", name)) < 1e-4


@pytest.mark.parametrize(
    "engine",
    [
        ("--fsdp", "--offload", "all"),
        ("--deepspeed", "--zero_stage", "2", "--offload", "optimizer"),
        ("--deepspeed", "--zero_stage", "3", "--offload", "all"),
    ],
    ids=lambda engine: "".join(engine[:3]),
)
def test_what_is_offloaded_trains_the_same_and_resumes_without(pretrain, ddp, tmp_path, engine):
    done = pretrain.interrupted(tmp_path, "SIGTERM", "log", 4, *TEN_STEPS, *engine, processes=2, exit_code=143)
    kept = "weights, gradients and optimizer state" if "all" in engine else "optimizer state"
    assert f"on 2 processes, {kept} in CPU memory" in done.stdout
    pretrain(tmp_path, *TEN_STEPS, *engine[:-2], "--resume", processes=2)
    assert losses(tmp_path) == pytest.approx(losses(ddp), abs=1e-4)
    assert distance(weights(tmp_path), weights(ddp)) < 1e-3


def test_sft(sft, tmp_path):
    flags = ("--max_steps", "2", "--batch_size", "2")
    sft(tmp_path / "ddp", *flags, processes=2)
    sft(tmp_path / "fsdp", *flags, "--fsdp", processes=2)
    name = "full_sft_32"
    assert losses(tmp_path / "fsdp", name) == pytest.approx(losses(tmp_path / "ddp", name), abs=1e-4)


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        ((), "torchrun --nproc_per_node N"),
        (("--offload", "optimizer"), "FSDP2 offloads weights, gradients and optimizer together"),
        (("--deepspeed",), "--fsdp and --deepspeed"),
        (("--optimizer", "muon"), "--optimizer muon"),
        (("--optimizer", "adamw8bit"), "--optimizer adamw8bit"),
    ],
)
def test_what_it_does_not_go_with(pretrain, tmp_path, capsys, flags, told):
    pretrain(tmp_path, "--fsdp", *flags, by=call_script, exit_code=2)
    assert told in one_error_line_of(capsys.readouterr().err)


def one_error_line_of(printed: str) -> str:
    (line,) = [line for line in printed.splitlines() if line.startswith("error: ")]
    return line
