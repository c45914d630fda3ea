"""Each fault of `benchmarks.faults` once, in the quickest stage: nothing is lost but steps."""

import contextlib
import random
import shutil

import pytest

from benchmarks import faults
from benchmarks.fault_injection.disturbed import BrokenPromise, Disturbed, Laboratory, Reference
from benchmarks.fault_injection.kinds import KINDS, Kind
from benchmarks.fault_injection.small_stages import STAGES, make_world
from benchmarks.faults import print_table
from tests.running import RunningScript

ELSEWHERE = {  # tests/stages/ tests these more closely
    *("kill -9 inside a save", "data grown", "data changed", "data moved", "one of two ranks halted"),
    "one of two ranks killed",
}
HERE = [kind for kind in KINDS if kind.name not in ELSEWHERE]


def start(*arguments, **how) -> RunningScript:
    return RunningScript("benchmarks/fault_injection/striking.py", *arguments, **how)


@pytest.fixture(scope="module")
def laboratory(tmp_path_factory) -> Laboratory:
    folder = tmp_path_factory.mktemp("faults")
    return Laboratory(make_world(folder / "world"), folder, start)


@pytest.mark.parametrize("kind", HERE, ids=lambda kind: kind.name)
def test_nothing_but_steps_is_lost(laboratory, kind):
    laboratory.disturb(kind, STAGES[0], random.Random(1))


def test_no_two_kinds_have_one_name():
    assert len({kind.name for kind in KINDS}) == len(KINDS) == len(HERE) + len(ELSEWHERE)


def test_a_run_that_is_lost_is_found_out(laboratory):
    """The check itself must be able to fail."""

    def lose(run: Disturbed, rng: random.Random) -> None:
        run.stop_after(5)
        for path in run.resume.rglob("model.pth"):
            path.write_bytes(b"")

    def change(run: Disturbed, rng: random.Random) -> None:
        run.reference = Reference({key: value + 1e-7 for key, value in run.reference.weights.items()}, 1)

    def forget(run: Disturbed, rng: random.Random) -> None:
        run.stop_after(5)
        shutil.rmtree(run.out)

    told = {lose: "no earlier state is intact", change: "other weights than", forget: "steps lost, at most 4"}
    for happen, why in told.items():
        with pytest.raises(BrokenPromise, match=why):
            laboratory.disturb(Kind("", happen, most=4), STAGES[0], random.Random(1))


@pytest.mark.parametrize("lost", [0, 1, 3])
def test_one_lost_run_is_a_failure(lost, monkeypatch, capsys):
    class Clumsy:
        def __init__(self, *_):
            self.left = lost

        def disturb(self, *_) -> int:
            self.left -= 1
            if self.left >= 0:
                raise BrokenPromise("gone")
            return 2

    monkeypatch.setattr("benchmarks.fault_injection.disturbed.Laboratory", Clumsy)
    monkeypatch.setattr("benchmarks.fault_injection.small_stages.make_world", lambda folder: folder)
    monkeypatch.setattr("sys.argv", ["faults.py", "--rounds", "3"])
    with pytest.raises(SystemExit) if lost else contextlib.nullcontext():
        faults.main()
    said = capsys.readouterr().out
    assert (said.count("LOST: gone"), said.count(": 2 steps lost")) == (lost, 3 - lost)


def test_the_table_counts_by_kind(capsys):
    print_table([("a", "s", 2), ("a", "t", 0), ("a", "t", None), ("b", "s", None)])
    rows = [line.split() for line in capsys.readouterr().out.splitlines() if line][1:]
    assert rows == [["a", "3", "2", "1.0", "2"], ["b", "1", "0", "-", "-"], ["all", "4", "2", "1.0", "2"]]
