"""Reporting a run: a progress bar or log lines, a metrics file, a loss curve, a tracker."""

import json
import math
import sys
import time
from collections.abc import Callable
from pathlib import Path

from torch import nn
from tqdm import tqdm

from dataset import DataError
from trainer.errors import UserError, print_notice, shown
from trainer.evaluation import EvaluationError
from trainer.files import replacing, write_error
from trainer.progress import Progress
from trainer.runtime import Runtime
from trainer.signals import terminal_may_go
from trainer.trackers import start_tracker

# A curve each, in this order, of those that a stage has
PLOTTED = {"loss": "loss (nats)", "reward": "reward", "length": "tokens an answer"}
EVERY_STAGE = ("loss", "lr", "grad_norm")  # what each logs of a step; the others' names are shown with their values


class Metrics:
    """Reports of a run on rank 0; every other rank's calls do nothing.

    `out/NAME_D.metrics.jsonl` gets a line per report, and `out/NAME_D.png` is drawn from it at the end. A resumed run
    drops the lines that the interrupted one reported after its last checkpoint, and a new run those of an earlier one,
    but only when it has something to report itself.

    Attributes:
        last: the newest value of each metric, None for one that was not finite.

    Raises:
        UserError: Weights & Biases does not start, or the file cannot be written.
    """

    def __init__(self, args, path: Path, model: nn.Module, total_steps: int, progress: Progress, runtime: Runtime):
        self.on = runtime.is_main
        self.last: dict[str, float | None] = {}
        self.path = path.with_suffix(".metrics.jsonl")
        self.progress = progress
        self.total_steps = total_steps
        self._started_at = progress.step
        self._wrote = False
        self._since, self._since_tokens = time.monotonic(), progress.tokens
        self._bar = self._tracker = None
        if not self.on:
            return
        millions = sum(getattr(p, "ds_numel", p.numel()) for p in model.parameters()) / 1e6  # ZeRO-3 keeps a share
        runtime.print(
            f"{path.stem}: {millions:.2f} M parameters, {total_steps} steps on {runtime.device}, "
            f"{runtime.dtype_name}, {runtime.engine}, {args.optimizer}"
        )
        if sys.stdout.isatty():
            self._bar = tqdm(total=total_steps, initial=progress.step, file=sys.stdout, unit="step", dynamic_ncols=True)
        if kind := "wandb" if args.use_wandb else args.tracker:
            settings = vars(args) | {"dtype": runtime.dtype_name}
            self._tracker = start_tracker(kind, args.wandb_project, path, settings, progress.step)

    def due(self, interval: int, stopping: bool = False) -> bool:
        """Whether an action that takes place every `interval` steps, and at the end, is due now."""
        step = self.progress.step
        return step % interval == 0 or step == self.total_steps or stopping

    def log(self, **values: float) -> None:
        """Report a training step: loss, learning rate, the stage's other metrics, tokens per second since the last
        report, and the time left."""
        progress, now = self.progress, time.monotonic()
        speed = (progress.tokens - self._since_tokens) / max(1e-9, now - self._since)
        self._since, self._since_tokens = now, progress.tokens
        self._report(values | {"tokens_per_second": round(speed, 1), "skipped": progress.skipped})
        if not self.on:
            return
        further = [f"{_words(name)} {value:.3g}" for name, value in values.items() if name not in EVERY_STAGE]
        short = "  ".join([f"loss {values['loss']:.4f}  lr {values['lr']:.2e}", *further, f"{speed:,.0f} tokens/s"])
        if progress.skipped:
            short += f"  {progress.skipped} steps skipped (not finite)"
        left = (self.total_steps - progress.step) * progress.seconds / progress.step
        with terminal_may_go():
            if self._bar is not None:
                self._bar.set_postfix_str(short, refresh=False)
                self._bar.update(progress.step - self._bar.n)
            else:
                print(f"step {progress.step}/{self.total_steps}  {short}  {_clock(left)} left", flush=True)

    def log_evaluation(self, evaluate: Callable[[], dict[str, float]]) -> None:
        """Evaluate on held-out lines and report it. A failed evaluation does not stop training: the rank
        where it failed says why, and all of them continue."""
        try:
            values = evaluate()
        except EvaluationError as error:
            if (cause := error.__cause__) is not None:
                reason = str(cause) if isinstance(cause, UserError | DataError) else f"{type(cause).__name__}: {cause}"
                print_notice(f"evaluation at step {self.progress.step} failed ({reason[:300]})", every_rank=True)
            return
        self._report(values)
        if self.on:
            text = ", ".join(f"{_words(name.removeprefix('eval_'))} {value:.4f}" for name, value in values.items())
            with terminal_may_go():
                tqdm.write(f"step {self.progress.step}  held out: {text}")

    def close(self) -> None:
        """Draw the curve and end the bar."""
        if not self.on:
            return
        if self._bar is not None:
            with terminal_may_go():
                self._bar.close()
        if self._tracker is not None:
            self._tracker.finish()
        draw_curve(self.path)

    def _report(self, values: dict[str, float]) -> None:
        values = {name: value if math.isfinite(value) else None for name, value in values.items()}  # JSON has no NaN
        self.last |= values
        if not self.on:
            return
        progress = self.progress
        line = {"step": progress.step, "tokens": progress.tokens, "seconds": round(progress.seconds, 2)} | values
        if not self._wrote:
            self._drop_from(self._started_at)
            self._wrote = True
        try:
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
        except OSError as error:
            raise write_error(self.path, error) from error
        if self._tracker is not None:
            self._tracker.log(values, step=progress.step)

    def _drop_from(self, step: int) -> None:
        kept = [line for line in read_metrics(self.path) if line["step"] <= step] if step else []
        with replacing(self.path) as temporary:
            temporary.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")


def _words(name: str) -> str:
    return name.replace("_", " ")


def read_metrics(path: Path) -> list[dict]:
    """The lines of a metrics file, without one that a crash cut off; empty if there is no file."""
    if not path.is_file():
        return []
    lines = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            lines.append(json.loads(line))
        except ValueError:
            continue
    return [line for line in lines if isinstance(line, dict) and isinstance(line.get("step"), int)]


def draw_curve(metrics: Path) -> Path | None:
    """Draw training and held-out loss over steps from a metrics file as a PNG beside it; with reinforcement learning
    also the reward and the length of the answers. None if there is nothing to draw."""
    lines = read_metrics(metrics)
    trained = _series(lines, "loss")
    if not trained:
        return None
    shown_names = [name for name in PLOTTED if _series(lines, name)]
    try:
        from matplotlib.figure import Figure  # not pyplot, which keeps every figure and wants a display
    except ImportError as error:
        print_notice(f"loss curve not plotted: {error}")
        return None

    figure = Figure(figsize=(7, 1 + 3 * len(shown_names)), dpi=120, layout="constrained")
    for axes, name in zip(figure.subplots(len(shown_names), squeeze=False)[:, 0], shown_names, strict=True):
        axes.plot(*zip(*_series(lines, name), strict=True), label="training", linewidth=1.2)
        if held_out := _series(lines, f"eval_{name}"):
            axes.plot(*zip(*held_out, strict=True), label="held out", marker="o", markersize=3)
        axes.set(xlabel="optimizer step", ylabel=PLOTTED[name])
        axes.grid(alpha=0.3)
        axes.legend()
    figure.axes[0].set_title(shown(metrics.name.split(".")[0]))
    image = metrics.with_name(metrics.name.replace(".metrics.jsonl", ".png"))
    with replacing(image) as temporary:
        figure.savefig(temporary, format="png")
    return image


def _series(lines: list[dict], name: str) -> list[tuple[int, float]]:
    """The steps and values of a metric wherever it was finite."""
    return [(line["step"], line[name]) for line in lines if line.get(name) is not None]


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
