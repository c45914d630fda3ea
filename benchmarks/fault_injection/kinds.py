"""The kinds of faults, each in a few lines; `Laboratory` checks the same guarantee after any of them."""

import os
import random
import re
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from benchmarks.fault_injection.disturbed import BrokenPromise, Disturbed
from benchmarks.fault_injection.small_stages import SAVE_INTERVAL, STEPS

CHANGES_OF_A_SAVE = 40  # of the file system: files opened, renamed and removed
FLUSHES_OF_A_SAVE = 22
Happen = Callable[[Disturbed, random.Random], None]


@dataclass(frozen=True)
class Kind:
    """A kind of fault.

    Attributes:
        happen: injects it into a run.
        processes: the number of processes of the run.
        most: steps that may be repeated: those since the last save, or since the one before it if the last was still
            being written or was damaged.
    """

    name: str
    happen: Happen
    processes: int = 1
    most: int = 2 * SAVE_INTERVAL


KINDS: list[Kind] = []


def kind(name: str, **how: int) -> Callable[[Happen], Happen]:
    def add(happen: Happen) -> Happen:
        KINDS.append(Kind(name, happen, **how))
        return happen

    return add


def any_step(rng: random.Random) -> int:
    """A step with a saved state before it, and some steps after it."""
    return rng.randint(SAVE_INTERVAL + 1, STEPS - 2)


# ------------------------------------------------------------------------------------------------------- processes


@kind("kill -9 at any instant")
def kill(run: Disturbed, rng: random.Random) -> None:
    run.start()
    time.sleep(rng.uniform(0, run.reference.seconds))
    run.send("SIGKILL")
    run.wait(-9, 0)


@kind("kill -9 inside a save")
def kill_in_save(run: Disturbed, rng: random.Random) -> None:
    run.start("kill_in_save", rng.randint(1, CHANGES_OF_A_SAVE * STEPS // SAVE_INTERVAL))
    run.wait(-9, 0)


@kind("SIGTERM at any instant", most=0)
def terminate(run: Disturbed, rng: random.Random) -> None:
    run.start()
    time.sleep(rng.uniform(0, run.reference.seconds))
    run.send("SIGTERM")
    run.wait(-15, 143, 0)  # the first before it trains


@kind("one of two ranks killed", processes=2)
def kill_a_rank(run: Disturbed, rng: random.Random) -> None:
    struck = rng.choice("01")
    run.start("kill", any_step(rng), STRUCK_RANK=struck)
    run.wait(-9, alone=True)


@kind("one of two ranks killed, the other left to itself", processes=2)
def leave_a_rank(run: Disturbed, rng: random.Random) -> None:
    struck = rng.choice("01")
    run.start("kill", any_step(rng), STRUCK_RANK=struck)
    said = run.wait(-9, 1, 2)  # 1 where the lost connection is not noticed, and the watchdog ends the other
    if f"rank {1 - int(struck)} stops" not in said and f"rank {struck} has sent no heartbeat" not in said:
        raise BrokenPromise(f"the other does not say why it ends:\n{said}")


@kind("one of two ranks halted", processes=2)
def halt_a_rank(run: Disturbed, rng: random.Random) -> None:
    struck = rng.choice("01")
    run.start("halt", any_step(rng), STRUCK_RANK=struck, SILENT="6")
    said = run.wait(1, alone=True)
    if f"rank {struck} has sent no heartbeat" not in said:
        raise BrokenPromise(f"the halted rank is not named:\n{said}")


@kind("two runs started at the same instant")
def start_twice(run: Disturbed, rng: random.Random) -> None:
    both = [run.start("none", 0, "--resume") for _ in range(2)]
    said = [run.wait(0, 2, run=each) for each in both]
    codes = [code for each in both for code in each.codes().values()]
    if 0 not in codes or (2 in codes and "is being written by another run" not in "".join(said)):
        raise BrokenPromise(f"{codes}: {said}")


# ------------------------------------------------------------------------------------------------------------ disk


@kind("full disk during a save")
def fill_disk(run: Disturbed, rng: random.Random) -> None:
    run.stop_after(any_step(rng))
    run.start("full_disk", rng.randint(20_000, run.weights.stat().st_size * 2), "--resume")
    if "cannot write" not in run.wait(2, 0):
        run.wait(0)


@kind("folder read-only during a save")
def forbid_writing(run: Disturbed, rng: random.Random) -> None:
    run.start("read_only", rng.randint(1, CHANGES_OF_A_SAVE * STEPS // SAVE_INTERVAL))
    if "Read-only file system" not in run.wait(2, 0):
        run.wait(0)


@kind("power loss")
def lose_power(run: Disturbed, rng: random.Random) -> None:
    run.start("power", rng.randint(1, FLUSHES_OF_A_SAVE * STEPS // SAVE_INTERVAL))
    run.wait(-9, 0)
    after = Path(f"{run.out}.after")
    if after.exists():
        shutil.rmtree(run.out)
        after.rename(run.out)


def damaged_file(run: Disturbed, rng: random.Random) -> Path:
    """Any file that is read to resume, or that users look for, except the lock."""
    run.stop_after(any_step(rng))
    beside = [run.weights, run.weights.with_suffix(".json")]
    return rng.choice([*sorted(run.newest().iterdir()), *beside])


@kind("a file truncated")
def truncate(run: Disturbed, rng: random.Random) -> None:
    path = damaged_file(run, rng)
    path.write_bytes(path.read_bytes()[: rng.randrange(1, path.stat().st_size)])


@kind("a bit of a file flipped")
def flip(run: Disturbed, rng: random.Random) -> None:
    path = damaged_file(run, rng)
    content = bytearray(path.read_bytes())
    content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    path.write_bytes(content)


@kind("a file of 0 bytes")
def empty(run: Disturbed, rng: random.Random) -> None:
    damaged_file(run, rng).write_bytes(b"")


@kind("a file deleted")
def delete(run: Disturbed, rng: random.Random) -> None:
    damaged_file(run, rng).unlink()


@kind("the pointer damaged")
def damage_pointer(run: Disturbed, rng: random.Random) -> None:
    run.stop_after(any_step(rng))
    (run.resume / "latest").write_bytes(rng.choice([b"", rng.randbytes(13), b"step_00000099", b"step_", b"."]))


# ------------------------------------------------------------------------------------------------------------ data


def own_data(run: Disturbed, rng: random.Random) -> None:
    """A copy of the data that may be changed, and a stopped run on it."""
    run.data = Path(shutil.copy(run.data, run.out.parent / "data.jsonl"))
    run.stop_after(any_step(rng))


def refused_with(run: Disturbed, content: bytes) -> None:
    """Check that the run refuses to resume with this content in the data file, and restore the file."""
    before = run.data.read_bytes()
    run.data.write_bytes(content)
    run.start("none", 0, "--resume")
    said = run.wait(2)
    if "has changed since the saved run began" not in said:
        raise BrokenPromise(f"other data: {said}")
    run.data.write_bytes(before)


@kind("data grown", most=0)
def grow(run: Disturbed, rng: random.Random) -> None:
    own_data(run, rng)
    lines = run.data.read_bytes().splitlines(keepends=True)
    refused_with(run, b"".join([*lines, rng.choice(lines)]))


@kind("data shrunk", most=0)
def shrink(run: Disturbed, rng: random.Random) -> None:
    own_data(run, rng)
    lines = run.data.read_bytes().splitlines(keepends=True)
    del lines[rng.randrange(len(lines))]
    refused_with(run, b"".join(lines))


@kind("data changed", most=0)
def change(run: Disturbed, rng: random.Random) -> None:
    own_data(run, rng)
    content = bytearray(run.data.read_bytes())
    words = [found.start() for found in re.finditer(rb"(?<=[a-z ])[a-z](?=[a-z]+ )", content)]  # inside texts, not keys
    place = rng.choice(words)
    content[place] = ord("x") if content[place] != ord("x") else ord("y")
    refused_with(run, bytes(content))


@kind("data moved", most=0)
def move(run: Disturbed, rng: random.Random) -> None:
    own_data(run, rng)
    run.data = run.data.rename(run.data.with_name("moved.jsonl"))


# --------------------------------------------------------------------------------------------------------- numbers


def not_finite(fault: str) -> Happen:
    def happen(run: Disturbed, rng: random.Random) -> None:
        run.stop_after(SAVE_INTERVAL)
        # a save among the skipped steps would continue after their rows, and so give other weights
        run.start(fault, rng.randint(1, 2), "--resume", "--save_interval", str(STEPS))
        if "10 times in a row" not in run.wait(2):
            raise BrokenPromise("it ends without saying why")

    return happen


for where in ("loss", "gradient", "input"):
    kind(f"NaN in the {where}", most=STEPS)(not_finite(f"nan_{where}"))


@kind("clock set back")
def set_clock_back(run: Disturbed, rng: random.Random) -> None:
    run.start("clock", rng.choice([3600, 86_400, 86_400 * 400]))
    time.sleep(rng.uniform(0, run.reference.seconds))
    run.send("SIGTERM")
    run.wait(-15, 143, 0)
    later = time.time() + 86_400
    for path in run.out.rglob("*"):
        os.utime(path, (later, later))
