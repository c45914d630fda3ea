"""One token of one answer through the whole network as a single compiled graph.

Decoding one answer is bound by reading the weights. Between the matmuls, eager mode spends as much time again launching
small operations and on kernels that are made for many rows. One graph has none of that: a product with one row is
written as a sum over elementwise products, which the compiler turns into a loop at the memory's speed; int8 and int4
call PyTorch's kernels. A dense model on a CPU with a C++ compiler only; anything else goes through `Decoder.read`.
"""

import math
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from model.config import LMConfig
from model.inference.matrices import INT4, INT8, PLAIN, Kernel, Matrix, Precision, output_precision


class Stacked(NamedTuple):
    """The weights of all layers, each kind in one tensor (or two), so that a step has few arguments.

    Each matrix is a tuple of its kernel's tensors with the layers as the first dimension: (n_layers, out, in) for fp32
    and bf16.
    """

    attention_norm: Tensor
    wqkv: tuple[Tensor, ...]
    wo: tuple[Tensor, ...]
    qk_norm: Tensor | None
    ffn_norm: Tensor
    w13: tuple[Tensor, ...]
    w2: tuple[Tensor, ...]
    norm: Tensor
    output: tuple[Tensor, ...]


def row_kernel(precision: Precision) -> Kernel:
    """The kernel whose form of a matrix the compiled step reads."""
    return {"int8": INT8, "int4": INT4}.get(precision) or PLAIN[precision]


def stack(matrices: list[Matrix], kernel: Kernel) -> tuple[Tensor, ...]:
    """The matrices in `kernel`'s form, stacked; the matrices then share this memory, so that a refresh reaches both."""
    stacked = tuple(torch.stack(parts) for parts in zip(*(m.kept[kernel.keep] for m in matrices), strict=True))
    for layer, matrix in enumerate(matrices):
        matrix.kept[kernel.keep] = tuple(part[layer] for part in stacked)
    return stacked


def multiply(x: Tensor, parts: tuple[Tensor, ...], kernel: Kernel) -> Tensor:
    """x (in,) fp32 -> (out,) fp32."""
    if kernel in (INT8, INT4):
        return kernel.multiply(x[None], *parts)[0].float()
    return (parts[0].float() * x).sum(-1)


def build_step(config: LMConfig, precision: Precision) -> Callable[..., tuple[Tensor, Tensor, list[Tensor]]]:
    """The step, to be compiled.

    It takes the embedding x (dim,) fp32, the rotary angles' cosines and sines (2, head_dim / 2), the keys and values
    so far (n_layers, length, 2, n_kv_heads, head_dim) and the weights; it returns logits (vocab,) fp32, the token's own
    keys and values (n_layers, 2, n_kv_heads, head_dim), and what was `stored`.
    """
    kernel, last_kernel = row_kernel(precision), row_kernel(output_precision(precision))
    heads, kv_heads, head_dim = config.n_heads, config.n_kv_heads, config.head_dim

    def normed(x: Tensor, weight: Tensor) -> Tensor:  # the weight has sqrt(dim) in it, as in the decoder
        return x * torch.rsqrt((x * x).sum() + config.dim * config.norm_eps) * weight

    def attend(q: Tensor, k: Tensor, v: Tensor, past: Tensor) -> Tensor:
        """q (kv_heads, group, head_dim), k, v (kv_heads, head_dim), past (length, 2, kv_heads, head_dim) -> (dim,).

        PyTorch's kernel attends to the past and also returns the log of the softmax's denominator, with which the
        token's attention to itself is added.
        """
        keys, values = past.permute(1, 2, 0, 3)[:, None].unbind(0)  # (1, kv_heads, length, head_dim)
        out, log_sum = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q[None], keys, values)
        own = (q * k[:, None]).sum(-1) / math.sqrt(head_dim)  # (kv_heads, group)
        part = torch.sigmoid(own - log_sum[0])[..., None]  # of the attention that the token gives itself
        return (out[0] * (1 - part) + v[:, None] * part).reshape(-1)

    def step(x: Tensor, rope: Tensor, past: Tensor, w: Stacked) -> tuple[Tensor, Tensor, list[Tensor]]:
        stored = []

        def store(value: Tensor) -> Tensor:
            """Make a value an output of the graph: otherwise it would be recomputed for each row of a matrix."""
            stored.append(value)
            return value

        new = []
        for layer in range(config.n_layers):
            qkv = multiply(store(normed(x, w.attention_norm[layer])), [part[layer] for part in w.wqkv], kernel)
            qk, v = qkv[: (heads + kv_heads) * head_dim].view(-1, head_dim), qkv[(heads + kv_heads) * head_dim :]
            if w.qk_norm is not None:
                qk = F.rms_norm(qk, (head_dim,), eps=config.norm_eps) * w.qk_norm[layer]
            even, odd = qk.view(-1, head_dim // 2, 2).unbind(-1)
            cos, sin = rope[0], rope[1]
            qk = torch.stack((even * cos - odd * sin, even * sin + odd * cos), -1).view(-1, head_dim)
            q = qk[:heads].view(kv_heads, -1, head_dim)
            k, v = qk[heads:], v.view(kv_heads, head_dim)
            new.append(torch.stack((k, v)))
            attended = store(attend(q, k, v, past[layer]))
            x = store(x + multiply(attended, [part[layer] for part in w.wo], kernel))
            gate, up = multiply(store(normed(x, w.ffn_norm[layer])), [part[layer] for part in w.w13], kernel).chunk(2)
            x = store(x + multiply(store(F.silu(gate) * up), [part[layer] for part in w.w2], kernel))
        return multiply(store(normed(x, w.norm)), w.output, last_kernel), torch.stack(new), stored

    return step


class CompiledStep:
    """`build_step`, compiled for one decoder's weights.

    Args:
        layers: the decoder's `Layer`s; their matrices share their memory with the step from now on.
        norm: weight of the last norm.
        output: the output matrix; its kernel for one row is that of the step.

    Raises:
        Exception: anything that keeps the compiler from working here.
    """

    def __init__(self, config: LMConfig, precision: Precision, layers: Sequence, norm: Tensor, output: Matrix):
        kernel = row_kernel(precision)
        output_kernel = output.kernels.for_rows(1)
        self._weights = Stacked(
            attention_norm=torch.stack([layer.attention_norm for layer in layers]),
            wqkv=stack([layer.wqkv for layer in layers], kernel),
            wo=stack([layer.wo for layer in layers], kernel),
            qk_norm=None if layers[0].qk_norm is None else torch.stack([layer.qk_norm for layer in layers]),
            ffn_norm=torch.stack([layer.ffn_norm for layer in layers]),
            w13=stack([layer.feed_forward.w13 for layer in layers], kernel),
            w2=stack([layer.feed_forward.w2 for layer in layers], kernel),
            norm=norm,
            output=output.kept[output_kernel.keep],
        )
        self._step = torch.compile(build_step(config, precision), fullgraph=True)

    def refresh(self, layers: Sequence) -> None:
        """Copy the layers' current norms; the matrices are shared."""
        for name in ("attention_norm", "qk_norm", "ffn_norm"):
            mine = getattr(self._weights, name)
            if mine is not None:
                mine.copy_(torch.stack([getattr(layer, name) for layer in layers]))

    def __call__(self, x: Tensor, rope: Tensor, past: Tensor) -> tuple[Tensor, Tensor]:
        """Logits (vocab,) and the token's keys and values; see `build_step`. The past must have at least two tokens."""
        torch._dynamo.mark_dynamic(past, 1)  # one graph for every length
        logits, new, _ = self._step(x, rope, past, self._weights)
        return logits, new


def best_time(run: Callable[[], object], rounds: int = 7) -> float:
    """The shortest time of a few runs in seconds, after one warm-up run."""
    run()
    times = []
    for _ in range(rounds):
        started = time.perf_counter()
        run()
        times.append(time.perf_counter() - started)
    return min(times)
