"""train_reward.py: its loss compared with trl's trainer, the place of the score, real runs, choosing answers."""

import itertools
import shutil

import pytest
import torch
import torch.nn.functional as F

from dataset import DPODataset, collate
from model import LMConfig, MiniMindLM
from model.chat import render_chat
from model.model_reward import SCORE, MiniMindReward, answer_scores
from tests.conftest import write_jsonl
from tests.dataset.test_dpo_dataset import pair
from tests.running import TINY_TRAINING, call_script, run_script
from tests.stages.test_resume import assert_equal, state_of
from tests.stages.training import about, distance, reports, weights
from train_reward import bradley_terry_loss
from trainer.errors import UserError
from trainer.reward_model import load_reward_model, score_chats

NAME = "reward_32"
STEPS = ("--max_steps", "4", "--epochs", "9", "--learning_rate", "1e-2", "--max_seq_len", "96", "--save_interval", "2")


@pytest.fixture(scope="module")
def world(tiny_tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    records = [pair(f"What is {n} + {n}?", f"It is {2 * n}.", "I do not know. " * (1 + n % 3)) for n in range(30)]
    write_jsonl(folder / "dpo.jsonl", records)
    torch.manual_seed(0)
    config = LMConfig(dim=32, n_layers=2, vocab_size=len(tiny_tokenizer))
    torch.save(MiniMindLM(config).state_dict(), folder / "full_sft_32.pth")
    return folder


@pytest.fixture(scope="module")
def train(world, tokenizer_dir):
    def run(out, *flags, by=call_script, **how):
        out.mkdir(parents=True, exist_ok=True)
        shutil.copy(world / "full_sft_32.pth", out)
        data = ("--tokenizer", tokenizer_dir, "--data_path", world / "dpo.jsonl")
        return by("train_reward.py", "--out_dir", out, *TINY_TRAINING, *data, *STEPS, *flags, **how)

    return run


@pytest.fixture(scope="module")
def whole(train, world, tmp_path_factory):
    out = tmp_path_factory.mktemp("whole")
    train(out, "--eval_interval", "4", "--eval_path", world / "dpo.jsonl")
    return out


@pytest.fixture(scope="module")
def judge(tiny_tokenizer):
    torch.manual_seed(1)
    model = MiniMindReward(LMConfig(dim=32, n_layers=2, vocab_size=len(tiny_tokenizer)))
    torch.nn.init.normal_(model.score.weight)
    return model.eval()


def test_the_loss_is_trls():
    """For the same two scores, as computed by trl's trainer."""
    from types import SimpleNamespace

    from trl import RewardTrainer

    torch.manual_seed(0)
    scores = torch.randn(5, 2)
    interleaved = torch.cat([scores[:, 0], scores[:, 1]])[:, None]  # all chosen answers, then all rejected
    given = SimpleNamespace(
        args=SimpleNamespace(center_rewards_coefficient=None),
        model=SimpleNamespace(training=True),
        accelerator=SimpleNamespace(gather_for_metrics=lambda x: x, gather=lambda x: x),
        _metrics={
            "train": {
                name: [] for name in ("num_tokens", "min_reward", "mean_reward", "max_reward", "accuracy", "margin")
            }
        },
        _total_train_tokens=0,
        _tp_size=1,
    )
    inputs = {"input_ids": torch.zeros(10, 3), "attention_mask": torch.ones(10, 3)}
    theirs = RewardTrainer.compute_loss(given, lambda **_: SimpleNamespace(logits=interleaved), inputs)
    assert bradley_terry_loss(scores).mean().item() == pytest.approx(theirs.item(), abs=1e-5)
    assert bradley_terry_loss(torch.tensor([[1.0, -1.0]])).item() == pytest.approx(
        -F.logsigmoid(torch.tensor(2.0)).item()
    )


def test_the_score_is_read_at_the_last_end_of_the_answer(tiny_tokenizer, judge, world):
    """In packed rows the score is the same as for each chat alone."""
    data = DPODataset(world / "dpo.jsonl", tiny_tokenizer, 256)  # nothing is cut off
    batch = collate([data[0], data[1]], data.max_seq_len)
    labels = batch.pop("labels")
    with torch.no_grad():
        packed, _ = answer_scores(judge, batch, labels)
    starts = (batch["position_ids"] == 0) & batch["attention_mask"]
    bounds = [*starts.flatten().nonzero()[:, 0].tolist(), starts.numel()]
    ids, real = batch["input_ids"].flatten(), batch["attention_mask"].flatten()
    for n, (begin, end) in enumerate(itertools.pairwise(bounds)):
        alone = ids[begin:end][real[begin:end]]
        assert alone[-2] == tiny_tokenizer.eos_token_id  # then a line break
        with torch.no_grad():
            hidden = judge(alone[None], logits_to_keep=torch.ones(1, len(alone), dtype=torch.bool)).last_hidden_state
        torch.testing.assert_close(packed[n], (hidden[-2] * judge.score.weight[0]).sum(), atol=1e-5, rtol=1e-5)
    assert len(packed) == len(bounds) - 1


def test_chats_are_scored_in_their_order(tiny_tokenizer, judge):
    chats = [
        [{"role": "user", "content": "a" * n}, {"role": "assistant", "content": "The sea. " * (n % 4 + 1)}]
        for n in range(1, 8)
    ]
    scores = score_chats(judge, tiny_tokenizer, chats, batch_size=3)
    for chat, score in zip(chats, scores, strict=True):
        ids, mask = render_chat(tiny_tokenizer, chat)
        last = max(i for i, learned in enumerate(mask) if learned)
        with torch.no_grad():
            out = judge(torch.tensor([ids]), logits_to_keep=torch.ones(1, len(ids), dtype=torch.bool))
        assert score == pytest.approx(out.logits[last].item(), abs=1e-5)


def test_it_learns_the_pairs_and_writes_the_head_beside_the_decoder(train, whole, tmp_path):
    assert set(weights(whole, NAME)) == {*torch.load(whole / "full_sft_32.pth", weights_only=True), f"{SCORE}weight"}
    assert weights(whole, NAME)["score.weight"].shape == (1, 32)
    losses = [line["loss"] for line in reports(whole, NAME) if "loss" in line]
    assert losses[0] == pytest.approx(0.6931, abs=1e-3)  # at first all scores are equal
    last = reports(whole, NAME)[-1]
    assert last["eval_accuracy"] > 0.9
    assert about(whole, NAME)["metrics"]["eval_accuracy"] == last["eval_accuracy"]


def test_interrupted_and_resumed_is_as_if_never_interrupted(train, whole, world, tmp_path):
    flags = ("--eval_interval", "4", "--eval_path", world / "dpo.jsonl")
    train(tmp_path, *flags, stop_after=3, exit_code=130)
    train(tmp_path, *flags, "--resume")
    assert_equal(state_of(tmp_path, NAME), state_of(whole, NAME))
    assert reports(tmp_path, NAME) == reports(whole, NAME)


def test_two_processes_take_the_steps_of_one(train, world, whole, tmp_path):
    flags = ("--eval_interval", "4", "--eval_path", world / "dpo.jsonl", "--batch_size", "2")
    train(tmp_path, *flags, by=run_script, processes=2)
    assert distance(weights(tmp_path, NAME), weights(whole, NAME)) < 1e-4


def test_a_model_without_a_head_is_refused(whole, tiny_tokenizer):
    with pytest.raises(UserError, match=r"missing: score\.weight"):
        load_reward_model(whole / "full_sft_32.pth", tiny_tokenizer)


def test_it_chooses_among_several_answers(whole, tokenizer_dir, tmp_path, capsys):
    common = ("--dim", "32", "--n_layers", "2", "--device", "cpu", "--tokenizer", tokenizer_dir, "--out_dir", whole)
    asked = ("--prompt", "What is 2 + 2?", "--max_new_tokens", "8", "--seed", "1")
    call_script("eval_model.py", *common, *asked, "--votes", "3", "--verifier", "reward")
    assert "best of 3 by a score of " in capsys.readouterr().err
    call_script("eval_model.py", *common, *asked, "--verifier", "reward", exit_code=2)
    assert "--votes 8" in capsys.readouterr().err
