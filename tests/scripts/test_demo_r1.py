"""scripts/demo_r1.py and benchmarks/rl_gain.py: their commands, measurements, and continuation by a second call."""

import importlib
import json

import pytest
import torch

from benchmarks import rl_gain
from model import LMConfig, MiniMindLM
from scripts import demo_r1
from scripts.demo import trying
from scripts.demo.problems import problem
from tests.conftest import write_jsonl
from trainer.reward_model import MiniMindReward


@pytest.fixture
def world(tmp_path, monkeypatch):
    """Eight unseen problems, and tiny weights."""
    lines = [problem(f"What is {n} + 1?", n + 1, "story" if n % 2 else "more", "en") for n in range(8)]
    write_jsonl(tmp_path / "eval_rl.jsonl", lines)
    monkeypatch.setattr(trying, "DATA", tmp_path)
    torch.manual_seed(0)
    config = LMConfig(dim=16, n_layers=1, vocab_size=6400)
    torch.save(MiniMindLM(config).state_dict(), tmp_path / "a_16.pth")
    torch.save(MiniMindReward(config).state_dict(), tmp_path / "reward_16.pth")
    return tmp_path


def test_every_command_of_the_recipe_is_understood_by_its_script(tmp_path, monkeypatch):
    stages = trying.recipe(tmp_path, tmp_path / "full_sft_256.pth", seed=7)
    assert list(stages) == ["cold start", "first GRPO", "SFT again", "second GRPO", "R1-Zero"]
    for stage in stages.values():
        script, *flags = stage.command
        monkeypatch.setattr("sys.argv", [script, *trying.SIZES, *flags])
        module = importlib.import_module(script.removesuffix(".py"))
        args = module.get_args()
        assert args.seed == 7
        assert args.from_weight.endswith("_256.pth")
        if script == "train_grpo.py":
            module.check(args)
    assert len({stage.folder for stage in stages.values()}) == 5
    first, last = stages["first GRPO"].command, stages["second GRPO"].command
    assert str(stages["cold start"].weights(tmp_path)) in first
    assert str(stages["SFT again"].weights(tmp_path)) in last


def test_an_examination_tells_what_is_in_range_from_what_is_beyond(world):
    found = trying.examine(world / "a_16.pth", world / "reward_16.pth")
    assert (found.problems, found.beyond_problems) == (4, 4)
    assert (found.form, found.greedy, found.verifier) == (0, 0, 0)  # random weights
    assert 1 <= found.tokens <= trying.LIMIT
    assert trying.examine(world / "a_16.pth", problems=3).problems == 1
    assert trying.thoughts(world / "a_16.pth", 2)[1].startswith("> What is 1 + 1?\n")


def test_a_right_answer_counts_whoever_gives_it(world, monkeypatch):
    """All greedy answers are right, five of eight samples are, and the verifier prefers long texts."""
    from trainer.rollouts import Writer, Written

    def write(self, prompts, seeds, temperature):
        texts = []
        for place in range(len(prompts)):
            number = place // trying.VOTES if temperature else place
            wanted = [2, 4, 6, 8] if temperature or len(asked) == 0 else [1, 3, 5, 7]
            right = temperature == 0 or place % trying.VOTES < 5
            texts.append(str(wanted[number]) if right else "0, or more")
        asked.append(texts)
        return [Written([5] * len(text), text, True) for text in texts]

    asked = []
    monkeypatch.setattr(Writer, "write", write)
    monkeypatch.setattr(
        trying, "score_chats", lambda judge, tokenizer, chats, batch_size: [len(c[-1]["content"]) for c in chats]
    )
    found = trying.examine(world / "a_16.pth", world / "reward_16.pth")
    assert (found.greedy, found.votes, found.beyond, found.verifier) == (1, 1, 1, 0)


def test_a_second_call_of_the_demo_examines_nothing_again(world, monkeypatch, capsys):
    trained, examined = [], []
    found = trying.Solved(600, 1.0, 0.5, 0.6, None, 0.1, 400, 30.0)
    monkeypatch.setattr("sys.argv", ["demo_r1.py"])
    monkeypatch.setattr(demo_r1, "OUT", world)
    monkeypatch.setattr(demo_r1, "make_model", lambda: None)
    monkeypatch.setattr(demo_r1, "read_settings", lambda path: {"seconds": 90})
    monkeypatch.setattr(demo_r1, "facts", lambda *opened: 0.96)
    monkeypatch.setattr(demo_r1, "open_model", lambda path: (path, None))
    monkeypatch.setattr(trying, "R1", world / "r1")
    monkeypatch.setattr(trying, "train", lambda stage, root: trained.append(stage.folder))
    monkeypatch.setattr(trying, "sample", lambda stage, root, seed: trained.append("sampled"))
    monkeypatch.setattr(trying, "train_verifier", lambda root, start, seed: world / "reward_16.pth")
    monkeypatch.setattr(trying, "examine", lambda path, verifier: examined.append(verifier) or found)
    monkeypatch.setattr(trying, "thoughts", lambda path: ["> a\nb"])
    demo_r1.main()
    assert trained == ["cold_start", "grpo_1", "sampled", "sft", "grpo_2", "zero"]
    assert [verifier is not None for verifier in examined] == [False] * 3 + [True] * 3
    shown = capsys.readouterr().out
    assert "cold start         1.5  100.0%    50.0%    60.0%         -    10.0%    30.0   96.0%" in shown
    demo_r1.main()
    assert len(examined) == 6


def test_more_sft_takes_as_long(tmp_path, monkeypatch):
    monkeypatch.setattr(rl_gain, "read_settings", lambda path: {"seconds": 30.0, "step": 100})
    cold = trying.recipe(tmp_path, tmp_path / "full_sft_256.pth", 1)["cold start"]
    flags = rl_gain.more_sft(cold, tmp_path, seconds=600, seed=3).command
    assert flags[flags.index("--max_steps") + 1] == "2000"
    monkeypatch.setattr("sys.argv", [*flags])
    args = importlib.import_module("train_distill_reason").get_args()
    assert (args.seed, args.max_steps, args.from_weight) == (3, 2000, str(cold.weights(tmp_path)))


def test_the_benchmark_keeps_its_results_and_joins_the_seeds(world, monkeypatch, capsys):
    monkeypatch.setattr(rl_gain, "OUT", world)
    torch.save({}, world / "full_sft_256.pth")
    monkeypatch.setattr(rl_gain, "identify_training", lambda path: "these")
    monkeypatch.setattr(rl_gain, "read_settings", lambda path: {"seconds": 600.0, "step": 100})
    monkeypatch.setattr(trying, "train", lambda stage, root: None)
    shares = iter([0.3, 0.8, 0.4, 0.5, 0.9, 0.4])
    found = trying.Solved(600, 1.0, 0.5, 0.6, None, 0.1, 400, 30.0)
    monkeypatch.setattr(trying, "examine", lambda path, seed, problems: found._replace(greedy=next(shares)))
    for seed in ("1", "2", "2"):
        monkeypatch.setattr("sys.argv", ["rl_gain.py", "--seed", seed])
        rl_gain.main()
    shown = capsys.readouterr().out.splitlines()
    assert "GRPO          85.0% ± 7.1%" in shown
    assert json.loads((world / "rl_gain" / "these" / "2" / "results.json").read_text())["GRPO"]["greedy"] == 0.9
