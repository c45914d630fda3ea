"""A copy of a run's tensors in memory, to be written to disk while training continues."""

import threading
from collections.abc import Callable

import torch
from torch import Tensor


class Snapshot:
    """Copies tensors into its own CPU memory, which the next copy reuses: touching new memory takes longer than
    copying."""

    def __init__(self):
        self._kept: dict[tuple, Tensor] = {}
        self._copied: dict[tuple, Tensor] = {}

    def copy(self, value):
        """A copy of a tensor, or of dicts and lists with tensors in them; tensors that share all their memory share it
        in the copy, too. The copy is valid until the next call."""
        self._copied = {}
        try:
            return self._copy(value, ())
        finally:
            if torch.accelerator.is_available():
                torch.accelerator.synchronize()  # copies from there do not wait
            self._copied = {}

    def _copy(self, value, place: tuple):
        if isinstance(value, Tensor):
            return self._copy_tensor(value.detach(), place)
        if isinstance(value, dict):
            return {key: self._copy(item, (*place, key)) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return type(value)(self._copy(item, (*place, i)) for i, item in enumerate(value))
        return value

    def _copy_tensor(self, tensor: Tensor, place: tuple) -> Tensor:
        identity = (tensor.device, tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype)
        if tensor.numel() and identity in self._copied:
            return self._copied[identity]
        kept = self._kept.get(place)
        if kept is None or kept.shape != tensor.shape or kept.dtype != tensor.dtype:
            pin = tensor.device.type == "cuda"  # what a GPU copies to without a detour
            kept = self._kept[place] = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=pin)
        self._copied[identity] = kept.copy_(tensor, non_blocking=tensor.device.type == "cuda")
        return kept


class Background:
    """Runs one task at a time in a non-daemon thread: Python waits for it before it exits."""

    NAME = "checkpoint"  # of the thread

    def __init__(self):
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def start(self, work: Callable[[], None]) -> None:
        """Begin `work` once the previous task has ended; raises that task's error, as `wait` does."""
        self.wait()

        def run() -> None:
            try:
                work()
            except BaseException as error:
                self._error = error

        self._thread = threading.Thread(target=run, name=self.NAME)
        self._thread.start()

    def wait(self) -> None:
        """Wait for the last task; raises its error, once."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        error, self._error = self._error, None
        if error is not None:
            raise error
