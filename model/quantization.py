"""Weights in 8 and 4 bits: quantisation, dequantisation, and a linear layer for quantisation-aware training.

int8: a row (output channel) of a matrix shares a scale, w ~ q * scale with q in -127 … 127 (symmetric, per channel).
int4: 32 neighbours of a row share one, with q in -8 … 7 (symmetric, in groups). A group's largest weight decides how
coarse its other 31 become; with a scale per group an outlier affects 31 weights and not a whole row. The embedding,
which is also the output matrix, is int8 in either case: each token's logit depends on one of its rows.

Dynamic or static: only the weights are rounded, ahead of time; activations stay as they are (weight-only quantisation),
so that no calibration data is needed. docs/quantization.md has the picture.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

GROUP = 32  # weights that share a scale in int4
BITS = {"int8": 8, "int4": 4}
SHRINK = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75)  # parts of the range that int4 tries: clipping an outlier helps the others


def quantize_int8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """(out, in) -> q int8 (out, in), scale fp32 (out,); a row of zeros has scale 0."""
    weight = weight.float()
    scale = weight.abs().amax(1) / 127
    q = (weight / scale.clamp(min=torch.finfo(torch.float32).tiny)[:, None]).round().clamp(-127, 127)
    return q.to(torch.int8), scale


def dequantize_int8(q: Tensor, scale: Tensor) -> Tensor:
    """The fp32 weights that `quantize_int8`'s result represents."""
    return q.float() * scale[:, None]


def quantize_int4(weight: Tensor) -> tuple[Tensor, Tensor]:
    """(out, in) -> q int8 (out, in) in -8 … 7, scale fp32 (out, in / GROUP).

    A group's scale puts its largest weight at -8 or, clipped, a little beyond: whichever of `SHRINK` leaves the
    smallest squared error.

    Raises:
        ValueError: in is not a multiple of GROUP.
    """
    n_out, n_in = weight.shape
    if n_in % GROUP:
        raise ValueError(f"int4 takes matrices whose rows are multiples of {GROUP} weights, not {n_in}")
    groups = weight.float().view(n_out, -1, GROUP)
    largest = groups.gather(-1, groups.abs().argmax(-1, keepdim=True))  # with its sign
    best_q = best_scale = best_error = None
    for part in SHRINK:
        scale = largest * (part / -8)
        safe = torch.where(scale == 0, 1.0, scale)
        q = (groups / safe).round().clamp(-8, 7)
        error = (q * scale - groups).square().sum(-1, keepdim=True)
        if best_error is None:
            best_q, best_scale, best_error = q, scale, error
        else:
            better = error < best_error
            best_q = torch.where(better, q, best_q)
            best_scale = torch.where(better, scale, best_scale)
            best_error = torch.where(better, error, best_error)
    return best_q.to(torch.int8).view(n_out, n_in), best_scale[..., 0]


def dequantize_int4(q: Tensor, scale: Tensor) -> Tensor:
    """The fp32 weights that `quantize_int4`'s result represents."""
    return (q.float().view(len(q), -1, GROUP) * scale[..., None]).view(q.shape)


def round_trip(weight: Tensor, bits: int) -> Tensor:
    """The weights that (out, in) would be after quantisation to 8 or 4 bits, in its own dtype."""
    if bits == 8:
        return dequantize_int8(*quantize_int8(weight)).to(weight.dtype)
    return dequantize_int4(*quantize_int4(weight)).to(weight.dtype)


def bits_of(name: str, bits: int) -> int:
    """The bits of the matrix of this name: at least 8 for the embedding and the output matrix."""
    return 8 if name.split(".")[-2] in ("tok_embeddings", "embed_tokens", "output", "lm_head") else bits


@torch.no_grad()
def quantize_weights(model: nn.Module, bits: int) -> None:
    """Replace the model's matrices by what they would be after quantisation, in place, to measure the loss in quality.

    A router stays exact, as in the engine: it is small, and a rounding error could reroute a token.

    Raises:
        ValueError: see `quantize_int4`; nothing is changed then.
    """
    matrices = {name: weight for name, weight in model.named_parameters() if is_quantized(name, weight)}
    rounded = {name: round_trip(weight, bits_of(name, bits)) for name, weight in matrices.items()}
    for name, weight in rounded.items():
        matrices[name].copy_(weight)


def is_quantized(name: str, weight: Tensor) -> bool:
    """Whether quantisation touches this parameter of a model: matrices, but not a router."""
    return weight.dim() == 2 and not name.endswith("gate.weight")


class QuantizationAwareLinear(nn.Linear):
    """A bias-free Linear that computes with its weights as quantised, and trains the exact ones.

    Rounding has no gradient: the straight-through estimator treats it as the identity (Bengio et al. 2013,
    arXiv:1308.3432; for weights Jacob et al. 2018, arXiv:1712.05877).
    """

    def __init__(self, linear: nn.Linear, bits: int):
        nn.Module.__init__(self)
        self.in_features, self.out_features, self.bits = linear.in_features, linear.out_features, bits
        self.weight = linear.weight
        self.register_parameter("bias", None)

    def forward(self, x: Tensor) -> Tensor:
        """x (…, in) -> (…, out)."""
        with torch.no_grad():
            error = round_trip(self.weight, self.bits) - self.weight
        return F.linear(x, self.weight + error)


def make_quantization_aware(model: nn.Module, bits: int) -> None:
    """Make every matrix of the blocks quantisation-aware, in `bits`; the parameters keep their names and shapes.

    The embedding and the output matrix, which int4 leaves at 8 bits, are trained as they are.

    Raises:
        ValueError: int4 does not divide a matrix; nothing is changed then.
    """
    linears = {
        name: module
        for name, module in model.named_modules()
        if type(module) is nn.Linear and bits_of(f"{name}.weight", bits) == bits
    }
    for linear in linears.values():
        round_trip(linear.weight.detach(), bits)
    for name, linear in linears.items():
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, QuantizationAwareLinear(linear, bits))
