"""The MiniMind decoder: pre-norm, RoPE, grouped-query attention, SwiGLU; dense or a mixture of experts."""

import itertools
import math
import re
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import AutoConfig, AutoModelForCausalLM, GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import ModelOutput

from model.cache import KVCache, attention_mask_of
from model.config import LMConfig
from model.generation import TextGeneration


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension (Zhang & Sennrich 2019, arXiv:1910.07467).

    Computed in fp32 whatever the type of x.
    """

    def __init__(self, dim: int, eps: float):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


def rope_angles(position_ids: Tensor, head_dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """Cosine and sine of the rotary embedding (Su et al. 2021, arXiv:2104.09864).

    Computed from the positions each time: a few hundred numbers a token, and the model keeps no table as state.

    Args:
        position_ids: (batch, n) int64.

    Returns:
        Two fp32 tensors (batch, n, 1, head_dim / 2).
    """
    pair = torch.arange(0, head_dim, 2, device=position_ids.device, dtype=torch.float32)
    angles = position_ids[:, :, None, None].float() * theta ** (-pair / head_dim)
    return angles.cos(), angles.sin()


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate each pair (2i, 2i+1) of x (batch, n, heads, head_dim) by its angle, in fp32."""
    even, odd = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1).flatten(-2).type_as(x)


def attention_by_hand(
    q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0, is_causal: bool = False
) -> Tensor:
    """softmax(q k^T / sqrt(d)) v, as written in "Attention is all you need" (arXiv:1706.03762).

    Same arguments and result as `F.scaled_dot_product_attention`.

    Args:
        q: (batch, heads, n, head_dim); k, v: (batch, heads, length, head_dim).
        attn_mask: bool, broadcastable to (batch, heads, n, length), True = may see; None = all.
        is_causal: in place of a mask: query i sees keys 0..i.

    Returns:
        (batch, heads, n, head_dim).
    """
    if is_causal:
        attn_mask = torch.ones(q.size(2), k.size(2), dtype=torch.bool, device=q.device).tril()
    scores = (q @ k.transpose(-2, -1)).float() / math.sqrt(q.size(-1))
    if attn_mask is not None:
        scores = scores.masked_fill(~attn_mask, float("-inf"))
    weights = F.dropout(scores.softmax(-1), dropout_p)
    return weights.type_as(v) @ v


class Samples:
    """How long the samples of a batch are, one after another, row by row; a run of padding is one of them.

    On a CPU, attention within each of them alone takes the sum of their squared lengths, where whole rows with a mask
    take the sum of the rows' squared lengths.
    """

    def __init__(self, lengths: list[int]):
        self.lengths = lengths

    @classmethod
    @torch.compiler.disable
    def of(cls, segment_ids: Tensor) -> "Samples | None":
        """From segments (batch, n) as of `attention_mask_of`; None where padding lies in the middle of a sample."""
        first = F.pad(segment_ids[:, 1:] != segment_ids[:, :-1], (1, 0), value=True)
        rows, places = first.nonzero(as_tuple=True)
        named = [pair for pair in zip(rows.tolist(), segment_ids[rows, places].tolist(), strict=True) if pair[1]]
        if len(set(named)) < len(named):
            return None
        starts = (rows * segment_ids.size(1) + places).tolist()
        return cls([end - start for start, end in itertools.pairwise([*starts, segment_ids.numel()])])


class Attention(nn.Module):
    """Causal self-attention; `n_heads / n_kv_heads` query heads share a key/value head (arXiv:2305.13245)."""

    def __init__(self, config: LMConfig, layer: int):
        super().__init__()
        self.layer = layer
        self.head_dim = config.head_dim
        self.dropout = config.dropout
        self.attend = F.scaled_dot_product_attention if config.flash_attn else attention_by_hand
        self.wq = nn.Linear(config.dim, config.n_heads * self.head_dim, bias=False)
        self.wk = nn.Linear(config.dim, config.n_kv_heads * self.head_dim, bias=False)
        self.wv = nn.Linear(config.dim, config.n_kv_heads * self.head_dim, bias=False)
        self.wo = nn.Linear(config.n_heads * self.head_dim, config.dim, bias=False)
        self.wo.adds_to_residual = True

    def forward(
        self, x: Tensor, rope: tuple[Tensor, Tensor], mask: Tensor | Samples | None, cache: KVCache | None
    ) -> Tensor:
        batch, n, _ = x.shape
        q = apply_rope(self.wq(x).view(batch, n, -1, self.head_dim), *rope).transpose(1, 2)
        k = apply_rope(self.wk(x).view(batch, n, -1, self.head_dim), *rope).transpose(1, 2)
        v = self.wv(x).view(batch, n, -1, self.head_dim).transpose(1, 2)
        if cache is not None:
            k, v = cache.append(self.layer, k, v)
        attend = self._attend_apart if isinstance(mask, Samples) else self._attend
        out = attend(q, k, v, mask)
        return self.wo(out.transpose(1, 2).reshape(batch, n, -1))

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        """q (batch, n_heads, n, head_dim); k, v (batch, n_kv_heads, length, head_dim) -> shape of q.

        mask None means causal; then the queries are all the positions there are, or the last one alone.
        """
        dropout = self.dropout if self.training else 0.0
        if q.size(2) == 1:  # the queries that share a key head stand side by side: no copy of the cache for each
            grouped = q.view(q.size(0), k.size(1), -1, self.head_dim)
            return self.attend(grouped, k, v, attn_mask=mask, dropout_p=dropout).reshape(q.shape)
        groups = q.size(1) // k.size(1)
        k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
        return self.attend(q, k, v, attn_mask=mask, dropout_p=dropout, is_causal=mask is None)

    @torch.compiler.disable  # how long the samples are is data, which no compiled graph can hold
    def _attend_apart(self, q: Tensor, k: Tensor, v: Tensor, samples: Samples) -> Tensor:
        """`_attend`, causal, for one sample after the other; in fp32, in which short ones take a CPU half the time."""
        rows, groups = (q.size(0), q.size(2)), q.size(1) // k.size(1)
        k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
        parts = (t.transpose(0, 1).flatten(1, 2)[None].float().split(samples.lengths, dim=2) for t in (q, k, v))
        dropout = self.dropout if self.training else 0.0
        with torch.autocast(q.device.type, enabled=False):
            outs = [self.attend(*qkv, dropout_p=dropout, is_causal=True) for qkv in zip(*parts, strict=True)]
        return torch.cat(outs, dim=2)[0].unflatten(1, rows).transpose(0, 1).type_as(q)


class FeedForward(nn.Module):
    """SwiGLU: w2(silu(w1 x) * w3 x) (Shazeer 2020, arXiv:2002.05202)."""

    def __init__(self, config: LMConfig):
        super().__init__()
        self.w1 = nn.Linear(config.dim, config.hidden_dim, bias=False)
        self.w2 = nn.Linear(config.hidden_dim, config.dim, bias=False)
        self.w2.adds_to_residual = True
        self.w3 = nn.Linear(config.dim, config.hidden_dim, bias=False)

    def forward(self, x: Tensor, real: Tensor | None = None) -> tuple[Tensor, None]:
        """x (..., dim) -> the same, and None where a mixture of experts has its auxiliary loss."""
        return self.w2(F.silu(self.w1(x)) * self.w3(x)), None


class Router(nn.Module):
    """Scores the routed experts for each token, in fp32 whatever the autocast: a coin-flip here moves a whole token."""

    def __init__(self, config: LMConfig):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(config.n_routed_experts, config.dim))

    def forward(self, x: Tensor) -> Tensor:
        """x (tokens, dim) -> probabilities (tokens, n_routed_experts) fp32."""
        with torch.autocast(x.device.type, enabled=False):
            return F.linear(x.float(), self.weight.float()).softmax(-1)


def load_balancing_loss(probabilities: Tensor, chosen: Tensor, real: Tensor, per_row: bool) -> Tensor:
    """sum_i f_i P_i: smallest when every expert gets the same share (Fedus et al. 2021, arXiv:2101.03961;
    per row as in DeepSeek-V2, arXiv:2405.04434).

    f_i is expert i's share of the assignments times the number of experts, P_i its mean probability.

    Args:
        probabilities: (batch, n, experts) fp32.
        chosen: (batch, n, k) int64, the experts each token went to.
        real: (batch, n) bool, False = padding, which does not count.
        per_row: balance each row by itself and average over rows with a real token, else the batch as one.

    Returns:
        fp32 scalar; 0 when nothing is real.
    """
    experts = probabilities.size(-1)
    real = real[..., None].float()
    assigned = F.one_hot(chosen, experts).sum(-2)  # (batch, n, experts)
    # written as products and sums: a matrix product would run in the half precision of autocast, which cannot count
    counts, mass, tokens = (real * assigned).sum(1), (real * probabilities).sum(1), real.sum(1)
    if not per_row:
        counts, mass, tokens = counts.sum(0, keepdim=True), mass.sum(0, keepdim=True), tokens.sum(0, keepdim=True)
    some = tokens.clamp(min=1)
    losses = (counts / (some * chosen.size(-1)) * experts * (mass / some)).sum(-1)
    return losses.sum() / (tokens > 0).sum().clamp(min=1)


class MoEFeedForward(nn.Module):
    """Each token goes to the `num_experts_per_tok` experts its router likes best, and to a shared one."""

    def __init__(self, config: LMConfig):
        super().__init__()
        self.k = config.num_experts_per_tok
        self.norm_topk_prob = config.norm_topk_prob
        self.aux_loss_alpha = config.aux_loss_alpha
        self.seq_aux = config.seq_aux
        self.experts = nn.ModuleList(FeedForward(config) for _ in range(config.n_routed_experts))
        self.gate = Router(config)
        self.shared_experts = FeedForward(config) if config.n_shared_experts else None

    def forward(self, x: Tensor, real: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """x (batch, n, dim), real (batch, n) bool or None for all -> same shape, and the weighted auxiliary loss
        (in training; else None)."""
        batch, n, dim = x.shape
        tokens = x.reshape(-1, dim)
        probabilities = self.gate(tokens)
        weights, chosen = probabilities.topk(self.k, dim=-1)
        if self.norm_topk_prob and self.k > 1:
            weights = weights / weights.sum(-1, keepdim=True)
        out = self._routed(tokens, weights, chosen).view(batch, n, dim)
        if self.shared_experts is not None:
            out = out + self.shared_experts(x)[0]
        if not self.training:
            return out, None
        if real is None:
            real = torch.ones(batch, n, dtype=torch.bool, device=x.device)
        aux = load_balancing_loss(probabilities.view(batch, n, -1), chosen.view(batch, n, -1), real, self.seq_aux)
        return out, self.aux_loss_alpha * aux

    @torch.compiler.disable  # how many tokens each expert gets is data, which no compiled graph can hold
    def _routed(self, x: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
        """Sum of the chosen experts' outputs: sort the (token, choice) pairs by expert, one product per expert, undo.

        x (tokens, dim); weights, chosen (tokens, k) -> (tokens, dim). An expert without a token multiplies an empty
        matrix: its gradient is zero rather than absent, as DDP expects.
        """
        order = chosen.flatten().argsort(stable=True)
        counts = torch.bincount(chosen.flatten(), minlength=len(self.experts)).tolist()
        batches = x[order // self.k].split(counts)
        outs = torch.cat([expert(tokens)[0] for expert, tokens in zip(self.experts, batches, strict=True)])
        back = torch.empty_like(order).scatter_(0, order, torch.arange(order.numel(), device=order.device))
        return (outs[back].view(-1, self.k, x.size(1)) * weights[..., None].type_as(outs)).sum(1)


class MiniMindBlock(nn.Module):
    """x + attention(norm(x)), then x + feed_forward(norm(x))."""

    def __init__(self, config: LMConfig, layer: int):
        super().__init__()
        self.attention_norm = RMSNorm(config.dim, config.norm_eps)
        self.attention = Attention(config, layer)
        self.ffn_norm = RMSNorm(config.dim, config.norm_eps)
        self.feed_forward = MoEFeedForward(config) if config.use_moe else FeedForward(config)
        self.dropout = nn.Dropout(config.dropout)

    def forward(
        self,
        x: Tensor,
        rope: tuple[Tensor, Tensor],
        mask: Tensor | Samples | None,
        real: Tensor | None,
        cache: KVCache | None,
    ) -> tuple[Tensor, Tensor | None]:
        """x (batch, n, dim) -> the same, and the layer's auxiliary loss or None."""
        x = x + self.dropout(self.attention(self.attention_norm(x), rope, mask, cache))
        h, aux = self.feed_forward(self.ffn_norm(x), real)
        return x + self.dropout(h), aux


SWITCHES = ("output_attentions", "output_hidden_states", "return_dict")
IGNORED = -100  # the label of what is not learned


def predicting(labels: Tensor) -> Tensor:
    """Which positions predict a token that is learned: labels (batch, n) int64, not shifted -> bool (batch, n)."""
    return F.pad(labels[:, 1:] != IGNORED, (0, 1))


def next_token_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Summed cross-entropy of each learned token given the logits one place before it, in nats.

    Args:
        logits: (batch, n, vocab), or those at `predicting(labels)` alone, (learned, vocab); any float dtype, the
            softmax is taken in fp32.
        labels: (batch, n) int64, not shifted; -100 is not learned.

    Returns:
        fp32 scalar, the sum over all learned tokens (divide by their number for the mean).
    """
    if logits.dim() == 3:
        logits = logits[predicting(labels)]
    targets = labels[:, 1:]
    return F.cross_entropy(logits.float(), targets[targets != IGNORED], reduction="sum")


@dataclass
class MiniMindOutput(ModelOutput):
    """What `MiniMindLM.forward` returns.

    loss: fp32 scalar, mean cross-entropy plus `aux_loss`; None without labels.
    logits: (batch, n, vocab), or of the `logits_to_keep` alone.
    last_hidden_state: (…, dim) at the same positions, normed: what the output matrix turns into the logits.
    cache: pass it back as `past_key_values` to continue; None unless `use_cache`.
    aux_loss: fp32 scalar, the experts' load-balancing loss over all layers; 0 for Dense and outside training.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    cache: KVCache | None = None
    aux_loss: Tensor | None = None
    last_hidden_state: Tensor | None = None

    @property
    def past_key_values(self) -> KVCache | None:
        """`cache`, by the name it had before transformers 5 renamed it."""
        return self.cache


OLD_BUFFERS = r"(^|\.)(pos_cis|mask)$"  # tables that published files carry and the model computes


def drop_old_buffers(model: nn.Module, state_dict: dict[str, Tensor], *_) -> None:
    """A published file loads unchanged, strictly too."""
    for name in [name for name in state_dict if re.search(OLD_BUFFERS, name)]:
        del state_dict[name]


class MiniMindLM(TextGeneration, PreTrainedModel, GenerationMixin):
    """The language model: embedding, blocks, norm, and the embedding again as output matrix.

    What generates is `TextGeneration`; `GenerationMixin` is the mark by which peft and trl know a model that can.
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
        self.gradient_checkpointing = False
        self.register_load_state_dict_pre_hook(drop_old_buffers)
        self.post_init()  # initialises by _init_weights and ties output to tok_embeddings

    def _init_weights(self, module: nn.Module) -> None:
        """N(0, 0.02); what adds to the residual stream is scaled down by its number of additions (GPT-2)."""
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
            attention_mask: (batch, n), or (batch, cached + n) as transformers has it; 0 = padding, on any side.
            position_ids: (batch, n) int64; a 0 begins a new sample, and attention stays within a sample. Default: each
                row is one sample, counted from its first real token, or from where the cache ends.
            labels: (batch, n) int64, not shifted; -100 is not trained.
            past_key_values: what an earlier call returned; the new tokens follow it.
            use_cache: return `past_key_values`.
            logits_to_keep: compute only the last so many positions' logits (0 = all), or those where a bool (batch, n)
                is True, (positions, vocab): what is not learned need not be predicted.
            inputs_embeds: (batch, n, dim), read in place of the embeddings of `input_ids`.
            others: further switches that peft passes to every model (output_attentions, …), all of them off.

        Raises:
            TypeError: one of the others is on, or is not known at all.
            ValueError: a position at or beyond `config.max_seq_len`, or a mask of another length.
        """
        if wrong := [name for name in others if name not in SWITCHES or (others[name] and name != "return_dict")]:
            raise TypeError(f"MiniMind's forward has no {', '.join(wrong)}")
        past = past_key_values
        n = input_ids.size(1)
        real = self._real(attention_mask, n, past)
        positions, segments, following = self._places(input_ids, position_ids, real, past)
        rope = rope_angles(positions, self.config.head_dim, self.config.rope_theta)
        cache = None
        if use_cache or past is not None:
            cache = KVCache.extended(past, n, segments, following)
        if segments is None and past is not None and n > 1:
            segments = positions.new_ones(1, past.length + n)
        mask = None
        if segments is not None:
            apart = cache is None and self.config.flash_attn and segments.device.type == "cpu"
            mask = (Samples.of(segments) if apart else None) or attention_mask_of(segments, n)

        x = self.dropout(self.tok_embeddings(input_ids) if inputs_embeds is None else inputs_embeds)
        aux_loss = torch.zeros((), device=x.device)
        for layer in self.layers:
            if self.gradient_checkpointing and self.training:
                x, aux = checkpoint(layer, x, rope, mask, real, cache, use_reentrant=False)
            else:
                x, aux = layer(x, rope, mask, real, cache)
            if aux is not None:
                aux_loss = aux_loss + aux
        kept = x[logits_to_keep] if isinstance(logits_to_keep, Tensor) else x[:, -logits_to_keep:]
        kept = self.norm(kept)
        logits = self.output(kept)

        loss = None
        if labels is not None:
            loss = next_token_loss(logits, labels) / predicting(labels).sum().clamp(min=1) + aux_loss
        return MiniMindOutput(loss, logits, cache if use_cache else None, aux_loss, kept)

    def _real(self, attention_mask: Tensor | None, n: int, past: KVCache | None) -> Tensor | None:
        """(batch, n) bool of the new tokens, False = padding; None when all are real."""
        if attention_mask is None:
            return None
        cached = 0 if past is None else past.length
        if attention_mask.dim() != 2 or attention_mask.size(1) not in (n, cached + n):
            raise ValueError(f"attention_mask {tuple(attention_mask.shape)} must have {n} or {cached + n} columns")
        return attention_mask[:, -n:].bool()

    def _places(
        self, input_ids: Tensor, position_ids: Tensor | None, real: Tensor | None, past: KVCache | None
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Where the tokens stand.

        Returns:
            positions of the new tokens (batch or 1, n); the segment of every token so far (batch, cached + n) and the
            position of the token after them (batch,). The last two are None when each row is one sample without
            padding: then plain causal attention will do.
        """
        batch, n = input_ids.shape
        cached = 0 if past is None else past.length
        if position_ids is None and real is None and (past is None or past.segment_ids is None):
            self._check_last_position(cached + n - 1)
            return torch.arange(cached, cached + n, device=input_ids.device)[None], None, None

        if past is None or past.segment_ids is None:
            segments = input_ids.new_ones(batch, cached)
            start = input_ids.new_full((batch, 1), cached)
        else:
            segments, start = past.segment_ids, past.next_position[:, None]
        if real is None:
            real = torch.ones_like(input_ids, dtype=torch.bool)
        segment = segments.amax(1, keepdim=True).clamp(min=1) if cached else torch.ones_like(start)
        if position_ids is None:
            positions = (start + real.cumsum(1) - 1).clamp(min=0)
        else:
            positions = position_ids.expand(batch, n)
            segment = segment + ((positions == 0) & real).cumsum(1)
        self._check_data_positions(positions)
        last_real = (real * torch.arange(1, n + 1, device=real.device)).amax(1, keepdim=True) - 1  # -1: none
        following = torch.where(last_real < 0, start, positions.gather(1, last_real.clamp(min=0)) + 1)[:, 0]
        return positions, torch.cat((segments, real * segment), dim=1), following

    @torch.compiler.disable  # what stands in a tensor is data, which no compiled graph can decide on
    def _check_data_positions(self, positions: Tensor) -> None:
        self._check_last_position(int(positions.max()))

    def _check_last_position(self, last: int) -> None:
        if last >= self.config.max_seq_len:
            raise ValueError(f"position {last} is beyond the model's max_seq_len of {self.config.max_seq_len}")


AutoConfig.register("minimind", LMConfig)
AutoModelForCausalLM.register(LMConfig, MiniMindLM)
