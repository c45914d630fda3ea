"""QLoRA's frozen weights in four bits, from scratch (Dettmers et al. 2023, arXiv:2305.14314): NF4, doubly quantised.

Trained weights are roughly normally distributed. The 16 values of NF4 ("4-bit NormalFloat") are therefore quantiles
of the normal distribution, so that equally many weights lie between them. Each block of 64 weights is divided by its
largest absolute value, its scale, and each weight becomes the nearest of the 16 values. The scales are quantised too:
groups of 256, less the mean of all, share an fp32 scale and take 8 bits each. A weight costs 4 bits, 8/64 for the scale
of its block and 32/(64 * 256) for that scale's own: 4.127 bits, or 0.516 bytes.

Nothing is computed in 4 bits: a layer dequantises its matrix when it is used, forward and backward, and discards it.
"""

from statistics import NormalDist

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.model_lora import LoRALinear, block_linears

BLOCK = 64  # weights that share a scale
SCALE_BLOCK = 256  # scales that share one


def _normal_float() -> tuple[float, ...]:
    """The 16 values, ascending, from -1 to 1: 7 quantiles of the normal distribution below 0, 0 itself, 8 above.

    The outermost probability is the mean of 1 - 1/30 and 1 - 1/32, and the others are evenly spaced from it to 1/2 on
    either side. Quantiles of 0 and 1 would be infinite; and with 15 or 16 values spaced evenly over the whole, none
    would be 0, which padding and pruned weights are (section 3 and appendix E).
    """
    outermost = 1 - (1 / 30 + 1 / 32) / 2

    def quantiles(count: int) -> list[float]:
        """The values from the outermost inwards, without 0."""
        step = (outermost - 0.5) / count
        return [NormalDist().inv_cdf(outermost - i * step) for i in range(count)]

    values = [-value for value in quantiles(7)] + [0.0] + quantiles(8)[::-1]
    return tuple(value / values[-1] for value in values)


NF4 = _normal_float()


class NF4Weight(nn.Module):
    """A frozen matrix in NF4, with double-quantised scales.

    Buffers, for n weights in b = n / BLOCK blocks, row by row:
        codes: uint8 (n / 2,), two indices into NF4 per byte, the first in the upper half.
        scales: int8 (b,), -127 … 127: a block's scale is `mean + scales * outer / 127`.
        outer: fp32 (ceil(b / SCALE_BLOCK),), the largest distance from `mean` of each SCALE_BLOCK scales.
        mean: fp32 (1,), of all scales. They are positive, and without it half of the int8's range would be unused.

    Args:
        weight: (out, in).

    Raises:
        ValueError: the number of weights is not a multiple of BLOCK.
    """

    def __init__(self, weight: Tensor):
        super().__init__()
        if weight.numel() % BLOCK:
            raise ValueError(f"nf4 needs matrices with a multiple of {BLOCK} weights, not {weight.numel()}")
        self.shape = weight.shape
        blocks = weight.detach().float().reshape(-1, BLOCK)
        scale = blocks.abs().amax(1)
        mean = scale.mean().view(1)
        grouped = F.pad(scale - mean, (0, -len(scale) % SCALE_BLOCK)).view(-1, SCALE_BLOCK)
        outer = grouped.abs().amax(1)
        tiny = torch.finfo(torch.float32).tiny  # what a group without any deviation, or a block of zeros, is divided by
        scales = (grouped / outer.clamp(min=tiny)[:, None] * 127).round().flatten()[: len(scale)].to(torch.int8)
        values = torch.tensor(NF4, device=weight.device)
        halfway = (values[1:] + values[:-1]) / 2
        codes = torch.bucketize(blocks / scale.clamp(min=tiny)[:, None], halfway).to(torch.uint8).view(-1, 2)
        self.register_buffer("codes", codes[:, 0] << 4 | codes[:, 1])
        self.register_buffer("scales", scales)
        self.register_buffer("outer", outer)
        self.register_buffer("mean", mean)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The dequantised matrix (out, in)."""
        return dequantize(self.codes, self.scales, self.outer, self.mean, self.shape, dtype)


def dequantize(
    codes: Tensor, scales: Tensor, outer: Tensor, mean: Tensor, shape: torch.Size, dtype: torch.dtype
) -> Tensor:
    """See `NF4Weight`; the arithmetic is in fp32, the result in `dtype`."""
    values = torch.tensor(NF4, device=codes.device)
    pairs = torch.stack([values.repeat_interleave(16), values.repeat(16)], dim=1)  # (256, 2), by byte
    of_block = outer.repeat_interleave(SCALE_BLOCK)[: len(scales)] * scales / 127 + mean
    weight = F.embedding(codes.int(), pairs).view(-1, BLOCK) * of_block[:, None]
    return weight.view(shape).to(dtype)


class NF4Product(torch.autograd.Function):
    """x W^T with W frozen in NF4. The codes are saved for the backward pass, not the dequantised matrix: an ordinary
    product would keep every layer's full matrix until then."""

    @staticmethod
    def forward(
        ctx, x: Tensor, codes: Tensor, scales: Tensor, outer: Tensor, mean: Tensor, shape: torch.Size
    ) -> Tensor:
        """x (..., in) -> (..., out), in autocast's dtype where it is on."""
        ctx.save_for_backward(codes, scales, outer, mean)
        ctx.shape, ctx.dtype = shape, x.dtype
        return F.linear(x, dequantize(codes, scales, outer, mean, shape, x.dtype))

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        """The gradient of x, (..., in); W has none."""
        weight = dequantize(*ctx.saved_tensors, ctx.shape, grad.dtype)
        return (grad @ weight).to(ctx.dtype), None, None, None, None, None


class NF4Linear(nn.Linear):
    """A bias-free Linear whose matrix is frozen in NF4, here `frozen`; there is no `weight` in its state dict."""

    def __init__(self, linear: nn.Linear):
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.register_parameter("bias", None)
        self.frozen = NF4Weight(linear.weight)

    @property
    def weight(self) -> Tensor:
        """(out, in), dequantised."""
        return self.frozen.dequantize()

    def forward(self, x: Tensor) -> Tensor:
        """x (..., in) -> (..., out)."""
        one = self.frozen
        return NF4Product.apply(x, one.codes, one.scales, one.outer, one.mean, one.shape)


class NF4LoRALinear(NF4Linear, LoRALinear):
    """A LoRALinear whose matrix is frozen in NF4: only its update gets gradients."""

    def __init__(self, layer: LoRALinear):
        NF4Linear.__init__(self, layer)
        self.lora, self.rank, self.alpha, self.active = layer.lora, layer.rank, layer.alpha, layer.active

    def forward(self, x: Tensor) -> Tensor:
        """x (..., in) -> (..., out)."""
        h = super().forward(x)
        return h + self.alpha / self.rank * self.lora(x) if self.active else h

    def merge(self) -> None:
        """
        Raises:
            ValueError: always. Quantised weights cannot be added to; the adapter belongs to the base as it was saved.
        """
        raise ValueError("nf4 weights cannot be merged into: load the base as it was saved and merge into that")

    def plain(self) -> nn.Linear:
        """A Linear with the dequantised weight, without the update."""
        linear = nn.Linear(self.in_features, self.out_features, bias=False, device="meta")
        linear.weight = nn.Parameter(self.weight, requires_grad=False)
        return linear


def quantize_nf4(model: nn.Module) -> None:
    """Freeze every Linear of the model's blocks in NF4, in place, with or without an adapter.

    The embedding (also the output matrix), norms and routers stay as they are: all but the embedding are small,
    and each row of that is a token.

    Raises:
        ValueError: a matrix cannot be quantised; the model is then unchanged.
    """
    made = {
        name: (NF4LoRALinear if isinstance(layer, LoRALinear) else NF4Linear)(layer)
        for name, layer in block_linears(model).items()
    }
    for name, layer in made.items():
        model.set_submodule(name, layer)


def describe_nf4(model: nn.Module) -> str:
    """A line about the bytes of a quantised model's weights: those in NF4, the other frozen ones, and the adapter."""
    frozen = [module for module in model.modules() if isinstance(module, NF4Weight)]
    weights = sum(one.shape.numel() for one in frozen)
    size = sum(buffer.nbytes for one in frozen for buffer in one.buffers())
    rest = sum(p.nbytes for p in model.parameters() if not p.requires_grad)
    adapter = sum(p.nbytes for p in model.parameters() if p.requires_grad)
    return (
        f"nf4: {weights:,} weights of the blocks in {size / 1e6:.1f} MB, {size / weights:.4f} bytes each; "
        f"not quantized: embedding and norms {rest / 1e6:.1f} MB, adapter {adapter / 1e6:.1f} MB"
    )
