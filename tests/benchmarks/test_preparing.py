"""The comparisons of data preparation: what they find and how they say it, without the processes that they start."""

import random
import subprocess
from argparse import Namespace
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest

from benchmarks import prepare_dedup, prepare_speed


def clock(*instants: float) -> SimpleNamespace:
    """Stands for the module `time`; its clocks show one instant after the other."""
    shown = iter(instants)
    return SimpleNamespace(perf_counter=lambda: next(shown), monotonic=lambda: next(shown), sleep=lambda seconds: None)


def test_planted_copies_are_found_across_chunks(tmp_path, monkeypatch, capsys):
    """No line of a chunk is lost, and the megabytes are those of all lines as UTF-8."""
    written = []

    class Lines(prepare_dedup.Lines):
        def __init__(self, path, lines):
            written.extend(lines)
            super().__init__(path, lines)

    monkeypatch.setattr(prepare_dedup, "CHUNK", 16)
    monkeypatch.setattr(prepare_dedup, "ProcessPoolExecutor", ThreadPoolExecutor)
    monkeypatch.setattr(prepare_dedup, "Lines", Lines)
    monkeypatch.setattr(prepare_dedup, "time", clock(0, 0.001, 0.004))
    args = Namespace(lines=60, planted=20, near_dup=0.8, workers=1)
    prepare_dedup.near_duplicates(args, tmp_path, random.Random(0))
    first, recall, precision, speed = (line.split() for line in capsys.readouterr().out.splitlines())
    size = len("".join(written).encode()) / 1e6
    assert len(written) == 80
    assert first == ["80", "lines,", f"{size:.1f}", "MB,", "1", "processes"]
    assert recall[1:] == ["100.00%", "of", "20", "planted"]
    assert precision[1:] == ["100.00%", "of", "20", "dropped"]
    assert speed == [f"{size * 1000:.1f}", "MB/s", "sampled,", f"{size * 250:.1f}", "MB/s", "in", "all"]


def test_questions_inside_lines_are_counted(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(prepare_dedup, "time", clock(0, 2))
    prepare_dedup.contamination(Namespace(questions=6), tmp_path, random.Random(0))
    first, second = (line.split() for line in capsys.readouterr().out.splitlines())
    assert (first[0], first[5]) == ("6", "120")
    assert (second[0], second[2]) == ("6", "0")


@pytest.mark.parametrize(("content", "told"), [("same", "the same bytes"), ("other", "OTHER BYTES")])
def test_a_run_that_is_killed_is_compared_with_one_in_peace(tmp_path, monkeypatch, capsys, content, told):
    """Two attempts are killed, a third ends by itself, and the last run is the one that counts."""
    attempts, ended = iter([True, True, False]), []

    def run(command, **_):
        out = next(part for part in command if part.endswith("x.jsonl"))
        with open(out, "w", encoding="utf-8") as file:
            file.write("same" if "peace" in out else content)

    class Process:
        def __init__(self, command, **_):
            self.long = next(attempts)

        def wait(self, patience=None):
            if patience is not None and self.long:
                raise subprocess.TimeoutExpired("x", patience)

        def send_signal(self, number):
            ended.append(self)

    monkeypatch.setattr(prepare_speed, "time", clock(0, 100))
    monkeypatch.setattr(
        prepare_speed,
        "subprocess",
        SimpleNamespace(Popen=Process, run=run, TimeoutExpired=subprocess.TimeoutExpired, DEVNULL=subprocess.DEVNULL),
    )
    if content == "other":
        with pytest.raises(SystemExit, match="1"):
            prepare_speed.kill_often(tmp_path / "source", tmp_path, 1, 0)
    else:
        prepare_speed.kill_often(tmp_path / "source", tmp_path, 1, 0)
    *killed, own, last = capsys.readouterr().out.splitlines()
    assert len(killed) == len(ended) == 2
    assert [line.split()[:2] for line in killed] == [["killed", "after"]] * 2
    assert own.startswith("  attempt 3 ended by itself before ")
    assert float(killed[0].split()[2]) <= 95 / prepare_speed.KILLS
    assert last.startswith(f"killed 2 times: {told}")


def test_a_run_is_measured_by_the_size_of_its_input(tmp_path, monkeypatch, capsys):
    class Process:
        pid, returncode = 7, 0

        def __init__(self, command, **_):
            assert command[command.index("--workers") + 1] == "3"
            assert command[-2:] == ["--near_dup", "0"]

        def communicate(self):
            return "read: 4\nkept: 3\n", None

    (tmp_path / "source").write_bytes(b"x" * 2_000_000)
    monkeypatch.setattr(prepare_speed, "time", clock(10, 14))
    monkeypatch.setattr(prepare_speed, "subprocess", SimpleNamespace(Popen=Process, PIPE=None))
    monkeypatch.setattr(
        prepare_speed, "PeakMemory", lambda pid: SimpleNamespace(peak=pid << 20, running=True, start=lambda: None)
    )
    prepare_speed.measure("clean", tmp_path / "source", tmp_path, 3, "--near_dup", "0")
    assert capsys.readouterr().out.splitlines() == [
        *("clean: 2 MB in 4.0 s, 0.5 MB/s, peak memory 7 MiB", "  read: 4", "  kept: 3"),
    ]
