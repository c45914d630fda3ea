"""A training step of each contender, as a function that takes one step and returns its number of tokens."""

import itertools
import math
import time
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, Qwen2MoeConfig, Qwen2MoeForCausalLM

from benchmarks.throughput.bare_model import BareModel
from benchmarks.throughput.vlm_peer import IMAGE_TOKENS, VISION_DIM, PeerVLM
from dataset import PretrainDataset, StepLoader, collate
from model import LMConfig, MiniMindLM
from model.loss import next_token_loss, target_mask
from model.model_lora import apply_lora
from model.model_vlm import MiniMindVLM, VLMConfig
from trainer.schedule import make_optimizer

Step = Callable[[], tuple[int, int]]  # one optimizer step -> (non-padding tokens, positions computed)
ROWS_JOINED = 2000  # of the packed rows, for the peer that reads one long text


def peer_model(config: LMConfig) -> PreTrainedModel:
    """transformers' model of the same shape: Llama, or Qwen2-MoE, which also has a shared expert."""
    shape = {
        **{"vocab_size": config.vocab_size, "hidden_size": config.dim, "intermediate_size": config.hidden_dim},
        **{"num_hidden_layers": config.n_layers, "num_attention_heads": config.n_heads},
        **{"num_key_value_heads": config.n_kv_heads, "max_position_embeddings": config.max_seq_len},
        **{"rope_theta": config.rope_theta, "rms_norm_eps": config.norm_eps, "tie_word_embeddings": True},
        "attn_implementation": "sdpa",
    }
    if not config.use_moe:
        return LlamaForCausalLM(LlamaConfig(**shape))
    experts = {
        **{"num_experts": config.n_routed_experts, "num_experts_per_tok": config.num_experts_per_tok},
        **{"moe_intermediate_size": config.hidden_dim, "shared_expert_intermediate_size": config.hidden_dim},
        **{"norm_topk_prob": config.norm_topk_prob, "decoder_sparse_step": 1},
        **{"output_router_logits": True, "router_aux_loss_coef": config.aux_loss_alpha},
    }
    return Qwen2MoeForCausalLM(Qwen2MoeConfig(**shape, **experts))


def with_peft(model: PreTrainedModel, rank: int = 16) -> nn.Module:
    """The same with peft's LoRA on the square matrices of attention, like `apply_lora`."""
    from peft import LoraConfig, get_peft_model

    return get_peft_model(model, LoraConfig(r=rank, lora_alpha=rank, target_modules=["q_proj", "o_proj"]))


def peer_step(data: PretrainDataset, config: LMConfig, args, dtype: torch.dtype) -> Step:
    """A step of the plain loop: transformers' model, every sample padded to the row length, torch's AdamW."""
    around = {"pretrain": nn.Identity(), "lora": with_peft, "vlm": PeerVLM}[args.stage]
    model = around(peer_model(config)).to(args.device).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    loader = DataLoader(
        data,
        args.batch_size,
        shuffle=True,
        drop_last=True,
        collate_fn=lambda rows: collate(rows, args.max_seq_len),
        generator=torch.Generator().manual_seed(0),
    )
    batches = endless(loader)

    def step() -> tuple[int, int]:
        batch = {name: tensor.to(args.device) for name, tensor in next(batches).items()}
        batch.pop("position_ids")
        real = batch.pop("attention_mask")
        with torch.autocast(args.device.type, dtype, enabled=dtype != torch.float32):
            loss = model(**batch, attention_mask=real.long()).loss
        loss.backward()
        finish(model, optimizer)
        return int(real.sum()), real.numel()

    return step


def bare_step(data: PretrainDataset, config: LMConfig, args, dtype: torch.dtype, compiled: bool) -> Step:
    """A step of `BareModel`, compiled with its loss, on texts joined end to end: every position is a token."""
    torch.manual_seed(0)
    model: nn.Module = BareModel(config, args.max_seq_len).to(args.device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    loss_of = torch.compile(model) if compiled else model
    text = torch.cat([data[row]["input_ids"] for row in range(min(len(data), ROWS_JOINED))])
    taken = args.batch_size * args.max_seq_len
    text = text.repeat(math.ceil((taken + 1) / len(text)))  # a file of few tokens comes more than once
    starts = itertools.cycle(range(0, len(text) - taken, taken))

    def step() -> tuple[int, int]:
        start = next(starts)
        ids, targets = (
            text[first : first + taken].view(args.batch_size, -1).to(args.device) for first in (start, start + 1)
        )
        with torch.autocast(args.device.type, dtype, enabled=dtype != torch.float32):
            loss = loss_of(ids, targets)
        loss.backward()
        finish(model, optimizer)
        return taken, taken

    return step


def our_step(
    data: PretrainDataset, config: LMConfig, args, dtype: torch.dtype, compiled: bool
) -> tuple[Step, list[tuple[float, float]]]:
    """A step of the stages' loop, on packed rows or, like MiniMind2, one sample a row; and a list that grows by each:
    the seconds that it waited for its rows, and all that it took."""
    model = MiniMindLM(config)
    if args.stage == "vlm":
        pictures = {"image_tokens": IMAGE_TOKENS, "vision_dim": VISION_DIM}
        model = MiniMindVLM(VLMConfig(**config.to_dict() | pictures))
    if args.stage == "lora":
        apply_lora(model)
    model.to(args.device).train()
    if compiled:
        for block in model.layers:
            block.compile()
    optimizer = make_optimizer(model, args)
    loader = StepLoader(data, args.batch_size, 1, epochs=1, seed=0)
    batches = itertools.chain.from_iterable(endless_steps(loader))
    times: list[tuple[float, float]] = []

    def step() -> tuple[int, int]:
        started = time.perf_counter()
        batch = next(batches)
        waited = time.perf_counter() - started
        batch = {name: tensor.to(args.device) for name, tensor in batch.items()}
        labels, real = batch.pop("labels"), batch["attention_mask"]
        with torch.autocast(args.device.type, dtype, enabled=dtype != torch.float32):
            learned = target_mask(labels)
            out = model(**batch, logits_to_keep=learned)
            loss = next_token_loss(out.logits, labels) / learned.sum() + out.aux_loss
        loss.backward()
        finish(model, optimizer)
        seen = int(real.sum()), real.numel()
        times.append((waited, time.perf_counter() - started))
        return seen

    return step, times


def finish(model: nn.Module, optimizer) -> None:
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def endless(loader: DataLoader) -> Iterator[dict[str, Tensor]]:
    while True:
        yield from loader


def endless_steps(loader: StepLoader) -> Iterator[list[dict[str, Tensor]]]:
    while True:
        yield from loader.steps()
