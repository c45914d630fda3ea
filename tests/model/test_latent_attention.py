"""Multi-head latent attention, compared with transformers' DeepSeek-V3, its own other form, and the engine."""

import pytest
import torch
from transformers import DeepseekV3Config
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3Attention

from model import LMConfig, MiniMindLM
from model.attention import rope_angles
from model.inference.decoder import Decoder, Span
from model.inference.request import Request
from model.inference.scheduler import Engine
from model.latent_attention import LatentAttention
from model.model_lora import apply_lora

SIZES = {"dim": 32, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "vocab_size": 64, "attention": "mla"}
LATENT = SIZES | {"kv_latent_dim": 12, "rope_head_dim": 6}


def random_model(**sizes) -> MiniMindLM:
    torch.manual_seed(0)
    model = MiniMindLM(LMConfig(**LATENT | sizes)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.2 * torch.randn_like(parameter) + (parameter.dim() == 1))
    return model


def test_it_is_deepseek_v3s():
    config = LMConfig(**LATENT)
    theirs = DeepseekV3Attention(
        DeepseekV3Config(
            hidden_size=32,
            num_attention_heads=4,
            num_key_value_heads=4,
            q_lora_rank=None,
            kv_lora_rank=12,
            qk_nope_head_dim=8,
            qk_rope_head_dim=6,
            v_head_dim=8,
            rope_interleave=True,
            rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
            attn_implementation="eager",
        ),
        layer_idx=0,
    )
    torch.manual_seed(0)
    ours = LatentAttention(config, 0)
    ours.latent_norm.eps = theirs.kv_a_layernorm.variance_epsilon
    up = ours.wkv_up.weight.detach()
    state = {
        "q_proj.weight": ours.wq.weight,
        "kv_a_proj_with_mqa.weight": ours.wkv_down.weight,
        "kv_a_layernorm.weight": ours.latent_norm.weight,
        "kv_b_proj.weight": up,
        "o_proj.weight": ours.wo.weight,
    }
    torch.nn.init.normal_(ours.latent_norm.weight)
    theirs.load_state_dict(state)
    x, places = torch.randn(2, 9, 32), torch.arange(9)[None]
    cos, sin = rope_angles(places, 6, config.rope_theta)
    doubled = tuple(torch.cat((part, part), -1)[:, :, 0] for part in (cos, sin))
    causal = torch.full((9, 9), float("-inf")).triu(1)[None, None]
    expected = theirs(x, doubled, causal)[0]
    torch.testing.assert_close(ours(x, (cos, sin), None, None), expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("sizes", [{}, {"flash_attn": False}, {"kv_latent_dim": None, "rope_head_dim": None}])
def test_absorbed_step_by_step_is_expanded_at_once(sizes):
    model, ids = random_model(**sizes), torch.randint(0, 64, (2, 12))
    whole = model(ids).logits
    out = model(ids[:, :5], use_cache=True)
    logits = [out.logits]
    for i in range(5, 9):
        out = model(ids[:, i : i + 1], past_key_values=out.past_key_values, use_cache=True)
        logits.append(out.logits)
    logits.append(model(ids[:, 9:], past_key_values=out.past_key_values).logits)  # several tokens after a cache
    torch.testing.assert_close(torch.cat(logits, 1), whole, atol=1e-4, rtol=1e-4)


def test_an_adapter_counts_in_the_absorbed_form_too():
    model, ids = random_model(), torch.randint(0, 64, (1, 7))
    before = model(ids).logits
    apply_lora(model, 2, targets=["wkv_up", "wq"])
    for name, parameter in model.named_parameters():
        if name.endswith("B.weight"):
            torch.nn.init.normal_(parameter)
    whole, cache = model(ids).logits, model(ids[:, :-1], use_cache=True).past_key_values
    assert not torch.allclose(whole, before, atol=0.1)
    torch.testing.assert_close(model(ids[:, -1:], past_key_values=cache).logits, whole[:, -1:], atol=1e-4, rtol=1e-4)


def test_samples_in_a_packed_row_do_not_see_each_other():
    model, ids = random_model(), torch.randint(0, 64, (1, 10))
    positions = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4, 5]])
    packed = model(ids, position_ids=positions).logits
    apart = torch.cat([model(ids[:, :4]).logits, model(ids[:, 4:]).logits], 1)
    torch.testing.assert_close(packed, apart, atol=1e-5, rtol=1e-4)


def test_the_cache_holds_the_latent_and_the_shared_key_alone():
    def numbers_a_token(cache) -> int:
        return sum(t[0, :, 0].numel() for t in (*cache._buffer.keys, *cache._buffer.values))

    ids = torch.randint(0, 64, (1, 3))
    assert numbers_a_token(random_model()(ids, use_cache=True).past_key_values) == 2 * (12 + 6)
    grouped = random_model(attention="gqa")
    assert numbers_a_token(grouped(ids, use_cache=True).past_key_values) == 2 * (2 * 2 * 8)


def test_the_engine_writes_what_the_model_does(tiny_tokenizer):
    model = random_model(vocab_size=len(tiny_tokenizer))
    prompts = [torch.randint(0, 64, (n,)).tolist() for n in (3, 17, 6)]
    engine = Engine(model, tiny_tokenizer, slots=2, slot_len=64, token_budget=8)
    assert engine.decoder._kv.shape == (2, 2, 64, 1, 1, 18)  # 12 + 6 values per token and layer
    answers = engine.run([Request(prompt=prompt, max_new_tokens=12, eos_token_id=()) for prompt in prompts])
    for prompt, answer in zip(prompts, answers, strict=True):
        alone = model.generate(torch.tensor([prompt]), max_new_tokens=12, eos_token_id=())
        assert answer.ids == alone[0].tolist()


@pytest.mark.parametrize("precision", ["int8", torch.bfloat16])
def test_fewer_bits_are_close(precision):
    model, ids = random_model(dim=64, kv_latent_dim=32), torch.randint(0, 64, (1, 9))
    decoder = Decoder(model, 1, 16, precision)
    logits = decoder.predict([Span(0, 0, ids[0].tolist())], list(range(9)))
    expected = model(ids).logits[0]
    assert (logits - expected).norm() < 0.1 * expected.norm()


@pytest.mark.parametrize(
    ("sizes", "told"),
    [
        ({"attention": "mqa"}, "attention must be one of gqa, mla"),
        ({"rope_head_dim": 5}, "rope_head_dim 5 must be even"),
    ],
)
def test_wrong_sizes_are_told(sizes, told):
    with pytest.raises(ValueError, match=told):
        LMConfig(**SIZES | sizes)
