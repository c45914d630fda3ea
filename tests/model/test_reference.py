"""The published checkpoint layout: reference logits and auxiliary losses, and old files' buffers."""

import pytest
import torch

from model import LMConfig, MiniMindLM


def reference(shared, name: str) -> tuple[dict, dict]:
    """The state dict and expected values of a fixture."""
    folder = shared / "fixtures"
    state = torch.load(folder / f"{name}.pth", weights_only=True)
    return state, torch.load(folder / f"{name}.expected.pt", weights_only=True)


def with_old_buffers(state: dict) -> dict:
    """The same file as MiniMind2 sometimes wrote it: with its rotation table and causal masks."""
    masks = {f"layers.{layer}.attention.mask": torch.ones(1, 1, 8, 8).triu(1) for layer in range(2)}
    return state | {"pos_cis": torch.ones(8, 8, dtype=torch.complex64)} | masks


@pytest.mark.parametrize("name", ["minimind2_dense_lora", "minimind2_moe"])
@pytest.mark.parametrize("flash_attn", [True, False])
def test_reference_logits(shared, name, flash_attn):
    state, expected = reference(shared, name)
    model = MiniMindLM(LMConfig(**expected["config"], flash_attn=flash_attn)).eval()
    assert model.state_dict().keys() == state.keys()
    model.load_state_dict(state)
    with torch.no_grad():
        logits = model(expected["input_ids"]).logits
    torch.testing.assert_close(logits, expected["logits"], rtol=0, atol=1e-4)


@pytest.mark.parametrize(("seq_aux", "name"), [(True, "sequence"), (False, "batch")])
def test_reference_auxiliary_loss(shared, seq_aux, name):
    state, expected = reference(shared, "minimind2_moe")
    model = MiniMindLM(LMConfig(**expected["config"], seq_aux=seq_aux)).train()
    model.load_state_dict(state)
    assert model(expected["input_ids"]).aux_loss.item() == pytest.approx(expected["aux_loss"][name], abs=1e-5)
    assert expected["aux_loss"]["sequence"] != pytest.approx(expected["aux_loss"]["batch"], abs=1e-3)


def test_buffers_of_old_files_are_ignored_and_other_strangers_are_not(shared):
    state, expected = reference(shared, "minimind2_dense_lora")
    old = with_old_buffers(state)
    model = MiniMindLM(LMConfig(**expected["config"]))
    model.load_state_dict(old)
    assert "pos_cis" in old, "the caller's dictionary stays as it was"
    torch.testing.assert_close(model.eval()(expected["input_ids"]).logits, expected["logits"], rtol=0, atol=1e-4)
    for stranger in ("layers.0.attention.unmask", "layers.0.attention.mask.weight", "pos_cis2"):
        with pytest.raises(RuntimeError, match=stranger):
            model.load_state_dict(state | {stranger: torch.ones(1)})
    with pytest.raises(RuntimeError, match=r"norm\.weight"):
        model.load_state_dict({key: value for key, value in state.items() if key != "norm.weight"})


def test_from_pretrained_ignores_the_buffers_of_old_files(shared, tmp_path):
    state, expected = reference(shared, "minimind2_moe")
    LMConfig(**expected["config"]).save_pretrained(tmp_path)
    torch.save(with_old_buffers(state), tmp_path / "pytorch_model.bin")
    model, info = MiniMindLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    torch.testing.assert_close(model(expected["input_ids"]).logits, expected["logits"], rtol=0, atol=1e-4)
