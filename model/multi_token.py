"""Multi-token prediction: in training, modules after the last block also predict the tokens beyond the next one.

Sequential, as in DeepSeek-V3 (arXiv:2412.19437, section 2.2): module k reads the hidden state of module k - 1 at each
position (the first one, that of the last block) and the embedding of the token k positions later, and so sees all
tokens before the one that it predicts:

    h_k[i] = block_k(merge_k [norm h_(k-1)[i]; norm embedding(token[i + k])])  ->  token[i + k + 1]

Parallel, as in Gloeckle et al. 2024 (arXiv:2404.19737): each module is a block on the output of the last block and does
not see the tokens in between. Both share the model's embedding and output matrix.

At inference the modules are left out, or draft tokens for the model to verify: `model.self_speculation`.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.attention import Segments
from model.config import LMConfig
from model.kv_cache import KVCache
from model.norm import RMSNorm


class MultiTokenModule(nn.Module):
    """Predicts one further token. Only sequential modules have `merge` and the two norms before it."""

    def __init__(self, config: LMConfig, block: nn.Module):
        super().__init__()
        self.sequential = config.mtp == "sequential"
        if self.sequential:
            self.hidden_norm = RMSNorm(config.dim, config.norm_eps)
            self.embedding_norm = RMSNorm(config.dim, config.norm_eps)
            self.merge = nn.Linear(2 * config.dim, config.dim, bias=False)
        self.block = block
        self.norm = RMSNorm(config.dim, config.norm_eps)  # before the output matrix

    def forward(
        self,
        h: Tensor,
        embeddings: Tensor | None,
        rope: tuple[Tensor, Tensor],
        mask: Tensor | Segments | None,
        non_padding: Tensor | None = None,
        cache: KVCache | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """h (batch, n, dim) and, if sequential, the later tokens' embeddings (batch, n, dim) -> the next h, and the
        auxiliary loss of its block or None."""
        if self.sequential:
            h = self.merge(torch.cat((self.hidden_norm(h), self.embedding_norm(embeddings)), dim=-1))
        return self.block(h, rope, mask, non_padding, cache)


class MultiTokenPrediction(nn.ModuleList):
    """The modules of a model, frozen until `learn`: only pretraining trains them.

    Args:
        make_block: makes a block; each has a cache of its own, in which it is layer 0.

    Attributes:
        weight: of the modules' mean loss relative to the model's own; 0: they do not run.
    """

    def __init__(self, config: LMConfig, make_block: Callable[[], nn.Module]):
        super().__init__(MultiTokenModule(config, make_block()) for _ in range(config.mtp_depth))
        self.weight = 0.0
        self.requires_grad_(False)

    def learn(self, weight: float) -> None:
        """Unfreeze the modules and train them with this weight."""
        self.weight = weight
        self.requires_grad_(weight > 0)

    def loss(
        self,
        h: Tensor,
        input_ids: Tensor,
        learned: Tensor,
        embed: nn.Embedding,
        output: nn.Linear,
        **block_inputs,
    ) -> tuple[Tensor, Tensor]:
        """The modules' cross-entropies over the target tokens.

        Args:
            h: (batch, n, dim), the output of the last block, before the final norm.
            input_ids: (batch, n) int64, also the targets.
            learned: (batch, n) bool, the positions whose next token is a target. A module's position counts only if
                those of all modules before it do, so it predicts within one sample.
            embed, output: the model's.
            block_inputs: `rope`, `mask` and `non_padding` as for the blocks.

        Returns:
            fp32 scalars: `weight` times the mean over the modules of each one's sum over its targets, in nats; the sum
            of their blocks' auxiliary losses.
        """
        first, counted = h, learned
        nats, aux_loss = torch.zeros((), device=h.device), torch.zeros((), device=h.device)
        for k, module in enumerate(self, start=1):
            # What follows the end of a row, or of a sample, does not matter: attention is causal, so only places see it
            # that do not count.
            later = embed(F.pad(input_ids[:, k:], (0, k))) if module.sequential else None
            h, aux = module(h if module.sequential else first, later, **block_inputs)
            counted = learned & F.pad(counted[:, 1:], (0, 1))  # the k + 1 tokens that follow
            targets = F.pad(input_ids[:, k + 1 :], (0, k + 1))[counted]
            nats = nats + F.cross_entropy(output(module.norm(h[counted])).float(), targets, reduction="sum")
            aux_loss = aux_loss if aux is None else aux_loss + aux
        return self.weight * nats / len(self), aux_loss
