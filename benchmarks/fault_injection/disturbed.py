"""A run that something happens to, and what must hold afterwards, whatever it was."""

import json
import random
import re
import shutil
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.fault_injection.small_stages import STEPS, Stage, World
from trainer.resume_files import find_whole_state, list_states

PATIENCE = 600  # seconds; only what hangs takes as long


class BrokenPromise(AssertionError):
    """After a fault something was lost, or could not be resumed."""


@dataclass(frozen=True)
class Reference:
    """A run that was never disturbed: its weights, and how long it took."""

    weights: dict[str, torch.Tensor]
    seconds: float


class Disturbed:
    """One run of one stage, for a fault to work on and then to be `check`ed.

    Args:
        out: an empty folder, for it alone.
        start: starts a script with a fault in it, see `processes.Forked`.
        reference: of the same stage with as many processes; None while that is being made.

    Attributes:
        reached: the last step that a process has reported before it ended.
    """

    def __init__(
        self, world: World, stage: Stage, out: Path, start: Callable, processes: int, reference: Reference | None
    ):
        self.world, self.stage, self.processes, self.reference = world, stage, processes, reference
        self.out, self.data = out, world.folder / stage.data
        self.weights = out / f"{stage.written}_32.pth"
        self.resume = self.weights.with_suffix(".resume")
        self.reached = 0
        self._start = start
        self._run = None

    def start(self, fault: str = "none", place: int = 0, *flags: str, **env: str):
        """Start the stage with a fault in it, see `striking`; what it returns is for `wait` alone where several run."""
        flags = [*self.world.flags(self.stage, self.out, self.processes, self.data), *flags]
        self._run = self._start(fault, str(place), self.stage.script, *flags, processes=self.processes, env=env)
        return self._run

    def send(self, name: str) -> None:
        self._run.send(getattr(signal, name))

    def wait(self, *allowed: int, run=None, alone: bool = False) -> str:
        """Until it ends, as one of some exit codes says, or -9 for SIGKILL.

        Args:
            alone: the first of its processes that ends counts, and the others are killed then.

        Returns:
            what it said on stderr.
        """
        run = run or self._run
        deadline = time.monotonic() + PATIENCE
        while not (codes := run.codes()) or not (alone or len(codes) == len(run.pids)):
            if time.monotonic() > deadline:
                run.send(signal.SIGKILL)
                raise BrokenPromise(f"hangs:\n{run.stdout}\n{run.stderr}")
            time.sleep(0.01)
        said = run.stderr
        if alone:
            run.send(signal.SIGKILL)
            while len(run.codes()) < len(run.pids):  # until then it holds its lock
                time.sleep(0.01)
        self.reached = max([self.reached, *map(int, re.findall(rf"^step (\d+)/{STEPS} ", run.stdout, flags=re.M))])
        if not set(codes.values()) <= set(allowed):
            raise BrokenPromise(f"ended with {codes}, not {allowed}:\n{run.stdout}\n{said}")
        if 2 in codes.values() and self.processes == 1 and said.count("error: ") != 1:
            raise BrokenPromise(f"not one error line:\n{said}")
        return said

    def stop_after(self, step: int) -> None:
        """Run it as far as about this step, and stop it there in order."""
        self.start("stop", step)
        self.wait(143)

    def newest(self) -> Path:
        """The state that it would resume from."""
        return self.resume / (self.resume / "latest").read_text(encoding="utf-8")

    def check(self) -> int:
        """The guarantee: an intact state exists, --resume continues from it, and the weights at the end are those of
        the run that was never disturbed.

        Returns:
            the number of steps that had been taken and were taken again.

        Raises:
            BrokenPromise: it is not so.
        """
        saved = 0
        if list_states(self.resume):
            saved = int(find_whole_state(self.resume / "latest")[0][5:].rstrip("_"))
        elif self.weights.exists():
            raise BrokenPromise("weights, but nothing to resume from")
        run = self.start("none", 0, "--resume")
        reached = self.reached
        self.wait(0)
        found = re.search(r"resumed at step (\d+)", run.stdout)
        if int(found[1] if found else 0) != saved:
            raise BrokenPromise(f"step {saved} is whole, but it said {found and found[0]}")
        weights = torch.load(self.weights, weights_only=True)
        expected = self.reference.weights
        if weights.keys() != expected.keys() or not all(torch.equal(weights[key], expected[key]) for key in expected):
            raise BrokenPromise("other weights than those of the run that was never disturbed")
        about = json.loads(self.weights.with_suffix(".json").read_text(encoding="utf-8"))
        if about["step"] != STEPS:
            raise BrokenPromise(f"the json tells step {about['step']}")
        left = [path.name for path in self.out.rglob("*") if path.suffix == ".tmp" or path.name == ".saving"]
        if left:
            raise BrokenPromise(f"left behind: {left}")
        return max(0, reached - saved)


class Laboratory:
    """Makes runs, disturbs them and checks them.

    Args:
        folder: an empty one.
        start: see `processes.Forked`.
    """

    def __init__(self, world: World, folder: Path, start: Callable):
        self.world, self.folder, self.start = world, folder, start
        self._references: dict[tuple[str, int], Reference] = {}
        self._tried = 0

    def disturb(self, kind, stage: Stage, rng: random.Random) -> int:
        """Do one thing of a kind (see `kinds`) to a run of a stage.

        Returns:
            the steps lost.

        Raises:
            BrokenPromise: more than steps was lost.
        """
        self._tried += 1
        out = self.folder / f"{self._tried}" / "out"
        out.mkdir(parents=True)
        run = Disturbed(self.world, stage, out, self.start, kind.processes, self.reference(stage, kind.processes))
        try:
            kind.happen(run, rng)
            lost = run.check()
            if lost > kind.most:
                raise BrokenPromise(f"{lost} steps lost, at most {kind.most} may be")
            return lost
        except BrokenPromise:
            raise
        except Exception as error:  # what cannot be read or loaded
            raise BrokenPromise(f"{type(error).__name__}: {error}") from error
        finally:
            shutil.rmtree(out.parent)

    def reference(self, stage: Stage, processes: int) -> Reference:
        place = (stage.script, processes)
        if place not in self._references:
            out = self.folder / f"{stage.script}_{processes}"
            out.mkdir()
            run = Disturbed(self.world, stage, out, self.start, processes, None)
            began = time.monotonic()
            run.start()
            run.wait(0)
            seconds = time.monotonic() - began
            self._references[place] = Reference(torch.load(run.weights, weights_only=True), seconds)
            shutil.rmtree(out)
        return self._references[place]
