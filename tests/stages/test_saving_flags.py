"""When a run saves and stops, by the clock and by signals, and which states it keeps."""

import signal

import pytest

from tests.running import one_error_line
from tests.stages.test_resume import assert_equal, state_of
from tests.stages.training import about, losses, weights

SIX = ("--max_steps", "6")


def states(out) -> list[str]:
    return sorted(path.name for path in (out / "pretrain_32.resume").glob("step_*"))


def test_a_job_with_a_time_limit_is_started_again_until_it_is_done(pretrain, tmp_path):
    """The documentation's loop: repeat until the exit code is not 75."""
    pretrain(tmp_path / "whole", *SIX)
    out, codes = tmp_path / "cut", []
    while not codes or codes[-1] == 75:
        assert len(codes) < 10
        codes.append(pretrain(out, *SIX, "--stop_after", "1e-9", "--resume", exit_code=None).returncode)
    assert codes == [75] * 5 + [0]  # one step each; the last run completes the training
    assert_equal(state_of(out), state_of(tmp_path / "whole"))
    assert losses(out) == losses(tmp_path / "whole")


def test_a_run_that_is_stopped_by_its_clock_on_two_ranks(pretrain, tmp_path):
    done = pretrain(tmp_path, *SIX, "--batch_size", "2", "--stop_after", "1e-9", processes=2, exit_code=75)
    assert "error" not in done.stderr
    assert about(tmp_path)["step"] == 1


def test_the_clock_saves_between_the_intervals(pretrain, tmp_path):
    flags = ("--save_interval", "100", "--save_minutes", "1e-9", "--keep_last", "9")
    pretrain(tmp_path, *SIX, *flags)
    assert states(tmp_path) == [f"step_{step:08d}" for step in range(1, 7)]


def test_what_is_kept(pretrain, tmp_path):
    pretrain(tmp_path, *SIX, "--save_interval", "1", "--keep_last", "1", "--keep_every", "4")
    assert states(tmp_path) == ["step_00000004", "step_00000006"]


def test_the_best_weights_of_a_run(pretrain, tmp_path):
    """The learning rate is so high that early progress is lost again."""
    evaluate = ("--eval_interval", "2", "--eval_path", pretrain.data_path)
    flags = ("--save_interval", "2", "--save_best", "--learning_rate", "0.3", "--warmup_iters", "4")
    pretrain(tmp_path, *SIX, *evaluate, *flags)
    best, last = about(tmp_path, "pretrain_best_32"), about(tmp_path)
    assert best["step"] < last["step"] == 6
    assert best["metrics"]["eval_loss"] < last["metrics"]["eval_loss"]
    assert weights(tmp_path, "pretrain_best_32").keys() == weights(tmp_path).keys()


def test_the_best_cannot_be_known_where_what_is_saved_is_not_evaluated(pretrain, tmp_path):
    flags = ("--save_best", "--save_interval", "4", "--eval_interval", "6")
    line = one_error_line(pretrain(tmp_path, *flags, exit_code=2))
    assert "--eval_interval must be a multiple of --save_interval (4), not 6" in line


@pytest.mark.skipif(not hasattr(signal, "SIGUSR1"), reason="Windows has no such signal")
def test_a_signal_from_outside_saves_and_the_run_goes_on(pretrain, tmp_path):
    pretrain.interrupted(tmp_path, "SIGUSR1", "log", 2, *SIX, "--save_interval", "100", "--keep_last", "9")
    saved = states(tmp_path)
    assert saved[0] in ("step_00000002", "step_00000003")
    assert saved[1:] == ["step_00000006"]
