"""Log-probabilities of answers, compared with a slow loop; the reference's are cached and never mixed up."""

import dataclasses
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from dataset import DPODataset, StepLoader, collate
from dataset.cache_folder import in_use, remove_cache
from model import LMConfig, MiniMindLM
from model.fingerprint import hash_weights
from model.loss import target_mask
from tests.conftest import write_jsonl
from tests.dataset.test_dpo_dataset import pair, samples
from trainer.preference import (
    DPO_METRICS,
    attach_reference_log_probs,
    count_pairs,
    evaluate_pairs,
    mean_per_answer,
    reference_token_log_probs,
    sum_per_answer,
    token_log_probs,
)
from trainer.runtime import Runtime

RUN = Runtime(torch.device("cpu"), torch.float32)


def tiny_model(vocab_size, seed=0, **changes):
    torch.manual_seed(seed)
    return MiniMindLM(LMConfig(**{"dim": 32, "n_layers": 1, "vocab_size": vocab_size} | changes)).eval()


@pytest.fixture
def pairs_file(tmp_path):
    records = [pair(f"What is {n} + {n}?", f"It is {2 * n}.", "I do not know. " * (1 + n % 3)) for n in range(12)]
    return write_jsonl(tmp_path / "dpo.jsonl", records)


@pytest.fixture
def pairs(pairs_file, tiny_tokenizer):
    return lambda **settings: DPODataset(pairs_file, tiny_tokenizer, **{"max_seq_len": 96} | settings)


@torch.no_grad()
def slowly(model, ids, labels):
    """log p of each target token, token by token, with the sample alone in its batch."""
    logits = model(ids[None]).logits[0].double()
    return [logits[t - 1].log_softmax(-1)[ids[t]].item() for t in range(1, len(ids)) if labels[t] >= 0]


def test_log_probabilities_of_packed_answers(pairs, tiny_tokenizer):
    data, model = pairs(), tiny_model(len(tiny_tokenizer))
    rows = [data[row] for row in range(3)]
    batch = collate([*rows, data.empty_row], data.max_seq_len)
    assert count_pairs([batch, batch]) == 2 * sum(len(samples(row)) // 2 for row in rows)
    labels = batch.pop("labels")
    with torch.no_grad():
        values = token_log_probs(model(**batch, logits_to_keep=target_mask(labels)).logits, labels)
    each = [slowly(model, *sample) for row in rows for sample in samples(row)]
    one_by_one = torch.tensor([value for answer in each for value in answer], dtype=torch.float64)
    torch.testing.assert_close(values.double(), one_by_one, atol=1e-5, rtol=0)
    expected = torch.tensor([sum(tokens) for tokens in each], dtype=torch.float64).view(-1, 2)
    torch.testing.assert_close(sum_per_answer(values, batch, labels).double(), expected, atol=1e-4, rtol=0)
    lengths = torch.tensor([len(tokens) for tokens in each]).view(-1, 2)
    torch.testing.assert_close(mean_per_answer(values, batch, labels).double(), expected / lengths, atol=1e-5, rtol=0)


def test_a_batch_of_padding_has_no_pairs_but_a_gradient(pairs, tiny_tokenizer):
    data, model = pairs(), tiny_model(len(tiny_tokenizer))
    batch = collate([data.empty_row] * 2, data.max_seq_len)
    assert count_pairs([batch]) == 0
    labels = batch.pop("labels")
    values = token_log_probs(model(**batch, logits_to_keep=target_mask(labels)).logits, labels)
    sum_per_answer(values, batch, labels).sum().backward()  # as DDP expects of every rank
    assert model.layers[0].attention.wq.weight.grad.abs().sum() == 0


@pytest.mark.parametrize("packing", [True, False])
def test_the_cached_reference_is_what_the_model_says(pairs, tiny_tokenizer, packing):
    data, model = pairs(packing=packing), tiny_model(len(tiny_tokenizer)).train()
    attach_reference_log_probs(data, model, "start", RUN, batch_size=4)
    assert model.training
    for (batch,) in StepLoader(data, 3, 1, 1, seed=0).steps():
        labels, column = batch.pop("labels"), batch.pop("reference")
        cached = reference_token_log_probs(column, None, batch, labels)
        asked = reference_token_log_probs(None, model.eval(), batch, labels)
        torch.testing.assert_close(cached, asked, atol=1e-5, rtol=0)
        assert len(cached) == int((labels[:, 1:] >= 0).sum()) > 0


def test_the_reference_is_asked_without_dropout_and_training_goes_on_with_it(pairs, tiny_tokenizer):
    given = {}
    for dropout in (0.0, 0.5):
        data, model = pairs(), tiny_model(len(tiny_tokenizer), dropout=dropout).train()
        attach_reference_log_probs(data, model, f"start {dropout}", RUN, batch_size=4)
        given[dropout] = np.array(data.reference)
        assert model.training
    np.testing.assert_allclose(given[0.5], given[0.0], atol=1e-6)


class Silent(MiniMindLM):
    """A model that must not be called."""

    def forward(self, *args, **kwargs):
        raise AssertionError("it was asked")


def test_the_cache_is_found_again_and_never_another_s(pairs, pairs_file, tiny_tokenizer, plain_tokenizer):
    model = tiny_model(len(tiny_tokenizer))
    first = hash_weights(model.state_dict())
    attach_reference_log_probs(data := pairs(), model, first, RUN, 4)
    config = model.config

    def asked(data, weights=first, run=RUN, **changes):
        silent = Silent(LMConfig(**config.to_diff_dict() | changes))
        try:
            attach_reference_log_probs(data, silent, weights, run, 4)
        except AssertionError:
            return True
        return False

    assert not asked(again := pairs())
    assert np.array_equal(again.reference, data.reference)
    assert not asked(pairs(), run=dataclasses.replace(RUN))
    other = tiny_model(len(tiny_tokenizer), seed=1)
    assert asked(pairs(), weights=hash_weights(other.state_dict()))
    assert asked(pairs(), norm_eps=1e-6)
    assert asked(pairs(), run=Runtime(torch.device("cpu"), torch.bfloat16))
    assert asked(pairs(max_seq_len=80))
    assert asked(pairs(packing=False))
    assert asked(pairs(seed=7))
    assert asked(DPODataset(pairs_file, plain_tokenizer, max_seq_len=96))
    copy = shutil.copy(pairs_file, pairs_file.with_name("copy.jsonl"))
    assert asked(DPODataset(copy, tiny_tokenizer, max_seq_len=96))
    write_jsonl(pairs_file, [pair("What is 1 + 1?", "It is 2.", "It is 3.") for _ in range(12)])
    assert asked(pairs())


@pytest.mark.parametrize("damage", ["cut off", "another", "no array", "gone"])
def test_a_damaged_cache_is_made_again(pairs, tiny_tokenizer, damage):
    model = tiny_model(len(tiny_tokenizer))
    attach_reference_log_probs(data := pairs(), model, "start", RUN, 4)
    before = np.array(data.reference)
    path = Path(data.reference.filename)
    data.reference = None
    if damage == "cut off":
        path.write_bytes(path.read_bytes()[:-4])
    elif damage == "another":
        np.save(path, before[:-1])
    elif damage == "no array":
        path.write_bytes(b"")
    else:
        path.unlink()
    attach_reference_log_probs(data, model, "start", RUN, 4)
    assert np.array_equal(data.reference, before)


def test_the_data_s_hash_is_part_of_what_decides_the_rows(pairs):
    data = pairs()
    assert data.cache.data_sha256 in data.rows_key


def test_it_lies_beside_the_data_s_tokens_of_the_same_state_which_stay(pairs, tiny_tokenizer):
    attach_reference_log_probs(data := pairs(), tiny_model(len(tiny_tokenizer)), "start", RUN, 4)
    folder = Path(data.reference.filename).parent
    tokens = data.cache.folder
    assert (folder.parent, folder.name.split("-")[0]) == (tokens.parent, tokens.name.split("-")[0])
    assert tokens.is_dir()


def test_it_is_in_use_as_long_as_the_data_set_has_it(pairs, tiny_tokenizer):
    attach_reference_log_probs(data := pairs(), tiny_model(len(tiny_tokenizer)), "start", RUN, 4)
    folder = Path(data.reference.filename).parent
    assert in_use(folder)
    assert not remove_cache(folder)
    data.reference = None
    assert remove_cache(folder)


def test_evaluation_is_a_mean_over_the_pairs_of_all_ranks_and_training_goes_on(pairs, tiny_tokenizer, monkeypatch):
    data, model = pairs(), tiny_model(len(tiny_tokenizer)).train()
    attach_reference_log_probs(data, model, "start", RUN, 4)

    seen = []

    def loss_function(policy, reference, beta):
        assert not model.training
        assert (policy.shape, beta) == (reference.shape, 0.3)
        torch.testing.assert_close(policy, reference, atol=1e-4, rtol=0)  # it is its own reference
        seen.append(len(policy))
        return policy[:, 0] * 0 + 2.0, policy[:, 0] * 0 + 5.0

    alone = evaluate_pairs(model, None, data, RUN, 2, sum_per_answer, loss_function, 0.3)
    assert model.training
    assert alone.keys() == {f"eval_{name}" for name in DPO_METRICS}
    assert (alone["eval_loss"], alone["eval_margin"], alone["eval_reward_accuracy"]) == (2.0, 5.0, 1.0)
    total = sum(len(samples(row)) // 2 for row in data)
    assert sum(seen) == total

    # Another rank has measured the same number of pairs, with each metric larger by 1
    def sums_with_another(self, failed, pairs, *sums):
        return [failed, 2 * pairs, *(2 * value + 1 for value in sums)]

    monkeypatch.setattr(Runtime, "sums", sums_with_another)
    both = evaluate_pairs(model.eval(), None, data, RUN, 2, sum_per_answer, loss_function, 0.3)
    assert not model.training
    assert both == {name: pytest.approx(value + 0.5 / total) for name, value in alone.items()}


def test_the_hash_of_weights_tells_every_number_and_name():
    state = tiny_model(50).state_dict()
    assert hash_weights(state) == hash_weights(dict(reversed(state.items())))
    assert hash_weights(state) == hash_weights({name: value.double() for name, value in state.items()})
    changed = state["norm.weight"].clone()
    changed[3] = torch.nextafter(changed[3], torch.tensor(2.0))
    assert hash_weights(state) != hash_weights(state | {"norm.weight": changed})
    renamed = {name.replace("norm", "form"): value for name, value in state.items()}
    assert hash_weights(state) != hash_weights(renamed)


class OneOfTwo(Runtime):
    """One rank of two; `sums` adds the other rank's results."""

    others: tuple = ()

    def sums(self, *values):
        self.found = values
        return [ours + theirs for ours, theirs in zip(values, self.others or [0.0] * len(values), strict=True)]


@pytest.mark.parametrize("training", [True, False])
def test_pairs_are_evaluated_without_dropout_and_the_model_is_then_as_it_was(pairs, tiny_tokenizer, training):
    data, model = pairs(), tiny_model(len(tiny_tokenizer), dropout=0.5)
    frozen = tiny_model(len(tiny_tokenizer), seed=1)

    def loss_function(policy, reference, beta):
        margins = (policy - reference) @ torch.tensor([1.0, -1.0])
        return margins.square(), margins

    def evaluate(run, batch_size):
        return evaluate_pairs(model, frozen, data, run, batch_size, sum_per_answer, loss_function, 1.0)

    values = []
    for _ in range(2):
        model.train(training)
        values.append(evaluate(RUN, 4))
    assert model.training == training
    assert values[0] == values[1]
    assert values[0].keys() == {f"eval_{name}" for name in DPO_METRICS}
    second, first = (OneOfTwo(RUN.device, RUN.dtype, rank, world_size=2) for rank in (1, 0))
    evaluate(second, 2)
    first.others = second.found
    assert evaluate(first, 2) == pytest.approx(values[0], rel=1e-4)
