"""DeepSpeed's engine, which shards what an optimizer keeps (ZeRO), behind the same lines as plain training."""

import logging
import os
import warnings
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from trainer.runtime import Runtime

MOMENTS = ("exp_avg", "exp_avg_sq")  # AdamW's state of a parameter, beside its number of steps


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


class ShardedOptimizer:
    """ZeRO's optimizer, whose state is read and written whole, as that of the AdamW that it shards: what one engine
    saved, any other, or none, goes on from.

    Args:
        sharded: DeepSpeed's optimizer, of stage 1, 2 or 3.
        groups: the parameters of each group of the AdamW.
    """

    def __init__(self, sharded, groups: list[list[nn.Parameter]]):
        self.sharded = sharded
        self.groups = groups

    @property
    def param_groups(self) -> list[dict]:
        return self.sharded.param_groups

    def state_dict(self) -> dict:
        """As `torch.optim.AdamW.state_dict` gives it, on the CPU. All ranks must call it."""
        from deepspeed.utils import safe_get_full_optimizer_state

        self._link_states()
        states, groups = {}, []
        for shard, parameters in zip(self._adamw.param_groups, self.groups, strict=True):
            numbers = list(range(len(states), len(states) + len(parameters)))
            groups.append({name: value for name, value in shard.items() if name != "params"} | {"params": numbers})
            taken = [state["step"] for state in map(self._adamw.state.get, shard["params"]) if state]
            for number, parameter in zip(numbers, parameters, strict=True):
                states[number] = {"step": taken[0].clone()} if taken else {}
                for name in MOMENTS if taken else ():
                    states[number][name] = safe_get_full_optimizer_state(parameter, name).cpu()
        return {"state": {number: state for number, state in states.items() if state}, "param_groups": groups}

    def load_state_dict(self, state: dict) -> None:
        """Take over the state of an AdamW of the same parameters. All ranks must call it.

        Each shard holds many parameters and counts one number of steps: the largest of theirs.
        """
        from deepspeed.utils import safe_set_full_optimizer_state

        for shard, saved in zip(self._adamw.param_groups, state["param_groups"], strict=True):
            states = [state["state"][number] for number in saved["params"] if number in state["state"]]
            for flat in shard["params"] if states else ():
                step = max(each["step"] for each in states).clone()
                self._adamw.state[flat] = {"step": step, **{name: torch.zeros_like(flat) for name in MOMENTS}}
        self._link_states()
        for parameters, saved in zip(self.groups, state["param_groups"], strict=True):
            for parameter, number in zip(parameters, saved["params"], strict=True):
                for name in MOMENTS if number in state["state"] else ():
                    value = state["state"][number][name].to(parameter.device)
                    safe_set_full_optimizer_state(parameter, value, name)

    def load_weights(self, weights: dict[nn.Parameter, Tensor]) -> None:
        """Set parameters to `weights`, whole tensors by the engine's parameter: its own and the fp32 copy in shards.

        All ranks must call it.
        """
        import deepspeed
        from deepspeed.utils import safe_set_full_fp32_param

        for parameter, value in weights.items():
            with torch.no_grad(), deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):
                parameter.copy_(value)
            safe_set_full_fp32_param(parameter, value.to(parameter.device, torch.float32))

    def _link_states(self) -> None:
        """Let parameters find their moments in the shards. Stages 1 and 2 link them once, after the step of the first
        group, when the other groups have none yet."""
        link = getattr(self.sharded, "_lazy_init_hp_params_optimizer_state", None)
        if link is not None and self._adamw.state:
            self.sharded._hp_optimizer_states_linked = False
            link()

    @property
    def _adamw(self) -> torch.optim.AdamW:
        return self.sharded.optimizer
