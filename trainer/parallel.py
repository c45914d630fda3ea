"""The loop's model: compiled, and shared with other processes by DDP, DeepSpeed or FSDP2."""

import contextlib
import os
import shutil
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from model.fingerprint import hash_weights
from trainer.device import device_ids
from trainer.errors import UserError
from trainer.runtime import Runtime
from trainer.sharding import ShardScaler, WholeStateOptimizer, is_sharded, load_whole, shard, whole
from trainer.zero import DeepSpeedScaler, ShardedOptimizer, deepspeed_engine

OFFLOADED = {"optimizer": "optimizer state", "all": "weights, gradients and optimizer state"}
COMPILE_PAYS_FROM = 2_000_000  # tokens; compiling takes about as long as a few hundred thousand of them on a CPU


def wrap_model(
    model: nn.Module, optimizer, scaler: torch.amp.GradScaler, runtime: Runtime, compile_blocks: bool
) -> tuple[nn.Module, Optimizer, torch.amp.GradScaler]:
    """Compile the blocks, then wrap the model in DeepSpeed, FSDP2 or DDP if there are several processes.

    Returns:
        the model, the optimizer and the scaler that the loop is to use.

    Raises:
        UserError: the ranks start with different weights.
    """
    require_same_weights(model, runtime)
    if compile_blocks:
        for block in model.layers:  # identical blocks: compiled once, and the state dict keeps its names
            block.compile()
    runtime.engine = "compiled" if compile_blocks else "eager"
    if runtime.deepspeed_config:
        model, optimizer = deepspeed_engine(model, optimizer, runtime)
        scaler = DeepSpeedScaler(model, scaler)
        runtime.engine += f", DeepSpeed ZeRO-{model.zero_optimization_stage()} on {runtime.world_size} processes"
    elif runtime.fsdp_clip is not None:
        model, optimizer = shard(model, optimizer, runtime)
        scaler = ShardScaler(model, optimizer, scaler, runtime.fsdp_clip)
        runtime.engine += f", FSDP2 on {runtime.world_size} processes"
    elif runtime.world_size > 1:
        # Its buffers, weights frozen in 4 bits or biases of experts, are equal everywhere: they need not travel.
        model = DistributedDataParallel(model, device_ids=device_ids(runtime.device), broadcast_buffers=False)
        runtime.engine += f", DDP on {runtime.world_size} processes"
    if runtime.offload:
        runtime.engine += f", {OFFLOADED[runtime.offload]} in CPU memory"
    return model, optimizer, scaler


def sync_gradients(model: nn.Module, last: bool) -> None:
    """Whether the next backward synchronises gradients across ranks: only a step's `last` micro-batch needs to."""
    if isinstance(model, DistributedDataParallel):
        model.require_backward_grad_sync = last
    elif hasattr(model, "set_gradient_accumulation_boundary"):  # DeepSpeed's
        model.set_gradient_accumulation_boundary(last)
    elif is_sharded(model):
        model.set_requires_gradient_sync(last)


def plain_model(model: nn.Module) -> nn.Module:
    """The model inside the wrapper of DDP or DeepSpeed; FSDP2 has none."""
    return getattr(model, "module", model)


def full_state_dict(model: nn.Module, runtime: Runtime, keep: Callable[[str], bool]) -> dict[str, Tensor]:
    """Each parameter that `keep` selects, whole, fp32, on its device, under its plain name; a shared tensor is kept
    once.

    All ranks must call it: ZeRO-3 and FSDP2 gather.
    """
    plain, held, found = plain_model(model), {}, {}
    with _gathered(plain, runtime):
        for key, value in plain.state_dict(keep_vars=True).items():
            if keep(key):
                # by identity: a tensor of which FSDP2 leaves this rank nothing has no address
                if id(value) not in held:
                    full = whole(value.detach()).float()
                    held[id(value)] = full.clone() if runtime.deepspeed_config else full  # gathered: freed again
                found[key] = held[id(value)]
    return found


def load_full_state_dict(model: nn.Module, optimizer, weights: dict[str, Tensor], keep: Callable[[str], bool]) -> None:
    """Load the result of `full_state_dict`; parameters that `keep` does not select stay. All ranks must call it.

    Raises:
        RuntimeError: a parameter is missing, or has another shape.
    """
    plain = plain_model(model)
    if isinstance(optimizer, ShardedOptimizer):
        optimizer.load_weights({p: weights[key] for key, p in plain.named_parameters() if keep(key)})
        return
    if isinstance(optimizer, WholeStateOptimizer):
        load_whole(model, {key: weights[key] for key, _ in plain.named_parameters() if keep(key)})
        return
    given = {key: value for key, value in plain.state_dict().items() if not keep(key)}
    plain.load_state_dict(given | weights)


def require_same_weights(model: nn.Module, runtime: Runtime) -> None:
    """Check that all ranks start with equal weights, which a joint step would mix; all ranks must call it.

    Raises:
        UserError: a rank's weights differ from rank 0's.
    """
    plain = plain_model(model)
    parted = any(hasattr(parameter, "ds_numel") for parameter in plain.parameters())  # ZeRO-3: each has a share
    if runtime.world_size == 1 or parted or is_sharded(model):
        return
    rank = runtime.first_that_differs(hash_weights(plain.state_dict()))
    if rank is not None:
        raise UserError(
            f"rank {rank} has different weights from rank 0: give all machines the same files, ideally a shared "
            "--out_dir"
        )


def _gathered(plain: nn.Module, runtime: Runtime) -> contextlib.AbstractContextManager:
    if not runtime.deepspeed_config:
        return contextlib.nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters(list(plain.parameters()))


# ------------------------------------------------------------------------------------------------------- compiling


def should_compile(args, runtime: Runtime, steps: int) -> bool:
    """Whether to use torch.compile: as --compile says, else if it works and the run is long enough for it to pay off
    (unpacked rows vary in length, and each length would be compiled; the hooks of ZeRO-3 and FSDP2 cause repeated
    compilation).

    Raises:
        UserError: --compile was given but does not work here.
    """
    if args.compile is None:
        tokens = steps * args.batch_size * args.accumulation_steps * args.max_seq_len
        zero = (runtime.deepspeed_config or {}).get("zero_optimization", {})
        hooked = zero.get("stage") == 3 or runtime.fsdp_clip is not None
        pays = args.packing and tokens >= COMPILE_PAYS_FROM and not hooked
        prototype = runtime.device.type == "mps"  # by PyTorch's own word
        return pays and not prototype and why_not_compile(runtime.device) is None
    if args.compile and (why_not := why_not_compile(runtime.device)):
        raise UserError(f"--compile does not work here ({why_not}): leave it out")
    return args.compile


def why_not_compile(device: torch.device) -> str | None:
    """The reason why torch.compile does not work on this machine; None if it works."""
    compilers = ("g++", "clang++", "cl")  # the last on Windows
    if device.type == "cpu" and not (os.environ.get("CXX") or any(map(shutil.which, compilers))):
        return "no C++ compiler found"
    try:
        torch.compile(lambda x: x.sin() + 1)(torch.ones(64, device=device))
    except Exception as error:  # no headers, no write access, an unknown chip: whatever it is, eager mode works
        return f"{type(error).__name__}: {str(error).strip().splitlines()[0][:200]}"
    return None
