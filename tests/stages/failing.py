"""Makes every evaluation of a training script fail, in a test or on the second of two ranks.

failing.py train_pretrain.py …
"""

import contextlib
import os
import runpy
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch.nn.modules.module import register_module_forward_pre_hook

from model import MiniMindLM


@contextlib.contextmanager
def before_forward(do: Callable[[MiniMindLM], None]) -> Iterator[None]:
    """Call `do` with the model at the start of each forward pass of the student; the teacher is wider."""

    def hook(module, _):
        if isinstance(module, MiniMindLM) and module.config.dim == 32:
            do(module)

    handle = register_module_forward_pre_hook(hook)
    try:
        yield
    finally:
        handle.remove()


@contextlib.contextmanager
def failing_evaluation(error: BaseException) -> Iterator[None]:
    """Raise `error` in forward passes without gradients once training has begun."""
    begun = []

    def strike(_) -> None:
        if torch.is_grad_enabled():
            begun.append(True)
        elif begun:
            raise error

    with before_forward(strike):
        yield


if __name__ == "__main__":
    script = str(Path(__file__).parents[2] / sys.argv[1])
    sys.argv = [script, *sys.argv[2:]]
    sys.path[0] = str(Path(script).parent)
    failing = failing_evaluation(RuntimeError("of rank 1")) if os.environ["RANK"] == "1" else contextlib.nullcontext()
    with failing:
        runpy.run_path(script, run_name="__main__")
