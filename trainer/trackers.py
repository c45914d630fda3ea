"""Experiment trackers: Weights & Biases, SwanLab, TensorBoard. Imported only when asked for."""

from pathlib import Path
from typing import Protocol

from trainer.errors import UserError, shown

TRACKERS = ("wandb", "swanlab", "tensorboard")
WITHOUT_ACCOUNT = {"wandb": "WANDB_MODE=offline", "swanlab": "SWANLAB_MODE=offline"}


class Tracker(Protocol):
    """The interface of a started tracker."""

    def log(self, values: dict[str, float | None], step: int) -> None:
        """Report the values of an optimizer step; None stands for one that was not finite."""

    def finish(self) -> None:
        """Write the remaining values."""


def start_tracker(kind: str, project: str, path: Path, settings: dict, step: int) -> Tracker:
    """Open a run of this `kind` (of TRACKERS).

    Args:
        path: the path of the weights; its stem names the run, and TensorBoard's files are beside it, in
            NAME_D.tensorboard.
        settings: the settings of the run.
        step: the run's current step; TensorBoard drops later steps that an earlier run has reported.

    Raises:
        UserError: the package is not installed, or it does not start (no account, no network).
    """
    name = shown(path.stem)
    settings = {key: shown(value) if isinstance(value, str) else value for key, value in settings.items()}
    try:
        if kind == "tensorboard":
            return _TensorBoard(path.with_suffix(".tensorboard"), settings, step)
        if kind == "wandb":
            import wandb as tracker
        else:
            import swanlab as tracker
        return tracker.init(project=project, name=name, config=settings)
    except ImportError as error:
        raise UserError(f"--tracker {kind}: {error}; pip install {kind}") from error
    except Exception as error:  # each has errors of its own, for no account and no network
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        advice = f" ({WITHOUT_ACCOUNT[kind]} needs no account)" if kind in WITHOUT_ACCOUNT else ""
        raise UserError(f"--tracker {kind}: {reason}{advice}") from error


class _TensorBoard:
    """`tensorboard --logdir out` shows it."""

    def __init__(self, folder: Path, settings: dict, step: int):
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder), purge_step=step + 1)
        self._writer.add_text("settings", "\n".join(f"    {name} {value}" for name, value in settings.items()))

    def log(self, values: dict[str, float | None], step: int) -> None:
        for name, value in values.items():
            if value is not None:
                self._writer.add_scalar(name, value, step)

    def finish(self) -> None:
        self._writer.close()
