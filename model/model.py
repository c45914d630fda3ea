"""The MiniMind decoder: pre-norm, RoPE, grouped-query attention, SwiGLU; dense or a mixture of experts.

Shapes, here and in attention.py, feed_forward.py and kv_cache.py:

    batch      rows
    n          new tokens of a row in this pass
    length     keys and values of a row: those in the cache, then the n new ones
    dim        width of the residual stream, n_heads * head_dim
    vocab      entries of the tokenizer

A row may hold several samples (packing) and padding; `segments` numbers them: equal numbers are one sample, 0 is
padding. None if each row is one sample without padding.
"""

import math
import re
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import AutoConfig, AutoModelForCausalLM, GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import ModelOutput

from model.attention import Segments, rope_angles
from model.config import LMConfig
from model.feed_forward import Router
from model.generation import TextGeneration
from model.kv_cache import KVCache, build_attention_mask
from model.loss import next_token_loss, target_mask
from model.multi_token import MultiTokenPrediction
from model.norm import RMSNorm
from model.variants import make_attention, make_feed_forward
from model.weight_layouts import TABLES


class MiniMindBlock(nn.Module):
    """x + attention(norm(x)), then x + feed_forward(norm(x))."""

    def __init__(self, config: LMConfig, layer: int):
        super().__init__()
        self.attention_norm = RMSNorm(config.dim, config.norm_eps)
        self.attention = make_attention(config, layer)
        self.ffn_norm = RMSNorm(config.dim, config.norm_eps)
        self.feed_forward = make_feed_forward(config)
        self.dropout = nn.Dropout(config.dropout)

    def forward(
        self,
        x: Tensor,
        rope: tuple[Tensor, Tensor],
        mask: Tensor | Segments | None,
        non_padding: Tensor | None,
        cache: KVCache | None,
    ) -> tuple[Tensor, Tensor | None]:
        """x (batch, n, dim) -> same shape, and the layer's auxiliary loss or None."""
        x = x + self.dropout(self.attention(self.attention_norm(x), rope, mask, cache))
        h, aux = self.feed_forward(self.ffn_norm(x), non_padding)
        return x + self.dropout(h), aux


SWITCHES = ("output_attentions", "output_hidden_states", "return_dict")


@dataclass
class MiniMindOutput(ModelOutput):
    """The output of `MiniMindLM.forward`.

    loss: fp32 scalar, mean cross-entropy plus `aux_loss`; None without labels.
    logits: (batch, n, vocab), or only those of `logits_to_keep`.
    last_hidden_state: (…, dim) at the same positions, after the final norm: the input of the output matrix.
    cache: pass it back as `past_key_values` to continue; None unless `use_cache`.
    aux_loss: fp32 scalar, the experts' load-balancing loss over all layers; 0 for Dense and outside training.
    mtp_loss: fp32 scalar, the weighted sum of multi-token prediction's losses, in nats; None if no module runs.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    cache: KVCache | None = None
    aux_loss: Tensor | None = None
    last_hidden_state: Tensor | None = None
    mtp_loss: Tensor | None = None

    @property
    def past_key_values(self) -> KVCache | None:
        """`cache`, under the name it had before transformers 5."""
        return self.cache


OLD_BUFFERS = rf"(^|\.)({'|'.join(TABLES)})$"


def drop_old_buffers(model: nn.Module, state_dict: dict[str, Tensor], *_) -> None:
    """Let a published file load unchanged, even with strict=True."""
    for name in [name for name in state_dict if re.search(OLD_BUFFERS, name)]:
        del state_dict[name]


class MiniMindLM(TextGeneration, PreTrainedModel, GenerationMixin):
    """The language model: embedding, blocks, norm, and an output matrix tied to the embedding.

    Generation comes from `TextGeneration`; `GenerationMixin` is how peft and trl recognise a model that can generate.
    """

    config_class = LMConfig
    base_model_prefix = ""
    supports_gradient_checkpointing = True
    _no_split_modules = ["MiniMindBlock"]  # noqa: RUF012 - transformers' own convention
    _tied_weights_keys = {"output.weight": "tok_embeddings.weight"}  # noqa: RUF012
    _keys_to_ignore_on_load_unexpected = [OLD_BUFFERS]  # noqa: RUF012

    def __init__(self, config: LMConfig | None = None):
        super().__init__(config or LMConfig())
        config = self.config
        self.tok_embeddings = nn.Embedding(config.vocab_size, config.dim)
        self.dropout = nn.Dropout(config.dropout)
        self.layers = nn.ModuleList(MiniMindBlock(config, layer) for layer in range(config.n_layers))
        self.norm = RMSNorm(config.dim, config.norm_eps)
        self.output = nn.Linear(config.dim, config.vocab_size, bias=False)
        self.mtp = MultiTokenPrediction(config, lambda: MiniMindBlock(config, 0)) if config.mtp_depth else None
        self.gradient_checkpointing = False
        self.register_load_state_dict_pre_hook(drop_old_buffers)
        self.post_init()  # initialises by _init_weights and ties output to tok_embeddings

    def _init_weights(self, module: nn.Module) -> None:
        """N(0, 0.02); projections into the residual stream are scaled down by 1 / sqrt(2 n_layers) (GPT-2)."""
        if isinstance(module, nn.Linear | nn.Embedding | Router):
            additions = 2 * self.config.n_layers if hasattr(module, "adds_to_residual") else 1
            nn.init.normal_(module.weight, std=0.02 / math.sqrt(additions))
        elif isinstance(module, RMSNorm):
            nn.init.ones_(module.weight)

    def get_input_embeddings(self) -> nn.Embedding:
        return self.tok_embeddings

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        self.tok_embeddings = value

    def get_output_embeddings(self) -> nn.Linear:
        return self.output

    def set_output_embeddings(self, value: nn.Linear) -> None:
        self.output = value

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        labels: Tensor | None = None,
        past_key_values: KVCache | None = None,
        use_cache: bool = False,
        logits_to_keep: int | Tensor = 0,
        inputs_embeds: Tensor | None = None,
        **others,
    ) -> MiniMindOutput:
        """One pass over `input_ids` (batch, n) int64.

        Args:
            attention_mask: (batch, n), or (batch, cached + n) as in transformers; 0 = padding, on either side.
            position_ids: (batch, n) int64; a 0 begins a new sample, and attention stays within a sample. Default: each
                row is one sample, counted from its first token after padding, or from the end of the cache.
            labels: (batch, n) int64, not shifted; -100 is ignored.
            past_key_values: returned by an earlier call; the new tokens follow it.
            use_cache: return `past_key_values`.
            logits_to_keep: compute the logits of the last this many positions only (0 = all), or of those where a bool
                (batch, n) is True, (positions, vocab): only target positions need logits.
            inputs_embeds: (batch, n, dim), used in place of the embeddings of `input_ids`.
            others: further switches that peft passes to every model (output_attentions, …), all of them off.

        Raises:
            TypeError: one of the others is on or unknown.
            ValueError: a position at or beyond `config.max_seq_len`, or a mask of the wrong length.
        """
        if wrong := [name for name in others if name not in SWITCHES or (others[name] and name != "return_dict")]:
            raise TypeError(f"MiniMind's forward does not support {', '.join(wrong)}")
        past = past_key_values
        n = input_ids.size(1)
        non_padding = self._non_padding(attention_mask, n, past)
        positions, segments, following = self._positions_and_segments(input_ids, position_ids, non_padding, past)
        config = self.config
        rope = rope_angles(positions, config.rope_dim, config.rope_theta, config.rope_scaling)  # see rope_angles
        cache = None
        if use_cache or past is not None:
            cache = KVCache.extend(past, n, segments, following)
        if segments is None and past is not None and n > 1:
            segments = positions.new_ones(1, past.length + n)
        mask = None
        if segments is not None:
            apart = cache is None and self.config.flash_attn and segments.device.type == "cpu"
            mask = (Segments.of(segments) if apart else None) or build_attention_mask(segments, n)

        x = self.dropout(self.tok_embeddings(input_ids) if inputs_embeds is None else inputs_embeds)  # (batch, n, dim)
        aux_loss = torch.zeros((), device=x.device)
        for layer in self.layers:
            if self.gradient_checkpointing and self.training:
                x, aux = checkpoint(layer, x, rope, mask, non_padding, cache, use_reentrant=False)
            else:
                x, aux = layer(x, rope, mask, non_padding, cache)
            if aux is not None:
                aux_loss = aux_loss + aux
        mtp_loss = None
        if self.mtp is not None and self.mtp.weight and self.training and isinstance(logits_to_keep, Tensor):
            parts = {"rope": rope, "mask": mask, "non_padding": non_padding}
            mtp_loss, aux = self.mtp.loss(x, input_ids, logits_to_keep, self.tok_embeddings, self.output, **parts)
            aux_loss = aux_loss + aux
        kept = x[logits_to_keep] if isinstance(logits_to_keep, Tensor) else x[:, -logits_to_keep:]
        kept = self.norm(kept)  # (positions, dim) or (batch, n kept, dim)
        logits = self.output(kept)  # (positions, vocab) or (batch, n kept, vocab)

        loss = None
        if labels is not None:
            loss = next_token_loss(logits, labels) / target_mask(labels).sum().clamp(min=1) + aux_loss
        return MiniMindOutput(loss, logits, cache if use_cache else None, aux_loss, kept, mtp_loss)

    def _non_padding(self, attention_mask: Tensor | None, n: int, past: KVCache | None) -> Tensor | None:
        """Which of the new tokens are not padding, bool (batch, n); None when all are."""
        if attention_mask is None:
            return None
        cached = 0 if past is None else past.length
        if attention_mask.dim() != 2 or attention_mask.size(1) not in (n, cached + n):
            raise ValueError(f"attention_mask {tuple(attention_mask.shape)} must have {n} or {cached + n} columns")
        return attention_mask[:, -n:].bool()

    def _positions_and_segments(
        self, input_ids: Tensor, position_ids: Tensor | None, non_padding: Tensor | None, past: KVCache | None
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Positions and segments of the tokens.

        Returns:
            positions of the new tokens (batch or 1, n); the segment of every token so far (batch, cached + n) and the
            next token's position (batch,). The last two are None when each row is one sample without padding: plain
            causal attention is enough then.
        """
        batch, n = input_ids.shape
        cached = 0 if past is None else past.length
        if position_ids is None and non_padding is None and (past is None or past.segment_ids is None):
            self._check_last_position(cached + n - 1)
            return torch.arange(cached, cached + n, device=input_ids.device)[None], None, None

        if past is None or past.segment_ids is None:
            segments = input_ids.new_ones(batch, cached)
            start = input_ids.new_full((batch, 1), cached)
        else:
            segments, start = past.segment_ids, past.next_position[:, None]
        if non_padding is None:
            non_padding = torch.ones_like(input_ids, dtype=torch.bool)
        segment = segments.amax(1, keepdim=True).clamp(min=1) if cached else torch.ones_like(start)
        if position_ids is None:
            positions = (start + non_padding.cumsum(1) - 1).clamp(min=0)
        else:
            positions = position_ids.expand(batch, n)
            segment = segment + ((positions == 0) & non_padding).cumsum(1)
        self._check_data_positions(positions)
        places = torch.arange(n, device=non_padding.device).masked_fill(~non_padding, -1)
        last = places.amax(1, keepdim=True)  # (batch, 1), each row's last token; -1 if it is all padding
        following = torch.where(last < 0, start, positions.gather(1, last.clamp(min=0)) + 1)[:, 0]
        return positions, torch.cat((segments, non_padding * segment), dim=1), following

    @torch.compiler.disable  # data-dependent control flow cannot be compiled
    def _check_data_positions(self, positions: Tensor) -> None:
        self._check_last_position(int(positions.max()))

    def _check_last_position(self, last: int) -> None:
        if last >= self.config.max_seq_len:
            raise ValueError(f"position {last} is beyond the model's max_seq_len of {self.config.max_seq_len}")


AutoConfig.register("minimind", LMConfig)

AutoModelForCausalLM.register(LMConfig, MiniMindLM)
