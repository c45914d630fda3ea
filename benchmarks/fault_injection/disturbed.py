"""A run with an injected fault, and the guarantees that must hold after any fault."""

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
    """After a fault something was lost, or the run could not be resumed."""


@dataclass(frozen=True)
class Reference:
    """An undisturbed run: its weights, and its duration."""

    weights: dict[str, torch.Tensor]
    seconds: float


class Disturbed:
    """One run of one stage, into which a fault is injected before it is `check`ed.

    Args:
        out: an empty folder of its own.
        start: starts a script with a fault, see `processes.Forked`.
        reference: of the same stage with the same number of processes; None while it is being made.

    Attributes:
        reached: the last step that a process reported before it ended.
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
        """Start the stage with a fault, see `striking`; the returned run is only needed for `wait` if several run."""
        flags = [*self.world.flags(self.stage, self.out, self.processes, self.data), *flags]
        self._run = self._start(fault, str(place), self.stage.script, *flags, processes=self.processes, env=env)
        return self._run

    def send(self, name: str) -> None:
        self._run.send(getattr(signal, name))

    def wait(self, *allowed: int, run=None, alone: bool = False) -> str:
        """Wait until it ends with one of these exit codes, -9 being SIGKILL.

        Args:
            alone: the first process to end decides, and the others are then killed.

        Returns:
            its output on stderr.
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
        """Run it to about this step, and stop it there properly."""
        self.start("stop", step)
        self.wait(143)

    def newest(self) -> Path:
        """The state that it would resume from."""
        return self.resume / (self.resume / "latest").read_text(encoding="utf-8")

    def check(self) -> int:
        """Check the guarantee: an intact state exists, --resume continues from it, and the final weights are those of
        the undisturbed run.

        Returns:
            the number of steps that had to be repeated.

        Raises:
            BrokenPromise: the guarantee is broken.
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
        folder: an empty folder.
        start: see `processes.Forked`.
    """

    def __init__(self, world: World, folder: Path, start: Callable):
        self.world, self.folder, self.start = world, folder, start
        self._references: dict[tuple[str, int], Reference] = {}
        self._tried = 0

    def disturb(self, kind, stage: Stage, rng: random.Random) -> int:
        """Inject a fault of a kind (see `kinds`) into a run of a stage.

        Returns:
            the number of steps lost.

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
