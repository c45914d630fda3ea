"""model/rope_scaling.py: frequencies equal transformers', or a formula by hand where it has no such type."""

import math

import pytest
import torch
from transformers import Qwen3Config
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from model.attention import rope_angles
from model.rope_scaling import checked_scaling, ntk_theta

HEAD, THETA = 96, 1e6


def ours(scaling: dict) -> tuple[torch.Tensor, float]:
    """Our frequencies (HEAD / 2,), and the factor of cosine and sine."""
    checked = checked_scaling(scaling)
    cos, sin = rope_angles(torch.tensor([[0, 1]]), HEAD, THETA, checked)
    factor = cos[0, 0, 0, 0].item()
    return torch.atan2(sin, cos)[0, 1, 0], factor


@pytest.mark.parametrize(
    "scaling",
    [
        {"rope_type": "linear", "factor": 4.0},
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512},
        {"rope_type": "yarn", "factor": 16.0, "original_max_position_embeddings": 2048, "attention_factor": 1.0},
        {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 340, "beta_fast": 16.0},
        {"type": "yarn", "factor": 32.0, "original_max_position_embeddings": 64, "beta_slow": 2.0},
    ],
)
def test_frequencies_are_those_of_transformers(scaling):
    rope = {"rope_type": scaling.get("type", "yarn")} | scaling | {"rope_theta": THETA}
    config = Qwen3Config(hidden_size=8 * HEAD, num_attention_heads=8, head_dim=HEAD, rope_parameters=rope)
    theirs, factor = ROPE_INIT_FUNCTIONS[rope["rope_type"]](config, "cpu")
    frequencies, our_factor = ours(scaling)
    torch.testing.assert_close(frequencies, theirs, rtol=1e-5, atol=1e-9)
    assert our_factor == pytest.approx(factor)


def test_ntk_keeps_the_highest_frequency_and_divides_the_lowest_by_the_factor():
    frequencies, factor = ours({"rope_type": "ntk", "factor": 8.0})
    plain, _ = ours({"rope_type": "linear", "factor": 1.0})
    assert factor == 1.0
    assert frequencies[0].item() == pytest.approx(plain[0].item())
    assert (plain[-1] / frequencies[-1]).item() == pytest.approx(8.0, rel=1e-4)
    assert ntk_theta(1e4, 4.0, 128) == pytest.approx(1e4 * 4 ** (128 / 126))


def test_what_is_not_said_is_filled_in():
    whole = checked_scaling({"type": "yarn", "factor": 4, "original_max_position_embeddings": 512})
    assert whole == {
        **{"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512},
        **{"beta_fast": 32.0, "beta_slow": 1.0, "attention_factor": 0.1 * math.log(4) + 1},
    }
    assert checked_scaling(whole) == whole
    assert checked_scaling(None) is checked_scaling({"rope_type": "default", "rope_theta": 1e4}) is None


@pytest.mark.parametrize(
    ("scaling", "said"),
    [
        ({"rope_type": "dynamic", "factor": 2}, "'dynamic': its base changes as the text grows"),
        ({"rope_type": "llama3", "factor": 2}, "'llama3': use linear, ntk, yarn"),
        ({"rope_type": "linear"}, "factor must be a number of 1 or more, not None"),
        ({"rope_type": "linear", "factor": 0.5}, "not 0.5"),
        ({"rope_type": "yarn", "factor": 2}, "must be the trained length, not None"),
        ({"rope_type": "linear", "factor": 2, "beta_fast": 3}, "has beta_fast: linear takes factor"),
        (
            {"rope_type": "yarn", "factor": 2, "original_max_position_embeddings": 9, "beta_slow": -1},
            "beta_slow must be a number above 0",
        ),
    ],
)
def test_a_wrong_scaling_is_named(scaling, said):
    with pytest.raises(ValueError, match=said):
        checked_scaling(scaling)
