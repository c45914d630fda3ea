"""model/inference/decoder.py: the decoder's logits, compared with the model's and the published ones."""

import copy

import pytest
import torch

from model import LMConfig, MiniMindLM
from model.inference import matrices
from model.inference.decoder import Decoder, Span
from model.model_lora import apply_lora, lora_off, lora_state_dict
from tests.model.networks import network, random_ids

KINDS = {
    "dense": {},
    "all heads have keys, another epsilon and base": {"n_kv_heads": 4, "norm_eps": 1e-2, "rope_theta": 100.0},
    "moe": {"use_moe": True},
    "moe without shared, three of five": {
        **{"use_moe": True, "n_shared_experts": False, "n_routed_experts": 5, "num_experts_per_tok": 3},
        "norm_topk_prob": False,
    },
    "moe, one expert a token": {"use_moe": True, "num_experts_per_tok": 1},  # whose output is weighted all the same
}


def ids_of(rows: int, length: int) -> list[list[int]]:
    return random_ids(rows, length).tolist()


@torch.no_grad()
def expected(model, ids: list[list[int]]) -> torch.Tensor:
    return model(torch.tensor(ids)).logits


@pytest.mark.parametrize("packed", [True, False], ids=["packed", "plain"])
@pytest.mark.parametrize("kind", KINDS)
def test_ragged_requests_get_the_logits_of_the_model(kind, packed, monkeypatch):
    """Prompts whole and in chunks, beside single tokens, in slots of any order with free slots between them."""
    if not packed:
        monkeypatch.setattr(matrices, "can_pack", lambda dtype: False)
    model = network(**KINDS[kind])
    ids = ids_of(4, 40)
    right = expected(model, ids)
    decoder = Decoder(model, slots=6, slot_len=64)
    plan = [  # (request, slot, tokens), by pass
        [(0, 2, 17), (1, 5, 30), (2, 0, 4)],
        [(2, 0, 1), (1, 5, 1), (0, 2, 20)],
        [(1, 5, 1), (2, 0, 9)],
        [(0, 2, 1), (3, 1, 1), (1, 5, 1)],
        [(3, 1, 1), (0, 2, 1)],
        [(1, 5, 1), (2, 0, 6), (3, 1, 38)],
        [(1, 5, 1)],
    ]
    done = [0] * 4
    for step in plan:
        spans = [Span(slot, done[i], ids[i][done[i] : done[i] + n]) for i, slot, n in step]
        logits = decoder.logits(decoder.read(spans))
        wanted = torch.cat([right[i, done[i] : done[i] + n] for i, _, n in step])
        torch.testing.assert_close(logits, wanted, atol=2e-4, rtol=1e-4)
        for i, _, n in step:
            done[i] += n
    assert done == [39, 35, 20, 40]


def test_slots_are_copied_and_swapped():
    model = network()
    ids = ids_of(2, 20)
    right = expected(model, ids)
    decoder = Decoder(model, slots=3, slot_len=32)
    decoder.read([Span(0, 0, ids[0][:19]), Span(1, 0, ids[1][:12])])
    decoder.copy(0, 2, 10)
    decoder.swap(0, 1, 19)
    spans = [Span(1, 19, ids[0][19:]), Span(0, 12, ids[1][12:]), Span(2, 10, ids[0][10:])]
    logits = decoder.logits(decoder.read(spans))
    torch.testing.assert_close(logits, torch.cat([right[0, 19:], right[1, 12:], right[0, 10:]]), atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("slots", [(0, 1), (1, 0)])
def test_writers_of_almost_one_length_in_any_order(slots):
    model = network()
    ids = ids_of(2, 20)
    right = expected(model, ids)
    decoder = Decoder(model, slots=2, slot_len=32)
    decoder.read([Span(slots[0], 0, ids[0][:18]), Span(slots[1], 0, ids[1][:19])])
    logits = decoder.logits(decoder.read([Span(slots[0], 18, ids[0][18:19]), Span(slots[1], 19, ids[1][19:])]))
    torch.testing.assert_close(logits, torch.stack([right[0, 18], right[1, 19]]), atol=2e-4, rtol=1e-4)


def test_embeddings_stand_in_for_tokens():
    model = network()
    ids = ids_of(2, 12)
    right = expected(model, ids)
    decoder = Decoder(model, slots=2, slot_len=32)
    embeddings = model.tok_embeddings.weight.detach()[ids[0]]
    logits = decoder.logits(decoder.read([Span(1, 0, [0] * 12, embeddings), Span(0, 0, ids[1])]))
    torch.testing.assert_close(logits, right.flatten(0, 1), atol=2e-4, rtol=1e-4)


def test_an_adapter_is_in_the_snapshot_and_the_model_stays_as_it_is():
    model = network()
    apply_lora(model, rank=4, alpha=8, targets=["wq", "wv", "w2"])
    with torch.no_grad():
        for value in lora_state_dict(model).values():
            value.normal_(std=0.3)
    before = copy.deepcopy(model.state_dict())
    ids = ids_of(1, 20)
    right = expected(model, ids)
    decoder = Decoder(model, 1, 32)
    logits = decoder.logits(decoder.read([Span(0, 0, ids[0])]))
    torch.testing.assert_close(logits, right[0], atol=2e-4, rtol=1e-4)
    with lora_off(model):
        base = Decoder(model, 1, 32)
        assert (base.logits(base.read([Span(0, 0, ids[0])])) - logits).abs().max() > 0.1
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("name", ["minimind2_dense_lora", "minimind2_moe"])
def test_a_published_checkpoint_gives_the_reference_logits(name, shared):
    reference = torch.load(shared / f"fixtures/{name}.expected.pt", weights_only=True)
    model = MiniMindLM(LMConfig(**reference["config"])).eval()
    state = torch.load(shared / f"fixtures/{name}.pth", weights_only=True)
    model.load_state_dict({key: value for key, value in state.items() if key in model.state_dict()})
    decoder = Decoder(model, 2, 64)
    for ids, logits in zip(reference["input_ids"].tolist(), reference["logits"], strict=True):
        decoder.read([Span(0, 0, ids[:20])])
        first = decoder.logits(decoder.read([Span(0, 20, ids[20:47])]))
        last = decoder.logits(decoder.read([Span(0, 47, ids[47:])]))
        assert (torch.cat([first, last]) - logits[20:]).abs().max() < 1e-4


@pytest.mark.parametrize("packed", [True, False], ids=["packed", "plain"])
def test_bfloat16_weights_are_as_near_as_the_models_own(packed, monkeypatch):
    if not packed:
        monkeypatch.setattr(matrices, "can_pack", lambda dtype: False)
    model = network()
    ids = ids_of(1, 40)
    right = expected(model, ids)[0]
    theirs = (expected(copy.deepcopy(model).bfloat16(), ids)[0].float() - right).square().mean().sqrt()
    for decoder in (Decoder(model, 1, 64, torch.bfloat16), Decoder(copy.deepcopy(model).bfloat16(), 1, 64)):
        assert decoder.dtype == torch.bfloat16
        first = decoder.logits(decoder.read([Span(0, 0, ids[0][:39])]))
        last = decoder.logits(decoder.read([Span(0, 39, ids[0][39:])]))
        assert last.dtype == torch.float32, "what is chosen by it, and log-probabilities, are computed in fp32"
        ours = (torch.cat([first, last]) - right).square().mean().sqrt()
        assert 0 < ours < 1.5 * theirs


def test_the_router_is_not_rounded_with_the_other_weights():
    """Experts whose scores differ by less than bfloat16 can express: each token goes to the model's choice."""
    model = network(n_layers=1, use_moe=True, n_routed_experts=2, num_experts_per_tok=1, n_shared_experts=False)
    router = model.layers[0].feed_forward.gate.weight
    with torch.no_grad():
        router[0] = router[0].bfloat16()
        router[1] = router[0] * (1 + 2**-10)
        model.layers[0].feed_forward.experts[1].w2.weight.neg_()
    assert torch.equal(router[0].bfloat16(), router[1].bfloat16())
    ids = ids_of(1, 60)
    decoder = Decoder(model, 1, 64, torch.bfloat16)
    logits = decoder.logits(decoder.read([Span(0, 0, ids[0])]))
    right = expected(model, ids)[0]
    apart = (logits - right).abs().amax(1) > 0.1 * right.abs().max()
    assert apart.sum() <= 3, "a score near 0 may change its sign"


def test_slots_longer_than_the_model_are_refused():
    for slot_len in (0, 257):
        with pytest.raises(ValueError, match="the model takes 1 to 256"):
            Decoder(network(), 1, slot_len)


# ---------------------------------------------------------------------------------------------------- new weights

STATES = {
    **{kind: (settings, None) for kind, settings in KINDS.items()},
    "bfloat16": ({}, torch.bfloat16),
    "moe in bfloat16": ({"use_moe": True}, torch.bfloat16),
    "int8": ({}, "int8"),
    "moe in int4": ({"use_moe": True}, "int4"),
}


def addresses(decoder: Decoder) -> list[int]:
    """The addresses of the weights; packed ones have none."""
    kept = []
    for weight in decoder._weights:
        parts = weight.kept.values() if isinstance(weight, matrices.Matrix) else [getattr(weight, "kept", (weight,))]
        kept += [part for tensors in parts for part in tensors]
    return [part.layout == torch.strided and part.data_ptr() for part in kept]


def logits_of(decoder: Decoder, ids: list[list[int]]) -> torch.Tensor:
    """Logits of rows: prompts are prefilled first, then one token of each is decoded."""
    decoder.read([Span(row, 0, tokens[:-1]) for row, tokens in enumerate(ids)])
    return decoder.logits(decoder.read([Span(row, len(tokens) - 1, tokens[-1:]) for row, tokens in enumerate(ids)]))


@pytest.mark.parametrize("packed", [True, False], ids=["packed", "plain"])
@pytest.mark.parametrize("kind", STATES)
def test_a_snapshot_stays_until_it_is_refreshed(kind, packed, monkeypatch):
    """Also after a training step has changed the model's parameters in place."""
    if not packed:
        monkeypatch.setattr(matrices, "can_pack", lambda dtype: False)
    settings, dtype = STATES[kind]
    model, ids = network(**settings), ids_of(3, 12)
    decoder = Decoder(model, 3, 16, dtype)
    old = logits_of(decoder, ids)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5).add_(0.1)
    assert torch.equal(logits_of(decoder, ids), old)
    decoder.refresh(model)
    new = logits_of(decoder, ids)
    assert torch.equal(new, logits_of(Decoder(model, 3, 16, dtype), ids))
    assert (new - old).abs().max() > 0.1
    at = addresses(decoder)
    decoder.refresh(model)
    assert at == addresses(decoder)
    assert torch.equal(logits_of(decoder, ids), new)


def test_an_adapter_is_merged_at_a_refresh_as_at_the_start():
    model, ids = network(), ids_of(2, 12)
    decoder = Decoder(model, 2, 16)
    apply_lora(model, rank=4, targets=["wq", "w3"])
    with torch.no_grad():
        for value in lora_state_dict(model).values():
            value.normal_(std=0.3)
    decoder.refresh(model)
    new = logits_of(decoder, ids)
    assert torch.equal(new, logits_of(Decoder(model, 2, 16), ids))
    with lora_off(model):
        decoder.refresh(model)
    assert (logits_of(decoder, ids) - new).abs().max() > 0.1


@pytest.mark.parametrize(
    ("ours", "theirs", "name"),
    [
        ({}, {"n_layers": 3}, "n_layers 2, and this one has 3"),
        ({}, {"n_heads": 8}, "n_heads 4, and this one has 8"),  # matrices of the same shapes
        ({}, {"rope_theta": 1e4}, "rope_theta 1000000.0, and this one has 10000.0"),
        ({}, {"use_moe": True}, "use_moe False, and this one has True"),
        ({}, {"vocab_size": 97}, "vocab_size 96, and this one has 97"),
        ({"use_moe": True}, {"use_moe": True, "num_experts_per_tok": 1}, "num_experts_per_tok 2, and this one has 1"),
        ({"use_moe": True}, {"use_moe": True, "n_shared_experts": False}, "n_shared_experts True, and"),
    ],
)
def test_weights_of_another_architecture_are_refused_and_nothing_is_changed(ours, theirs, name):
    ids = ids_of(2, 8)
    decoder = Decoder(network(**ours), 2, 16)
    old = logits_of(decoder, ids)
    with pytest.raises(ValueError, match=name):
        decoder.refresh(network(seed=1, **theirs))
    assert torch.equal(logits_of(decoder, ids), old)


def test_a_model_that_grew_since_is_another_one():
    model = network()
    decoder = Decoder(model, 1, 16)
    model.resize_token_embeddings(128, mean_resizing=False)
    with pytest.raises(ValueError, match="vocab_size 96, and this one has 128"):
        decoder.refresh(model)
