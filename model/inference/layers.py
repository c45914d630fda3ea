"""The parts of the inference decoder's layers. `tokens` counts the tokens of all spans of a pass."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from model.config import LMConfig
from model.inference.matrices import Matrix


class SwiGLU(NamedTuple):
    """w2(silu(w1 x) * w3 x)."""

    w13: Matrix
    w2: Matrix

    def __call__(self, x: Tensor) -> Tensor:
        """(tokens, dim) -> the same."""
        gate, up = self.w13(x).chunk(2, -1)
        return self.w2(F.silu(gate).mul_(up))


class Layer(NamedTuple):
    """The weights of a block: the norms' in fp32, see `Decoder._normed`; qk_norm as in `blocks.Parts`."""

    attention_norm: Tensor
    wqkv: Matrix
    wo: Matrix
    qk_norm: Tensor | None
    ffn_norm: Tensor
    feed_forward: Callable[[Tensor], Tensor]


class Experts:
    """Each token's best experts, weighted, and the shared one."""

    def __init__(
        self,
        config: LMConfig,
        router: Tensor,
        experts: Sequence[SwiGLU],
        shared: SwiGLU | None,
        bias: Tensor | None = None,
    ):
        self._router, self._experts, self._shared, self._bias = router, experts, shared, bias
        self._k = config.num_experts_per_tok
        # generation 3 makes a single expert's weight one, generation 2 leaves it
        self._normalises = config.norm_topk_prob and (self._k > 1 or config.generation == 3)

    def __call__(self, x: Tensor) -> Tensor:
        """(tokens, dim) -> the same, fp32."""
        scores = F.linear(x.float(), self._router)
        if self._bias is None:
            weights, chosen = scores.softmax(-1).topk(self._k, dim=-1)
        else:  # as in BalancedMoE
            chosen = (scores.sigmoid_() + self._bias).topk(self._k, dim=-1).indices
            weights = scores.gather(1, chosen)
        if self._normalises:
            weights = weights / weights.sum(-1, keepdim=True)
        order = chosen.flatten().argsort(stable=True)  # (token, choice) pairs by expert, as in MoEFeedForward
        counts = torch.bincount(chosen.flatten(), minlength=len(self._experts)).tolist()
        batches = zip(self._experts, x[order // self._k].split(counts), strict=True)
        outs = torch.cat([expert(tokens) for expert, tokens in batches if len(tokens)])
        out = (outs[order.argsort()].view(-1, self._k, x.size(1)).float() * weights[..., None]).sum(1)
        return out if self._shared is None else out + self._shared(x)
