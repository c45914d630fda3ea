"""The matrices of a decoder: how each precision stores them, and which kernel multiplies by them.

One row of input reads every weight once, so the time of a matmul is its bytes over the memory bandwidth, if the
kernel is good; many rows are bound by arithmetic. Which kernel is good differs between processors: the candidates are
timed at start (`fastest_kernels`), for one row, a few, and many. Where an answer must not depend on the others, one
kernel serves all (`fixed_kernels`).
"""

import math
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from model.quantization import GROUP, dequantize_int4, dequantize_int8, quantize_int4, quantize_int8

Precision = torch.dtype | str  # torch.float32, torch.bfloat16, "int8" or "int4"

PACKED_FOR = 512  # rows of input that oneDNN chooses the layout for; as good for one row (benchmarks/generate.py)
ROW_CLASSES = (1, 16, 256)  # rows of input that kernels are timed for; each serves up to its number, the last all
TIMED_WEIGHTS = 16_000_000  # more than a processor's caches hold, less than a second takes


class Kernel(NamedTuple):
    """A kernel: one way to multiply by a matrix.

    keep: weight (out, in) fp32 -> the tensors that the kernel reads.
    multiply: x (rows, in) fp32 or bf16, then those tensors -> (rows, out) fp32 or bf16.
    """

    name: str
    keep: Callable[[Tensor], tuple[Tensor, ...]]
    multiply: Callable[..., Tensor]


# ----------------------------------------------------------------------------------------------------- the kernels


def _keep_fp32(weight: Tensor) -> tuple[Tensor]:
    return (weight.float().clone(memory_format=torch.contiguous_format),)


def _keep_bf16(weight: Tensor) -> tuple[Tensor]:
    return (weight.bfloat16().clone(memory_format=torch.contiguous_format),)


def _linear(x: Tensor, weight: Tensor) -> Tensor:
    return F.linear(x.to(weight.dtype), weight)


def _widened(x: Tensor, weight: Tensor) -> Tensor:
    return F.linear(x.float(), weight.float())


def _pack(weight: Tensor) -> Tensor:
    return torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), PACKED_FOR)


def _packed(x: Tensor, weight: Tensor) -> Tensor:
    rows = len(x)
    if rows > 16:  # oneDNN keeps half a megabyte for every number of rows it has seen
        x = F.pad(x, (0, 0, 0, -rows % 16))
    return torch.ops.mkldnn._linear_pointwise(x.to(weight.dtype), weight, None, "none", [], "")[:rows]


def _keep_int8(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """int8 weights, their fp32 scales, and bf16 scales of 1, because PyTorch's kernel accepts only bf16 scales."""
    q, scale = quantize_int8(weight)
    return q, scale, torch.ones_like(scale, dtype=torch.bfloat16)


def _int8_kernel(x: Tensor, q: Tensor, scale: Tensor, ones: Tensor) -> Tensor:
    return torch.ops.aten._weight_int8pack_mm(x.bfloat16(), q, ones) * scale


def _int8_widened(x: Tensor, q: Tensor, scale: Tensor, ones: Tensor) -> Tensor:
    return F.linear(x.float(), q.float()) * scale


def _keep_int4(weight: Tensor) -> tuple[Tensor, Tensor]:
    """The weights in the kernel's own packing, and its pairs of scale and offset, bf16 (in / GROUP, out, 2)."""
    q, scale = quantize_int4(weight)
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(q.int() + 8, 1)
    return packed, torch.stack((scale, torch.zeros_like(scale)), -1).transpose(0, 1).bfloat16().contiguous()


def _int4_kernel(x: Tensor, packed: Tensor, scales: Tensor) -> Tensor:
    return torch.ops.aten._weight_int4pack_mm_for_cpu(x.bfloat16(), packed, GROUP, scales)


def _keep_int4_plain(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Two weights per byte, uint8 (out, in / 2), and their fp32 scales (out, in / GROUP)."""
    q, scale = quantize_int4(weight)
    low, high = (q + 8).to(torch.uint8).unflatten(1, (-1, 2)).unbind(-1)
    return low | high << 4, scale


def _int4_widened(x: Tensor, packed: Tensor, scale: Tensor) -> Tensor:
    q = torch.stack((packed & 15, packed >> 4), -1).flatten(1).to(torch.int8) - 8
    return F.linear(x.float(), dequantize_int4(q, scale))


PLAIN = {torch.float32: Kernel("linear", _keep_fp32, _linear), torch.bfloat16: Kernel("linear", _keep_bf16, _linear)}
INT8 = Kernel("int8", _keep_int8, _int8_kernel)
INT4 = Kernel("int4", _keep_int4, _int4_kernel)


def candidates(precision: Precision, device: torch.device) -> list[Kernel]:
    """The kernels for a precision on a device; the first is used where a single one must serve all rows.

    Args:
        precision: torch.float32, torch.bfloat16, "int8" or "int4".
    """
    on_cpu = device.type == "cpu"
    if precision == "int8":
        widened = Kernel("int8, widened", _keep_int8, _int8_widened)
        return [INT8, widened] if on_cpu else [widened]
    if precision == "int4":
        widened = Kernel("int4, widened", _keep_int4_plain, _int4_widened)
        return [INT4, widened] if on_cpu else [widened]
    kernels = [PLAIN.get(precision) or Kernel("linear", lambda weight: (weight.to(precision, copy=True),), _linear)]
    if on_cpu and can_pack(precision):
        keep = PLAIN[precision].keep
        kernels.insert(0, Kernel("packed", lambda weight: (_pack(*keep(weight)),), _packed))
    if on_cpu and precision == torch.bfloat16 and not can_pack(precision):  # a CPU that does not compute in bf16
        kernels.append(Kernel("widened", _keep_bf16, _widened))
        if can_pack(torch.float32):  # three times the memory, and twice as fast with a few rows
            kernels.append(Kernel("widened, packed", lambda weight: (_pack(weight.bfloat16().float()),), _packed))
    return kernels


def output_precision(precision: Precision) -> Precision:
    """The precision of the output matrix and of the embedding tied to it: 8 bits where the others have 4."""
    return "int8" if precision == "int4" else precision


def can_pack(dtype: torch.dtype) -> bool:
    """Whether oneDNN can compute in this dtype on this machine."""
    if not torch.backends.mkldnn.is_available():
        return False
    return dtype == torch.float32 or (dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported())


# ----------------------------------------------------------------------------------------------------- which of them


class Kernels(NamedTuple):
    """The kernel of each class of `ROW_CLASSES`."""

    by_class: tuple[Kernel, ...]

    def for_rows(self, rows: int) -> Kernel:
        """The kernel for this many rows of input."""
        return self.by_class[next((i for i, most in enumerate(ROW_CLASSES) if rows <= most), -1)]

    def with_first(self, kernel: Kernel) -> "Kernels":
        """The same kernels, but with `kernel` for one row of input."""
        return Kernels((kernel, *self.by_class[1:]))


def fixed_kernels(precision: Precision, device: torch.device) -> Kernels:
    """One kernel for any number of rows, so that a row's result does not depend on the others."""
    return Kernels((candidates(precision, device)[0],) * len(ROW_CLASSES))


@torch.inference_mode()
def fastest_kernels(
    precision: Precision, device: torch.device, shapes: Sequence[tuple[int, int]], rounds: int = 5
) -> Kernels:
    """The fastest kernel of each class on this machine, now: by its best of a few rounds over random matrices.

    Args:
        shapes: (out, in) of a layer's matrices; more layers are timed than fit into any cache, one for many rows.
    """
    kernels = candidates(precision, device)
    if len(kernels) == 1 or device.type != "cpu":
        return fixed_kernels(precision, device)
    layers = max(1, min(8, TIMED_WEIGHTS // sum(math.prod(shape) for shape in shapes)))
    weights = [torch.randn(shape) for shape in shapes]
    kept = {kernel.name: [kernel.keep(weight) for _ in range(layers) for weight in weights] for kernel in kernels}
    chosen = []
    for rows in ROW_CLASSES:
        inputs = [torch.randn(rows, n_in) for _, n_in in shapes]
        best = dict.fromkeys(kept, math.inf)
        for _ in range(rounds if rows < ROW_CLASSES[-1] else 1):
            for kernel in kernels:
                matrices = kept[kernel.name] if rows == 1 else kept[kernel.name][: len(shapes)]
                started = time.perf_counter()
                for matrix, x in zip(matrices, inputs * layers, strict=False):  # a layer's or all layers'
                    kernel.multiply(x, *matrix)
                best[kernel.name] = min(best[kernel.name], time.perf_counter() - started)
        chosen.append(min(kernels, key=lambda kernel: best[kernel.name]))
    return Kernels(tuple(chosen))


class Matrix:
    """A weight matrix (out, in) as its kernels read it; two kernels that read different forms keep both.

    Args:
        weight: (out, in).
        kernels: the kernel for each class of row counts.
    """

    def __init__(self, weight: Tensor, kernels: Kernels):
        self.kernels = kernels
        self.kept = {kernel.keep: kernel.keep(weight) for kernel in kernels.by_class}

    def __call__(self, x: Tensor) -> Tensor:
        """x (rows, in) -> (rows, out)."""
        kernel = self.kernels.for_rows(len(x))
        return kernel.multiply(x, *self.kept[kernel.keep])

    def copy_(self, weight: Tensor) -> None:
        """Take the values of another weight (out, in), in place."""
        for keep, mine in self.kept.items():
            for old, new in zip(mine, keep(weight), strict=True):
                old.copy_(new)


class Embedding:
    """A copy of the embedding matrix (vocab, dim): in 8 bits where the matrices have 8 or 4, else in their dtype."""

    def __init__(self, weight: Tensor, precision: Precision):
        self._quantized = isinstance(precision, str)
        self.kept = quantize_int8(weight) if self._quantized else (weight.to(precision, copy=True),)

    def __call__(self, tokens: Tensor) -> Tensor:
        """tokens (n,) int64 -> (n, dim) fp32."""
        rows = [part[tokens] for part in self.kept]
        return dequantize_int8(*rows) if self._quantized else rows[0].float()

    def copy_(self, weight: Tensor) -> None:
        """Take the values of another weight (vocab, dim), in place."""
        for old, new in zip(self.kept, quantize_int8(weight) if self._quantized else (weight,), strict=True):
            old.copy_(new)
