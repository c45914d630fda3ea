"""PyTorch's own FSDP2 (`fully_shard`), behind the same lines as plain training: each rank keeps a shard of every
weight, gradient and moment, and gathers a block's weights while it computes with them.

PyTorch FSDP: Zhao et al. 2023, arXiv:2304.11277; it shards as ZeRO's stage 3 does.
"""

import torch
import torch.distributed as dist
from torch import Tensor, nn

from trainer.runtime import Runtime


def shard(model: nn.Module, optimizer, runtime: Runtime) -> tuple[nn.Module, "WholeStateOptimizer"]:
    """Shard a model across the ranks, block by block, and let its optimizer step the shards.

    The embedding, which is also the output matrix, and the last norm belong to the root: gathered once per pass. With
    --offload all the shards, their gradients and moments stay in CPU memory, and the optimizer steps there.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import CPUOffloadPolicy, OffloadPolicy, fully_shard

    names = {parameter: name for name, parameter in model.named_parameters()}
    groups = [[names[parameter] for parameter in group["params"]] for group in optimizer.param_groups]
    mesh = init_device_mesh(runtime.device.type, (runtime.world_size,))
    offload = OffloadPolicy()
    if runtime.offload:
        offload = CPUOffloadPolicy(pin_memory=runtime.device.type == "cuda")
    for block in model.layers:
        fully_shard(block, mesh=mesh, offload_policy=offload)
    fully_shard(model, mesh=mesh, offload_policy=offload)
    shares = dict(model.named_parameters())  # others than before
    for group, members in zip(optimizer.param_groups, groups, strict=True):
        group["params"] = [shares[name] for name in members]
    return model, WholeStateOptimizer(optimizer)


def is_sharded(model: nn.Module) -> bool:
    """Whether the model was sharded by `shard`."""
    return hasattr(model, "set_requires_gradient_sync")


def whole(value: Tensor) -> Tensor:
    """The whole tensor, gathered from the ranks' shards; all ranks must call it."""
    return value.full_tensor() if hasattr(value, "full_tensor") else value


def share_of(value: Tensor, like: Tensor) -> Tensor:
    """This rank's shard of a whole tensor, cut like `like`: along the first dimension, as by torch.chunk."""
    from torch.distributed.tensor import DTensor

    local = like.to_local()
    chunks = value.to(local.device, local.dtype).chunk(dist.get_world_size())
    rank = dist.get_rank()
    mine = chunks[rank] if rank < len(chunks) else value.new_empty(local.shape)
    return DTensor.from_local(
        mine.clone(), like.device_mesh, like.placements, run_check=False, shape=value.shape, stride=value.stride()
    )


class ShardScaler(torch.amp.GradScaler):
    """Replaces the loop's GradScaler where the gradients are sharded.

    `scaler.scale(loss).backward()` is unchanged; `clip_and_step` replaces everything after the backward pass.

    Args:
        grad_clip: the maximum norm of the gradient.
    """

    def __init__(self, model: nn.Module, optimizer: "WholeStateOptimizer", scaler, grad_clip: float):
        super().__init__(next(model.parameters()).device.type, enabled=scaler.is_enabled())
        self.model, self.optimizer, self.grad_clip = model, optimizer, grad_clip

    def clip_and_step(self) -> float:
        """Clip, take the step unless the gradient is not finite, and zero it.

        Returns:
            the gradient's norm before clipping, over all shards.
        """
        self.unscale_(self.optimizer)
        norm = whole(torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.grad_clip))
        if torch.isfinite(norm):
            self.step(self.optimizer)
        self.update()
        self.optimizer.zero_grad(set_to_none=True)
        return norm.item()


class WholeStateOptimizer:
    """AdamW over shards, whose state is loaded and saved whole: any engine can resume what another has saved."""

    def __init__(self, optimizer: torch.optim.AdamW):
        self.optimizer = optimizer

    @property
    def param_groups(self) -> list[dict]:
        return self.optimizer.param_groups

    def step(self) -> None:
        self.optimizer.step()

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.optimizer.zero_grad(set_to_none)

    def state_dict(self) -> dict:
        """The state of a plain AdamW. All ranks must call it."""
        state = self.optimizer.state_dict()
        states = {
            number: {name: whole(value) for name, value in moments.items()}
            for number, moments in sorted(state["state"].items())
        }
        return state | {"state": states}

    def load_state_dict(self, state: dict) -> None:
        """Load a plain AdamW's state, of which each rank keeps its shard."""
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        states = {
            number: {
                name: share_of(value, parameters[number]) if value.dim() else value for name, value in moments.items()
            }
            for number, moments in state["state"].items()
        }
        self.optimizer.load_state_dict(state | {"state": states})


def load_whole(model: nn.Module, weights: dict[str, Tensor]) -> None:
    """Load whole weights, by name, into a sharded model; weights that are not given stay.

    Raises:
        RuntimeError: a weight has another shape.
    """
    for name, parameter in model.named_parameters():
        if name in weights:
            if weights[name].shape != parameter.shape:
                raise RuntimeError(f"{name} is {tuple(weights[name].shape)}, not {tuple(parameter.shape)}")
            with torch.no_grad():
                parameter.copy_(share_of(weights[name], parameter))
