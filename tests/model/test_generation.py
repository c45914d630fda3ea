"""model/generation.py, model/inference/sampling.py: compared with transformers' sampling, and with single rows."""

import pytest
import torch
from transformers import (
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from model.inference.sampling import keep_top_k, keep_top_p, penalise_repetition, sample_from, sample_token
from tests.model.networks import KINDS, VOCAB, Llama, network, random_ids

SAMPLING = {"temperature": 0.7, "top_k": 20, "top_p": 0.8, "repetition_penalty": 1.4}


def transformers_processors(temperature=1.0, top_k=0, top_p=1.0, repetition_penalty=1.0) -> LogitsProcessorList:
    processors = LogitsProcessorList()
    if repetition_penalty != 1:
        processors.append(RepetitionPenaltyLogitsProcessor(repetition_penalty))
    if temperature != 1:
        processors.append(TemperatureLogitsWarper(temperature))
    if top_k:
        processors.append(TopKLogitsWarper(top_k))
    if top_p < 1:
        processors.append(TopPLogitsWarper(top_p))
    return processors


# ---------------------------------------------------------------------------------------------------- the settings


@pytest.mark.parametrize("penalty", [1.3, 0.7])
def test_repetition_penalty_lowers_positive_and_negative_logits_as_transformers_does(penalty):
    logits = torch.randn(3, VOCAB, generator=torch.Generator().manual_seed(0)) * 3
    ids = random_ids(3, 12)
    seen = torch.zeros(3, VOCAB, dtype=torch.bool).scatter_(1, ids, True)
    got = penalise_repetition(logits, seen, penalty)
    assert torch.equal(got, transformers_processors(repetition_penalty=penalty)(ids, logits.clone()))
    assert (logits[seen] < 0).any()
    assert (logits[seen] > 0).any()
    assert ((got < logits) if penalty > 1 else (got > logits))[seen].all()
    assert torch.equal(got[~seen], logits[~seen])


@pytest.mark.parametrize("k", [1, 2, 7, VOCAB - 1, VOCAB, 10_000, 0])
def test_top_k_as_transformers_does(k):
    logits = torch.randn(4, VOCAB, generator=torch.Generator().manual_seed(1))
    expected = transformers_processors(top_k=k)(None, logits.clone())
    assert torch.equal(keep_top_k(logits, k), expected)


@pytest.mark.parametrize("p", [1e-6, 0.1, 0.5, 0.85, 0.999, 1.0])
def test_top_p_as_transformers_does(p):
    logits = torch.randn(50, VOCAB, generator=torch.Generator().manual_seed(2)) * 2
    expected = transformers_processors(top_p=p)(None, logits.clone())
    assert torch.equal(keep_top_p(logits, p), expected)


def test_top_p_by_hand():
    logits = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log()
    for p, kept in ((0.4, 1), (0.6, 2), (0.79, 2), (0.81, 3), (0.96, 4), (1.0, 4)):
        assert (keep_top_p(logits, p)[0] > float("-inf")).tolist() == [place < kept for place in range(4)], p


def test_what_is_drawn_follows_the_probabilities():
    """20,000 draws: each frequency is within five standard deviations of its probability."""
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0, -3.0]])
    generator = torch.Generator().manual_seed(0)
    draws = sample_token(logits.repeat(20_000, 1), 0.8, 4, 0.99, generator)
    kept = logits[0, :4].div(0.8).softmax(0)
    probabilities = torch.cat([kept, torch.zeros(1)])
    frequencies = draws.bincount(minlength=5) / 20_000
    assert frequencies[4] == 0
    assert ((frequencies - probabilities).abs() <= 5 * (probabilities * (1 - probabilities) / 20_000).sqrt()).all()


# ------------------------------------------------------------------------------------------------------ whole texts


def test_greedy_is_transformers_greedy_on_a_llama_with_the_same_weights():
    model = network()
    llama = Llama(model).llama
    ids = random_ids(1, 6)
    for penalty in (1.0, 1.5):
        expected = llama.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=20,
            do_sample=False,
            repetition_penalty=penalty,
            eos_token_id=[3, 4],
        )
        got = model.generate(
            input_ids=ids, max_new_tokens=20, temperature=0, repetition_penalty=penalty, eos_token_id=[3, 4]
        )
        assert got.tolist() == expected.tolist()
        assert len(set(got[0, 6:].tolist())) > 3, "the test needs a text with some life in it"


@pytest.mark.parametrize("kind", KINDS)
def test_sampling_is_a_plain_loop_over_transformers_processors(kind):
    model = network(**KINDS[kind])
    prompt = random_ids(2, 5)
    got = model.generate(prompt, max_new_tokens=15, eos_token_id=(), seed=3, **SAMPLING)
    processors = transformers_processors(**SAMPLING)
    generator = torch.Generator().manual_seed(3)
    ids = prompt
    with torch.no_grad():
        for _ in range(15):
            scores = processors(ids, model(ids).logits[:, -1])  # without a cache: the whole text is processed again
            ids = torch.cat([ids, sample_from(scores.softmax(-1), generator)[:, None]], dim=1)
    assert got.tolist() == ids.tolist()


def test_the_same_seed_gives_the_same_text_and_another_one_another():
    model = network()
    prompt = random_ids(2, 5)
    first, again, other = (
        model.generate(prompt, max_new_tokens=12, temperature=1.0, seed=seed).tolist() for seed in (1, 1, 2)
    )
    assert first == again
    assert first != other
    torch.manual_seed(5)
    unseeded = model.generate(prompt, max_new_tokens=12, temperature=1.0).tolist()
    torch.manual_seed(5)
    state = torch.get_rng_state()
    model.generate(prompt, max_new_tokens=12, temperature=1.0, seed=1)
    assert torch.equal(torch.get_rng_state(), state), "a seeded draw leaves the global generator alone"
    assert model.generate(prompt, max_new_tokens=12, temperature=1.0).tolist() == unseeded


def test_a_tiny_temperature_is_nearly_greedy():
    model = network()
    prompt = random_ids(2, 5)
    greedy = model.generate(prompt, max_new_tokens=10).tolist()
    assert model.generate(prompt, max_new_tokens=10, temperature=1e-3, seed=0).tolist() == greedy
    assert model.generate(prompt, max_new_tokens=10, temperature=1.0, top_k=1, seed=0).tolist() == greedy
    assert model.generate(prompt, max_new_tokens=10, temperature=1.0, top_p=1e-9, seed=0).tolist() == greedy


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_writes_for_each_row_what_it_gets_alone(kind, side):
    model = network(**KINDS[kind])
    lengths, n, settings = (3, 8, 5), 8, {"max_new_tokens": 9, "eos_token_id": (), "repetition_penalty": 1.3}
    rows = [random_ids(1, length, seed=length) for length in lengths]
    ids, mask = random_ids(3, n, seed=9), torch.zeros(3, n, dtype=torch.long)
    for row, tokens in enumerate(rows):
        place = slice(n - tokens.size(1), n) if side == "left" else slice(tokens.size(1))
        ids[row, place], mask[row, place] = tokens[0], 1
    got = model.generate(ids, mask, **settings)
    assert torch.equal(got[:, :n], ids)
    for row, tokens in enumerate(rows):
        assert got[row, n:].tolist() == model.generate(tokens, **settings)[0, tokens.size(1) :].tolist()


def test_each_row_stops_at_its_own_stop_and_is_filled_up():
    model = network()
    prompt = random_ids(3, 5)
    free = model.generate(prompt, max_new_tokens=12, eos_token_id=())[:, 5:].tolist()
    stops = [free[0][2], free[1][6]]
    expected = []
    for row in free:
        ends = [place for place, token in enumerate(row) if token in stops]
        expected.append(row[: ends[0] + 1] if ends else row)
    assert len({len(row) for row in expected}) > 1, "the test needs rows that stop at different times"
    longest = max(map(len, expected))
    padded = [row + [0] * (longest - len(row)) for row in expected]
    assert model.generate(prompt, max_new_tokens=12, eos_token_id=stops)[:, 5:].tolist() == padded


def test_it_ends_as_soon_as_every_row_has_stopped():
    model = network()
    prompt = random_ids(1, 5)
    free = model.generate(prompt, max_new_tokens=6, eos_token_id=())[0, 5:].tolist()
    assert model.generate(prompt, max_new_tokens=6, eos_token_id=free[0])[0, 5:].tolist() == free[:1]
    model.config.eos_token_id = free[1]
    expected = free[: free.index(free[1]) + 1]
    assert model.generate(prompt, max_new_tokens=6)[0, 5:].tolist() == expected, "the config's, when none is given"
    assert model.generate(prompt, max_new_tokens=6, eos_token_id=())[0, 5:].tolist() == free


def test_max_new_tokens_counts_new_tokens_and_max_seq_len_ends_the_text():
    model = network(max_seq_len=24)
    for length in (1, 20):
        for new in (1, 4):
            assert model.generate(random_ids(2, length), max_new_tokens=new, eos_token_id=()).shape == (2, length + new)
    assert model.generate(random_ids(1, 20), max_new_tokens=100, eos_token_id=()).shape == (1, 24)


def test_stream_yields_what_generate_returns_while_it_is_written():
    model = network()
    prompt = random_ids(2, 5)
    settings = {"max_new_tokens": 8, "temperature": 1.0, "seed": 4, "eos_token_id": ()}
    read = []
    model.register_forward_hook(lambda module, args, out: read.append(args[0].size(1)))
    steps = []
    for number, tokens in enumerate(model.stream(prompt, **settings), start=1):
        assert tokens.shape == (2,)
        assert read == [5] + [1] * (number - 1), "one pass a step, and only the new token is read again"
        steps.append(tokens)
    assert torch.equal(torch.stack(steps, 1), model.generate(prompt, **settings)[:, 5:])


def test_interleaved_streams_on_one_model_share_no_state():
    model = network(use_moe=True)
    prompts = [random_ids(1, 5, seed=1), random_ids(2, 9, seed=2)]
    settings = {"max_new_tokens": 7, "temperature": 1.0, "repetition_penalty": 1.2, "eos_token_id": ()}
    alone = [model.generate(prompt, seed=number, **settings) for number, prompt in enumerate(prompts)]
    streams = [model.stream(prompt, seed=number, **settings) for number, prompt in enumerate(prompts)]
    turns = list(zip(*streams, strict=True))
    for number, prompt in enumerate(prompts):
        together = torch.stack([turn[number] for turn in turns], dim=1)
        assert torch.equal(together, alone[number][:, prompt.size(1) :])


def test_gradients_are_on_again_between_the_steps_of_a_stream():
    model = network()
    for _ in model.stream(random_ids(1, 3), max_new_tokens=2):
        assert torch.is_grad_enabled()
        assert not torch.is_inference_mode_enabled()
    model(random_ids(1, 3), labels=random_ids(1, 3)).loss.backward()


@pytest.mark.parametrize(
    "settings",
    [
        {"max_new_tokens": 0},
        {"temperature": -0.1},
        {"temperature": float("nan")},
        {"top_k": -1},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"repetition_penalty": 0.0},
    ],
)
def test_settings_out_of_range_are_refused_by_name_before_anything_is_written(settings):
    model = network()
    with pytest.raises(ValueError, match=next(iter(settings))):
        model.stream(random_ids(1, 3), **settings)
    with pytest.raises(ValueError, match=next(iter(settings))):
        model.generate(random_ids(1, 3), **settings)


def test_prompts_that_cannot_be_continued_are_refused():
    model = network(max_seq_len=8)
    for length in (0, 8, 9):
        with pytest.raises(ValueError, match=f"the prompt has {length} tokens: the model takes 1 to 7"):
            model.stream(random_ids(1, length))
    with pytest.raises(ValueError, match="all padding"):
        model.stream(random_ids(2, 3), torch.tensor([[1, 1, 1], [0, 0, 0]]))
    with pytest.raises(ValueError, match="attention_mask"):
        model.stream(random_ids(2, 3), torch.ones(2, 4))


@pytest.mark.parametrize(("p", "kept"), [(0.2, 1), (0.25, 1), (0.26, 2), (0.5, 2), (0.51, 3), (0.75, 3), (0.76, 4)])
def test_of_equally_likely_tokens_the_first_are_kept(p, kept):
    assert (keep_top_p(torch.zeros(2, 4), p) == 0).tolist() == [[place < kept for place in range(4)]] * 2


@pytest.mark.parametrize(
    ("vocabulary", "p", "kept"), [(512, 0.5, 256), (256, 0.5, 128), (256, 0.51, 131), (64, 0.5, 32)]
)
def test_a_nucleus_of_more_tokens_than_are_looked_at_first(vocabulary, p, kept):
    """All tokens are equally likely, with a power of 2, so that sums are exact."""
    logits = torch.zeros(1, vocabulary)
    assert (keep_top_p(logits, p) == 0).sum() == kept
    assert (keep_top_p(logits, p) == 0)[0, :kept].all()


def test_a_token_is_the_first_whose_share_reaches_beyond_the_number_drawn(monkeypatch):
    numbers = [0.0, 0.2499, 0.25, 0.4999, 0.5, 0.9999]
    monkeypatch.setattr(torch, "rand", lambda rows, _, device, generator: torch.tensor(numbers)[:, None])
    probabilities = torch.tensor([[0.25, 0.25, 0.5]])
    assert sample_from(probabilities.repeat(6, 1), None).tolist() == [0, 0, 1, 1, 2, 2]
    assert sample_from(4 * probabilities.repeat(6, 1), None).tolist() == [0, 0, 1, 1, 2, 2]  # of half a character
    impossible_first = torch.tensor([[0.0, 0.5, 0.5]])
    assert sample_from(impossible_first.repeat(6, 1), None).tolist() == [1, 1, 1, 1, 2, 2]


def test_every_row_may_have_a_generator_of_its_own():
    probabilities = torch.full((3, 50), 0.02)

    def generators():
        return [torch.Generator().manual_seed(seed) for seed in (5, 6, 7)]

    together = sample_from(probabilities, generators())
    assert together.tolist() == [sample_from(probabilities[:1], one).item() for one in generators()]
    assert sample_from(probabilities, generators()[0])[0] == together[0]


@pytest.mark.parametrize(("temperature", "drawn"), [(0.0, {0}), (9e-6, {0}), (1e-5, {0, 1})])
def test_below_a_tiny_temperature_the_best_token_is_taken(temperature, drawn):
    """Of two equally likely tokens: the first below the tiny temperature, a random one above it."""
    draws = sample_token(torch.zeros(64, 2), temperature, 0, 1.0, torch.Generator().manual_seed(0))
    assert set(draws.tolist()) == drawn


def test_settings_at_their_bounds_are_taken():
    model = network(max_seq_len=8)
    for settings in ({"max_new_tokens": 1}, {"temperature": 0}, {"top_k": 0}, {"top_p": 1.0}, {"top_p": 1e-9}):
        assert model.generate(random_ids(1, 7), **{"temperature": 1.0} | settings).shape == (1, 8)
    assert model.generate(random_ids(1, 1), repetition_penalty=1e-3, eos_token_id=()).shape == (1, 8)


def test_an_answer_has_512_tokens_at_most_where_nothing_is_said():
    model = network(max_seq_len=600)
    assert model.generate(random_ids(1, 3), eos_token_id=()).shape == (1, 515)
