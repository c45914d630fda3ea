"""The device of the computation: the CPU, or the accelerator that PyTorch finds (cuda, also for ROCm; mps; xpu; …),
and what differs between them.

The code runs on PyTorch 2.6 and newer. What later versions brought or renamed is looked up here by name.
"""

import inspect
from types import ModuleType

import torch
import torch.distributed as dist
from torch import Tensor

from trainer.errors import UserError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def pick_device(name: str | None, local_rank: int = 0) -> torch.device:
    """The requested device, or this rank's accelerator, or the CPU. An accelerator becomes the current device, with
    settings for rows of any length.

    Raises:
        UserError: it does not exist.
    """
    there = _accelerator()
    if name is None:
        name = there.type if there else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"--device {name}: use cpu, cuda, cuda:N, mps, xpu or similar") from None
    if device.type == "cpu":
        return device
    if there is None:
        raise UserError(f"--device {name}: PyTorch sees no accelerator here; use --device cpu")
    if device.type != there.type:
        raise UserError(f"--device {name}: PyTorch sees {there.type} here; use --device {there.type} or cpu")
    if device.index is None:
        device = torch.device(device.type, local_rank)
    count = torch.accelerator.device_count()
    if device.index >= count:
        raise UserError(f"{device} does not exist: there are {count} {device.type} devices, counted from 0")
    accelerator = torch.accelerator
    set_index = "set_device_index" if hasattr(accelerator, "set_device_index") else "set_device_idx"  # of PyTorch 2.6
    getattr(accelerator, set_index)(device)
    if device.type == "cuda":
        # On Hopper and Blackwell PyTorch asks cuDNN first, which takes a second to plan for each new length, forward
        # and backward: at every token written, and every unpacked row (measured by benchmarks/, an H200, torch 2.11).
        torch.backends.cuda.enable_cudnn_sdp(False)
    return device


def default_dtype(device: torch.device) -> str:
    """The fastest dtype to train in: bfloat16 if the hardware supports it, which needs no loss scaling."""
    if device.type == "cuda":
        return "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float16"
    if device.type == "cpu":
        able = getattr(torch.cpu, "get_capabilities", dict)()  # bf16: what ARM calls it
        return "bfloat16" if any(able.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16")) else "float32"
    return "float32"  # the most exact, on devices that have not been measured


def _accelerator() -> torch.device | None:
    """The machine's accelerator; None if there is none or it does not work."""
    current = torch.accelerator.current_accelerator
    if "check_available" in inspect.signature(current).parameters:  # from PyTorch 2.7 on
        return current(check_available=True)
    return current() if torch.accelerator.is_available() else None


def backend_of(device: torch.device) -> str:
    """The backend for ranks on such devices: nccl for cuda, gloo for the CPU."""
    if hasattr(dist, "get_default_backend_for_device"):
        return dist.get_default_backend_for_device(device)
    return "nccl" if device.type == "cuda" else "gloo"


def device_ids(device: torch.device) -> list[int] | None:
    """This rank's accelerator as `DistributedDataParallel` and `barrier` want it; None for the CPU, which all share."""
    return None if device.type == "cpu" else [device.index]


def random_state(device: torch.device) -> dict[str, Tensor]:
    """The state of the CPU's random generator, and of the device's own where it has one, by device type."""
    state = {"cpu": torch.get_rng_state()}
    if device.type != "cpu":
        state[device.type] = _module(device).get_rng_state(device)
    return state


def set_random_state(device: torch.device, state: dict[str, Tensor]) -> None:
    """Restore a `random_state`; states of other types of devices in it are ignored."""
    torch.set_rng_state(state["cpu"])
    if device.type != "cpu" and device.type in state:
        _module(device).set_rng_state(state[device.type], device)


def moved(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor on the device. Only CUDA copies without waiting, as it has read pageable memory when the call returns;
    other devices may read it after it has been freed (mps: pytorch/pytorch#189690)."""
    return tensor.to(device, non_blocking=device.type == "cuda")


def _module(device: torch.device) -> ModuleType:
    """`torch.cuda`, `torch.mps`, …"""
    return torch.get_device_module(device)
