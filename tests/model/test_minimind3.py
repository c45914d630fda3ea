"""model/minimind3.py: reference logits and auxiliary loss of the published layout, and transformers' Qwen3."""

import pytest
import torch

from model import MiniMind3Config, MiniMind3LM


def reference(shared, name: str) -> tuple[dict, dict]:
    folder = shared / "fixtures"
    if not (folder / f"{name}.pth").is_file():
        pytest.skip("no fixtures of MiniMind-3")
    state = torch.load(folder / f"{name}.pth", weights_only=True)
    return state, torch.load(folder / f"{name}.expected.pt", weights_only=True)


@pytest.mark.parametrize("name", ["minimind3_dense", "minimind3_moe", "minimind3_yarn"])
@pytest.mark.parametrize("flash_attn", [True, False])
def test_reference_logits(shared, name, flash_attn):
    state, expected = reference(shared, name)
    model = MiniMind3LM(MiniMind3Config(**expected["config"], flash_attn=flash_attn)).eval()
    assert model.state_dict().keys() == state.keys()
    model.load_state_dict(state)
    with torch.no_grad():
        logits = model(expected["input_ids"]).logits
    torch.testing.assert_close(logits, expected["logits"], rtol=0, atol=1e-4)


def test_reference_auxiliary_loss(shared):
    state, expected = reference(shared, "minimind3_moe")
    model = MiniMind3LM(MiniMind3Config(**expected["config"])).train()
    model.load_state_dict(state)
    assert model(expected["input_ids"]).aux_loss.item() == pytest.approx(expected["aux_loss"], abs=1e-6)
