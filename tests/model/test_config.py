"""model/config.py: sizes, derived fields, and invalid combinations."""

import pytest
import torch

from model import LMConfig, MiniMindLM

DEFAULTS = {
    **{"dim": 512, "n_layers": 8, "n_heads": 8, "n_kv_heads": 2, "vocab_size": 6400, "multiple_of": 64},
    **{"norm_eps": 1e-5, "max_seq_len": 8192, "rope_theta": 1e6, "dropout": 0.0, "flash_attn": True, "use_moe": False},
    **{"num_experts_per_tok": 2, "n_routed_experts": 4, "n_shared_experts": True, "scoring_func": "softmax"},
    **{"aux_loss_alpha": 0.1, "seq_aux": True, "norm_topk_prob": True},
}


def test_the_defaults_are_minimind2s():
    assert {name: getattr(LMConfig(), name) for name in DEFAULTS} == DEFAULTS


def parameters_of(**settings) -> int:
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in MiniMindLM(LMConfig(**settings)).parameters())


def test_the_three_sizes():
    assert parameters_of(dim=512, n_layers=8) == 25_829_888
    assert round(parameters_of(dim=768, n_layers=16) / 1e6) == 104
    assert round(parameters_of(dim=640, n_layers=8, use_moe=True) / 1e6) == 145


@pytest.mark.parametrize(("dim", "hidden_dim"), [(512, 1408), (768, 2048), (640, 1728), (32, 128), (16, 64)])
def test_hidden_dim_is_two_thirds_of_four_dim_rounded_up(dim, hidden_dim):
    assert LMConfig(dim=dim).hidden_dim == hidden_dim


def test_hidden_dim_may_be_given_and_multiple_of_changed():
    assert LMConfig(hidden_dim=100).hidden_dim == 100
    assert LMConfig(dim=512, multiple_of=256).hidden_dim == 1536


def test_other_libraries_find_the_sizes_by_their_own_names():
    config = LMConfig(dim=64, n_layers=3, n_heads=4, n_kv_heads=2, max_seq_len=99)
    assert (config.hidden_size, config.num_hidden_layers, config.num_attention_heads) == (64, 3, 4)
    assert (config.num_key_value_heads, config.intermediate_size, config.max_position_embeddings) == (2, 192, 99)
    assert config.model_type == "minimind"


@pytest.mark.parametrize(("given", "has"), [(0, False), (1, True), (2, True), (True, True)])
def test_there_is_a_shared_expert_or_none_however_many_are_named(given, has):
    """MiniMind2's configs hold a number or a bool: two files of one model must compare equal."""
    assert LMConfig(use_moe=True, n_shared_experts=given).n_shared_experts is has


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"n_layers": 0}, "n_layers 0"),
        ({"n_heads": 0}, "n_heads 0"),
        ({"dim": 100, "n_heads": 8}, "dim 100"),
        ({"dim": 24, "n_heads": 8}, "even head size"),
        ({"n_heads": 8, "n_kv_heads": 3}, "n_kv_heads 3"),
        ({"scoring_func": "sigmoid"}, "sigmoid"),
        ({"use_moe": True, "num_experts_per_tok": 5}, "num_experts_per_tok 5"),
        ({"use_moe": True, "num_experts_per_tok": 0}, "num_experts_per_tok 0"),
    ],
)
def test_what_has_no_meaning_is_refused_by_name(settings, named):
    with pytest.raises(ValueError, match=named):
        LMConfig(**settings)
