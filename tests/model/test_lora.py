"""LoRA compared with the published layout and peft; saving, loading and merging of adapters."""

import copy

import pytest
import torch

from model import LMConfig, MiniMindLM
from model.model_lora import (
    apply_lora,
    attach_lora,
    base_hash,
    is_lora,
    load_lora,
    lora_layers,
    lora_off,
    lora_settings,
    lora_state_dict,
    merge_lora,
    remove_lora,
    save_lora,
    unmerge_lora,
)

TINY = {"dim": 32, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "vocab_size": 50, "max_seq_len": 64}
IDS = torch.arange(2 * 12).view(2, 12) * 7 % 50


def tiny_model(**changes) -> MiniMindLM:
    torch.manual_seed(0)
    return MiniMindLM(LMConfig(**TINY | changes)).eval()


def adapted(**changes) -> MiniMindLM:
    """A model whose adapter has an effect: B is not zero."""
    model = tiny_model(n_layers=changes.pop("n_layers", 2))
    apply_lora(model, **{"rank": 4, "alpha": 8} | changes)
    with torch.no_grad():
        for key, value in lora_state_dict(model).items():
            value.normal_(std=0.2 if "B" in key else 0.02)
    return model


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits


def test_a_published_adapter_gives_the_reference_logits(shared):
    expected = torch.load(shared / "fixtures/minimind2_dense_lora.expected.pt", weights_only=True)
    model = MiniMindLM(LMConfig(**expected["config"])).eval()
    state = torch.load(shared / "fixtures/minimind2_dense_lora.pth", weights_only=True)
    model.load_state_dict({key: value for key, value in state.items() if key not in ("pos_cis",)})
    found = load_lora(model, shared / "fixtures/minimind2_dense_lora.adapter.pth")
    assert found == (8, 8, ("wq", "wo"))
    with torch.no_grad():
        assert (model(expected["input_ids"]).logits - expected["lora_logits"]).abs().max() < 1e-4
        with lora_off(model):
            assert (model(expected["input_ids"]).logits - expected["logits"]).abs().max() < 1e-4


@pytest.mark.parametrize("moe", [False, True])
def test_logits_and_gradients_are_those_of_peft(moe):
    from peft import LoraConfig, get_peft_model

    targets = ["wq", "wk", "w1", "w2"]
    ours, base = tiny_model(use_moe=moe).train(), tiny_model(use_moe=moe)
    apply_lora(ours, rank=4, alpha=6, targets=targets)
    theirs = get_peft_model(base, LoraConfig(r=4, lora_alpha=6, target_modules=targets, lora_dropout=0.0)).train()
    numbers = dict(theirs.named_parameters())
    with torch.no_grad():
        for key, value in lora_state_dict(ours).items():
            value.normal_(std=0.1)
            numbers[peft_key(key)].copy_(value)
    out, reference = ours(IDS, labels=IDS), theirs(input_ids=IDS, labels=IDS)
    assert (out.logits - reference.logits).abs().max() < 1e-5
    out.loss.backward()
    reference.loss.backward()
    trained = {key: value for key, value in ours.named_parameters() if value.requires_grad}
    assert len(trained) == len([p for p in theirs.parameters() if p.requires_grad]) > 0
    for key, value in trained.items():
        torch.testing.assert_close(value.grad, numbers[peft_key(key)].grad, atol=1e-6, rtol=1e-4)
    assert all(value.grad is None for value in ours.parameters() if not value.requires_grad)


def peft_key(key: str) -> str:
    """peft's name for a key such as 'layers.0.attention.wq.lora.A.weight'."""
    return "base_model.model." + key.replace(".lora.A.", ".lora_A.default.").replace(".lora.B.", ".lora_B.default.")


def test_it_starts_at_the_base_with_a_drawn_by_seed():
    model, base = tiny_model(dim=256), tiny_model(dim=256)
    torch.manual_seed(1)
    assert apply_lora(model) == (16, 16, ("wq", "wo"))
    assert torch.equal(logits(model), logits(base))
    state = lora_state_dict(model)
    drawn = torch.cat([value.flatten() for key, value in state.items() if "A" in key])
    assert abs(drawn.std().item() - 0.02) < 2e-4
    assert abs(drawn.mean().item()) < 2e-4
    again = tiny_model(dim=256)
    torch.manual_seed(1)
    apply_lora(again)
    assert all(torch.equal(value, state[key]) for key, value in lora_state_dict(again).items())


def test_every_square_projection_is_the_default():
    model = tiny_model(n_kv_heads=4)  # wk and wv are square as well
    assert apply_lora(model).targets == ("wq", "wk", "wv", "wo")
    moe = tiny_model(use_moe=True)
    assert apply_lora(moe, targets=["w2"]).targets == ("w2",)
    assert len(lora_layers(moe)) == 2 * 5  # the routed experts and the shared one of each layer


def test_off_is_the_base_bit_for_bit():
    model, base = adapted(), tiny_model()
    assert not torch.equal(logits(model), logits(base))
    on = logits(model)
    with lora_off(model):
        assert torch.equal(logits(model), logits(base))
    assert torch.equal(logits(model), on)
    assert base_hash(model) == base_hash(base)


def test_merge_and_its_inverse():
    model, base = adapted(), tiny_model()
    on = logits(model)
    merge_lora(model)
    assert (logits(model) - on).abs().max() < 1e-5
    for refused in (merge_lora, lora_state_dict, base_hash):
        with pytest.raises(ValueError, match="merged into the weights"):
            refused(model)
    with pytest.raises(ValueError, match="merged"), lora_off(model):
        pass
    plain = tiny_model()
    plain.load_state_dict(model.state_dict())  # strict: the names are the base's
    assert torch.equal(logits(plain), logits(model))

    unmerge_lora(model)
    with pytest.raises(ValueError, match="no merged LoRA"):
        unmerge_lora(model)
    assert (logits(model) - on).abs().max() < 1e-5
    restored = model.state_dict()
    assert all((restored[key] - value).abs().max() < 1e-5 for key, value in base.state_dict().items())
    with lora_off(model):
        assert (logits(model) - logits(base)).abs().max() < 1e-5

    merge_lora(model)
    remove_lora(model)
    assert not lora_layers(model)
    assert (logits(model) - on).abs().max() < 1e-5
    apply_lora(model, rank=2)  # a second adapter on top of the first


def test_a_merged_model_may_change_its_precision_before_it_is_unmerged():
    model = adapted()
    on = logits(model)
    merge_lora(model)
    model.double()
    unmerge_lora(model)
    assert {value.dtype for value in model.state_dict().values()} == {torch.float64}
    assert (logits(model) - on).abs().max() < 1e-5
    merge_lora(model.bfloat16())
    unmerge_lora(model)
    assert {value.dtype for value in model.state_dict().values()} == {torch.bfloat16}
    assert logits(model).isfinite().all()


@pytest.mark.parametrize("alpha", [0, -1.0, float("nan")])
def test_a_factor_that_is_not_above_0_is_refused(alpha):
    with pytest.raises(ValueError, match="alpha above 0"):
        apply_lora(tiny_model(), rank=4, alpha=alpha)


def test_copies_and_state_dicts():
    model = adapted()
    on = logits(model)
    twin = copy.deepcopy(model)
    assert torch.equal(logits(twin), on)
    merge_lora(twin)
    assert torch.equal(logits(model), on)  # changing the copy does not change the original
    unmerge_lora(copy.deepcopy(twin))  # a copy of a merged one knows that it is merged

    other = tiny_model()
    apply_lora(other, rank=4, alpha=8)
    other.load_state_dict(model.state_dict())
    assert torch.equal(logits(other), on)
    with pytest.raises(RuntimeError, match="Missing key"):
        other.load_state_dict(twin.state_dict())  # merged weights cannot be mistaken for a base with an adapter


def test_compiled_blocks_give_the_same_numbers_and_see_every_switch():
    model = adapted(n_layers=1)
    base, on = logits(tiny_model(n_layers=1)), logits(model)
    for block in model.layers:
        block.compile(backend="eager")
    assert (logits(model) - on).abs().max() < 1e-5
    with lora_off(model):
        assert (logits(model) - base).abs().max() < 1e-5
    merge_lora(model)
    assert (logits(model) - on).abs().max() < 1e-5
    remove_lora(model)
    assert (logits(model) - on).abs().max() < 1e-5
    assert not any("_orig_mod" in key for key in model.state_dict())


def test_a_file_brings_its_alpha_and_knows_its_base(tmp_path):
    model = adapted(targets=["wq", "w1"])
    save_lora(model, tmp_path / "me_32.pth", base="full_sft_32.pth")
    saved = torch.load(tmp_path / "me_32.pth", weights_only=True)
    assert list(saved) == [key for key in model.state_dict() if is_lora(key)]

    fresh = tiny_model()
    assert load_lora(fresh, tmp_path / "me_32.pth") == lora_settings(model) == (4, 8, ("wq", "w1"))
    assert torch.equal(logits(fresh), logits(model))
    prepared = tiny_model()
    apply_lora(prepared, rank=4, alpha=8, targets=["wq", "w1"])
    load_lora(prepared, tmp_path / "me_32.pth")
    assert torch.equal(logits(prepared), logits(model))

    stranger = tiny_model()
    with torch.no_grad():
        stranger.norm.weight[0] += 1
    before = logits(stranger)
    with pytest.raises(ValueError, match=rf"trained on full_sft_32.pth .*{base_hash(fresh)}.*{base_hash(stranger)}"):
        load_lora(stranger, tmp_path / "me_32.pth")
    assert not lora_layers(stranger)
    assert torch.equal(logits(stranger), before)


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (
            lambda: tiny_model(dim=64),
            r"another base: its .*wo.lora.A.weight is \(4, 32\), but this model takes \(4, 64\)",
        ),
        (lambda: tiny_model(n_layers=3), r"its layers.2.attention.wo.lora.A.weight is missing"),
        (lambda: tiny_model(n_layers=1), r"its layers.1.attention.wo.lora.A.weight is \(4, 32\), .* takes none"),
        (lambda: adapted(rank=2), "rank 4, alpha 8 on wq, wo, but the model was prepared for rank 2"),
        (lambda: adapted(targets=["wq"]), "on wq, wo, but the model was prepared for rank 4, alpha 8 on wq"),
    ],
)
def test_an_adapter_that_does_not_fit_is_refused_whole(make, told):
    adapter, model = lora_state_dict(adapted()), make()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=told) as error:
        attach_lora(model, adapter, {"alpha": 8})
    assert "\n" not in str(error.value)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_what_is_no_adapter_is_told_so():
    model = tiny_model()
    half = {key: value for key, value in lora_state_dict(adapted()).items() if "A" in key}
    mixed = lora_state_dict(adapted()) | {"layers.1.attention.wo.lora.B.weight": torch.zeros(32, 5)}
    for state, told in (
        ({}, "has no tensors"),
        (model.state_dict(), "not a LoRA adapter"),
        (half, "is missing"),
        (mixed, "32, 5"),
    ):
        with pytest.raises(ValueError, match=told):
            attach_lora(model, state, {})
    for wrong, told in (
        ({"rank": 0}, "rank of at least 1"),
        ({"alpha": 0}, "alpha above 0"),
        ({"targets": ["wq", "q_proj"]}, "named q_proj; use wq, wk, wv, wo, w1, w2, w3"),
    ):
        with pytest.raises(ValueError, match=told):
            apply_lora(model, **wrong)
    assert not lora_layers(model)
    apply_lora(model)
    with pytest.raises(ValueError, match="already"):
        apply_lora(model)
    remove_lora(model)
    with pytest.raises(ValueError, match="no LoRA adapter"):
        merge_lora(model)
