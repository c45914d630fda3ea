"""train_ppo.py: it learns what is rewarded, by rules or by a reward model, and its loop has the usual properties."""

import shutil

import pytest
import torch

from model import LMConfig, MiniMindLM
from model.model_reward import MiniMindReward
from tests.conftest import write_jsonl
from tests.running import TINY_TRAINING, call_script, run_script
from tests.stages.test_resume import assert_equal, state_of
from tests.stages.training import about, distance, reports, weights

NAME = "ppo_32"
STEPS = ("--max_steps", "3", "--epochs", "9", "--learning_rate", "3e-3", "--max_seq_len", "96", "--batch_size", "8")
RULES = ("--rewards", "repetition:1", "length:0.5", "language:1", "--max_new_tokens", "12", "--save_interval", "2")


@pytest.fixture(scope="module")
def world(tiny_tokenizer, tmp_path_factory):
    """Twenty questions, and a policy and a reward model with random weights."""
    folder = tmp_path_factory.mktemp("world")
    write_jsonl(folder / "rl.jsonl", [{"question": f"What is {n} + {n}?", "answer": 2 * n} for n in range(20)])
    torch.manual_seed(0)
    config = LMConfig(dim=32, n_layers=2, vocab_size=len(tiny_tokenizer))
    torch.save(MiniMindLM(config).state_dict(), folder / "reason_32.pth")
    judge = MiniMindReward(config)
    torch.nn.init.normal_(judge.score.weight)
    torch.save(judge.state_dict(), folder / "reward_32.pth")
    return folder


@pytest.fixture(scope="module")
def train(world, tokenizer_dir):
    def run(out, *flags, by=call_script, **how):
        out.mkdir(parents=True, exist_ok=True)
        for start in world.glob("*.pth"):
            shutil.copy(start, out)
        data = ("--tokenizer", tokenizer_dir, "--data_path", world / "rl.jsonl")
        return by("train_ppo.py", "--out_dir", out, *TINY_TRAINING, *data, *STEPS, *RULES, *flags, **how)

    return run


@pytest.fixture(scope="module")
def whole(train, tmp_path_factory):
    out = tmp_path_factory.mktemp("whole")
    train(out)
    return out


def told(out) -> list[dict]:
    return [{k: v for k, v in line.items() if not k.endswith("ing_seconds")} for line in reports(out, NAME)]


def test_it_learns_what_is_rewarded(train, tmp_path, monkeypatch):
    (tmp_path / "evens.py").write_text(
        "def share(reply):\n    return sum(i % 7 == 0 for i in reply.tokens) / max(1, len(reply.tokens))\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    flags = ("--rewards", "evens:share:2", "--learning_rate", "2e-2", "--max_steps", "25", "--batch_size", "20")
    train(tmp_path / "out", *flags, "--beta", "0.001", "--epochs", "30")
    rewards = [line["reward"] for line in told(tmp_path / "out")]
    assert sum(rewards[:3]) / 3 < 0.5 < 0.8 < sum(rewards[-3:]) / 3
    weight = [line["kl_weight"] for line in told(tmp_path / "out")]
    assert weight[-1] > weight[0]  # the KL is far beyond its target, which raises the weight


def test_interrupted_and_resumed_is_as_if_never_interrupted(train, whole, tmp_path):
    """The critic and the KL penalty's weight are resumed, too."""
    train(tmp_path, stop_after=2, exit_code=130)
    assert about(tmp_path, NAME)["step"] == 2
    train(tmp_path, "--resume")
    assert_equal(state_of(tmp_path, NAME), state_of(whole, NAME))
    assert told(tmp_path) == told(whole)


def test_what_is_published_is_the_policy_alone(whole, tmp_path):
    start = torch.load(whole / "reason_32.pth", weights_only=True)
    assert weights(whole, NAME).keys() == start.keys()
    assert distance(weights(whole, NAME), start) > 1e-3
    state = state_of(whole, NAME)["optimizer.pt"]["optimizer"]
    assert "score.weight" in state["critic"]
    assert distance({k: state["critic"][k] for k in start}, start) > 1e-4  # it has learned, too


def test_two_processes_take_the_steps_of_one(train, whole, tmp_path):
    train(tmp_path, "--batch_size", "2", "--accumulation_steps", "2", by=run_script, processes=2)
    for our, their in zip(told(tmp_path), told(whole), strict=True):
        assert our == pytest.approx(their, rel=2e-3, abs=1e-5)
    assert distance(weights(tmp_path, NAME), weights(whole, NAME)) < 1e-4


def test_a_reward_model_judges(train, tmp_path, capsys):
    train(tmp_path, "--rewards", "--reward_model", "reward", "--max_steps", "1")
    (line,) = told(tmp_path)
    assert line["reward"] == pytest.approx(line["reward_model"])
    assert line["reward"] != 0
    train(tmp_path / "none", "--rewards", exit_code=2)
    assert "--rewards is empty" in capsys.readouterr().err
