"""model/kv_cache.py and `forward` with it: chunks, continuations, padding, packed rows, each row as if alone."""

import pytest
import torch

from model.kv_cache import build_attention_mask
from tests.model.networks import KINDS, assert_all_close, gradients, network, random_ids

CLOSE = {"rtol": 1e-4, "atol": 1e-5}
pytestmark = pytest.mark.parametrize("kind", KINDS)


def read(model, chunks, cache=None, **arguments):
    """The logits of one chunk after another, and the last cache."""
    logits = []
    with torch.no_grad():
        for chunk in chunks:
            out = model(chunk, past_key_values=cache, use_cache=True, **arguments)
            cache = out.past_key_values
            logits.append(out.logits)
    return torch.cat(logits, dim=1), cache


@pytest.mark.parametrize("sizes", [[1] * 12, [5, 3, 1, 2, 1], [12], [1, 11], [7, 90, 1, 1, 40]])
def test_reading_in_chunks_equals_reading_at_once(kind, sizes):
    model = network(**KINDS[kind])
    ids = random_ids(2, sum(sizes))
    logits, cache = read(model, ids.split(sizes, dim=1))
    torch.testing.assert_close(logits, model(ids).logits, **CLOSE)
    assert cache.length == sum(sizes)


def test_every_continuation_of_a_cache_is_as_if_it_were_the_only_one(kind):
    model = network(**KINDS[kind])
    prompt = random_ids(2, 9)
    _, root = read(model, [prompt])
    branches = {}  # path of seeds -> (all ids, cache)
    for path in ("a", "b", "aa", "c", "ba", "ab", "aaa", "d", "bb", "aba"):  # children before and after siblings
        ids, cache = branches.get(path[:-1], (prompt, root))
        more = random_ids(2, 1 + len(path) % 3 + 70 * (path == "d"), seed=hash(path) % 1000)
        logits, grown = read(model, [more], cache)
        branches[path] = (torch.cat([ids, more], dim=1), grown)
        torch.testing.assert_close(logits, model(branches[path][0]).logits[:, ids.size(1) :], **CLOSE)
    for ids, cache in branches.values():  # and none has changed since
        last = random_ids(2, 1, seed=7)
        logits, _ = read(model, [last], cache)
        torch.testing.assert_close(logits, model(torch.cat([ids, last], 1)).logits[:, -1:], **CLOSE)


def test_interleaved_requests_share_no_state(kind):
    model = network(**KINDS[kind])
    requests = [random_ids(1, n, seed=n) for n in (4, 9)]
    caches = [None, None]
    for step in range(1, 4):
        for number, ids in enumerate(requests):
            logits, caches[number] = read(model, [ids if step == 1 else random_ids(1, 2, seed=step)], caches[number])
            if step > 1:
                requests[number] = torch.cat([ids, random_ids(1, 2, seed=step)], dim=1)
            torch.testing.assert_close(logits, model(requests[number]).logits[:, -logits.size(1) :], **CLOSE)


@pytest.mark.parametrize("side", ["left", "right", "middle"])
def test_a_padded_batch_gives_each_row_what_it_gets_alone(kind, side):
    model = network(**KINDS[kind])
    lengths, n = (3, 8, 5), 8
    rows = [random_ids(1, length, seed=length) for length in lengths]
    places = {
        "left": [list(range(n - length, n)) for length in lengths],
        "right": [list(range(length)) for length in lengths],
        "middle": [[0, 4, 7], list(range(8)), [1, 2, 3, 5, 6]],
    }[side]
    ids, mask = random_ids(3, n, seed=50), torch.zeros(3, n, dtype=torch.long)  # padding is known by place, not value
    for row, tokens in enumerate(rows):
        ids[row, places[row]], mask[row, places[row]] = tokens[0], 1
    with torch.no_grad():
        out = model(ids, mask, use_cache=True)
        uncached = model(ids, mask).logits
        chunked, _ = read_masked(model, ids, mask, [3, 1, 4])
        more = random_ids(3, 2, seed=51)
        one_more = model(more[:, :1], past_key_values=out.past_key_values, use_cache=True)
        full_mask = torch.cat([mask, torch.ones(3, 2, dtype=torch.long)], dim=1)  # transformers' way to continue
        two_more = model(more, full_mask, past_key_values=out.past_key_values)
        second = model(more[:, 1:], past_key_values=one_more.past_key_values)
    for row, tokens in enumerate(rows):
        alone = model(torch.cat([tokens, more[row : row + 1]], dim=1)).logits[0]
        torch.testing.assert_close(out.logits[row, places[row]], alone[:-2], **CLOSE)
        torch.testing.assert_close(uncached[row, places[row]], alone[:-2], **CLOSE)
        torch.testing.assert_close(chunked[row, places[row]], alone[:-2], **CLOSE)
        torch.testing.assert_close(torch.stack([one_more.logits[row, 0], second.logits[row, 0]]), alone[-2:], **CLOSE)
        torch.testing.assert_close(two_more.logits[row], alone[-2:], **CLOSE)


def read_masked(model, ids, mask, sizes):
    logits, cache = [], None
    for chunk, non_padding in zip(ids.split(sizes, 1), mask.split(sizes, 1), strict=True):
        out = model(chunk, non_padding, past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        logits.append(out.logits)
    return torch.cat(logits, dim=1), cache


def test_a_row_of_nothing_but_padding_spoils_nothing(kind):
    model = network(**KINDS[kind]).train()
    ids = random_ids(2, 5)
    mask = torch.tensor([[1] * 5, [0] * 5])
    out = model(ids, mask, labels=ids.masked_fill(mask == 0, -100))
    out.loss.backward()
    assert out.logits.isfinite().all()
    assert all(gradient.isfinite().all() for gradient in gradients(model).values())
    torch.testing.assert_close(out.loss, model(ids[:1], labels=ids[:1]).loss)


def test_a_packed_row_gives_each_sample_what_it_gets_alone(kind):
    model = network(**KINDS[kind], aux_loss_alpha=0.0).train()
    lengths = (4, 1, 6, 3)
    samples = [random_ids(1, length, seed=length) for length in lengths]
    padding = 2
    ids = torch.cat([*samples, random_ids(1, padding)], dim=1)
    positions = torch.cat([*(torch.arange(length) for length in lengths), torch.zeros(padding).long()])[None]
    mask = torch.tensor([[1] * sum(lengths) + [0] * padding])
    labels = torch.full_like(ids, -100)
    start = 0
    for length in lengths:  # the first token of a sample is never predicted
        labels[0, start + 1 : start + length] = ids[0, start + 1 : start + length]
        start += length
    together = model(ids, mask, positions, labels)
    together.loss.backward()
    packed_gradients = {name: gradient.clone() for name, gradient in gradients(model).items()}
    model.zero_grad()
    outs = [model(sample, labels=sample) for sample in samples]
    alone = torch.cat([out.logits for out in outs], dim=1)
    torch.testing.assert_close(together.logits[:, :-padding], alone, **CLOSE)
    trained = [length - 1 for length in lengths]
    loss = sum(out.loss * count for out, count in zip(outs, trained, strict=True)) / sum(trained)
    loss.backward()
    torch.testing.assert_close(together.loss, loss)
    assert_all_close(packed_gradients, gradients(model), **CLOSE)


def test_a_packed_row_may_be_read_in_chunks_and_continued(kind):
    model = network(**KINDS[kind])
    first, second, third = (random_ids(1, n, seed=n) for n in (4, 5, 6))
    ids = torch.cat([first, second[:, :2]], dim=1)
    with torch.no_grad():
        out = model(ids, position_ids=torch.tensor([[0, 1, 2, 3, 0, 1]]), use_cache=True)
        rest = model(second[:, 2:], past_key_values=out.past_key_values, use_cache=True)  # continues the last sample
        placed = model(second[:, 2:], position_ids=torch.tensor([[2, 3, 4]]), past_key_values=out.past_key_values)
        new = model(third, position_ids=torch.arange(6)[None], past_key_values=rest.past_key_values)  # a new sample
    torch.testing.assert_close(rest.logits, model(second).logits[:, 2:], **CLOSE)
    torch.testing.assert_close(placed.logits, rest.logits, **CLOSE)
    torch.testing.assert_close(new.logits, model(third).logits, **CLOSE)


def test_position_ids_are_the_positions_of_the_rotation(kind):
    """Attention depends on differences only: shifting a whole sample changes nothing, a gap within it does."""
    model = network(**KINDS[kind])
    ids = random_ids(1, 6)
    moved = model(ids, position_ids=torch.arange(20, 26)[None]).logits
    torch.testing.assert_close(moved, model(ids).logits, rtol=1e-3, atol=1e-4)
    gap = model(ids, position_ids=torch.tensor([[0, 1, 2, 30, 31, 32]])).logits
    assert (gap - model(ids).logits).abs().max() > 1e-2


def test_the_mask_of_segments_by_hand(kind):
    segments = torch.tensor([[0, 1, 1, 2, 2], [1, 1, 1, 0, 0]])
    mask = build_attention_mask(segments, 3)[:, 0]
    assert mask.shape == (2, 3, 5)
    for row in range(2):
        for query in range(3):
            for key in range(5):
                place = query + 2
                expected = key <= place and segments[row, key] == segments[row, place]
                assert mask[row, query, key] == expected
