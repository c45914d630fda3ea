"""Where and how a stage runs: device, precision, processes, compilation, DDP or DeepSpeed, and signals."""

import contextlib
import datetime
import json
import logging
import os
import shutil
import signal
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from trainer.errors import UserError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
NON_FINITE_LIMIT = 10  # in a row; float16's scaler needs a few of them to find its scale
COMPILE_PAYS_FROM = 2_000_000  # tokens; compiling takes about as long as a few hundred thousand of them on a CPU


@dataclass
class Totals:
    """What one optimizer step covers on all ranks: trained tokens, rows with anything in them, real tokens."""

    trained: float
    rows: float
    real: float


@dataclass
class Runtime:
    """The process a stage runs in. Make it with `start_runtime`."""

    device: torch.device
    dtype: torch.dtype
    rank: int = 0
    world_size: int = 1
    deepspeed_config: dict | None = None
    non_finite: int = 0  # steps skipped so far
    asked_to_stop: bool = False  # by Ctrl-C or SIGTERM, on any rank: the loop saves and ends
    _non_finite_in_a_row: int = 0
    _signals: list[int] = field(default_factory=list)
    _preparation: dist.ProcessGroup | None = None

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)

    def to_device(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: tensor.to(self.device, non_blocking=True) for name, tensor in batch.items()}

    def sum(self, *values: float) -> list[float]:
        """Each value summed over all ranks."""
        tensor = torch.tensor(values, dtype=torch.float64, device=self.device)
        if self.world_size > 1:
            dist.all_reduce(tensor)
        return tensor.tolist()

    def totals(self, batches: list[dict[str, Tensor]]) -> Totals:
        """Count a step's micro-batches over all ranks, so that each token of it weighs the same wherever it lies.

        The ranks also tell each other here whether one of them was asked to stop.
        """
        trained = sum(int((batch["labels"][:, 1:] != -100).sum()) for batch in batches)
        rows = sum(int(batch["attention_mask"].any(1).sum()) for batch in batches)
        real = sum(int(batch["attention_mask"].sum()) for batch in batches)
        *counts, asked = self.sum(trained, rows, real, len(self._signals))
        self.asked_to_stop = asked > 0
        return Totals(*counts)

    def gradients_synced(self, model: nn.Module, last: bool) -> contextlib.AbstractContextManager:
        """DDP adds the ranks' gradients up in the last backward of a step only."""
        if last or not isinstance(model, DistributedDataParallel):
            return contextlib.nullcontext()
        return model.no_sync()

    def is_finite(self, gradient_norm: Tensor) -> bool:
        """Whether the step may be taken; one that may not is counted.

        Raises:
            UserError: after several in a row.
        """
        if torch.isfinite(gradient_norm):
            self._non_finite_in_a_row = 0
            return True
        self.non_finite += 1
        self._non_finite_in_a_row += 1
        if self._non_finite_in_a_row >= NON_FINITE_LIMIT or self.deepspeed_config:
            raise UserError(
                f"the gradient was not finite {self._non_finite_in_a_row} times in a row; the last saved weights are "
                "whole: go on from them with --resume, a lower --learning_rate or --dtype bfloat16"
            )
        return False

    def on_signal(self, number: int, _frame) -> None:
        """The first one lets the current step end and be saved, the second one ends at once."""
        if self._signals:
            sys.exit(128 + number)
        self._signals.append(number)
        if self.is_main:
            print(f"\n{signal.Signals(number).name}: saving after this step (again: stop at once)", file=sys.stderr)

    def finish(self) -> None:
        """The end of a stage; a run that was asked to stop ends with a signal's exit code."""
        if dist.is_initialized():
            dist.destroy_process_group()
        if self.asked_to_stop:
            sys.exit(128 + (self._signals[0] if self._signals else signal.SIGTERM))

    @contextlib.contextmanager
    def main_first(self) -> Iterator[None]:
        """Rank 0 prepares (reads, tokenises, writes a cache), then the others find it done."""
        if self._preparation is None:
            yield
            return
        if not self.is_main:
            try:
                dist.barrier(group=self._preparation)
            except RuntimeError:
                sys.exit(2)  # rank 0 has stopped and said why
        yield
        if self.is_main:
            dist.barrier(group=self._preparation)

    def say(self, text: str) -> None:
        """Print a line, on rank 0."""
        if self.is_main:
            print(text, flush=True)


def start_runtime(args) -> Runtime:
    """Set up this process from the training arguments and the launcher's environment; seeds torch.

    Raises:
        UserError: no such device, or --deepspeed without a launcher.
    """
    world_size = int(os.environ.get("WORLD_SIZE", 1))
    rank, local_rank = int(os.environ.get("RANK", 0)), int(os.environ.get("LOCAL_RANK", 0))
    device = pick_device(args.device, local_rank)
    config = None
    if args.deepspeed:
        if "RANK" not in os.environ:
            raise UserError("--deepspeed needs a launcher: torchrun --nproc_per_node N, or deepspeed --num_gpus N")
        config = deepspeed_config(args)
    runtime = Runtime(device, DTYPES[args.dtype], rank, world_size, config)
    if "RANK" in os.environ:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    if world_size > 1:
        runtime._preparation = dist.new_group(backend="gloo", timeout=datetime.timedelta(days=2))
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")
    torch.manual_seed(args.seed)
    signal.signal(signal.SIGINT, runtime.on_signal)
    signal.signal(signal.SIGTERM, runtime.on_signal)
    return runtime


def pick_device(name: str | None, local_rank: int = 0) -> torch.device:
    """The device asked for, or this rank's GPU, or the CPU.

    Raises:
        UserError: it is not there.
    """
    if name is None:
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"--device {name}: no such kind of device; use cpu, cuda or cuda:N") from None
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise UserError(f"--device {name}: PyTorch sees no CUDA GPU here; use --device cpu")
        if device.index is None:
            device = torch.device("cuda", local_rank)
        if device.index >= torch.cuda.device_count():
            raise UserError(f"--device {name}: there are {torch.cuda.device_count()} GPUs, counted from 0")
    return device


def deepspeed_config(args) -> dict:
    """DeepSpeed's settings, from --zero_stage or from the user's JSON; batch sizes and clipping are the flags' own."""
    if args.deepspeed is True:
        config = {"zero_optimization": {"stage": args.zero_stage}}
    else:
        try:
            config = json.loads(Path(args.deepspeed).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise UserError(f"--deepspeed {args.deepspeed}: {error}") from None
    if args.dtype == "float16":
        config["torch_autocast"] = {"enabled": True, "dtype": "float16"}
    return config | {
        "train_micro_batch_size_per_gpu": args.batch_size,
        "gradient_accumulation_steps": 1,  # the loop says where a step ends: the last one of an epoch is shorter
        "gradient_clipping": args.grad_clip,
    }


def wrap_model(model: nn.Module, optimizer, runtime: Runtime, compile_blocks: bool):
    """Compile the blocks, then hand the model to DeepSpeed or DDP where there are several processes.

    Returns:
        (what the loop calls and takes steps with, its optimizer).
    """
    if compile_blocks:
        for block in model.layers:  # all alike: compiled once, and the state dict keeps its names
            block.compile()
    if runtime.deepspeed_config:
        return _deepspeed_engine(model, optimizer, runtime)
    if runtime.world_size > 1:
        model = DistributedDataParallel(model, device_ids=[runtime.device] if runtime.device.type == "cuda" else None)
    return model, optimizer


def _deepspeed_engine(model: nn.Module, optimizer, runtime: Runtime):
    if runtime.device.type == "cpu":
        os.environ["DS_ACCELERATOR"] = "cpu"  # before the import, which looks for one
    import deepspeed

    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    config = runtime.deepspeed_config | {"zero_allow_untested_optimizer": True, "zero_force_ds_cpu_optimizer": False}
    engine, optimizer, _, _ = deepspeed.initialize(
        model=model, optimizer=optimizer, config=config, dist_init_required=False
    )
    return engine, optimizer


def should_compile(args, device: torch.device, steps: int) -> bool:
    """Whether to use torch.compile: as --compile says, else where it works and the run is long enough to earn it back
    (unpacked rows have all lengths, and each would be compiled anew)."""
    if args.compile is not None:
        return args.compile
    if not args.packing or steps * args.batch_size * args.accumulation_steps * args.max_seq_len < COMPILE_PAYS_FROM:
        return False
    if device.type == "cpu" and not (os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")):
        return False
    try:
        torch.compile(lambda x: x.sin() + 1)(torch.ones(64, device=device))
    except Exception:  # no headers, no write access, an unknown chip: whatever it is, eager mode works
        return False
    return True


def plain_model(model: nn.Module) -> nn.Module:
    """The model inside DDP's or DeepSpeed's wrapper."""
    return getattr(model, "module", model)
