"""Several processes on a CPU: DDP and DeepSpeed, started by torchrun and by DeepSpeed."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch

from tests.running import PATIENCE, ROOT, TORCHRUN, free_port, one_error_line
from tests.stages.test_resume import assert_equal
from tests.stages.training import about, distance, losses, reports, weights
from trainer.weights import load_weights

# 22 rows in steps of 4: the last step of each epoch has one micro-batch, in which rank 1 has only padding
TWENTY_STEPS = ("--epochs", "4", "--max_steps", "20", "--batch_size", "1", "--accumulation_steps", "2")
FOUR_STEPS = ("--max_steps", "4", "--batch_size", "2")


@pytest.fixture(scope="module")
def ddp(pretrain, tmp_path_factory):
    out = tmp_path_factory.mktemp("ddp")
    done = pretrain(out, *TWENTY_STEPS, processes=2)
    assert "eager, DDP on 2 processes" in done.stdout
    assert done.stdout.count("step 20/20") == 1  # only rank 0 prints
    return out


@pytest.fixture(scope="module")
def zero_2(pretrain, tmp_path_factory):
    out = tmp_path_factory.mktemp("zero2")
    pretrain(out, *TWENTY_STEPS, "--deepspeed", "--zero_stage", "2", processes=2)
    return out


def assert_follows(out, ddp, tokenizer) -> None:
    """Check that 20 steps have DDP's losses, to 1e-4, and that the weights load without DeepSpeed."""
    assert len(losses(out)) == 20
    assert losses(out) == pytest.approx(losses(ddp), abs=1e-4)
    for ours, theirs in zip(reports(out), reports(ddp), strict=True):
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-3)
        assert ours["tokens"] == theirs["tokens"]
    assert distance(weights(out), weights(ddp)) < 1e-3
    assert {value.dtype for value in weights(out).values()} == {torch.float32}
    assert load_weights(out / "pretrain_32.pth", None, tokenizer).config.n_layers == 2


def test_zero_2_follows_ddp(zero_2, ddp, tiny_tokenizer):
    assert_follows(zero_2, ddp, tiny_tokenizer)


@pytest.mark.parametrize("stage", ["0", "1", "3"])
def test_the_other_stages_of_zero_follow_ddp(pretrain, ddp, tiny_tokenizer, tmp_path, stage):
    flags = ("--deepspeed", "--zero_stage", stage, "--eval_interval", "20", "--eval_path", pretrain.data_path)
    done = pretrain(tmp_path, *TWENTY_STEPS, *flags, processes=2)
    assert f"0.05 M parameters, 20 steps on cpu, float32, eager, DeepSpeed ZeRO-{stage} on 2 processes" in done.stdout
    assert "step 20  held out: " in done.stdout
    evaluation = (tmp_path / "pretrain_32.metrics.jsonl").read_text().splitlines()[-1]
    assert json.loads(evaluation)["eval_loss"] < losses(tmp_path)[0]
    (tmp_path / "pretrain_32.metrics.jsonl").write_text(
        "".join(line for line in (tmp_path / "pretrain_32.metrics.jsonl").open() if "eval_loss" not in line)
    )
    assert_follows(tmp_path, ddp, tiny_tokenizer)


def test_zero_2_resumes_as_if_never_stopped(pretrain, zero_2, tmp_path):
    """The signal reaches only rank 1."""
    flags = (*TWENTY_STEPS, "--deepspeed")
    done = pretrain.interrupted(tmp_path, "SIGTERM", "log", 9, *flags, processes=2, exit_code=143)
    assert "Traceback" not in done.stderr
    assert about(tmp_path)["step"] in (9, 10)
    done = pretrain(tmp_path, *flags, "--resume", processes=2)
    assert "resumed at step" in done.stdout
    assert_equal(weights(tmp_path), weights(zero_2))
    assert reports(tmp_path) == reports(zero_2)


def test_ddp_resumes_as_if_never_stopped(pretrain, ddp, tmp_path):
    pretrain.interrupted(tmp_path, "SIGINT", "log", 9, *TWENTY_STEPS, processes=2, exit_code=130)
    line = one_error_line(pretrain(tmp_path, *TWENTY_STEPS, "--resume", exit_code=2))
    assert "4 rows, this one has 2: with 1 processes, --batch_size x --accumulation_steps must be 4" in line
    pretrain(tmp_path, *TWENTY_STEPS, "--resume", processes=2)
    assert_equal(weights(tmp_path), weights(ddp))
    assert reports(tmp_path) == reports(ddp)


ONE, DDP = (1, ()), (2, ())
ZERO = {stage: (2, ("--deepspeed", "--zero_stage", stage)) for stage in "0123"}
MOVES = {  # number of processes and engine, before and after
    "one process to two": (ONE, DDP),
    "two processes to one": (DDP, ONE),
    "DDP to ZeRO-2": (DDP, ZERO["2"]),
    "ZeRO-2 to DDP": (ZERO["2"], DDP),
    "ZeRO-2 to one process": (ZERO["2"], ONE),
    "one process to ZeRO-3": (ONE, ZERO["3"]),
    "ZeRO-1 to ZeRO-3": (ZERO["1"], ZERO["3"]),
    "ZeRO-3 to ZeRO-1": (ZERO["3"], ZERO["1"]),
    "ZeRO-0 to ZeRO-2": (ZERO["0"], ZERO["2"]),
}


@pytest.mark.parametrize("move", MOVES)
def test_a_run_goes_on_with_other_processes_and_engines(pretrain, ddp, tmp_path, move):
    """With the same order of rows and AdamW's moments carried over, the losses equal those of an unchanged run, up to
    rounding (a fresh optimizer would be far from them)."""
    (before, first), (after, second) = MOVES[move]

    def flags(processes: int) -> tuple[str, ...]:
        return (*TWENTY_STEPS, "--batch_size", str(2 // processes))

    pretrain.interrupted(tmp_path, "SIGTERM", "log", 10, *flags(before), *first, processes=before, exit_code=143)
    done = pretrain(tmp_path, *flags(after), *second, "--resume", processes=after)
    assert "resumed at step 1" in done.stdout
    assert "summed in another order" in done.stdout
    assert [line["tokens"] for line in reports(tmp_path)] == [line["tokens"] for line in reports(ddp)]
    assert losses(tmp_path) == pytest.approx(losses(ddp), abs=1e-4)
    assert distance(weights(tmp_path), weights(ddp)) < 1e-3


def test_machines_that_share_no_out_dir(pretrain, tmp_path):
    """Rank 0 resumes from its state, and rank 1, which has none, must not silently start from the beginning."""
    here, there = tmp_path / "here", tmp_path / "there"
    machines = {"processes": 2, "each": [("--out_dir", here), ("--out_dir", there)]}
    pretrain(tmp_path, *TWENTY_STEPS, "--max_steps", "8", **machines)
    assert not there.exists()
    done = pretrain(tmp_path, *TWENTY_STEPS, "--resume", **machines, exit_code=2)
    line = one_error_line(done)
    state = there / "pretrain_32.resume" / "step_00000008" / "state.json"
    assert f"rank 1 has no {state}, from which rank 0 resumes" in line
    assert "--out_dir" in line
    shutil.copytree(here / "pretrain_32.resume", there / "pretrain_32.resume")
    story = json.loads(state.read_text())
    state.write_text(json.dumps(story))  # the same in another spelling
    done = pretrain(tmp_path, *TWENTY_STEPS, "--resume", **machines, exit_code=2)
    assert "rank 1 has a different " in one_error_line(done)
    shutil.rmtree(there)
    shutil.copytree(here, there)
    pretrain(tmp_path, *TWENTY_STEPS, "--resume", **machines)
    assert about(here)["step"] == 20
    assert about(there)["step"] == 8


def test_ranks_that_begin_with_other_weights(sft, tiny_out, tmp_path):
    """DDP would overwrite them with rank 0's, but a reference or teacher would still differ."""
    state = weights(tiny_out)
    state["norm.weight"][3] += 1e-6
    other = tmp_path / "pretrain_32.pth"
    torch.save(state, other)
    each = [(), ("--from_weight", other)]
    line = one_error_line(sft(tmp_path, *FOUR_STEPS, processes=2, each=each, exit_code=2))
    assert "rank 1 has different weights from rank 0" in line


def test_ranks_with_other_settings(pretrain, tmp_path):
    each = [(), ("--grad_clip", "0.5")]
    line = one_error_line(pretrain(tmp_path, *FOUR_STEPS, processes=2, each=each, exit_code=2))
    assert "rank 1 has grad_clip 0.5, but rank 0 has 1.0" in line


def test_half_a_launcher(pretrain, tmp_path):
    line = one_error_line(pretrain(tmp_path, env={"WORLD_SIZE": "2"}, exit_code=2))
    assert "WORLD_SIZE is 2 in the environment, but there is no RANK" in line
    assert "torchrun --nproc_per_node" in line


def test_zero_3_resumes_with_settings_of_its_own(pretrain, tmp_path):
    settings = tmp_path / "ds.json"
    settings.write_text(json.dumps({"zero_optimization": {"stage": 3}, "bf16": {"enabled": True}}))
    flags = ("--deepspeed", settings, "--batch_size", "2", "--epochs", "2")
    done = pretrain(tmp_path / "whole", *flags, "--max_steps", "8", processes=2)
    assert "DeepSpeed ZeRO-3" in done.stdout
    assert f"{settings}: bf16 ignored in favour of the flags" in done.stderr
    part = tmp_path / "part"
    pretrain.interrupted(part, "SIGTERM", "log", 3, *flags, "--max_steps", "8", processes=2, exit_code=143)
    pretrain(part, *flags, "--max_steps", "8", "--resume", processes=2)
    assert_equal(weights(part), weights(tmp_path / "whole"))


@pytest.mark.parametrize(("stage", "dtype"), [("0", "float16"), ("2", "float16"), ("3", "float16"), ("2", "bfloat16")])
def test_half_precision_with_deepspeed(pretrain, ddp, tmp_path, stage, dtype):
    """The gradient's norm shows whether the loss was scaled and unscaled, and clipped after that."""
    flags = (*TWENTY_STEPS, "--max_steps", "6", "--deepspeed", "--zero_stage", stage, "--dtype", dtype)
    pretrain(tmp_path, *flags, processes=2)
    for ours, theirs in zip(reports(tmp_path)[:5], reports(ddp)[:5], strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], abs=0.05)
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=0.1)


@pytest.mark.parametrize("stage", [None, "0", "2", "3"])
def test_gradients_are_clipped(pretrain, ddp, tmp_path, stage):
    """Clipped to so little that AdamW's epsilon dominates, and nothing is learned."""
    flags = ("--deepspeed", "--zero_stage", stage) if stage else ()
    pretrain(tmp_path, *TWENTY_STEPS, "--max_steps", "6", "--grad_clip", "1e-9", *flags, processes=2)
    assert losses(tmp_path)[0] == losses(ddp)[0]
    assert losses(tmp_path)[5] > losses(ddp)[5] + 0.05
    assert min(line["grad_norm"] for line in reports(tmp_path)) > 0.5  # it is reported as before


@pytest.mark.parametrize("stage", ["0", "2"])
def test_gradients_below_the_limit_are_left_alone(pretrain, tmp_path, stage):
    flags = (*TWENTY_STEPS, "--max_steps", "6", "--grad_clip", "100", "--learning_rate", "5e-3")
    pretrain(tmp_path / "ddp", *flags, processes=2)
    pretrain(tmp_path / "zero", *flags, "--deepspeed", "--zero_stage", stage, processes=2)
    assert max(line["grad_norm"] for line in reports(tmp_path / "ddp")) > 1, "a limit of 1 must be told apart"
    assert distance(weights(tmp_path / "zero"), weights(tmp_path / "ddp")) < 1e-4


def test_a_mixture_of_experts_with_deepspeed(pretrain, tmp_path):
    flags = (*FOUR_STEPS, "--use_moe")
    pretrain(tmp_path / "ddp", *flags, processes=2)
    pretrain(tmp_path / "zero", *flags, "--deepspeed", processes=2)
    name = "pretrain_32_moe"
    assert losses(tmp_path / "zero", name) == pytest.approx(losses(tmp_path / "ddp", name), abs=1e-4)


def test_fine_tuning_with_deepspeed(sft, tmp_path):
    sft(tmp_path / "ddp", *FOUR_STEPS, processes=2)
    sft(tmp_path / "zero", *FOUR_STEPS, "--deepspeed", processes=2)
    name = "full_sft_32"
    assert losses(tmp_path / "zero", name) == pytest.approx(losses(tmp_path / "ddp", name), abs=1e-4)
    assert distance(weights(tmp_path / "zero", name), weights(tmp_path / "ddp", name)) < 1e-4


@pytest.mark.parametrize("stage", ["0", "2"])
def test_deepspeed_skips_what_is_not_finite(pretrain, tmp_path, stage):
    flags = ("--epochs", "9", "--batch_size", "2", "--learning_rate", "1e30", "--deepspeed", "--zero_stage", stage)
    done = pretrain(tmp_path, *flags, "--save_interval", "1", processes=2, exit_code=2)
    assert "10 times in a row" in one_error_line(done)
    assert about(tmp_path)["skipped"] == 9
    assert all(torch.isfinite(value).all() for value in weights(tmp_path).values())


def test_the_real_torchrun(pretrain, ddp, tmp_path):
    pretrain(tmp_path, *TWENTY_STEPS, launcher=TORCHRUN)
    assert_equal(weights(tmp_path), weights(ddp))


def test_ctrl_c_under_the_real_torchrun(pretrain, tmp_path):
    """It reaches every process, and once more through torchrun; the run still saves."""
    command = [
        sys.executable,
        *TORCHRUN,
        ROOT / pretrain.script,
        *pretrain.common,
        "--out_dir",
        tmp_path,
        "--epochs",
        "99999",
    ]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    log = tmp_path / "log"
    with log.open("w") as out:
        run = subprocess.Popen(list(map(str, command)), stdout=out, stderr=out, env=env, start_new_session=True)
    deadline = time.monotonic() + PATIENCE
    while "step 3/" not in log.read_text():
        assert run.poll() is None, log.read_text()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    os.killpg(run.pid, signal.SIGINT)
    assert run.wait(PATIENCE) != 0
    assert "SIGINT: saving after this step" in log.read_text()
    assert about(tmp_path)["step"] >= 3
    assert len(list((tmp_path / "pretrain_32.resume").glob("step_*/rank_1.pt"))) == 1


def test_the_deepspeed_launcher(pretrain, tmp_path):
    launcher = ("-m", "deepspeed.launcher.runner", "--num_gpus", "2", "--master_port", str(free_port()))
    done = pretrain(tmp_path, *FOUR_STEPS, "--deepspeed", launcher=launcher)
    assert "DeepSpeed ZeRO-2 on 2 processes" in done.stdout
    assert re.search(r"step 4/4  loss", done.stdout)
    assert weights(tmp_path)
