"""model/minimind3.py, compared with reference logits and auxiliary losses, and with transformers' Qwen3."""

from types import SimpleNamespace

import pytest
import torch

from model import MiniMind3Config, MiniMind3LM
from model.inference.request import Request
from model.inference.scheduler import Engine
from model.model_lora import apply_lora, load_lora, lora_layers, merge_lora, save_lora
from trainer.schedule import make_optimizer


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


def lively(seed: int = 0, **sizes) -> MiniMind3LM:
    small = {"dim": 32, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "vocab_size": 96, "max_seq_len": 256}
    model = MiniMind3LM(MiniMind3Config(**small | sizes)).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            mean = 1.0 if parameter.dim() == 1 else 0.0  # norms
            parameter.copy_(mean + 0.2 * torch.randn(parameter.shape, generator=generator))
    return model


def test_defaults_are_those_of_the_published_models():
    config = MiniMind3Config()
    sizes = ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "intermediate_size")
    assert [getattr(config, size) for size in sizes] == [768, 8, 8, 4, 2432]
    assert (config.rope_theta, config.max_position_embeddings, config.norm_eps) == (1e6, 32768, 1e-6)
    assert (config.num_experts_per_tok, config.n_routed_experts, config.aux_loss_alpha) == (1, 4, 5e-4)
    with torch.device("meta"):
        dense, moe = (sum(p.numel() for p in MiniMind3LM(MiniMind3Config(use_moe=m)).parameters()) for m in (0, 1))
    assert (round(dense / 1e6), round(moe / 1e6)) == (64, 198)


def test_wrong_sizes_are_refused():
    for wrong in ({"n_shared_experts": True}, {"norm_topk_prob": False}, {"hidden_size": 64, "dim": 32}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            MiniMind3Config(**wrong)


@pytest.mark.parametrize("sizes", [{}, {"use_moe": True}, {"inference_rope_scaling": True}])
def test_a_packed_row_a_padded_one_and_a_cache_compute_what_each_sample_does_alone(sizes):
    model = lively(**sizes)
    a, b = (torch.randint(3, 96, (1, n), generator=torch.Generator().manual_seed(n)) for n in (9, 14))
    with torch.no_grad():
        alone = [model(ids).logits[0] for ids in (a, b)]
        positions = torch.cat([torch.arange(9), torch.arange(14)])[None]
        packed = model(torch.cat([a, b], 1), position_ids=positions).logits[0]
        padded = model(
            torch.cat([torch.zeros(1, 5, dtype=torch.long), a], 1), torch.tensor([[0] * 5 + [1] * 9])
        ).logits[0]
        first = model(b[:, :6], use_cache=True)
        rest = model(b[:, 6:], past_key_values=first.past_key_values).logits[0]
    torch.testing.assert_close(packed, torch.cat(alone), rtol=0, atol=1e-4)
    torch.testing.assert_close(padded[5:], alone[0], rtol=0, atol=1e-4)
    torch.testing.assert_close(rest, alone[1][6:], rtol=0, atol=1e-4)


@pytest.mark.parametrize("k", [1, 2])
def test_the_auxiliary_loss_is_its_formula_and_padding_does_not_count(k):
    """coef E sum_i load_i mean_score_i, load_i the mean over tokens of the one-hot choices summed over k."""
    model = lively(use_moe=True, num_experts_per_tok=k, n_layers=1).train()
    ids = torch.randint(3, 96, (2, 12), generator=torch.Generator().manual_seed(0))
    mask = torch.ones(2, 12, dtype=torch.long)
    mask[1, 7:] = 0
    scores = []
    model.model.layers[0].mlp.gate.register_forward_hook(lambda *called: scores.append(called[-1].detach()))
    aux = model(ids, mask).aux_loss.item()
    kept = scores[0].view(2, 12, 4)[mask.bool()]
    load = torch.zeros(4)
    for row in kept:
        for expert in row.topk(k).indices.tolist():
            load[expert] += 1 / len(kept)
    assert aux == pytest.approx(5e-4 * 4 * (load * kept.mean(0)).sum().item(), rel=1e-5)


@pytest.mark.parametrize("sizes", [{}, {"use_moe": True, "num_experts_per_tok": 2}, {"inference_rope_scaling": True}])
def test_the_inference_engine_writes_the_same(sizes, tiny_tokenizer):
    model = lively(vocab_size=len(tiny_tokenizer), **sizes)
    prompts = [torch.randint(3, 500, (1, n), generator=torch.Generator().manual_seed(n)) for n in (5, 40)]
    requests = [Request(prompt=ids[0].tolist(), max_new_tokens=8, eos_token_id=()) for ids in prompts]
    answers = Engine(model, tiny_tokenizer, slots=2, token_budget=16).run(requests)
    for ids, written in zip(prompts, answers, strict=True):
        expected = model.generate(ids, max_new_tokens=8, eos_token_id=())[0, ids.size(1) :]
        assert [token.id for token in written.tokens] == expected.tolist()


def test_an_adapter_is_put_on_merged_and_taken_by_the_engine(tiny_tokenizer, tmp_path):
    model = lively(vocab_size=len(tiny_tokenizer))
    settings = apply_lora(model, rank=2, targets=("q_proj", "down_proj"))
    assert settings.targets == ("q_proj", "down_proj")
    for layer in lora_layers(model).values():
        torch.nn.init.normal_(layer.lora.B.weight)
    save_lora(model, tmp_path / "me.pth")
    ids = torch.randint(3, 500, (1, 12), generator=torch.Generator().manual_seed(0))
    adapted = model(ids).logits
    request = Request(prompt=ids[0].tolist(), max_new_tokens=5, eos_token_id=())
    (written,) = Engine(model, tiny_tokenizer, slots=1).run([request])
    again = lively(vocab_size=len(tiny_tokenizer))
    load_lora(again, tmp_path / "me.pth")
    merge_lora(again)
    torch.testing.assert_close(again(ids).logits, adapted, rtol=0, atol=1e-4)
    expected = again.generate(ids, max_new_tokens=5, eos_token_id=())[0, 12:].tolist()
    assert [token.id for token in written.tokens] == expected
    assert all(key.startswith("model.layers.") for key in torch.load(tmp_path / "me.pth", weights_only=True))


def test_muon_takes_the_hidden_matrices_and_leaves_routers_and_embeddings():
    model = lively(use_moe=True)
    args = SimpleNamespace(optimizer="muon", learning_rate=1e-3)
    muon, adamw = make_optimizer(model, args).optimizers
    by_muon = {id(p) for group in muon.param_groups for p in group["params"]}
    names = {name for name, p in model.named_parameters() if id(p) in by_muon}
    ends = ("_proj.weight",)
    assert names == {name for name, _ in model.named_parameters() if name.endswith(ends)}
    assert sum(len(group["params"]) for group in adamw.param_groups) > 0
