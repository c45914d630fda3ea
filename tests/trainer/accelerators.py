"""Simulated accelerators, which PyTorch is made to see."""

import types

import torch


def pretend(monkeypatch, kind: str, count: int) -> list[int]:
    """Let PyTorch see `count` devices of a kind; the list records each index that became the current device."""
    current: list[int] = []
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available: torch.device(kind))
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: count)
    monkeypatch.setattr(
        torch.accelerator, "set_device_index", lambda device: current.append(getattr(device, "index", device))
    )
    return current


def pretend_random(monkeypatch) -> dict[torch.device, torch.Tensor]:
    """Give every accelerator a random generator; the dict contains their states."""
    states: dict[torch.device, torch.Tensor] = {}
    module = types.SimpleNamespace(
        get_rng_state=lambda device: states.get(device, torch.tensor([7], dtype=torch.uint8)),
        set_rng_state=lambda state, device: states.update({device: state}),
    )
    monkeypatch.setattr(torch, "get_device_module", lambda device: module)
    return states


class OnMac(torch.Tensor):
    """A tensor that claims to be on a Mac's GPU, and like one there refuses float64."""

    @property
    def device(self) -> torch.device:
        return torch.device("mps")

    def double(self):
        raise TypeError("the MPS framework doesn't support float64")

    def to(self, where, **how):
        return self.as_subclass(torch.Tensor if torch.device(where).type == "cpu" else OnMac)
