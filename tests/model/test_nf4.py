"""model/nf4.py: the published code book, blocks by hand, gradients compared with an ordinary product, memory."""

import math

import pytest
import torch
from torch import nn

from model.model_lora import apply_lora, lora_layers, lora_state_dict, merge_lora, remove_lora
from model.nf4 import NF4, NF4Linear, NF4LoRALinear, NF4Weight, describe_nf4, quantize_nf4
from tests.model.networks import network, random_ids

PUBLISHED = (  # Dettmers et al. 2023, appendix E; bitsandbytes has the same
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635),
    *(-0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725),
    *(0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)


def random_weight(rows: int, columns: int) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(0))


def nearest(weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Each weight's nearest value, found by trying all 16, block by block."""
    values = torch.tensor(PUBLISHED)
    tried = (weight.view(-1, 64, 1) / scale.view(-1, 1, 1) - values).abs()
    return values[tried.argmin(-1)]


def test_the_sixteen_values_are_the_published_ones():
    assert list(NF4) == pytest.approx(list(PUBLISHED), abs=1e-6)


def test_a_block_by_hand():
    """Two blocks with scales 2 and 4: their mean is 3, and each differs from it by the int8 range's full scale."""
    first = [2.0, -2.0, 0.0, 0.1, 0.3, -1.1] + [0.0] * 58
    second = [-4.0, 4 * 0.7229568, 4 * 0.76, 4 * 0.9] + [0.0] * 60
    made = NF4Weight(torch.tensor([first, second]))
    assert made.scales.tolist() == [-127, 127]
    assert (made.mean.tolist(), made.outer.tolist()) == ([3.0], [1.0])
    assert made.codes[:3].tolist() == [15 << 4 | 0, 7 << 4 | 8, 9 << 4 | 2]  # 1 -1, 0 0.05, 0.15 -0.55
    assert made.codes[32:34].tolist() == [0 << 4 | 14, 14 << 4 | 15]  # -1 0.72, 0.76 0.9
    expected = [
        [2, -2, 0, 2 * PUBLISHED[8], 2 * PUBLISHED[9], 2 * PUBLISHED[2]],
        [-4, *[4 * PUBLISHED[14]] * 2, 4, 0, 0],
    ]
    torch.testing.assert_close(made.dequantize()[:, :6], torch.tensor(expected), rtol=1e-5, atol=1e-6)


def test_every_weight_becomes_the_nearest_value_of_its_block():
    """With more scales than one second-level block holds, the last block being shorter."""
    weight = random_weight(200, 96)  # 300 blocks
    made = NF4Weight(weight)
    scale = weight.view(-1, 64).abs().amax(1)
    assert (len(made.scales), len(made.outer)) == (300, 2)
    own = made.outer.repeat_interleave(256)[:300] * made.scales / 127 + made.mean
    assert ((own - scale).abs() <= made.outer.repeat_interleave(256)[:300] / 254 * 1.001).all()
    torch.testing.assert_close(made.dequantize(), (nearest(weight, scale) * own[:, None]).view(200, 96))
    error = (made.dequantize() - weight).norm() / weight.norm()
    assert 0.08 < error < 0.11  # about 0.094 for a normal distribution


def test_a_weight_is_half_a_byte_and_little_more():
    made = NF4Weight(random_weight(512, 128))  # the smallest matrix of the 26M model
    assert sum(buffer.nbytes for buffer in made.buffers()) <= 0.52 * 512 * 128
    assert not list(made.parameters())


def test_zeros_and_equal_blocks_stay():
    assert NF4Weight(torch.zeros(2, 64)).dequantize().eq(0).all()
    torch.testing.assert_close(NF4Weight(torch.full((2, 64), -0.3)).dequantize(), torch.full((2, 64), -0.3))


def test_a_model_with_a_matrix_of_another_size_is_refused_whole():
    model = network(dim=40)  # wk has 20 rows of 40
    with pytest.raises(ValueError, match="multiple of 64 weights, not 800"):
        quantize_nf4(model)
    assert not any(isinstance(module, NF4Linear) for module in model.modules())


@pytest.mark.parametrize("half", [False, True])
def test_a_product_and_its_gradient_are_those_of_the_dequantised_matrix(half):
    layer = NF4Linear(nn.Linear(96, 32, bias=False))
    plain = nn.Linear(96, 32, bias=False)
    plain.weight = nn.Parameter(layer.weight)
    x = random_weight(10, 96).view(2, 5, 96).requires_grad_()
    results = []
    for each in (layer, plain):
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            out = each(x)
        (grad,) = torch.autograd.grad(out.float().sin().sum(), x)
        results.append((out, grad))
    (ours, our_grad), (theirs, their_grad) = results
    assert ours.dtype == theirs.dtype
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(our_grad, their_grad)


def test_no_dequantised_matrix_is_kept_for_the_backward():
    layer, kept = NF4Linear(nn.Linear(256, 256, bias=False)), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.nbytes) or t, lambda t: t):
        assert layer(torch.ones(1, 256, requires_grad=True)).requires_grad
    assert sum(kept) < 0.53 * 256 * 256


@pytest.mark.parametrize("settings", [{}, {"use_moe": True}])
def test_gradients_reach_the_adapter_only_and_are_those_over_the_dequantised_base(settings):
    """Compared with LoRA on a base that contains the dequantised weights."""
    quantized, plain = network(**settings), network(**settings)
    for model in (quantized, plain):
        torch.manual_seed(1)
        apply_lora(model, rank=4, alpha=8, targets=["wq", "w2"])
        for layer in lora_layers(model).values():
            nn.init.normal_(layer.lora.B.weight)
    quantize_nf4(quantized)
    with torch.no_grad():
        for name, layer in quantized.named_modules():
            if isinstance(layer, NF4Linear):
                plain.get_submodule(name).weight.copy_(layer.weight)
    ids = random_ids(2, 9)
    for model in (quantized, plain):
        model(ids, labels=ids).loss.backward()
    trained = {name: p.grad for name, p in quantized.named_parameters() if p.grad is not None}
    assert trained.keys() == lora_state_dict(quantized).keys()
    for name, grad in trained.items():
        torch.testing.assert_close(grad, dict(plain.named_parameters())[name].grad, rtol=1e-4, atol=1e-6)


def test_every_linear_of_the_blocks_is_quantised_and_nothing_else():
    model = network(use_moe=True)
    linears = sum(isinstance(module, nn.Linear) for module in model.layers.modules())
    apply_lora(model, rank=2)
    quantize_nf4(model)
    assert sum(isinstance(module, NF4Linear) for module in model.layers.modules()) == linears
    assert sum(isinstance(module, NF4LoRALinear) for module in model.modules()) == 4  # wq and wo
    left = {name for name, p in model.named_parameters() if p.dim() == 2 and ".lora." not in name}
    assert {name.split(".")[-2] for name in left} == {"tok_embeddings", "gate"}


def test_an_adapter_is_not_merged_into_four_bits():
    model = network()
    apply_lora(model, rank=2)
    quantize_nf4(model)
    with pytest.raises(ValueError, match="load the base as it was saved"):
        merge_lora(model)
    expected = model.layers[0].attention.wq.weight
    remove_lora(model)
    assert type(model.layers[0].attention.wq) is nn.Linear
    assert torch.equal(model.layers[0].attention.wq.weight, expected)


def test_what_is_not_quantised_is_told_apart():
    model = network(dim=64, n_layers=1)
    apply_lora(model, rank=4)
    quantize_nf4(model)
    weights = 64 * (64 + 64 + 2 * 32 + 3 * model.config.hidden_dim)
    rest = 4 * 64 * (96 + 3)
    told = describe_nf4(model)
    assert f"nf4: {weights:,} weights of the blocks" in told
    assert f"embedding and norms {rest / 1e6:.1f} MB, adapter {4 * 4 * 4 * 64 / 1e6:.1f} MB" in told
    assert math.isclose(float(told.split(" MB, ")[1].split(" bytes")[0]), 0.516, abs_tol=0.004)
