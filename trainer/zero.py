"""DeepSpeed's engine, which shards the optimizer's state (ZeRO), behind the same lines as plain training."""

import logging
import os
import warnings
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from trainer.runtime import Runtime

MOMENTS = ("exp_avg", "exp_avg_sq")  # AdamW's state of a parameter, besides its step count


def deepspeed_engine(model: nn.Module, optimizer, runtime: Runtime):
    if runtime.device.type == "cpu":
        os.environ["DS_ACCELERATOR"] = "cpu"  # before the import, which looks for one
    import deepspeed

    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    # Its collectives are deprecated in PyTorch 2.13, which tells so at every step: once will do.
    warnings.filterwarnings("once", category=FutureWarning, module="torch.distributed")
    # On a CPU it would now compile C++ collectives, which take a compiler and minutes; gloo's do as well.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    model.forward = runtime.autocast()(model.forward)  # around the engine it would be switched off again
    groups = [list(group["params"]) for group in optimizer.param_groups]  # what ZeRO replaces by its flat shards
    engine, optimizer, _, _ = deepspeed.initialize(
        model=model, optimizer=optimizer, config=runtime.deepspeed_config, dist_init_required=False
    )
    if engine.zero_optimization_stage() > 0:
        optimizer = ShardedOptimizer(optimizer, groups)
    return engine, optimizer


class DeepSpeedScaler(torch.amp.GradScaler):
    """Replaces the loop's GradScaler where a DeepSpeed engine holds the gradients.

    `scaler.scale(loss).backward()` is unchanged; `clip_and_step` replaces everything after the backward pass.

    Args:
        scaler: the GradScaler that it replaces, enabled or not.
    """

    def __init__(self, engine, scaler: torch.amp.GradScaler):
        super().__init__(engine.device.type, enabled=scaler.is_enabled())
        self.engine = engine
        self.is_zero = engine.zero_optimization_stage() > 0
        self._steps_since_change = 0  # GradScaler's growth tracker, which has not seen ZeRO's gradients

    def state_dict(self) -> dict:
        state = super().state_dict()
        return state | {"_growth_tracker": self._steps_since_change} if state and self.is_zero else state

    def load_state_dict(self, state: dict) -> None:
        super().load_state_dict(state)
        self._steps_since_change = state.get("_growth_tracker", 0)

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
        """Clip and step without ZeRO, where the engine neither reports the norm nor skips a non-finite step."""
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
            self._steps_since_change += 1
            if norm == float("inf"):
                scale *= self.get_backoff_factor()
                self._steps_since_change = 0
            elif self._steps_since_change == self.get_growth_interval():
                scale *= self.get_growth_factor()
                self._steps_since_change = 0
            super().scale(torch.zeros((), device=self.engine.device))  # it keeps no scale before its first use
            self.update(scale)
        return norm


@dataclass
class _EngineLoss:
    engine: object
    loss: Tensor

    def backward(self) -> None:
        self.engine.backward(self.loss)


class ShardedOptimizer:
    """ZeRO's optimizer, whose state is loaded and saved whole, like that of the AdamW that it shards: any engine, or
    plain training, can resume what another has saved.

    Args:
        sharded: DeepSpeed's optimizer, of stage 1, 2 or 3.
        groups: AdamW's parameters, by group.
    """

    def __init__(self, sharded, groups: list[list[nn.Parameter]]):
        self.sharded = sharded
        self.groups = groups

    @property
    def param_groups(self) -> list[dict]:
        return self.sharded.param_groups

    def state_dict(self) -> dict:
        """The state in the form of `torch.optim.AdamW.state_dict`, on the CPU. All ranks must call it."""
        from deepspeed.utils import safe_get_full_optimizer_state

        self._link_states()
        states, groups, number = {}, [], 0
        for group, parameters, shards in zip(self.param_groups, self.groups, self._shards(), strict=True):
            numbers = list(range(number, number + len(parameters)))
            number += len(parameters)
            groups.append({name: value for name, value in group.items() if name != "params"} | {"params": numbers})
            steps = [self._adamw.state[shard]["step"] for shard in shards if self._adamw.state.get(shard)]
            if not steps:
                continue
            for mine, parameter in zip(numbers, parameters, strict=True):
                moments = {name: safe_get_full_optimizer_state(parameter, name).cpu() for name in MOMENTS}
                states[mine] = {"step": steps[0].clone(), **moments}
        return {"state": states, "param_groups": groups}

    def load_state_dict(self, state: dict) -> None:
        """Load the state of an AdamW with the same parameters. All ranks must call it.

        A shard contains many parameters but has one step count: the largest of theirs.
        """
        for group, parameters, shards, saved in zip(
            self.param_groups, self.groups, self._shards(), state["param_groups"], strict=True
        ):
            states = [state["state"].get(number) for number in saved["params"]]
            if not any(states):
                continue
            step = max(each["step"] for each in states if each)
            for shard in shards:
                moments = {name: torch.zeros_like(shard) for name in MOMENTS}
                # the fused kernel reads the count on the device, the others on the CPU
                count = step.to(shard.device, copy=True) if group.get("fused") else step.clone()
                self._adamw.state[shard] = {"step": count, **moments}
            self._link_states()
            for parameter, each in zip(parameters, states, strict=True):
                for name in MOMENTS if each else ():
                    self._set(parameter, each[name], name)

    def load_weights(self, weights: dict[nn.Parameter, Tensor]) -> None:
        """Set parameters, given as whole tensors: the engine's own, and the fp32 copies in the shards.

        All ranks must call it.
        """
        import deepspeed

        for parameter, value in weights.items():
            with torch.no_grad(), deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):
                parameter.copy_(value)
            self._set(parameter, value.float(), None)

    def _set(self, parameter: nn.Parameter, value: Tensor, name: str | None) -> None:
        """Write a parameter's value into the shards: into the moment `name`, or the weights if it is None."""
        from deepspeed.utils import (
            safe_set_full_fp32_param,
            safe_set_full_optimizer_state,
            safe_set_local_fp32_param,
            safe_set_local_optimizer_state,
        )

        value = value.to(parameter.device)
        if self._stage_3:
            width = parameter.ds_tensor.ds_numel  # of this rank's part; the last one is filled up
            parts = torch.nn.functional.pad(value.flatten(), (0, width * dist.get_world_size() - value.numel()))
            value = parts[dist.get_rank() * width :][:width]
        if name is None:
            (safe_set_local_fp32_param if self._stage_3 else safe_set_full_fp32_param)(parameter, value)
        else:
            (safe_set_local_optimizer_state if self._stage_3 else safe_set_full_optimizer_state)(parameter, value, name)

    @property
    def _stage_3(self) -> bool:
        return hasattr(self.sharded, "fp32_partitioned_groups_flat")

    @property
    def _adamw(self) -> torch.optim.AdamW:
        return self.sharded.optimizer

    def _shards(self) -> list[list[Tensor]]:
        """The flat fp32 tensors that AdamW updates, by parameter group."""
        if not self._stage_3:
            return [[shard] for shard in self.sharded.single_partition_of_fp32_groups]
        flat, group_of = self.sharded.fp32_partitioned_groups_flat, self.sharded.sub_group_to_group_id
        return [[shard for i, shard in enumerate(flat) if group_of[i] == group] for group in range(len(self.groups))]

    def _link_states(self) -> None:
        """Link the parameters to their moments in the shards again. Stages 1 and 2 link them only once, after the first
        group's step, when the other groups have no moments yet."""
        if not self._stage_3 and self._adamw.state:
            self.sharded._hp_optimizer_states_linked = False
            self.sharded._lazy_init_hp_params_optimizer_state()
