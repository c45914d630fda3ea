"""Memory of a training step on one device: the engines' state of the model, and saved activations."""

import math
from typing import NamedTuple

from model import LMConfig
from scripts.planning.sizes import count_parameters, count_tensors
from trainer.adamw8bit import BLOCK, SMALLEST

FP32 = 4  # bytes
BUCKET = 500_000_000  # numbers in the buffer through which DeepSpeed's ZeRO 1 and 2 reduce gradients, by default


class Engine(NamedTuple):
    """A way to share the work: its name, its flags, and what it shards across the processes.

    Weights are fp32 in all of them; autocast computes in --dtype.
    """

    name: str
    flags: str = ""
    splits_weights: bool = False
    splits_gradients: bool = False
    splits_optimizer: bool = False
    copies: str = ""  # its additional copies


ALONE = Engine("one process")
DDP = Engine("DDP", copies="gradients")
ZERO_1 = Engine("ZeRO-1", "--deepspeed --zero_stage 1", splits_optimizer=True, copies="master")
ZERO_2 = Engine("ZeRO-2", "--deepspeed --zero_stage 2", splits_gradients=True, splits_optimizer=True, copies="master")
ZERO_3 = Engine("ZeRO-3", "--deepspeed --zero_stage 3", True, True, True, copies="master")
FSDP2 = Engine("FSDP2", "--fsdp", True, True, True)
ENGINES = (ALONE, DDP, ZERO_1, ZERO_2, FSDP2, ZERO_3)


class State(NamedTuple):
    """Bytes of a process's model state, independent of the batch.

    weights, gradients: fp32, 4 bytes per parameter.
    optimizer: AdamW's two moments, 8 bytes per parameter, or Muon's single one for the matrices between embedding and
        output, and a step count of 4 bytes for each of AdamW's tensors. AdamW in 8 bits: see `moments_in_8_bits`.
    copies: the engine's additional copies. DDP: the gradients, in its communication buckets (PyTorch's
        DistributedDataParallel, `gradient_as_bucket_view`). ZeRO: its shard of the weights, which the optimizer
        updates, and up to stage 2 a buffer of `reduce_bucket_size` numbers (DeepSpeed's configuration,
        zero_optimization).
    """

    weights: int
    gradients: int
    optimizer: int
    copies: int

    @property
    def total(self) -> int:
        return sum(self)


def state_bytes(config: LMConfig, engine: Engine = ALONE, processes: int = 1, optimizer: str = "adamw") -> State:
    """Weights, gradients and optimizer of one process. Exact without sharding; shard sizes are rounded up, because
    engines pad the last shard.

    ZeRO's shards: Rajbhandari et al. 2020, arXiv:1910.02054, section 5, here with fp32 weights.
    """
    parameters = count_parameters(config)
    moments = 2 * FP32 * parameters.total
    tensors = count_tensors(config)
    if optimizer == "muon":
        hidden = parameters.attention + _matrices(config) * 3 * config.dim * config.hidden_dim
        moments -= FP32 * hidden
        tensors -= config.n_layers * 4 + 3 * _matrices(config)
    elif optimizer == "adamw8bit":
        moments, tensors = moments_in_8_bits(config), 0  # its step counts are plain numbers
    of_all = FP32 * parameters.total

    def share(size: int, split: bool) -> int:
        return math.ceil(size / processes) if split else size

    copies = 0
    if engine.copies == "gradients" and processes > 1:
        copies = of_all
    elif engine.copies == "master":
        buffer = 0 if engine.splits_weights else FP32 * min(BUCKET, parameters.total)
        copies = share(of_all, True) + buffer
    return State(
        share(of_all, engine.splits_weights),
        share(of_all, engine.splits_gradients),
        share(moments, engine.splits_optimizer) + FP32 * tensors,
        copies,
    )


def moments_in_8_bits(config: LMConfig) -> int:
    """Bytes of both moments in trainer/adamw8bit.py: one per number and 4 per block; small tensors stay in fp32."""
    dim, kv_dim, layers = config.dim, config.n_kv_heads * config.head_dim, config.n_layers
    sizes = {  # numbers of a tensor: how many such tensors there are
        "embedding": (config.vocab_size * dim, 1),
        "wq, wo": (dim * dim, 2 * layers),
        "wk, wv": (dim * kv_dim, 2 * layers),
        "w1, w2, w3": (dim * config.hidden_dim, 3 * _matrices(config)),
        "router": (config.n_routed_experts * dim, layers * config.use_moe),
        "norms": (dim, 2 * layers + 1),
    }
    return sum(
        count * 2 * (FP32 * n if n < SMALLEST else n + FP32 * math.ceil(n / BLOCK))
        for n, count in sizes.values()
        if count
    )


def _matrices(config: LMConfig) -> int:
    """The number of feed-forward networks in all layers; each has three matrices."""
    experts = config.n_routed_experts + config.n_shared_experts if config.use_moe else 1
    return config.n_layers * experts


def saved_bytes(
    config: LMConfig,
    rows: int,
    n: int,
    half: bool = True,
    checkpointing: bool = False,
    packed: bool = False,
    fused_norm: bool = True,
) -> int:
    """Bytes that the forward pass saves for the backward pass, without weights: within 10 % by test.

    Counted by hand over model/model.py, in the manner of Korthikanti et al. 2022 (arXiv:2205.05198, section 4), whose
    block, however, has two-layer feed-forwards and computes wholly in half precision. Here, per token, the residual
    stream and the norms' outputs are fp32; each matrix product saves its input in --dtype (under autocast one copy for
    each product that reads it); keys and values are repeated for each query head.

    Args:
        rows, n: rows per micro-batch, and tokens per row.
        half: autocast to bfloat16 or float16; False computes in fp32.
        checkpointing: only the input of each block is saved, and one block at a time is recomputed.
        packed: rows have several samples, which a mask separates (on a GPU).
        fused_norm: as on GPUs; PyTorch's RMSNorm on a CPU also saves its normalised input.
    """
    tokens, block = rows * n, block_bytes(config, rows, n, half, packed, fused_norm)
    inputs = tokens * FP32 * config.dim
    kept = config.n_layers * inputs + block if checkpointing else config.n_layers * block
    norm = 0 if fused_norm else inputs
    return kept + head_bytes(config, tokens, half) + norm + rope_bytes(config, tokens)


def block_bytes(config: LMConfig, rows: int, n: int, half: bool, packed: bool, fused_norm: bool) -> int:
    """Bytes that one block saves for the backward pass.

    Per token: the block's input and the input of the second norm, fp32, with 4 bytes each for the norms' scales; the
    inputs of wq, wk, wv; q, and k and v repeated for each head; attention's output, which is also the input of wo, and
    4 bytes per head for its softmax; then the feed-forward.
    """
    size, dim = 2 if half else FP32, config.dim
    copies = 3 if half else 1  # under autocast each product casts its input anew
    norms = 2 * FP32 * (dim * (1 if fused_norm else 2) + 1)
    per_token = norms + copies * size * dim + 3 * size * dim + size * dim + FP32 * config.n_heads
    mask = rows * n * n * size if packed else 0  # as numbers to add to the scores
    return rows * n * (per_token + _feed_forward_bytes(config, half)) + mask


def _feed_forward_bytes(config: LMConfig, half: bool) -> int:
    """Bytes kept for the backward pass per token: the inputs of w1 and w3, w1's output, its SiLU, w3's output, and the
    input of w2; in a mixture of experts these, and the weighted output, for each expert of the token, and the router's
    input."""
    size, dim = 2 if half else FP32, config.dim
    inner = 4 * size * config.hidden_dim
    inputs = (2 if half else 1) * size * dim
    if not config.use_moe:
        return inputs + inner
    routed = config.num_experts_per_tok * (inputs + inner + size * dim)
    shared = config.n_shared_experts * ((inputs if half else 0) + inner)
    return routed + shared + FP32 * dim  # the router's input is the norm's output, which fp32 experts share


def head_bytes(config: LMConfig, tokens: int, half: bool) -> int:
    """Bytes that the last norm, the output matrix and the loss save: the inputs of the first two, and the softmax over
    the vocabulary in fp32."""
    return tokens * (FP32 * config.dim + (2 if half else FP32) * config.dim + FP32 * config.vocab_size)


def rope_bytes(config: LMConfig, tokens: int) -> int:
    """Bytes of cosine and sine, which all layers share."""
    return 2 * FP32 * tokens * config.head_dim // 2


def working_bytes(config: LMConfig, rows: int, n: int, half: bool = True) -> int:
    """An estimate of the peak of temporary bytes, in addition to the saved ones.

    They are the logits in --dtype and in fp32, with the gradient of both, and under autocast the copies of the weights
    in --dtype, which the backward pass uses again.
    """
    size = 2 if half else FP32
    logits = rows * n * config.vocab_size * (2 * size + FP32)
    matrices = count_parameters(config).total - count_parameters(config).norms
    return logits + (size * matrices if half else 0)
