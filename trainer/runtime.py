"""Where a stage runs: device, precision, the processes it shares a step with, and signals."""

import atexit
import contextlib
import datetime
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor

from model.loss import target_mask
from trainer.arguments import deepspeed_config
from trainer.device import DTYPES, backend_of, default_dtype, moved, pick_device
from trainer.errors import UserError
from trainer.launcher import read_place
from trainer.signals import StopSignals, terminal_may_go


@dataclass
class Totals:
    """What one optimizer step covers on all ranks: target tokens, rows with anything in them, non-padding tokens."""

    target_tokens: float
    rows: float
    non_padding_tokens: float


@dataclass
class Runtime:
    """The process a stage runs in. Make it with `start_runtime`."""

    device: torch.device
    dtype: torch.dtype
    rank: int = 0
    world_size: int = 1
    deepspeed_config: dict | None = None
    engine: str = "eager"  # what `wrap_model` made of the model, for people to read
    _signals: StopSignals = field(default_factory=StopSignals)
    _fault: Exception | None = None
    _preparation: dist.ProcessGroup | None = None

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @property
    def dtype_name(self) -> str:
        """As --dtype has it: "bfloat16"."""
        return str(self.dtype).removeprefix("torch.")

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)

    def to_device(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: moved(tensor, self.device) for name, tensor in batch.items()}

    def sum(self, value: float | Tensor) -> float:
        """A number summed over all ranks; all ranks must call it."""
        return self.sums(value)[0]

    def sums(self, *values: float | Tensor) -> list[float]:
        """Each of some numbers summed over all ranks; all ranks must call it."""
        tensor = torch.tensor(values, dtype=torch.float64)
        if self.world_size > 1:
            tensor = tensor.to(self.device)  # where the ranks meet; not all devices have float64 (mps)
            dist.all_reduce(tensor)
        return tensor.tolist()

    def totals(self, batches: list[dict[str, Tensor]]) -> Totals:
        """Count a step's micro-batches over all ranks, so that each token of it weighs the same wherever it lies."""
        target_tokens = sum(int(target_mask(batch["labels"]).sum()) for batch in batches)
        rows = sum(int(batch["attention_mask"].any(1).sum()) for batch in batches)
        non_padding_tokens = sum(int(batch["attention_mask"].sum()) for batch in batches)
        return Totals(*self.sums(target_tokens, rows, non_padding_tokens))

    def catch_signals(self) -> None:
        """From now on Ctrl-C and its like let the current step end and be saved; a second Ctrl-C ends at once."""
        self._signals.catch(speak=self.is_main)

    def stop_because(self, error: Exception) -> None:
        """Ask for a stop after this step, as a signal does; once it is saved, `finish` raises the error."""
        self._fault = error

    def stop_requested(self) -> bool:
        """Whether a signal, or `stop_because`, has asked any rank to stop; all ranks must call it."""
        return self.sum(len(self._signals) + (self._fault is not None)) > 0

    def finish(self, finished: bool) -> None:
        """The end of a stage; one that is not `finished`, as it was asked to stop, ends with the signal's exit code, or
        with the error given to `stop_because`."""
        if dist.is_initialized():
            # Once the model is gone. Were DDP's reducer the last to hold a group, it would wait for gloo's threads and
            # keep the GIL meanwhile, for which one of them may be waiting: a run that never ends.
            atexit.register(dist.destroy_process_group)
        if self._fault is not None:
            raise self._fault
        if not finished:
            sys.exit(128 + self._signals.first)

    def gather(self, value) -> list:
        """What each rank has, in their order; all ranks must call it, with anything that can be pickled."""
        if self.world_size == 1:
            return [value]
        values = [None] * self.world_size
        dist.all_gather_object(values, value, group=self._preparation)
        return values

    def first_that_differs(self, value) -> int | None:
        """The first rank that has something else than rank 0; None where all have the same."""
        values = self.gather(value)
        return next((rank for rank, theirs in enumerate(values) if theirs != values[0]), None)

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

    def print(self, text: str) -> None:
        """Print a line, on rank 0."""
        if self.is_main:
            with terminal_may_go():
                print(text, flush=True)


def start_runtime(args) -> Runtime:
    """Set up this process from the training arguments and the launcher's environment; seeds torch.

    Raises:
        UserError: no such device, or another rank's; --deepspeed without a launcher; half a launcher's environment;
            the processes do not find each other.
    """
    place = read_place(os.environ)
    device = pick_device(args.device, place.local_rank or 0)
    if place.world_size > 1 and device.type == "mps":
        raise UserError("--device mps: a Mac's GPU cannot be shared by processes; run without the launcher")
    if place.launched and device.index is not None and torch.accelerator.device_count() > 1:
        if place.local_rank is None and place.world_size > 1:
            raise UserError("LOCAL_RANK, which selects each process's GPU, is not in the environment: torchrun sets it")
        if device.index != (place.local_rank or 0):
            raise UserError(
                f"--device {args.device}: a launcher gives each process its own GPU; omit the flag, and choose GPUs "
                "with CUDA_VISIBLE_DEVICES"
            )
    config = None
    if args.deepspeed:
        if not place.launched:
            raise UserError("--deepspeed needs a launcher: torchrun --nproc_per_node N, or deepspeed --num_gpus N")
        config = deepspeed_config(args)
    runtime = Runtime(device, DTYPES[args.dtype or default_dtype(device)], place.rank, place.world_size, config)
    if place.launched:
        _meet(backend_of(device))
    if place.world_size > 1:
        runtime._preparation = dist.new_group(backend="gloo", timeout=datetime.timedelta(days=2))
    torch.manual_seed(args.seed)
    return runtime


def _meet(backend: str) -> None:
    """Find the other processes of the run."""
    try:
        dist.init_process_group(backend)
    except (RuntimeError, ValueError) as error:
        where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"the processes cannot connect at {where} (MASTER_ADDR, MASTER_PORT; {reason}): is the port "
            "in use, the host name resolvable, and rank 0 running there?"
        ) from error
