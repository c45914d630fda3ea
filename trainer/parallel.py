"""What the loop calls as its model: compiled, and shared with other processes by DDP or DeepSpeed."""

import contextlib
import logging
import os
import shutil
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from model.fingerprint import hash_weights
from trainer.device import index_of
from trainer.errors import UserError
from trainer.runtime import Runtime

COMPILE_PAYS_FROM = 2_000_000  # tokens; compiling takes about as long as a few hundred thousand of them on a CPU


def wrap_model(
    model: nn.Module, optimizer, scaler: torch.amp.GradScaler, runtime: Runtime, compile_blocks: bool
) -> tuple[nn.Module, Optimizer, torch.amp.GradScaler]:
    """Compile the blocks, then hand the model to DeepSpeed or DDP where there are several processes.

    Returns:
        the model, the optimizer and the scaler that the loop is to use.

    Raises:
        UserError: the ranks begin with different weights.
    """
    require_same_weights(model, runtime)
    if compile_blocks:
        for block in model.layers:  # all alike: compiled once, and the state dict keeps its names
            block.compile()
    runtime.engine = "compiled" if compile_blocks else "eager"
    if runtime.deepspeed_config:
        model, optimizer = _deepspeed_engine(model, optimizer, runtime)
        scaler = DeepSpeedScaler(model, scaler)
        runtime.engine += f", DeepSpeed ZeRO-{model.zero_optimization_stage()} on {runtime.world_size} processes"
    elif runtime.world_size > 1:
        model = DistributedDataParallel(model, device_ids=index_of(runtime.device))
        runtime.engine += f", DDP on {runtime.world_size} processes"
    return model, optimizer, scaler


def sync_gradients(model: nn.Module, last: bool) -> None:
    """Let the next backward add up the ranks' gradients, or not: only that of a step's `last` micro-batch has to."""
    if isinstance(model, DistributedDataParallel):
        model.require_backward_grad_sync = last
    elif hasattr(model, "set_gradient_accumulation_boundary"):  # DeepSpeed's
        model.set_gradient_accumulation_boundary(last)


def plain_model(model: nn.Module) -> nn.Module:
    """The model inside DDP's or DeepSpeed's wrapper."""
    return getattr(model, "module", model)


def full_state_dict(model: nn.Module, runtime: Runtime, keep: Callable[[str], bool]) -> dict[str, Tensor]:
    """Each parameter that `keep` names, whole, fp32, on the CPU, under its plain name; one with two names is held once.

    All ranks must call it: ZeRO-3 gathers.
    """
    plain, copies, whole = plain_model(model), {}, {}
    with _gathered(plain, runtime):
        for key, value in plain.state_dict().items():
            if keep(key):
                place = (value.data_ptr(), value.shape)
                if place not in copies:
                    copies[place] = value.detach().float().cpu().clone()
                whole[key] = copies[place]
    return whole


def require_same_weights(model: nn.Module, runtime: Runtime) -> None:
    """All ranks must call it, before a step is taken together: it would mix what they have.

    Raises:
        UserError: a rank has other weights than rank 0.
    """
    plain = plain_model(model)
    parted = any(hasattr(parameter, "ds_numel") for parameter in plain.parameters())  # ZeRO-3: each has a share
    if runtime.world_size == 1 or parted:
        return
    rank = runtime.first_that_differs(hash_weights(plain.state_dict()))
    if rank is not None:
        raise UserError(
            f"rank {rank} has other weights than rank 0: give all machines the same files, best one --out_dir that "
            "they share"
        )


def _gathered(plain: nn.Module, runtime: Runtime) -> contextlib.AbstractContextManager:
    if not runtime.deepspeed_config:
        return contextlib.nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters(list(plain.parameters()))


# ------------------------------------------------------------------------------------------------------- compiling


def should_compile(args, runtime: Runtime, steps: int) -> bool:
    """Whether to use torch.compile: as --compile says, else where it works and the run is long enough to earn it back
    (unpacked rows have all lengths, and each would be compiled anew; ZeRO-3's hooks compile over and over).

    Raises:
        UserError: --compile was asked for and does not work here.
    """
    if args.compile is None:
        tokens = steps * args.batch_size * args.accumulation_steps * args.max_seq_len
        zero = (runtime.deepspeed_config or {}).get("zero_optimization", {})
        pays = args.packing and tokens >= COMPILE_PAYS_FROM and zero.get("stage") != 3
        prototype = runtime.device.type == "mps"  # by PyTorch's own word
        return pays and not prototype and why_not_compile(runtime.device) is None
    if args.compile and (why_not := why_not_compile(runtime.device)):
        raise UserError(f"--compile does not work here ({why_not}): leave it out")
    return args.compile


def why_not_compile(device: torch.device) -> str | None:
    """What keeps torch.compile from working on this machine; None where it works."""
    compilers = ("g++", "clang++", "cl")  # the last on Windows
    if device.type == "cpu" and not (os.environ.get("CXX") or any(map(shutil.which, compilers))):
        return "there is no C++ compiler"
    try:
        torch.compile(lambda x: x.sin() + 1)(torch.ones(64, device=device))
    except Exception as error:  # no headers, no write access, an unknown chip: whatever it is, eager mode works
        return f"{type(error).__name__}: {str(error).strip().splitlines()[0][:200]}"
    return None


# ------------------------------------------------------------------------------------------------------- DeepSpeed


def _deepspeed_engine(model: nn.Module, optimizer, runtime: Runtime):
    if runtime.device.type == "cpu":
        os.environ["DS_ACCELERATOR"] = "cpu"  # before the import, which looks for one
    import deepspeed

    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    # Its collectives are deprecated in PyTorch 2.13, which tells so at every step: once will do.
    warnings.filterwarnings("once", category=FutureWarning, module="torch.distributed")
    # On a CPU it would now compile C++ collectives, which take a compiler and minutes; gloo's do as well.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    model.forward = runtime.autocast()(model.forward)  # around the engine it would be switched off again
    engine, optimizer, _, _ = deepspeed.initialize(
        model=model, optimizer=optimizer, config=runtime.deepspeed_config, dist_init_required=False
    )
    return engine, optimizer


class DeepSpeedScaler(torch.amp.GradScaler):
    """What the loop calls as its GradScaler where a DeepSpeed engine holds the gradients.

    `scaler.scale(loss).backward()` is as ever; all that follows a backward is `clip_and_step`.

    Args:
        scaler: the one that it replaces, switched on or off alike.
    """

    def __init__(self, engine, scaler: torch.amp.GradScaler):
        super().__init__(engine.device.type, enabled=scaler.is_enabled())
        self.engine = engine
        self.is_zero = engine.zero_optimization_stage() > 0

    def scale(self, loss: Tensor) -> "_EngineLoss":
        if not self.is_zero:
            return _EngineLoss(self.engine, super().scale(loss))
        if self.is_enabled():  # ZeRO scales and unscales by itself, and has to be told the scale
            self.engine.optimizer.override_loss_scale(self.get_scale())
        return _EngineLoss(self.engine, loss)

    def clip_and_step(self) -> float:
        """Clip, take the step unless the gradient is not finite, and zero it.

        Returns:
            the gradient's norm before clipping, not finite when the step was skipped.
        """
        return self._step_by_zero() if self.is_zero else self._step_by_hand()

    def _step_by_hand(self) -> float:
        """Without ZeRO the engine clips but does not say the norm, nor skip anything."""
        self.unscale_(self.engine.optimizer)
        norm = torch.nn.utils.clip_grad_norm_(self.engine.module.parameters(), self.engine.gradient_clipping())
        if torch.isfinite(norm):
            self.engine.step()
        else:
            self.engine.zero_grad()
        self.update()
        return float(norm)

    def _step_by_zero(self) -> float:
        self.engine.step()
        norm = float(self.engine.get_global_grad_norm())
        if self.is_enabled():  # GradScaler's rule, by hand, as it has not seen the gradients
            scale = self.get_scale()
            if norm == float("inf"):
                scale *= self.get_backoff_factor()
            elif self.engine.global_steps % self.get_growth_interval() == 0:
                scale *= self.get_growth_factor()
            super().scale(torch.zeros((), device=self.engine.device))  # it keeps no scale before its first use
            self.update(scale)
        return norm


@dataclass
class _EngineLoss:
    engine: object
    loss: Tensor

    def backward(self) -> None:
        self.engine.backward(self.loss)
