"""Likelihoods with batching and shared prefixes equal those of plain forward passes."""

import itertools
import random

import pytest
import torch
import torch.nn.functional as F

from model.inference.decoder import Decoder, Span
from scripts.evaluation import likelihoods
from scripts.evaluation.likelihoods import Likelihood, Likelihoods, Question, runs
from tests.scripts.conversion import make_model

VOCABULARY = 300


@torch.no_grad()
def by_forward(model, context: list[int], continuation: list[int]) -> Likelihood:
    logprobs = F.log_softmax(model(torch.tensor([context + continuation])).logits[0, len(context) - 1 : -1], dim=-1)
    likeliest = logprobs.argmax(-1).tolist() == continuation
    return Likelihood(float(logprobs[range(len(continuation)), continuation].sum()), likeliest)


def ids(draw: random.Random, n: int) -> list[int]:
    return [draw.randrange(3, VOCABULARY) for _ in range(n)]


def questions(draw: random.Random, count: int = 24) -> list[Question]:
    """Questions of two subjects with their own examples, and some without examples; options of 1 to 6 tokens."""
    examples = [ids(draw, 60), ids(draw, 45), []]
    made = []
    for i in range(count):
        context = examples[i % 3] + ids(draw, draw.randrange(1, 30))
        made.append(Question(context, [ids(draw, draw.randrange(1, 7)) for _ in range(draw.randrange(1, 6))]))
    return made


def assert_as_by_forward(model, asked: list[Question], found) -> None:
    found = dict(found)
    assert sorted(found) == list(range(len(asked)))
    for number, question in enumerate(asked):
        for continuation, likelihood in zip(question.continuations, found[number], strict=True):
            theirs = by_forward(model, question.context, continuation)
            assert likelihood.logprob == pytest.approx(theirs.logprob, abs=1e-3)
            assert likelihood.greedy == theirs.greedy


@pytest.mark.parametrize("use_moe", [False, True])
@pytest.mark.parametrize("batch_size", [1, 5, 16])
def test_likelihoods_are_those_of_forward_passes(use_moe, batch_size):
    model = make_model(VOCABULARY, use_moe=use_moe)
    asked = questions(random.Random(0))
    assert_as_by_forward(model, asked, Likelihoods(model, batch_size).of(asked))


@pytest.mark.parametrize("most", [1, 3])
def test_likelihoods_are_the_same_a_few_rows_of_logits_at_a_time(monkeypatch, most):
    model = make_model(VOCABULARY)
    asked = questions(random.Random(6), 7)
    monkeypatch.setattr(likelihoods, "LOGIT_ROWS", most)
    rows, logits = [], Decoder.logits
    monkeypatch.setattr(Decoder, "logits", lambda self, hidden: rows.append(len(hidden)) or logits(self, hidden))
    assert_as_by_forward(model, asked, Likelihoods(model, 16).of(asked))
    assert max(rows) == most


@pytest.mark.parametrize("most", [1, 20, 50])
def test_likelihoods_are_the_same_a_few_tokens_at_a_time(monkeypatch, most):
    model = make_model(VOCABULARY)
    asked = questions(random.Random(7), 12)
    monkeypatch.setattr(likelihoods, "BATCH_TOKENS", most)
    assert_as_by_forward(model, asked, Likelihoods(model, 16).of(asked))


def test_the_likeliest_continuation_is_greedy():
    model = make_model(VOCABULARY)
    context = ids(random.Random(1), 20)
    written = model.generate(torch.tensor([context]), max_new_tokens=4, eos_token_id=())[0, 20:].tolist()
    asked = [Question(context, [written, written[:2], [*written[:-1], (written[-1] + 1) % VOCABULARY]])]
    ((_, found),) = Likelihoods(model, 4).of(asked)
    assert [likelihood.greedy for likelihood in found] == [True, True, False]


def test_calls_go_on_from_what_the_slots_hold():
    model = make_model(VOCABULARY)
    asked = questions(random.Random(2), 30)
    once = Likelihoods(model, 4)
    for some in (asked[:10], asked[10:20], asked[5:30], asked[:1]):
        assert_as_by_forward(model, some, once.of(some))


def test_options_that_do_not_fit_together_are_read_apart():
    model = make_model(VOCABULARY, max_seq_len=64)
    draw = random.Random(3)
    asked = [Question(ids(draw, 50), [ids(draw, 12) for _ in range(4)]), Question(ids(draw, 9), [ids(draw, 3)])]
    assert_as_by_forward(model, asked, Likelihoods(model, 4).of(asked))
    with pytest.raises(ValueError, match="a text of 65 tokens: the model takes 64"):
        list(Likelihoods(model, 4).of([Question(ids(draw, 60), [ids(draw, 6)])]))


def test_what_is_shared_is_read_once(monkeypatch):
    model = make_model(VOCABULARY)
    draw = random.Random(4)
    examples = [ids(draw, 80), ids(draw, 80)]
    asked = [Question(examples[i % 2] + ids(draw, 10), [ids(draw, 3) for _ in range(4)]) for i in range(20)]
    read, counted = Decoder.read, []
    monkeypatch.setattr(
        Decoder,
        "read",
        lambda self, spans: counted.append(sum(len(s.all_tokens()) for s in spans)) or read(self, spans),
    )
    list(Likelihoods(model, 4).of(asked))
    assert sum(counted) == 2 * 80 + 20 * (10 + 4 * 2)


def test_neighbours_are_cut_apart_where_what_they_share_changes():
    shared = [[7] * 40, [8] * 30]
    contexts = sorted([shared[0] + [i, 1, 2] for i in range(5)] + [shared[1] + [i, 1, 2] for i in range(4)])
    assert list(runs(contexts)) == [(0, 5, 40), (5, 9, 30)]
    assert list(runs([[1, *context] for context in contexts])) == [(0, 5, 41), (5, 9, 31)]
    alone = sorted([[9, i, 3, 4] for i in range(3)])
    assert list(runs(alone)) == [(0, 3, 0)]
    assert list(runs([[5, 6]])) == [(0, 1, 0)]
    assert list(runs([])) == []


def test_branches_see_what_precedes_them_and_not_each_other():
    model = make_model(VOCABULARY)
    draw = random.Random(5)
    held, tokens, branches = ids(draw, 12), ids(draw, 7), [ids(draw, 4), [], ids(draw, 1), ids(draw, 5)]
    decoder = Decoder(model, 2, 64)
    for start in (0, 12):
        decoder.read([Span(1, 0, held)])
        before = held[:start]
        other = Span(0, 0, ids(draw, 9))
        logits = decoder.logits(decoder.read([other, Span(1, start, tokens, branches=branches)]))[9:]
        ends = [7, *(7 + n for n in itertools.accumulate(map(len, branches)))]
        for branch, (first, last) in zip(branches, itertools.pairwise(ends), strict=True):
            with torch.no_grad():
                alone = model(torch.tensor([before + tokens + branch])).logits[0, start:]
            assert torch.allclose(logits[:7], alone[:7], atol=1e-3)
            assert torch.allclose(logits[first:last], alone[7:], atol=1e-3)
