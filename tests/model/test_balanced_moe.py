"""Experts balanced by biases: compared with transformers' DeepSeek-V3 layer, updates by hand, and the engine."""

import pytest
import torch
from transformers import DeepseekV3Config
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3MoE

from model import LMConfig, MiniMindLM
from model.balanced_moe import BalancedMoE
from model.inference.request import Request
from model.inference.scheduler import Engine
from trainer.balancing import balance_experts
from trainer.runtime import Runtime

EXPERTS = {"use_moe": True, "num_experts_per_tok": 3, "n_routed_experts": 8, "shared_width": 2, "balance": "bias"}
SIZES = EXPERTS | {"dim": 32, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "hidden_dim": 24, "vocab_size": 64}
RUN = Runtime(torch.device("cpu"), torch.float32)


def random_layer() -> BalancedMoE:
    torch.manual_seed(0)
    layer = BalancedMoE(LMConfig(**SIZES))
    torch.nn.init.normal_(layer.gate.weight)
    torch.nn.init.normal_(layer.gate.expert_bias, std=0.3)
    return layer


def test_it_is_deepseek_v3s():
    ours = random_layer().eval()
    theirs = DeepseekV3MoE(
        DeepseekV3Config(
            hidden_size=32,
            moe_intermediate_size=24,
            num_local_experts=8,
            n_routed_experts=8,
            num_experts_per_tok=3,
            n_shared_experts=2,
            n_group=1,
            topk_group=1,
            routed_scaling_factor=1.0,
            norm_topk_prob=True,
        )
    )
    w1, w2, w3 = (
        torch.stack([getattr(expert, name).weight for expert in ours.experts]).detach() for name in ("w1", "w2", "w3")
    )
    state = {
        "gate.weight": ours.gate.weight,
        "gate.e_score_correction_bias": ours.gate.expert_bias,
        "experts.gate_up_proj": torch.cat((w1, w3), 1),
        "experts.down_proj": w2,
        "shared_experts.gate_proj.weight": ours.shared_experts.w1.weight,
        "shared_experts.up_proj.weight": ours.shared_experts.w3.weight,
        "shared_experts.down_proj.weight": ours.shared_experts.w2.weight,
    }
    theirs.load_state_dict(state)
    x = torch.randn(2, 9, 32)
    out, aux = ours(x, None)
    assert aux is None
    torch.testing.assert_close(out, theirs(x), atol=1e-5, rtol=1e-4)
    with torch.no_grad():
        ours.gate.expert_bias.zero_()
    assert not torch.allclose(ours(x, None)[0], out, atol=1e-3)  # other experts are chosen


def test_the_bias_chooses_and_does_not_weigh():
    layer = random_layer().eval()
    x = torch.randn(1, 20, 32)
    with torch.no_grad():
        before = layer(x, None)[0]
        layer.gate.expert_bias += 7.0  # all equal: the choice does not change
    torch.testing.assert_close(layer(x, None)[0], before)


def test_crowded_experts_lose_and_starved_ones_gain():
    torch.manual_seed(0)
    model = MiniMindLM(LMConfig(**SIZES | {"n_routed_experts": 4, "num_experts_per_tok": 1, "n_layers": 1})).train()
    (gate,) = [layer.feed_forward.gate for layer in model.layers]
    with torch.no_grad():
        gate.weight.zero_()
        gate.expert_bias.copy_(torch.tensor([0.3, 0.0, 0.0, -0.1]))
    mask = torch.tensor([[1, 1, 1, 1, 0, 0]])
    model(torch.randint(0, 64, (1, 6)), attention_mask=mask)
    assert gate.load.tolist() == [4, 0, 0, 0]  # padding does not count
    assert balance_experts(model, 0.01, RUN) == 3.0  # four times the mean load of one
    torch.testing.assert_close(gate.expert_bias, torch.tensor([0.29, 0.01, 0.01, -0.09]))
    assert gate.load is None


def test_without_the_bias_it_stays_crowded_and_with_it_the_load_evens_out():
    def violation(rate: float) -> float:
        layer = random_layer().train()
        alike = torch.randn(32)  # a component shared by all tokens draws them to the same experts
        found = []
        for _ in range(150):
            layer(alike + torch.randn(1, 64, 32), None)
            found.append(balance_experts(layer, rate, RUN))
        return sum(found[-20:]) / 20

    assert violation(0.01) < 0.6 * violation(0.0)


def test_two_halves_of_a_step_count_as_one():
    ids = torch.randint(0, 64, (4, 8))

    def biases(*parts) -> torch.Tensor:
        torch.manual_seed(0)
        model = MiniMindLM(LMConfig(**SIZES)).train()
        for part in parts:
            model(part)
        balance_experts(model, 0.01, RUN)
        return torch.stack([layer.feed_forward.gate.expert_bias for layer in model.layers])

    whole = biases(ids)
    assert whole.abs().sum() > 0
    torch.testing.assert_close(biases(ids[:2], ids[2:]), whole)


def test_the_engine_writes_what_the_model_does(tiny_tokenizer):
    torch.manual_seed(0)
    model = MiniMindLM(LMConfig(**SIZES | {"vocab_size": len(tiny_tokenizer)})).eval()
    with torch.no_grad():
        for name, weight in model.state_dict().items():
            if weight.dim() == 2 or name.endswith("bias"):
                weight.copy_(0.2 * torch.randn_like(weight))
    prompt = torch.randint(0, 64, (9,)).tolist()
    engine = Engine(model, tiny_tokenizer, slots=2, slot_len=64)
    (answer,) = engine.run([Request(prompt=prompt, max_new_tokens=16, eos_token_id=())])
    alone = model.generate(torch.tensor([prompt]), max_new_tokens=16, eos_token_id=())
    assert answer.ids == alone[0].tolist()


def test_without_experts_there_is_nothing_to_balance():
    with pytest.raises(ValueError, match="use_moe is off"):
        LMConfig(dim=32, n_heads=4, balance="bias")
