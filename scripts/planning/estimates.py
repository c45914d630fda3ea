"""Estimates, not measurements, of a step's time, the communication between devices, and a run's cost."""

from typing import NamedTuple

from model import LMConfig
from scripts.planning.memory import FP32, Engine, saved_bytes, state_bytes, working_bytes
from scripts.planning.sizes import count_parameters, training_flops

ROOM = 0.9  # of a device's memory; the rest is CUDA's own, and what the allocator cannot use


class Gpu(NamedTuple):
    """A GPU by its data sheet: memory in bytes, and operations/s of dense bfloat16 products accumulated in fp32."""

    memory: float
    flops: float


GPUS = {  # NVIDIA's data sheets and architecture white papers, without sparsity
    "rtx3090": Gpu(24e9, 71e12),
    "rtx4090": Gpu(24e9, 165e12),
    "l40s": Gpu(48e9, 362e12),
    "a100": Gpu(80e9, 312e12),
    "h100": Gpu(80e9, 989e12),
    "h200": Gpu(141e9, 989e12),
    "b200": Gpu(180e9, 2250e12),
}


class Machines(NamedTuple):
    """The machines of a run.

    gpus: their total number.
    gpu: the kind of GPU.
    mfu: the share of `gpu.flops` that the model's matrix products reach ("model FLOPs utilization", Chowdhery et al.
        2022, arXiv:2204.02311, section 4.1). Llama 3 reached 0.38 to 0.43 (arXiv:2407.21783, section 3.3.2), small
        models reach less.
    bandwidth: bytes/s that each GPU sends to the others while it receives at the same rate.
    """

    gpus: int
    gpu: Gpu
    mfu: float
    bandwidth: float


class Work(NamedTuple):
    """An optimizer step on each GPU: rows of `n` tokens per micro-batch, and micro-batches per step."""

    n: int
    rows: int
    accumulation: int
    checkpointing: bool = False
    half: bool = True


class Step(NamedTuple):
    """An optimizer step: seconds of computing and of communication, bytes that each GPU sends, its memory in bytes."""

    computing: float
    sending: float
    sent: int
    memory: int

    @property
    def seconds(self) -> float:
        """The longer of computing and communication, which engines overlap."""
        return max(self.computing, self.sending)


def sent_bytes(config: LMConfig, engine: Engine, gpus: int, accumulation: int) -> int:
    """Bytes that each GPU sends in an optimizer step.

    In a ring all-reduce over N devices, each sends 2 (N - 1) / N times the data (Patarasuk & Yuan 2009, "Bandwidth
    optimal all-reduce algorithms"); a reduce-scatter or an all-gather is half of that. DDP and ZeRO-1 sum the gradients
    once per step; ZeRO-2 scatters them in each micro-batch, and gathers the weights once; ZeRO-3 and FSDP2 gather the
    weights twice in each micro-batch and scatter the gradients (Rajbhandari et al. 2020, arXiv:1910.02054, section 7).
    """
    if gpus == 1:
        return 0
    halves = 2
    if engine.splits_weights:
        halves = 3 * accumulation
    elif engine.splits_gradients:
        halves = accumulation + 1
    return halves * FP32 * count_parameters(config).total * (gpus - 1) // gpus


def peak_bytes(config: LMConfig, engine: Engine, gpus: int, work: Work, optimizer: str) -> int:
    """Peak memory of one GPU: the state (exact), the saved activations (within 10 %), and temporary tensors.

    ZeRO-3 and FSDP2 gather the whole weights of the module being computed: here one block and the embedding.
    """
    gathered = 0
    if engine.splits_weights:
        parameters = count_parameters(config)
        gathered = FP32 * (parameters.embedding + (parameters.attention + parameters.feed_forward) // config.n_layers)
    return (
        state_bytes(config, engine, gpus, optimizer).total
        + saved_bytes(config, work.rows, work.n, work.half, work.checkpointing, packed=True)
        + working_bytes(config, work.rows, work.n, work.half)
        + gathered
    )


def estimate_step(config: LMConfig, engine: Engine, machines: Machines, work: Work, optimizer: str = "adamw") -> Step:
    """The cost of an optimizer step: `training_flops` at the rate of `machines`, and `sent_bytes`."""
    rows = work.rows * work.accumulation
    flops = rows * training_flops(config, work.n, work.checkpointing)
    sent = sent_bytes(config, engine, machines.gpus, work.accumulation)
    return Step(
        flops / (machines.gpu.flops * machines.mfu),
        sent / machines.bandwidth,
        sent,
        peak_bytes(config, engine, machines.gpus, work, optimizer),
    )
