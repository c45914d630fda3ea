"""train_grpo.py: it learns what is rewarded, and its loop has the properties of every loop."""

import math
import shutil

import pytest
import torch

from model import LMConfig, MiniMindLM
from tests.conftest import write_jsonl
from tests.running import TINY_TRAINING, call_script, one_error_line, run_script
from tests.stages.test_resume import assert_equal, state_of
from tests.stages.training import about, distance, reports, weights

NAME = "grpo_32"
STEPS = ("--max_steps", "3", "--epochs", "9", "--learning_rate", "3e-3", "--max_seq_len", "96", "--batch_size", "4")
RULES = ("--rewards", "repetition:1", "length:0.5", "language:1", "--group_size", "4", "--max_new_tokens", "12")


@pytest.fixture(scope="module")
def world(tiny_tokenizer, tmp_path_factory):
    """Ten questions, and random weights, dense and MoE, without a json, as if downloaded."""
    folder = tmp_path_factory.mktemp("world")
    lines = [{"question": f"What is {n} + {n}?" + " Hm." * (n % 3), "answer": 2 * n} for n in range(10)]
    write_jsonl(folder / "rl.jsonl", lines)
    for use_moe in (False, True):
        torch.manual_seed(0)
        config = LMConfig(dim=32, n_layers=2, vocab_size=len(tiny_tokenizer), use_moe=use_moe)
        torch.save(MiniMindLM(config).state_dict(), folder / f"reason_32{'_moe' * use_moe}.pth")
    return folder


@pytest.fixture(scope="module")
def train(world, tokenizer_dir):
    """Runs train_grpo.py with a folder as --out_dir, where the weights that it starts from are."""

    def run(out, *flags, by=call_script, **how):
        out.mkdir(parents=True, exist_ok=True)
        for start in world.glob("*.pth"):
            shutil.copy(start, out)
        data = ("--tokenizer", tokenizer_dir, "--data_path", world / "rl.jsonl")
        return by("train_grpo.py", "--out_dir", out, *TINY_TRAINING, *data, *STEPS, *RULES, *flags, **how)

    return run


@pytest.fixture(scope="module")
def whole(train, tmp_path_factory):
    """Three steps, the third with two questions; two updates each, with a KL penalty."""
    out = tmp_path_factory.mktemp("whole")
    train(out, *HARD)
    return out


HARD = ("--updates_per_rollout", "2", "--beta", "0.1", "--save_interval", "2")
TIMES = ("writing_seconds", "learning_seconds")


def told(out, name=NAME) -> list[dict]:
    return [{key: value for key, value in line.items() if key not in TIMES} for line in reports(out, name)]


def assert_same_run(ours, theirs, name=NAME):
    for our, their in zip(told(ours, name), told(theirs, name), strict=True):
        assert our == pytest.approx(their, rel=1e-3, abs=1e-5)
    assert distance(weights(ours, name), weights(theirs, name)) < 1e-4


def test_it_learns_what_is_rewarded(train, tmp_path, monkeypatch):
    """With a custom rule that a model with random weights can follow: generate ids divisible by seven."""
    (tmp_path / "sevens.py").write_text(
        "def share(reply):\n    return sum(i % 7 == 0 for i in reply.tokens) / max(1, len(reply.tokens))\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    flags = ("--rewards", "sevens:share:2", "--learning_rate", "2e-2", "--max_steps", "25", "--group_size", "8")
    train(tmp_path / "out", *flags)
    rewards = [line["reward"] for line in told(tmp_path / "out")]
    assert sum(rewards[:3]) / 3 < 0.5 < 1.0 < sum(rewards[-3:]) / 3
    last = told(tmp_path / "out")[-1]
    assert last["reward"] == pytest.approx(2 * last["reward_share"])
    assert {"kl", "entropy", "clipped", "length", "finished", "no_signal", "resampled"} < last.keys()


def test_interrupted_and_resumed_is_as_if_never_interrupted(train, whole, tmp_path):
    train(tmp_path, *HARD, stop_after=2, exit_code=130)
    assert about(tmp_path, NAME)["step"] == 2
    train(tmp_path, *HARD, "--resume")
    assert_equal(state_of(tmp_path, NAME), state_of(whole, NAME))
    assert_equal(weights(tmp_path, NAME), weights(whole, NAME))
    assert told(tmp_path) == told(whole)
    assert len(told(whole)) == 3


def test_accumulation_takes_the_steps_of_a_big_batch(train, whole, tmp_path):
    train(tmp_path, *HARD, "--batch_size", "1", "--accumulation_steps", "4")
    assert_same_run(tmp_path, whole)


def test_two_processes_take_the_steps_of_one(train, whole, tmp_path):
    """Each generates the answers to its own questions; in the last step one has none."""
    train(tmp_path, *HARD, "--batch_size", "2", by=run_script, processes=2)
    assert_same_run(tmp_path, whole)


def test_zero_takes_the_same_steps(train, tmp_path):
    train(tmp_path / "alone", *HARD, "--updates_per_rollout", "1")
    deepspeed = ("--deepspeed", "--zero_stage", "2", "--batch_size", "2", "--updates_per_rollout", "1")
    train(tmp_path / "zero", *HARD, *deepspeed, by=run_script, processes=2, env={"DS_ACCELERATOR": "cpu"})
    assert distance(weights(tmp_path / "zero", NAME), weights(tmp_path / "alone", NAME)) < 1e-3


def test_experts_and_recomputed_activations(train, tmp_path):
    train(tmp_path / "a", *HARD, "--use_moe")
    train(tmp_path / "b", *HARD, "--use_moe", "--gradient_checkpointing")
    assert_same_run(tmp_path / "a", tmp_path / "b", f"{NAME}_moe")
    start = torch.load(tmp_path / "a" / "reason_32_moe.pth", weights_only=True)
    assert distance(weights(tmp_path / "a", f"{NAME}_moe"), start) > 1e-3


@pytest.mark.parametrize("loss", ["dr_grpo", "dapo", "gspo", "cispo"])
def test_every_objective_trains(train, tmp_path, loss):
    train(tmp_path, "--loss", loss, "--max_steps", "1")
    (line,) = told(tmp_path)
    assert math.isfinite(line["loss"])
    assert line["grad_norm"] > 0


def test_answers_that_all_got_the_same_teach_nothing(train, tmp_path):
    """No answer of a random model is right."""
    train(tmp_path, "--rewards", "accuracy:1", "--max_steps", "1")
    (line,) = told(tmp_path)
    assert (line["no_signal"], line["loss"], line["grad_norm"], line["skipped"]) == (1, 0, 0, 0)


def test_questions_without_signal_are_replaced(train, tmp_path):
    train(tmp_path, "--rewards", "accuracy:1", "--max_steps", "1", "--resample", "2")
    assert told(tmp_path)[0]["resampled"] == 2 * 4


def test_a_step_that_is_not_finite_is_skipped_and_counted(train, tmp_path, monkeypatch):
    backward, calls = torch.Tensor.backward, []

    def spoiled(loss):
        calls.append(loss)
        backward(loss * math.nan if len(calls) == 2 else loss)

    monkeypatch.setattr(torch.Tensor, "backward", spoiled)
    train(tmp_path, "--max_steps", "3")
    assert [line["skipped"] for line in told(tmp_path)] == [0, 1, 1]
    assert all(value.isfinite().all() for value in weights(tmp_path, NAME).values())


def test_held_out_questions_are_answered_and_judged(train, world, tmp_path):
    train(tmp_path, "--max_steps", "1", "--eval_interval", "1", "--eval_path", world / "rl.jsonl")
    last = told(tmp_path)[-1]
    assert {"eval_reward", "eval_length", "eval_repetition", "eval_language"} < last.keys()
    assert -1.5 <= last["eval_reward"] <= 1


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--packing", "1"), "--packing"),
        (("--group_size", "1"), "--group_size must be 2 or more"),
        (("--max_new_tokens", "96"), "leaves no room"),
        (("--rewards", "beauty"), "choose from format, accuracy"),
        (("--deepspeed", "--zero_stage", "3"), "--zero_stage 3"),
    ],
)
def test_what_cannot_be_is_said_in_a_line(train, tmp_path, capsys, flags, words):
    train(tmp_path, *flags, exit_code=2)
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert words in line


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ('{"question": "a"}', 'the key "answer" is missing'),
        ('{"question": "a", "answer": true}', "must be text or a number"),
        ('{"question": "a", "answer": "  "}', "must be text or a number"),
        ('{"answer": 4}', "neither"),
    ],
)
def test_a_bad_line_is_named(train, tmp_path, line, words):
    (tmp_path / "bad.jsonl").write_text('{"question": "a", "answer": 1}\n' + line + "\n")
    done = train(tmp_path / "out", "--data_path", tmp_path / "bad.jsonl", by=run_script, exit_code=2)
    assert "bad.jsonl line 2" in one_error_line(done).replace(",", "").replace(":", "")
    assert words in one_error_line(done)
