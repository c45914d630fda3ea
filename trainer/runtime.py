"""A stage's runtime: device, precision, the processes that share a step, and signals."""

import atexit
import contextlib
import datetime
import math
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor

from model.loss import target_mask
from trainer.device import DTYPES, backend_of, default_dtype, moved, pick_device
from trainer.engine_settings import deepspeed_config
from trainer.errors import UserError
from trainer.launcher import read_place
from trainer.signals import Signals, terminal_may_go
from trainer.watchdog import Watchdog

EXIT_TIME_IS_UP = 75  # sysexits.h: a temporary failure, try again


@dataclass
class Totals:
    """The size of one optimizer step on all ranks: target tokens, non-empty rows, non-padding tokens."""

    target_tokens: float
    rows: float
    non_padding_tokens: float


class Clock:
    """The times of --stop_after and --save_minutes, in seconds from now; None: never."""

    def __init__(self, stop_after: float | None = None, save_every: float | None = None):
        self._stop_at = time.monotonic() + stop_after if stop_after else math.inf
        self._save_every = save_every or math.inf
        self._save_at = time.monotonic() + self._save_every

    def is_over(self) -> bool:
        return time.monotonic() >= self._stop_at

    def is_save_due(self) -> bool:
        """Whether it is time to save; from then on the next interval counts."""
        now = time.monotonic()
        if now < self._save_at:
            return False
        self._save_at = now + self._save_every
        return True


@dataclass
class Runtime:
    """The process a stage runs in. Make it with `start_runtime`."""

    device: torch.device
    dtype: torch.dtype
    rank: int = 0
    world_size: int = 1
    deepspeed_config: dict | None = None
    fsdp_clip: float | None = None  # with --fsdp, whose engine clips the gradient: at this norm
    offload: str | None = None  # what the engine keeps in CPU memory: --offload
    engine: str = "eager"  # what `wrap_model` made of the model, for people to read
    _signals: Signals = field(default_factory=Signals)
    _clock: Clock = field(default_factory=Clock)
    _watchdog: Watchdog | None = None
    _signalled: bool = False  # whether a signal has asked any rank to stop
    _fault: Exception | None = None
    _preparation: dist.ProcessGroup | None = None

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @property
    def dtype_name(self) -> str:
        """The dtype as in --dtype: "bfloat16"."""
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

    @property
    def sharded(self) -> bool:
        """Whether DeepSpeed or FSDP2 shards the model and its optimizer; their engine then takes the steps."""
        return self.deepspeed_config is not None or self.fsdp_clip is not None

    def totals(self, batches: list[dict[str, Tensor]]) -> Totals:
        """Count a step's micro-batches over all ranks, so that each of its tokens has the same weight."""
        target_tokens = sum(int(target_mask(batch["labels"]).sum()) for batch in batches)
        rows = sum(int(batch["attention_mask"].any(1).sum()) for batch in batches)
        non_padding_tokens = sum(int(batch["attention_mask"].sum()) for batch in batches)
        return Totals(*self.sums(target_tokens, rows, non_padding_tokens))

    def start_loop(self) -> None:
        """From now on Ctrl-C and similar signals let the current step end and be saved, a second Ctrl-C ends at once,
        and the watchdog checks that the ranks take their steps."""
        self._signals.catch(speak=self.is_main)
        if self._watchdog is not None:
            self._watchdog.start()

    def stop_because(self, error: Exception) -> None:
        """Ask for a stop after this step, as a signal does; once it is saved, `finish` raises the error."""
        self._fault = error

    def requests(self) -> tuple[bool, bool]:
        """Whether any rank has been asked to stop after this step, and whether to save it, as also by --stop_after,
        --save_minutes and `stop_because`; all ranks must call it, once per step."""
        if self._watchdog is not None:
            self._watchdog.count_step()
        late, due = self._clock.is_over(), self._clock.is_save_due()  # of each rank's own clock: rank 0's counts
        signalled, late, save = self.sums(
            self._signals.stop_asked or self._fault is not None,
            self.is_main and late,
            self._signals.take_save_asked() or (self.is_main and due),
        )
        self._signalled = signalled > 0
        return signalled + late > 0, signalled + late + save > 0

    def finish(self, finished: bool) -> None:
        """End the stage. A run that was asked to stop before it was `finished` exits with the signal's exit code, with
        `EXIT_TIME_IS_UP`, or with the error passed to `stop_because`. All ranks must call it: they wait until rank 0
        has written everything."""
        if self._watchdog is not None:
            self._watchdog.stop()
        # They meet here: once a rank has ended with an error code, torchrun kills the others. That SIGTERM nobody asked
        # for, so the code is of a signal that has come to any rank by now.
        came = [first for first in self.gather(self._signals.first) if first is not None]
        if dist.is_initialized():
            # Once the model is gone. Were DDP's reducer the last to hold a group, it would wait for gloo's threads and
            # keep the GIL meanwhile, for which one of them may be waiting: a run that never ends.
            atexit.register(dist.destroy_process_group)
        if self._fault is not None:
            raise self._fault
        if not finished:
            sys.exit(128 + came[0] if came and self._signalled else EXIT_TIME_IS_UP)

    def gather(self, value) -> list:
        """The values of all ranks, by rank; all ranks must call it, with a value that can be pickled."""
        if self.world_size == 1:
            return [value]
        values = [None] * self.world_size
        dist.all_gather_object(values, value, group=self._preparation)
        return values

    def first_that_differs(self, value) -> int | None:
        """The first rank whose value differs from rank 0's; None if all are equal."""
        values = self.gather(value)
        return next((rank for rank, theirs in enumerate(values) if theirs != values[0]), None)

    @contextlib.contextmanager
    def main_first(self) -> Iterator[None]:
        """Let rank 0 do the work first (read, tokenise, write a cache), then the other ranks, which find it done."""
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
        """Print a line on rank 0."""
        if self.is_main:
            with terminal_may_go():
                print(text, flush=True)


def start_runtime(args) -> Runtime:
    """Set up this process from the training arguments and the launcher's environment; seeds torch.

    Raises:
        UserError: the device does not exist or is another rank's; --deepspeed without a launcher; an incomplete
            launcher's environment; the processes cannot connect to each other.
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
    runtime.offload = args.offload
    if getattr(args, "fsdp", False):
        if place.world_size == 1:
            raise UserError("--fsdp shards a model across processes: start them with torchrun --nproc_per_node N")
        if device.type == "cpu" and not hasattr(torch.cpu.current_stream(), "record_event"):  # PyTorch 2.6
            raise UserError(f"--fsdp on a CPU needs a newer PyTorch than {torch.__version__}")
        runtime.fsdp_clip = args.grad_clip
    if place.launched:
        backend = backend_of(device)
        if args.offload and device.type != "cpu":  # what is offloaded is summed where it lies
            backend = f"cpu:gloo,{device.type}:{backend}"
        _meet(backend)
    if place.world_size > 1:
        runtime._preparation = dist.new_group(backend="gloo", timeout=datetime.timedelta(days=2))
    runtime._clock = Clock(args.stop_after * 60, args.save_minutes * 60)
    runtime._watchdog = Watchdog(place.rank, place.world_size, args.stall_timeout)
    torch.manual_seed(args.seed)
    return runtime


def _meet(backend: str) -> None:
    """Connect to the other processes of the run."""
    try:
        dist.init_process_group(backend)
    except (RuntimeError, ValueError) as error:
        where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"the processes cannot connect at {where} (MASTER_ADDR, MASTER_PORT; {reason}): is the port "
            "in use, the host name resolvable, and rank 0 running there?"
        ) from error
