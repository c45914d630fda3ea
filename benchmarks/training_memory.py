"""Memory and time of a training step with and without gradient checkpointing, on each process, beside the formulas of
scripts/plan.py.

    python -m benchmarks.training_memory                                                       one process
    torchrun --nproc_per_node 2 -m benchmarks.training_memory                                  DDP
    torchrun --nproc_per_node 2 -m benchmarks.training_memory --deepspeed --zero_stage 2       ZeRO
    torchrun --nproc_per_node 2 -m benchmarks.training_memory --fsdp                           FSDP2

Memory is what rank 0 has allocated in tensors: on CUDA as its allocator counts it, elsewhere by counting every
operator that returns a new storage, without what an operator needs internally and without DDP's own buckets.
"Held" is between two steps, "peak" within one. Times are medians of --rounds steps; the two kinds take turns.
"""

import statistics
import time
import weakref
from collections.abc import Iterator
from contextlib import contextmanager

import trainer.start  # noqa: F401  (first of all: what to do where PyTorch, or a home folder, is missing)
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from model import LMConfig, MiniMindLM
from model.loss import next_token_loss, target_mask
from model.model_lora import apply_lora
from model.nf4 import quantize_nf4
from scripts.planning.estimates import Work, peak_bytes
from scripts.planning.memory import ALONE, DDP, ENGINES, FSDP2, Engine, saved_bytes, state_bytes, working_bytes
from trainer.argument_types import BooleanFlag, positive_int
from trainer.arguments import Parser, add_device_argument, add_fsdp_argument
from trainer.errors import run_main
from trainer.parallel import sync_gradients, wrap_model
from trainer.runtime import Runtime, start_runtime
from trainer.schedule import make_optimizer


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of storages that operators have allocated and that are still alive.

    Attributes:
        now, peak: bytes now, and their maximum since `peak` was last set.
    """

    def __init__(self):
        super().__init__()
        self.now = self.peak = 0
        self._seen: dict[int, weakref.ref] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        tree_map_only(torch.Tensor, self._count, out)
        return out

    def _count(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._seen:
            return

        def gone(_, key=key, size=size) -> None:
            del self._seen[key]
            self.now -= size

        self._seen[key] = weakref.ref(storage, gone)
        self.now += size
        self.peak = max(self.peak, self.now)


class CudaBytes:
    """The same, reported by CUDA's allocator."""

    @property
    def now(self) -> int:
        return torch.cuda.memory_allocated()

    @property
    def peak(self) -> int:
        return torch.cuda.max_memory_allocated()

    @peak.setter
    def peak(self, _: int) -> None:
        torch.cuda.reset_peak_memory_stats()


@contextmanager
def counting(device: torch.device) -> Iterator[LiveBytes | CudaBytes]:
    if device.type == "cuda":
        yield CudaBytes()
        return
    with LiveBytes() as live:
        yield live


def training_step(model, optimizer, scaler, run: Runtime, ids: torch.Tensor, engine_steps: bool) -> None:
    """A step of train_pretrain.py's loop with one micro-batch of rows without padding."""
    sync_gradients(model, last=True)
    with run.autocast():
        out = model(input_ids=ids, logits_to_keep=target_mask(ids))
        loss = next_token_loss(out.logits, ids) / ids.numel() + out.aux_loss
    scaler.scale(loss).backward()
    if engine_steps:
        scaler.clip_and_step()
        return
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def measure(args, run: Runtime, config: LMConfig, checkpointing: bool) -> dict[str, float]:
    """Bytes allocated between steps and at a step's peak, and a step function to be timed."""
    torch.manual_seed(0)
    ids = torch.randint(0, config.vocab_size, (args.batch_size, args.max_seq_len), device=run.device)
    with counting(run.device) as live:
        model = MiniMindLM(config).to(run.device).train()
        if args.adapter:
            apply_lora(model)
        if args.adapter == "qlora":
            quantize_nf4(model)
        model.gradient_checkpointing = checkpointing
        scaler = torch.amp.GradScaler(run.device.type, enabled=run.dtype == torch.float16)
        model, optimizer, scaler = wrap_model(model, make_optimizer(model, args), scaler, run, compile_blocks=False)

        def step() -> None:
            training_step(model, optimizer, scaler, run, ids, bool(args.deepspeed or args.fsdp))

        step()
        step()
        held = live.now
        live.peak = 0
        step()
        peak = live.peak
    return {"held": held, "peak": peak, "step": step}


def timed(step, device: torch.device) -> float:
    started = time.perf_counter()
    step()
    if device.type != "cpu":
        torch.accelerator.synchronize()
    return time.perf_counter() - started


def engine_of(args, run: Runtime) -> Engine:
    if args.deepspeed:
        return next(engine for engine in ENGINES if engine.name == f"ZeRO-{args.zero_stage}")
    if args.fsdp:
        return FSDP2
    return DDP if run.world_size > 1 else ALONE


def main():
    parser = Parser(__doc__)
    parser.add_argument("--dim", type=positive_int, default=512)
    parser.add_argument("--n_layers", type=positive_int, default=8)
    parser.add_argument("--use_moe", action=BooleanFlag)
    parser.add_argument("--batch_size", type=positive_int, default=8, help="rows")
    parser.add_argument("--max_seq_len", type=positive_int, default=512, help="tokens per row")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="bfloat16")
    parser.add_argument("--optimizer", choices=("adamw", "muon", "adamw8bit"), default="adamw")
    parser.add_argument("--adapter", choices=("lora", "qlora"), help="train an adapter of rank 16; without formulas")
    parser.add_argument("--deepspeed", nargs="?", const=True, default=None, metavar="JSON")
    parser.add_argument("--zero_stage", type=int, choices=(1, 2, 3), default=2)
    add_fsdp_argument(parser)
    parser.add_argument("--rounds", type=positive_int, default=5)
    add_device_argument(parser)
    parser.set_defaults(
        seed=42, grad_clip=1.0, learning_rate=1e-4, stop_after=0, save_minutes=0, stall_timeout=0, offload=None
    )
    args = parser.parse_args()
    run = start_runtime(args)
    config = LMConfig(dim=args.dim, n_layers=args.n_layers, use_moe=args.use_moe)
    found = {kind: measure(args, run, config, kind) for kind in (False, True)}
    times = [{kind: timed(one["step"], run.device) for kind, one in found.items()} for _ in range(args.rounds)]

    engine, half, fused = engine_of(args, run), run.dtype != torch.float32, run.device.type != "cpu"
    state = state_bytes(config, engine, run.world_size, args.optimizer)
    rows = f"{args.batch_size} rows of {args.max_seq_len}, {run.dtype_name}, {run.device.type}"
    run.print(f"{run.engine}, {run.world_size} processes, {rows}; formula in brackets")
    for kind, one in found.items():
        if args.adapter:
            run.print(
                f"{args.adapter}, {'with' if kind else 'without'} checkpointing: held {one['held'] / 1e6:,.1f} MB, "
                f"peak {one['peak'] / 1e6:,.1f} MB"
            )
            continue
        held = state.total - (0 if engine.splits_gradients else state.gradients)
        saved = saved_bytes(config, args.batch_size, args.max_seq_len, half, kind, fused_norm=fused)
        work = Work(args.max_seq_len, args.batch_size, 1, kind, half)
        most = peak_bytes(config, engine, run.world_size, work, args.optimizer)
        seconds = statistics.median(turn[kind] for turn in times)
        run.print(
            f"{'with' if kind else 'without'} checkpointing: held {one['held'] / 1e6:,.1f} MB ({held / 1e6:,.1f}), "
            f"peak {one['peak'] / 1e6:,.1f} MB ({most / 1e6:,.1f}; saved {saved / 1e6:,.1f}, working "
            f"{working_bytes(config, args.batch_size, args.max_seq_len, half) / 1e6:,.1f}), step {seconds:.2f} s"
        )
    more = statistics.median(turn[True] / turn[False] for turn in times)
    run.print(
        f"checkpointing takes {found[True]['peak'] / found[False]['peak']:.0%} of the peak and {more:.2f} x the time"
    )
    run.finish(finished=True)


if __name__ == "__main__":
    run_main(main)
