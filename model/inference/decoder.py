"""The decoder laid out for inference: what `MiniMindLM.forward` computes, over the slots of a preallocated cache.

A decode step reads every weight for one token per request, so it is as fast as memory allows if nothing else takes
time. Hence: q, k, v in one matrix, w1 and w3 in another, matrices packed once as the CPU's kernels like them, rotary
angles from a table, keys and values of all requests in one block of memory that never grows or moves, and few and
cheap operations between the matrices.

Shapes: `tokens` counts those of all spans of a pass, one after another, without padding. The cache is
(n_layers, slots, slot_len, 2, n_kv_heads, head_dim); the 2 are keys and values. (`CachedLatents` holds other rows.)
"""

import copy
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from model.attention import rope_angles
from model.inference.blocks import parts_of_block
from model.inference.cached_heads import cached_heads, effective_weight
from model.inference.compiled_step import CompiledStep, best_time, row_kernel
from model.inference.layers import Experts, Layer, SwiGLU
from model.inference.matrices import (
    Embedding,
    Kernels,
    Matrix,
    Precision,
    fastest_kernels,
    fixed_kernels,
    output_precision,
)
from model.model import MiniMindLM
from model.norm import RMSNorm

SHAPE = (
    *("generation", "dim", "n_layers", "n_heads", "n_kv_heads", "vocab_size", "hidden_dim", "norm_eps"),
    *("rope_theta", "rope_scaling", "use_moe", "attention", "kv_latent_dim", "rope_head_dim"),
)
TIMED_BEHIND = 64  # keys and values that the steps attend to whose times are compared
EXPERTS = ("n_routed_experts", "num_experts_per_tok", "n_shared_experts", "norm_topk_prob", "balance", "shared_width")


@dataclass
class Span:
    """Tokens that one pass processes in a slot, after the `start` tokens that it has cached.

    `embeddings` (tokens, dim) replace those of the tokens, for a prompt with images. `branches` follow the tokens, each
    as if it were the only one: the options of a question. They are stored in the slot one after another.
    """

    slot: int
    start: int
    tokens: list[int]
    embeddings: Tensor | None = None
    branches: Sequence[list[int]] = ()

    def all_tokens(self) -> list[int]:
        """The tokens to process, including those of branches."""
        return [*self.tokens, *itertools.chain.from_iterable(self.branches)]

    def positions(self) -> Iterator[int]:
        """The position of each of `all_tokens` in its text; a branch begins where the tokens end."""
        end = self.start + len(self.tokens)
        yield from range(self.start, end)
        for branch in self.branches:
            yield from range(end, end + len(branch))


class Decoder:
    """A snapshot of a model's weights, and the keys and values of `slots` requests of up to `slot_len` tokens each.

    Args:
        model: Dense or MoE; an adapter on it is merged into the snapshot; a VLM's projection and tower are not used.
        slots: requests that can be in flight.
        slot_len: positions per slot.
        dtype: of the weights, torch.float32, torch.bfloat16, "int8" or "int4" (None: as they are). Operations between
            the matrices are in fp32, as are keys and values on a CPU, whose attention is faster in it.
        deterministic: one kernel for any number of rows, so that an answer does not depend on the others; else the
            fastest for each, timed now.
        compile: decode a single answer by a compiled step if it can be compiled and is faster; takes seconds.

    Attributes:
        compiled: whether there is such a step.

    Raises:
        ValueError: `slot_len` is beyond the model's `max_seq_len`; a matrix that int4 cannot divide into groups.
    """

    def __init__(
        self,
        model: MiniMindLM,
        slots: int,
        slot_len: int,
        dtype: Precision | None = None,
        deterministic: bool = True,
        compile: bool = False,
    ):
        config = copy.deepcopy(model.config)
        if not 0 < slot_len <= config.max_seq_len:
            raise ValueError(f"slots of {slot_len} tokens: the model takes 1 to {config.max_seq_len}")
        self.config = config
        self.slots, self.slot_len = slots, slot_len
        self.device = model.tok_embeddings.weight.device
        self.precision = dtype or model.tok_embeddings.weight.dtype
        self.dtype = torch.float32 if isinstance(self.precision, str) else self.precision  # of what a matrix reads
        compile = compile and self.device.type == "cpu" and not config.use_moe and config.attention == "gqa"
        self._kernels = self._pick_kernels(model, deterministic, compile)
        self._weights = [self._keep(kind, weight) for kind, weight in self._weights_of(model)]
        weights = iter(self._weights)
        self._embeddings = next(weights)
        self._layers = [self._layer(weights) for _ in range(config.n_layers)]
        self._norm, self._output = weights
        self._eps = torch.tensor(math.sqrt(config.dim * config.norm_eps), device=self.device)
        places = torch.arange(slot_len, device=self.device)[None]
        cos, sin = rope_angles(places, config.rope_dim, config.rope_theta, config.rope_scaling)
        self._rope = torch.complex(cos, sin)[0]  # (slot_len, 1, head_dim / 2)
        self._heads = cached_heads(config)
        shape = (config.n_layers, slots, slot_len, *self._heads.row)
        if self.device.type == "cpu":
            self._kv = torch.from_numpy(np.zeros(shape, dtype=np.float32))  # pages come into being when written to
        else:
            self._kv = torch.zeros(shape, dtype=self.dtype, device=self.device)
        self._step = self._compile_step() if compile else None

    @property
    def compiled(self) -> bool:
        return self._step is not None

    # ------------------------------------------------------------------------------------------------- the weights

    @torch.inference_mode()
    def refresh(self, model: MiniMindLM) -> None:
        """Copy the model's current weights over the snapshot; nothing is allocated permanently.

        The slots' contents were computed with the old weights: prefill them again.

        Raises:
            ValueError: a model of another architecture; nothing is changed then.
        """
        for name in (*SHAPE, *EXPERTS) if self.config.use_moe else SHAPE:
            ours, theirs = getattr(self.config, name), getattr(model.config, name)
            if ours != theirs:
                raise ValueError(f"the decoder was made for a model with {name} {ours}, and this one has {theirs}")
        for mine, (_, new) in zip(self._weights, self._weights_of(model), strict=True):
            mine.copy_(new)
        if self._step is not None:
            self._step.refresh(self._layers)

    def _weights_of(self, model: MiniMindLM) -> Iterator[tuple[str, Tensor]]:
        """A pass's weights in the order of `__init__`, with their kinds: "embedding", "vector", "matrix", "output"."""
        yield "embedding", model.tok_embeddings.weight.detach()
        for block in model.layers:
            parts = parts_of_block(block)
            yield "vector", self._scaled(parts.attention_norm)
            yield "matrix", torch.cat(parts.qkv)
            yield "matrix", parts.wo
            if parts.qk_norm is not None:
                yield "vector", parts.qk_norm.detach()
            yield "vector", self._scaled(parts.ffn_norm)
            if parts.router is not None:
                yield "vector", parts.router.detach()
            if parts.router_bias is not None:
                yield "vector", parts.router_bias
            for into, out_of in parts.experts:
                yield "matrix", torch.cat(into)
                yield "matrix", out_of
        yield "vector", self._scaled(model.norm)
        yield "output", effective_weight(model.output)

    def _keep(self, kind: str, weight: Tensor) -> Tensor | Matrix:
        """A copy of a weight in the form in which a pass reads it."""
        if kind == "embedding":
            return Embedding(weight, self.precision)
        if kind == "vector":
            return weight.to(self.device, torch.float32, copy=True)
        return Matrix(weight.to(self.device), self._kernels[kind])

    def _scaled(self, norm: RMSNorm) -> Tensor:
        return norm.weight.detach().float() * math.sqrt(self.config.dim)  # see _normed

    def _pick_kernels(self, model: MiniMindLM, deterministic: bool, compile: bool) -> dict[str, Kernels]:
        """The kernels for the matrices of the blocks and of the output layer, which int4 leaves at 8 bits."""
        parts = parts_of_block(model.layers[0])
        layer = [
            torch.cat(parts.qkv),
            parts.wo,
            *(torch.cat(into) for into, _ in parts.experts[:1]),
            parts.experts[0][1],
        ]
        shapes = {"matrix": [tuple(weight.shape) for weight in layer], "output": [tuple(model.output.weight.shape)]}
        precisions = {"matrix": self.precision, "output": output_precision(self.precision)}
        if deterministic:
            kernels = {kind: fixed_kernels(precisions[kind], self.device) for kind in shapes}
        else:
            kernels = {kind: fastest_kernels(precisions[kind], self.device, shapes[kind]) for kind in shapes}
        if compile:
            kernels = {kind: k.with_first(row_kernel(precisions[kind])) for kind, k in kernels.items()}
        return kernels

    def _layer(self, weights: Iterator) -> Layer:
        attention_norm, wqkv, wo = itertools.islice(weights, 3)
        qk_norm = next(weights) if self.config.generation == 3 or self.config.attention == "mla" else None
        ffn_norm = next(weights)
        feed_forward = self._experts(weights) if self.config.use_moe else SwiGLU(next(weights), next(weights))
        return Layer(attention_norm, wqkv, wo, qk_norm, ffn_norm, feed_forward)

    def _experts(self, weights: Iterator) -> Experts:
        router = next(weights)
        bias = next(weights) if self.config.balance == "bias" else None
        experts = [SwiGLU(next(weights), next(weights)) for _ in range(self.config.n_routed_experts)]
        shared = SwiGLU(next(weights), next(weights)) if self.config.n_shared_experts else None
        return Experts(self.config, router, experts, shared, bias)

    # ------------------------------------------------------------------------------------------------- one pass

    @torch.inference_mode()
    def read(self, spans: Sequence[Span]) -> Tensor:
        """Process tokens of several requests at once and cache their keys and values.

        Args:
            spans: at most one per slot. Those of a single token come first: they share one attention call.

        Returns:
            (tokens of all spans, dim), the normed hidden state after each, for `logits`.
        """
        read = [span.all_tokens() for span in spans]
        positions = [position for span in spans for position in span.positions()]
        firsts = [span.slot * self.slot_len + span.start for span in spans]
        rows = [first + i for first, tokens in zip(firsts, read, strict=True) for i in range(len(tokens))]
        sizes = [len(tokens) for tokens in read]
        tokens = torch.tensor([*itertools.chain.from_iterable(read)], device=self.device)
        rope = self._rope[torch.tensor(positions, device=self.device)]  # (tokens, 1, head_dim / 2) complex
        rows = torch.tensor(rows, device=self.device)

        x = self._embeddings(tokens)  # (tokens, dim)
        at = 0
        for span, size in zip(spans, sizes, strict=True):
            if span.embeddings is not None:
                x[at : at + len(span.tokens)] = span.embeddings
            at += size

        attend = self._attention(spans, sizes)
        q_width = self._heads.q_width
        # for each layer (slots * slot_len, 2 * n_kv_heads * head_dim): a row is a token's keys, then its values
        stores = self._kv.view(self.config.n_layers, self.slots * self.slot_len, -1).unbind(0)
        for layer, (attention_norm, wqkv, wo, qk_norm, ffn_norm, feed_forward) in enumerate(self._layers):
            qkv = wqkv(self._normed(x, attention_norm)).float()  # (tokens, q, k and v side by side)
            self._heads.place(qkv, rope, qk_norm)
            qkv = qkv.to(self._kv.dtype)
            stores[layer].index_copy_(0, rows, qkv[:, q_width:])
            x += wo(attend(qkv[:, :q_width], layer).to(self.dtype))
            x += feed_forward(self._normed(x, ffn_norm))
        return self._normed(x, self._norm)

    @torch.inference_mode()
    def predict(self, spans: Sequence[Span], rows: Sequence[int]) -> Tensor:
        """`read`, and the logits after some of the tokens.

        Args:
            rows: which of the tokens of all spans, counted one after another.

        Returns:
            (rows, vocab) fp32.
        """
        if self._step is not None and len(rows) == 1 and len(spans) == 1 and self._fits_step(spans[0]):
            return self._step_through(spans[0])
        hidden = self.read(spans)
        if not rows:
            return hidden.new_zeros(0, self.config.vocab_size, dtype=torch.float32)
        return self.logits(hidden if len(rows) == len(hidden) else hidden[rows])

    @staticmethod
    def _fits_step(span: Span) -> bool:
        """Whether it is a single token after at least two: the compiled graph takes any past length but 0 and 1."""
        return len(span.tokens) == 1 and span.start >= 2 and span.embeddings is None and not span.branches

    def _step_through(self, span: Span) -> Tensor:
        """Decode one token with the compiled step -> logits (1, vocab)."""
        angles = self._rope[span.start, 0]  # (head_dim / 2,) complex
        x = self._embeddings(torch.tensor(span.tokens))[0]
        past = self._kv[:, span.slot, : span.start]
        logits, new = self._step(x, torch.stack((angles.real, angles.imag)), past)
        self._kv[:, span.slot, span.start] = new
        return logits[None]

    @torch.inference_mode()
    def _compile_step(self) -> CompiledStep | None:
        """The compiled step; None if it cannot be compiled or is not faster than `read` and `logits`."""
        span = Span(0, min(TIMED_BEHIND, self.slot_len - 1), [0])
        if not self._fits_step(span):
            return None
        try:
            self._step = CompiledStep(self.config, self.precision, self._layers, self._norm, self._output)
            compiled = best_time(lambda: self._step_through(span))
        except Exception:  # no headers, no write access, an unknown chip: whatever it is, the eager pass works
            return None
        eager = best_time(lambda: self.logits(self.read([span])))
        return self._step if compiled < eager else None

    @torch.inference_mode()
    def logits(self, hidden: Tensor) -> Tensor:
        """(tokens, dim) as `read` returns it -> (tokens, vocab) fp32."""
        return self._output(hidden).float()

    def _normed(self, x: Tensor, weight: Tensor) -> Tensor:
        """RMSNorm in few operations: x / rms = x sqrt(dim) / hypot(|x|, sqrt(dim eps)); `weight` contains sqrt(dim)."""
        length = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        return (x / torch.hypot(length, self._eps)).mul_(weight).to(self.dtype)

    def _attention(self, spans: Sequence[Span], sizes: list[int]) -> Callable[[Tensor, int], Tensor]:
        """The attention of these spans' tokens: a function of queries (tokens, n_heads * head_dim) and the layer."""
        decodes = next((i for i, size in enumerate(sizes) if size > 1), len(spans))
        parts = [self._prefill_attention(span) for span in spans[decodes:]]
        sizes = sizes[decodes:]
        if decodes:
            parts.insert(0, self._decode_attention(spans[:decodes]))
            sizes.insert(0, decodes)
        if len(parts) == 1:
            return parts[0]

        def attend(q: Tensor, layer: int) -> Tensor:
            return torch.cat([part(rows, layer) for part, rows in zip(parts, q.split(sizes), strict=True)])

        return attend

    def _decode_attention(self, spans: Sequence[Span]) -> Callable[[Tensor, int], Tensor]:
        """Attention for one query in each of several slots, in one call over the range of those slots.

        Queries that share a key head become rows of one matrix product. A slot in the range that does not decode gets
        a query of zeros, and its output is not used.
        """
        first = min(span.slot for span in spans)
        rows = [span.slot - first for span in spans]
        count, longest = max(rows) + 1, max(span.start for span in spans) + 1
        held = self._kv[:, first : first + count, :longest]
        by_kind = held.permute(3, 0, 1, 4, 2, 5)  # (2, n_layers, count, n_kv_heads, longest, head_dim)
        k, v = self._heads.split(by_kind)
        lengths = [1] * count
        for row, span in zip(rows, spans, strict=True):
            lengths[row] = span.start + 1
        mask = None
        if min(lengths) < longest:
            places = torch.arange(longest, device=self.device)
            beyond = places >= torch.tensor(lengths, device=self.device)[:, None]
            mask = torch.zeros(beyond.shape, dtype=self._kv.dtype, device=self.device)
            mask = mask.masked_fill_(beyond, -math.inf)[:, None, None]
        shape = (count, held.size(-2), -1, held.size(-1))
        scattered = None if rows == list(range(count)) else torch.tensor(rows, device=self.device)

        def attend(q: Tensor, layer: int) -> Tensor:
            if scattered is not None:
                q = q.new_zeros(count, q.size(1)).index_copy_(0, scattered, q)
            out = F.scaled_dot_product_attention(q.view(shape), k[layer], v[layer], attn_mask=mask).reshape(count, -1)
            return out if scattered is None else out[scattered]  # (spans, n_heads * head_dim)

        return attend

    def _prefill_attention(self, span: Span) -> Callable[[Tensor, int], Tensor]:
        """Attention for the queries of consecutive tokens in one slot, and of the branches after them.

        Key heads are the batch dimension and the queries that share one are its heads, so that no key is copied.
        """
        n = len(span.tokens) + sum(map(len, span.branches))
        end = span.start + n
        _, heads, head_dim = self._heads.row
        groups = self.config.n_heads // heads
        kv = self._kv[:, span.slot, :end].permute(2, 0, 3, 1, 4)[:, :, :, None].expand(-1, -1, -1, groups, -1, -1)
        k, v = self._heads.split(kv)
        mask = None
        if span.start or len(span.branches) > 1:
            mask = torch.ones(n, end, dtype=torch.bool, device=self.device).tril(span.start)
            first = len(span.tokens)
            for branch in span.branches:  # it sees what all see, and itself
                mask[first : first + len(branch), span.start + len(span.tokens) : span.start + first] = False
                first += len(branch)

        def attend(q: Tensor, layer: int) -> Tensor:
            q = q.view(n, heads, groups, head_dim).permute(1, 2, 0, 3)  # (n_kv_heads, group, n, head_dim)
            out = F.scaled_dot_product_attention(q, k[layer], v[layer], attn_mask=mask, is_causal=mask is None)
            return out.permute(2, 0, 1, 3).reshape(n, -1)

        return attend

    # ------------------------------------------------------------------------------------------------- the slots

    def copy(self, source: int, target: int, length: int) -> None:
        """Copy the first `length` positions of slot `source` to slot `target`."""
        self._kv[:, target, :length] = self._kv[:, source, :length]

    def swap(self, a: int, b: int, length: int) -> None:
        """Exchange the first `length` positions of two slots."""
        self._kv[:, [a, b], :length] = self._kv[:, [b, a], :length]
