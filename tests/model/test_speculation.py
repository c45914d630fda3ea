"""model/inference/speculation.py: drafts change how soon an answer comes, never its content."""

import copy
import itertools
from collections import Counter

import pytest
import torch

from model import MiniMindLM
from model.inference import speculation
from model.inference.request import Request
from model.inference.sampling import probabilities, sample_from
from model.inference.scheduler import Engine
from model.inference.speculation import Lookup, keep_or_replace
from tests.model.networks import network

CHI_SQUARE_7 = 24.3  # exceeded by chance once in a thousand, with 7 degrees of freedom


def prompt_of(length: int, seed: int = 0) -> list[int]:
    return torch.randint(8, 580, (length,), generator=torch.Generator().manual_seed(1000 * seed + length)).tolist()


PROMPTS = [prompt_of(1), prompt_of(20), prompt_of(6) * 5, [9, 10, 11] * 7, prompt_of(41), prompt_of(13) * 2]


@pytest.fixture(scope="module")
def models(tiny_tokenizer):
    """Models that repeat themselves at times; the draft model agrees with the dense one at times."""
    size = len(tiny_tokenizer)
    return {
        "dense": quieter(network(vocab_size=size, max_seq_len=160), 0.6),
        "moe": quieter(network(vocab_size=size, max_seq_len=160, use_moe=True), 0.6),
        "draft": quieter(network(vocab_size=size, max_seq_len=160), 0.5),
    }


def quieter(model: MiniMindLM, scale: float) -> MiniMindLM:
    """Scale the blocks' matrices: the less they add, the more a network repeats its last token."""
    with torch.no_grad():
        for parameter in model.layers.parameters():
            parameter *= scale if parameter.dim() > 1 else 1
    return model


def free(engine: Engine) -> Engine:
    """Make drafts free, so that drafting goes on whether they are accepted or not, on any machine."""
    engine.speculation.cost = lambda *_: 0.0
    return engine


def counted(engine: Engine) -> Counter:
    """Counts drafted and accepted tokens, and the engine's passes, as they come."""
    counts = Counter()
    drafts, verify, predict = engine.speculation.drafts, engine.speculation.verify, engine.decoder.predict

    def count_drafts(*args):
        found = drafts(*args)
        assert all(draft.tokens for draft in found.values()), "where there is no room, there is no draft"
        counts["drafted"] += sum(len(draft.tokens) for draft in found.values())
        return found

    def count_kept(slot, *args):
        before = slot.answer.count
        verify(slot, *args)
        counts["kept"] += len(slot.answer.ids) - len(slot.answer.request.prompt) - before - 1

    def count_passes(*args):
        counts["passes"] += 1
        return predict(*args)

    engine.speculation.drafts, engine.speculation.verify = count_drafts, count_kept
    engine.decoder.predict = count_passes
    return counts


def requests_of(**settings) -> list[Request]:
    return [
        Request(prompt=prompt, max_new_tokens=20 + 5 * i, eos_token_id=(), **settings)
        for i, prompt in enumerate(PROMPTS)
    ]


def summary(answer):
    return answer.text, [token.id for token in answer.tokens], answer.finish_reason, answer.count


# ------------------------------------------------------------------------------------------------------- equal texts

SETTINGS = {
    "greedy": {},
    "sampled": {"temperature": 0.7, "top_k": 5, "top_p": 0.9, "seed": 3},
    "penalised": {"repetition_penalty": 1.2, "frequency_penalty": 0.2, "presence_penalty": 0.1},
    "sampled and penalised": {"temperature": 0.6, "top_k": 3, "seed": 4, "frequency_penalty": 0.1},
}


LOOKUP, MODEL = {"speculate": 6}, {"draft": "draft"}
CASES = [
    *itertools.product([LOOKUP], ("dense", "moe"), (1, 4)),
    *((MODEL, "dense", 4), (MODEL, "moe", 1), (LOOKUP | MODEL, "dense", 4)),
]


@pytest.mark.parametrize(("how", "kind", "slots"), CASES)
def test_an_answer_is_the_same_with_drafts_and_comes_in_fewer_passes(how, kind, slots, models, tiny_tokenizer):
    """Random and repetitive prompts; greedy, seeded and penalised; alone and in a batch."""
    requests = [
        Request(prompt=prompt, max_new_tokens=18 + i, eos_token_id=(), **settings)
        for i, prompt in enumerate(PROMPTS)
        for settings in (*SETTINGS.values(),)[i % 2 :: 2]
    ]
    how = how | {name: models[value] for name, value in how.items() if name == "draft"}
    expected = Engine(models[kind], tiny_tokenizer, slots=slots, token_budget=40).run(requests)
    engine = free(Engine(models[kind], tiny_tokenizer, slots=slots, token_budget=40, **how))
    counts = counted(engine)
    assert [summary(a) for a in engine.run(requests)] == [summary(a) for a in expected]
    assert counts["drafted"] > counts["kept"] > (40 if kind == "dense" else 10)
    if slots == 1:
        assert counts["passes"] < sum(answer.count for answer in expected)


def test_log_probabilities_are_those_without_drafts(models, tiny_tokenizer):
    settings = {"logprobs": 3, "prompt_logprobs": True}
    expected = Engine(models["dense"], tiny_tokenizer, slots=2).run(requests_of(**settings))
    engine = free(Engine(models["dense"], tiny_tokenizer, slots=2, speculate=5))
    counts = counted(engine)
    for answer, right in zip(engine.run(requests_of(**settings)), expected, strict=True):
        for ours, theirs in ((answer.tokens, right.tokens), (answer.prompt_tokens[1:], right.prompt_tokens[1:])):
            assert [token.id for token in ours] == [token.id for token in theirs]
            assert [token.logprob for token in ours] == pytest.approx([token.logprob for token in theirs], abs=1e-4)
            assert [[i for i, _ in token.top] for token in ours] == [[i for i, _ in token.top] for token in theirs]
    assert counts["kept"] > 20


def test_an_answer_ends_where_it_would_in_the_middle_of_a_draft(models, tiny_tokenizer):
    """By length, stop string or end token, at every position; after cancellation nothing more comes."""
    model, prompt = models["dense"], PROMPTS[3]
    plain = Engine(model, tiny_tokenizer, slots=1)
    engine = free(Engine(model, tiny_tokenizer, slots=1, speculate=6))
    counts = counted(engine)
    whole = plain.run([Request(prompt=prompt, max_new_tokens=24, eos_token_id=())])[0]
    ends = [{"max_new_tokens": n, "eos_token_id": ()} for n in range(12)]
    ends += [{"max_new_tokens": 24, "eos_token_id": token.id} for token in whole.tokens[4:16]]
    ends += [{"max_new_tokens": 24, "eos_token_id": (), "stop": [whole.text[i : i + 3]]} for i in range(4, 20, 3)]
    for end in ends:
        request = Request(prompt=prompt, **end)
        (got,), (right,) = engine.run([request]), plain.run([request])
        assert (summary(got), got.end_token) == (summary(right), right.end_token)
    assert counts["kept"] > 20
    full = Request(prompt=prompt * 7, eos_token_id=())  # up to the slot's length
    assert summary(engine.run([full])[0]) == summary(plain.run([full])[0])
    answer = engine.submit(Request(prompt=prompt, eos_token_id=()))
    while answer.count < 9:
        engine.step()
    engine.cancel(answer)
    before = answer.count
    engine.step()
    assert (answer.finish_reason, answer.count) == ("cancelled", before)
    assert answer.text == whole.text[: len(answer.text)]


@pytest.mark.parametrize("drafts", ["look-up", "model"])
def test_a_wrong_draft_leaves_no_trace_in_the_slots(drafts, models, tiny_tokenizer, monkeypatch):
    """Every draft is wrong; a slot's cache serves the next turn, and is recomputed with new weights."""
    model = models["dense"]
    how = {"speculate": 5} if drafts == "look-up" else {"draft": models["draft"]}
    engine = free(Engine(model, tiny_tokenizer, slots=2, **how))
    counts = counted(engine)
    if drafts == "look-up":
        monkeypatch.setattr(Lookup, "draft", lambda self, ids, n: [5] * n)
    else:
        monkeypatch.setattr(speculation.DraftModel, "draft", lambda self, wanted: {s: ([5] * 2, []) for s in wanted})
    answers = engine.run(requests_of())
    assert counts["kept"] == 0
    assert counts["drafted"] > 100
    for slot in engine._slots:
        assert 5 not in slot.holds
    following = [Request(prompt=[*answer.ids, 17], max_new_tokens=9, eos_token_id=()) for answer in answers[-2:]]
    expected = Engine(model, tiny_tokenizer, slots=2).run(following)
    got = engine.run(following)
    assert [summary(a) for a in got] == [summary(a) for a in expected]
    assert all(answer.reused >= len(answer.request.prompt) - 3 for answer in got)
    running = engine.submit(Request(prompt=PROMPTS[2], max_new_tokens=30, eos_token_id=()))
    for _ in range(10):
        engine.step()
    engine.refresh(model)
    while running.finish_reason is None:
        engine.step()
    right = Engine(model, tiny_tokenizer, slots=1).run([running.request])[0]
    assert summary(running) == summary(right)


def test_a_step_stays_within_its_budget(models, tiny_tokenizer):
    engine = free(Engine(models["dense"], tiny_tokenizer, slots=4, token_budget=9, speculate=8))
    sizes, predict = [], engine.decoder.predict
    engine.decoder.predict = lambda spans, rows: (
        sizes.append(sum(len(span.tokens) for span in spans)) or predict(spans, rows)
    )
    engine.run(requests_of())
    assert max(sizes) == 9


# -------------------------------------------------------------------------------------------------------- drafting


def test_the_longest_suffix_that_occurred_is_continued():
    lookup = Lookup()
    assert lookup.draft([1, 2, 3], 4) == []
    assert lookup.draft([1, 2, 3, 9, 2, 3], 3) == [9, 2, 3]
    assert lookup.draft([1, 2, 3, 9, 2, 3, 8, 1, 2, 3], 2) == [9, 2]  # 1 2 3, although 2 3 was later followed by 8
    assert lookup.draft([1, 2, 3, 9, 2, 3, 8, 1, 2, 3, 4, 2, 3], 2) == [4, 2]  # the last of several equal matches
    assert Lookup().draft([7, 7, 7], 5) == [7] * 5  # a loop continues
    assert Lookup().draft([4, 5, 6, 4, 5, 6, 4, 5], 5) == [6, 4, 5, 6, 4]


def test_a_draft_model_of_the_same_weights_is_always_right(models, tiny_tokenizer):
    engine = free(Engine(models["dense"], tiny_tokenizer, slots=3, token_budget=30, draft=models["dense"]))
    counts = counted(engine)
    answers = engine.run(requests_of())
    assert counts["kept"] == counts["drafted"] > 100
    assert sum(answer.count for answer in answers) > 2 * counts["passes"]


def test_drafts_that_are_not_kept_are_given_up(models, tiny_tokenizer, monkeypatch):
    """Each draft costs one token's time: the credit is 1 plus 0.03 per token, so 120 tokens allow 4 or 5 drafts."""
    monkeypatch.setattr(Lookup, "draft", lambda self, ids, n: [5] * n)
    engine = Engine(models["dense"], tiny_tokenizer, slots=1, speculate=5)
    engine.speculation.cost = lambda *_: 1.0
    tried, verify = [], engine.speculation.verify
    engine.speculation.verify = lambda slot, *args: tried.append(slot.answer.count) or verify(slot, *args)
    engine.run([Request(prompt=prompt_of(9), max_new_tokens=120, eos_token_id=())])
    assert tried == [1, 34, 67, 100]


def test_a_draft_costs_what_it_adds_to_the_pass(models, tiny_tokenizer):
    s = Engine(models["dense"], tiny_tokenizer, slots=1, speculate=5).speculation
    s._seconds = [(1, 2.0), (2, 5.0), (4, 6.0), (8, 10.0)]
    assert [s.seconds(n) for n in (1, 2, 3, 4, 6, 8)] == [2, 5, 5.5, 6, 8, 10]
    assert s.cost(1, 1, 3) == pytest.approx((6 - 2) / 2)
    assert s.cost(2, 4, 2, model_seconds=1.0) == pytest.approx((8 - 6 + 1) / 5 * 2)


# ----------------------------------------------------------------------------------------------------- distribution


def chi_square(counts: Counter, expected: torch.Tensor) -> float:
    n = sum(counts.values())
    assert all(expected[token] > 0 for token in counts)
    return sum((counts[i] - n * p) ** 2 / (n * p) for i, p in enumerate(expected.tolist()) if p)


def test_the_rule_by_hand():
    """p = (1/2, 1/2, 0) and q = (1/4, 0, 3/4): 0 is always kept, 2 never, and then it is 0 or 1 as max(0, p - q)."""
    logits = torch.tensor([[0.5, 0.5, 0.0]]).log()
    q = torch.tensor([[0.25, 0.0, 0.75]])
    generator = torch.Generator().manual_seed(0)
    choose = [[int(keep_or_replace(logits, 1.0, 0, 1.0, [generator], x, q)) for _ in range(1000)] for x in (0, 2)]
    assert set(choose[0]) == {0}
    assert Counter(choose[1])[2] == 0
    assert Counter(choose[1])[0] / 1000 == pytest.approx(1 / 3, abs=0.05)  # (1/4, 1/2, 0), renormalised
    half = torch.tensor([[1.0, 0.0, 0.0]])
    kept = Counter(int(keep_or_replace(logits, 1.0, 0, 1.0, [generator], 0, half)) for _ in range(1000))
    assert kept[0] / 1000 == pytest.approx(0.5, abs=0.05)  # kept with p / q


def test_the_rule_samples_from_the_model_whatever_the_draft():
    generator = torch.Generator().manual_seed(1)
    logits, drafted = torch.randn(2, 8, generator=generator).unsqueeze(1)
    settings = (0.9, 7, 0.95)
    q = probabilities(drafted, 1.3, 0, 1.0)
    counts = Counter()
    for _ in range(4000):
        token = int(sample_from(q, generator))
        counts[int(keep_or_replace(logits, *settings, [generator], token, q))] += 1
    assert chi_square(counts, probabilities(logits, *settings)[0]) < CHI_SQUARE_7


@pytest.mark.parametrize("drafts", ["look-up", "model"])
def test_sampled_answers_have_the_models_distribution(drafts, tiny_tokenizer, monkeypatch):
    """The third to fifth tokens of an answer, over all texts, compared with the network's own probabilities."""
    model = network(vocab_size=len(tiny_tokenizer), max_seq_len=64, dim=16, n_layers=1, n_heads=2, n_kv_heads=1)
    settings = {"temperature": 3.0, "top_k": 2}
    prompt = [9, 10, 9, 10, 9]
    with torch.no_grad():
        expected, texts = Counter(), {(): 1.0}
        for _ in range(3):
            longer = {}
            for text, chance in texts.items():
                logits = model(torch.tensor([[*prompt, *text]])).logits[0, -1:]
                p = probabilities(logits, settings["temperature"], settings["top_k"], 1.0)[0]
                for token in p.nonzero()[:, 0].tolist():
                    longer[(*text, token)] = chance * float(p[token])
            texts = longer
    assert len(texts) == 8
    how = {"speculate": 4} if drafts == "look-up" else {"draft": quieter(copy.deepcopy(model), 0.5)}
    engine = free(Engine(model, tiny_tokenizer, slots=12, slot_len=64, token_budget=200, **how))
    if drafts == "look-up":  # at every position, half of them wrong
        guesses = itertools.cycle(texts)
        monkeypatch.setattr(Lookup, "draft", lambda self, ids, n: [*next(guesses)][len(ids) - len(prompt) :][:n])
    counts = counted(engine)
    torch.manual_seed(0)
    requests = [Request(prompt=prompt, max_new_tokens=3, eos_token_id=(), **settings) for _ in range(1500)]
    answers = [engine.prepare(request) for request in requests]
    for number, answer in enumerate(answers):
        answer.generator.manual_seed(number)
        engine.enqueue(answer)
    while engine.running or engine.waiting:
        engine.step()
    assert 0 < counts["kept"] < counts["drafted"]
    written = Counter(tuple(answer.ids[len(prompt) :]) for answer in answers)
    order = list(texts)
    assert set(written) <= set(order)
    expected = torch.tensor([texts[text] for text in order])
    assert chi_square(Counter({i: written[text] for i, text in enumerate(order)}), expected) < CHI_SQUARE_7


# ----------------------------------------------------------------------------------------------------------- errors


def test_what_cannot_be_is_said(models, tiny_tokenizer):
    with pytest.raises(ValueError, match="speculate 0, not 1, 256 and -1"):
        Engine(models["dense"], tiny_tokenizer, slots=1, speculate=-1)
    with pytest.raises(ValueError, match=f"vocabulary of 96 tokens, but the model has {len(tiny_tokenizer)}"):
        Engine(models["dense"], tiny_tokenizer, slots=1, draft=network())
