"""trainer/rollouts.py: answers depend only on their seeds, and are batched and scored as generated."""

from types import SimpleNamespace

import pytest
import torch

from dataset.loader import StepLoader
from dataset.rl_dataset import RLDataset
from model import LMConfig, MiniMindLM
from model.inference.request import Request
from model.inference.scheduler import Engine
from model.loss import IGNORE_INDEX, target_mask
from tests.conftest import write_jsonl
from trainer.policy_measures import learning_sums, spread, token_entropies
from trainer.preference import token_log_probs
from trainer.rewards import read_rewards
from trainer.rollouts import Rollouts, sampling_seed

ARGS = {
    "seed": 42,
    "temperature": 1.0,
    "batch_size": 2,
    "accumulation_steps": 2,
    "max_seq_len": 96,
    "max_new_tokens": 10,
}


@pytest.fixture(scope="module")
def model(tiny_tokenizer):
    torch.manual_seed(0)
    return MiniMindLM(LMConfig(dim=32, n_layers=2, vocab_size=len(tiny_tokenizer))).eval()


@pytest.fixture(scope="module")
def dataset(tiny_tokenizer, tmp_path_factory):
    lines = [{"question": f"What is {n} + {n}?" + " Hm." * (n % 3), "answer": 2 * n} for n in range(5)]
    path = write_jsonl(tmp_path_factory.mktemp("rl") / "rl.jsonl", lines)
    return RLDataset(path, tiny_tokenizer, 96, False, max_new_tokens=10)


@pytest.fixture(scope="module")
def questions(dataset):
    """The questions of one step: micro-batches of two, two and one."""
    (step,) = StepLoader(dataset, 2, 3, 1, seed=0).steps()
    return step


def rollouts(model, tokenizer, dataset, **changed) -> Rollouts:
    rewards = read_rewards(["repetition:1", "length:0.5"])
    return Rollouts(model, tokenizer, dataset, SimpleNamespace(**ARGS | changed), rewards, group_size=3)


@pytest.mark.parametrize("use_moe", [False, True])
def test_engine_and_trainer_find_the_same_log_probabilities(tiny_tokenizer, dataset, questions, use_moe):
    """To 1e-5 in fp32, so that the first update's ratio is 1."""
    torch.manual_seed(1)
    model = MiniMindLM(LMConfig(dim=32, n_layers=2, vocab_size=len(tiny_tokenizer), use_moe=use_moe))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3)  # far from uniform
    batches, _ = rollouts(model, tiny_tokenizer, dataset).write(model, questions, step=0)
    engine = Engine(model, tiny_tokenizer, slots=8, slot_len=96)
    for batch in batches:
        labels = batch["labels"]
        inputs = {name: batch[name] for name in ("input_ids", "attention_mask", "position_ids")}
        with torch.no_grad():
            ours = token_log_probs(model(**inputs, logits_to_keep=target_mask(labels)).logits, labels)
        theirs = []
        for ids, row, kept in zip(batch["input_ids"], labels, batch["attention_mask"], strict=True):
            prompt = ids[kept].tolist()
            (answer,) = engine.run([Request(prompt=prompt, max_new_tokens=0, logprobs=0, prompt_logprobs=True)])
            learned = (row[kept] != IGNORE_INDEX).nonzero()[:, 0].tolist()
            theirs += [answer.prompt_tokens[place].logprob for place in learned]
        torch.testing.assert_close(ours, torch.tensor(theirs), atol=1e-5, rtol=0)
        assert ours.std() > 0.5


def test_rows_are_prompt_and_answer_and_the_answer_is_learned(model, tiny_tokenizer, dataset, questions):
    batches, sums = rollouts(model, tiny_tokenizer, dataset).write(model, questions, step=0)
    assert [len(batch["input_ids"]) for batch in batches] == [6, 6, 3]
    assert (sums["answers"], sums["groups"]) == (15, 5)
    for asked, batch in zip(questions, batches, strict=True):
        for row in range(len(batch["input_ids"])):
            prompt = asked["input_ids"][row // 3][asked["attention_mask"][row // 3]]
            n = len(prompt)
            assert torch.equal(batch["input_ids"][row, :n], prompt)
            kept = batch["attention_mask"][row]
            assert (batch["labels"][row, :n] == IGNORE_INDEX).all()
            assert torch.equal(batch["labels"][row, n:][kept[n:]], batch["input_ids"][row, n:][kept[n:]])
            assert (batch["labels"][row][~kept] == IGNORE_INDEX).all()
        assert batch["advantages"].view(-1, 3).mean(1).abs().max() < 1e-5
    rewards = torch.cat([batch["rewards"] for batch in batches])
    assert rewards.sum().item() == pytest.approx(sums["reward"], abs=1e-5)
    assert sums["reward"] == pytest.approx(sums["reward_repetition"] + 0.5 * sums["reward_length"])


def test_an_answer_depends_on_its_seed_step_question_and_number_and_not_on_its_company(
    model, tiny_tokenizer, dataset, questions
):
    together, _ = rollouts(model, tiny_tokenizer, dataset).write(model, questions, step=3)
    alone, _ = rollouts(model, tiny_tokenizer, dataset, batch_size=1, accumulation_steps=1).write(
        model, questions[1:2], step=3
    )
    assert torch.equal(together[1]["input_ids"], alone[0]["input_ids"])
    other_step, _ = rollouts(model, tiny_tokenizer, dataset).write(model, questions[1:2], step=4)
    assert not torch.equal(alone[0]["input_ids"], other_step[0]["input_ids"])
    other_seed, _ = rollouts(model, tiny_tokenizer, dataset, seed=43).write(model, questions[1:2], step=3)
    assert not torch.equal(alone[0]["input_ids"], other_seed[0]["input_ids"])
    seeds = {sampling_seed(*place) for place in ((0, 0, 0, 0), (1, 0, 0, 0), (0, 1, 0, 0), (0, 0, 1, 0), (0, 0, 0, 1))}
    assert len(seeds) == 5
    ours = rollouts(model, tiny_tokenizer, dataset)
    first, again, another = ([answer.ids for answer in ours._written([2], 3, n)[0].answers] for n in (0, 0, 1))
    assert first == again != another, "a question drawn again is answered anew"
    assert len({tuple(ids) for ids in (*first, *another)}) == 6
    assert all(0 <= seed < 1 << 63 for seed in seeds)


def test_the_weights_are_those_of_now(tiny_tokenizer, dataset, questions):
    torch.manual_seed(2)
    model = MiniMindLM(LMConfig(dim=32, n_layers=2, vocab_size=len(tiny_tokenizer)))
    ours = rollouts(model, tiny_tokenizer, dataset)
    before, _ = ours.write(model, questions, step=0)
    with torch.no_grad():
        model.tok_embeddings.weight.mul_(2)
    after, _ = ours.write(model, questions, step=0)
    fresh, _ = rollouts(model, tiny_tokenizer, dataset).write(model, questions, step=0)
    assert not torch.equal(before[0]["input_ids"], after[0]["input_ids"])
    assert all(torch.equal(a["input_ids"], b["input_ids"]) for a, b in zip(after, fresh, strict=True))


def test_values_are_spread_to_their_places_and_entropy_is_the_textbooks():
    mask = torch.tensor([[False, True, True], [True, False, False]])
    assert spread(torch.tensor([1.0, 2.0, 3.0]), mask).tolist() == [[0, 1, 2], [3, 0, 0]]
    uniform, certain = torch.zeros(8), torch.tensor([100.0] + [0.0] * 7)
    assert token_entropies(torch.stack([uniform, certain])).tolist() == pytest.approx([2.0794415, 0], abs=1e-5)


def test_the_metrics_of_a_micro_batch_by_hand():
    loss, clipped, logits = torch.tensor(3.0), torch.tensor(1.0), torch.zeros(2, 4)  # two tokens, uniform over four
    sums = learning_sums(loss, logits, clipped, torch.tensor([[0.5, 0.25, 0.0]]))
    assert sums.tolist() == pytest.approx([3, 0.75, 2 * 1.3862944, 1])
    assert learning_sums(loss, logits, clipped)[1] == 0, "no penalty"
