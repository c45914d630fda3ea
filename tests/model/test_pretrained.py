"""MiniMind as a transformers model: saved, loaded, and found by the Auto classes."""

import pytest
import torch
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from model import LMConfig, MiniMindLM
from tests.model.networks import KINDS, network, random_ids

NOT_THE_DEFAULTS = {
    **{"dim": 48, "n_layers": 3, "n_heads": 6, "n_kv_heads": 3, "vocab_size": 77, "hidden_dim": 40, "norm_eps": 1e-6},
    **{"max_seq_len": 100, "rope_theta": 1e4, "dropout": 0.1, "flash_attn": False, "use_moe": True},
    **{"num_experts_per_tok": 1, "n_routed_experts": 3, "n_shared_experts": False, "aux_loss_alpha": 0.2},
    **{"seq_aux": False, "norm_topk_prob": False, "multiple_of": 32},
}


@pytest.mark.parametrize("kind", KINDS)
def test_saved_and_loaded_it_is_the_same_model(kind, tmp_path):
    model = network(**KINDS[kind])
    ids = random_ids(2, 7)
    expected = model(ids).logits
    model.save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} >= {"config.json", "model.safetensors"}
    for load in (MiniMindLM, AutoModelForCausalLM):
        loaded, info = load.from_pretrained(tmp_path, output_loading_info=True)
        assert type(loaded) is MiniMindLM
        assert isinstance(loaded, PreTrainedModel)
        assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
        assert not loaded.training
        assert loaded.output.weight is loaded.tok_embeddings.weight
        torch.testing.assert_close(loaded(ids).logits, expected, rtol=0, atol=0)
        assert loaded.state_dict().keys() == model.state_dict().keys()
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        stored = set(file.keys())
    assert stored | {"output.weight"} == model.state_dict().keys() | {"output.weight"}


def test_the_tie_holds_through_training_and_loading():
    model = network().train()
    model(random_ids(2, 6), labels=random_ids(2, 6)).loss.backward()
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    assert model.output.weight is model.tok_embeddings.weight
    assert sum(parameter is model.output.weight for parameter in model.parameters()) == 1
    other = network(seed=1)
    other.load_state_dict(model.state_dict())
    assert other.output.weight is other.tok_embeddings.weight
    torch.testing.assert_close(other(random_ids(1, 4)).logits, model.eval()(random_ids(1, 4)).logits)


def test_the_auto_classes_know_it(tmp_path):
    config = LMConfig(**NOT_THE_DEFAULTS)
    model = AutoModelForCausalLM.from_config(config)
    assert type(model) is MiniMindLM
    assert model.output.weight is model.tok_embeddings.weight
    config.save_pretrained(tmp_path)
    loaded = AutoConfig.from_pretrained(tmp_path)
    assert type(loaded) is LMConfig
    assert {name: getattr(loaded, name) for name in NOT_THE_DEFAULTS} == NOT_THE_DEFAULTS
    assert (loaded.bos_token_id, loaded.eos_token_id, loaded.pad_token_id) == (1, 2, 0)


def test_every_field_is_tried_with_another_value_than_its_default():
    plain = LMConfig()
    assert all(getattr(plain, name) != value for name, value in NOT_THE_DEFAULTS.items())


def test_loaded_in_half_precision(tmp_path):
    model = network(use_moe=True)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.bfloat16}
    ids = random_ids(1, 6)
    assert (loaded(ids).logits.float().softmax(-1) - model(ids).logits.softmax(-1)).abs().mean() < 0.02


def test_generate_is_called_as_users_call_it(tmp_path):
    network().save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    batch = {"input_ids": random_ids(2, 5), "attention_mask": torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])}
    written = model.generate(**batch, max_new_tokens=4, temperature=0.8, top_p=0.9, top_k=30, seed=0, eos_token_id=2)
    assert written.shape[0] == 2
    assert torch.equal(written[:, :5], batch["input_ids"])
    assert 5 < written.shape[1] <= 9


def test_the_embedding_can_be_resized_and_stays_tied():
    model = network()
    ids = random_ids(1, 4)
    before = model(ids).logits
    model.resize_token_embeddings(100)
    assert model.output.weight is model.tok_embeddings.weight
    assert model.config.vocab_size == 100
    torch.testing.assert_close(model(ids).logits[..., :96], before)
