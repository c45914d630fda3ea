"""scripts/inspect_checkpoint.py: it describes an output folder file by file, with the command that continues."""

import json
import shlex
import shutil

import pytest

from scripts.inspect_checkpoint import _without
from tests.running import ROOT, TINY_TRAINING, one_error_line, run_script
from trainer.files import file_hash
from trainer.run_lock import lock_run


@pytest.fixture(scope="module")
def trained(tiny_data, tokenizer_dir, tmp_path_factory):
    """A run of two ranks that saved steps 2 and 4 and was stopped before its end."""
    out = tmp_path_factory.mktemp("with a space")
    flags = ("--data_path", tiny_data / "pretrain_hq.jsonl", "--tokenizer", tokenizer_dir, "--out_dir", out)
    several = (
        "--batch_size",
        "2",
        "--accumulation_steps",
        "1",
        "--save_interval",
        "2",
        "--overwrite",
        "1",
        "--max_steps",
        "4",
    )
    run_script("train_pretrain.py", *TINY_TRAINING, *flags, *several, processes=2)
    return out


@pytest.fixture
def out(trained, tmp_path):
    return shutil.copytree(trained, tmp_path / "out")


def inspect(*arguments, exit_code: int = 0, **how):
    return run_script("scripts/inspect_checkpoint.py", *arguments, exit_code=exit_code, **how)


def told(done, of: str) -> str:
    (line,) = [line for line in done.stdout.splitlines() if line.strip().startswith(of)]
    return line


def flip(path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("which", ["", "pretrain_32.pth", "pretrain_32.resume"])
def test_a_whole_run(trained, which):
    done = inspect(trained / which)
    for name in ("pretrain_32.pth", "step_00000004", "step_00000002"):
        assert " whole" in told(done, name)
    assert "2 processes" in told(done, "step_00000004")
    assert "resumes from step_00000004:" in done.stdout
    assert "writing" not in done.stdout


def test_the_command_goes_on(trained, out):
    command = inspect(trained).stdout.splitlines()[-1].split(" && ")[-1]
    launcher, count, processes, script, *flags = shlex.split(command)
    assert (launcher, count, processes) == ("torchrun", "--nproc_per_node", "2")
    assert script == str(ROOT / "train_pretrain.py")
    assert flags[-1] == "--resume"
    assert "--overwrite" not in flags
    assert (
        flags.count("1") == 2
    )  # values of --accumulation_steps and --log_interval; the one after --overwrite is dropped with it
    flags[flags.index("--out_dir") + 1] = out  # and not where other tests look for caches
    flags[flags.index("--max_steps") + 1] = "5"
    done = run_script("train_pretrain.py", *flags, processes=2)
    assert "resumed at step 4" in done.stdout


def test_from_another_folder_the_command_begins_with_the_way_there(trained, tmp_path):
    assert f"cd {ROOT} && torchrun" in inspect(trained, cwd=tmp_path).stdout
    assert "cd " not in inspect(trained).stdout


@pytest.mark.parametrize("name", ["model.pth", "optimizer.pt", "state.json", "rank_1.pt"])
def test_a_damaged_file_is_named_and_the_state_before_it_is_gone_on_from(out, name):
    flip(out / "pretrain_32.resume" / "step_00000004" / name)
    before = file_hash(out / "pretrain_32.resume" / "latest")
    done = inspect(out, exit_code=2)
    assert f"{name} is damaged" in told(done, "step_00000004")
    assert " whole" in told(done, "step_00000002")
    assert "resumes from step_00000002:" in done.stdout
    assert file_hash(out / "pretrain_32.resume" / "latest") == before


def test_nothing_is_whole(out):
    for step in (2, 4):
        flip(out / "pretrain_32.resume" / f"step_0000000{step}" / "model.pth")
    done = inspect(out, exit_code=2)
    assert "no state is intact: start over with --overwrite" in done.stdout
    assert "torchrun" not in done.stdout


def test_damaged_weights_and_a_damaged_pointer(out):
    flip(out / "pretrain_32.pth")
    done = inspect(out, exit_code=2)
    assert "does not match the sha256" in told(done, "pretrain_32.pth")
    assert "resumes from step_00000004:" in done.stdout
    shutil.copy(out / "pretrain_32.resume" / "step_00000004" / "model.pth", out / "pretrain_32.pth")
    (out / "pretrain_32.resume" / "latest").write_text("step_00000007")
    done = inspect(out, exit_code=2)
    assert "latest is damaged: it names 'step_00000007'" in done.stdout


def test_weights_without_a_run(out):
    shutil.rmtree(out / "pretrain_32.resume")
    assert "nothing to resume from" in inspect(out).stdout
    (out / "pretrain_32.json").unlink()
    assert "not checked" in told(inspect(out), "pretrain_32.pth")


def test_a_run_of_an_earlier_version_is_not_called_whole(out):
    path = out / "pretrain_32.resume" / "step_00000004" / "state.json"
    state = json.loads(path.read_text())
    for later in ("sha256", "about", "command", "working_folder"):
        del state[later]
    path.write_text(json.dumps(state))
    done = inspect(out)
    assert "not checked" in told(done, "step_00000004")
    assert "the command that started it, with --resume" in done.stdout


def test_a_run_that_is_under_way(out):
    held = lock_run(out / "pretrain_32.resume", out / "pretrain_32.pth")
    assert "a run is writing there: process " in inspect(out).stdout
    held.close()
    assert "writing" not in inspect(out).stdout


def test_nothing_there(tmp_path):
    assert "contains no run" in one_error_line(inspect(tmp_path, exit_code=2))
    assert "is neither a folder" in one_error_line(inspect(tmp_path / "x.pth", exit_code=2))


@pytest.mark.parametrize(
    ("flags", "left"),
    [
        ("--overwrite --dim 8", "--dim 8"),
        ("--overwrite true --dim 8", "--dim 8"),
        ("--dim 8 --no-overwrite", "--dim 8"),
        ("--local-rank=1 --resume=0 --dim 8", "--dim 8"),
        ("--local_rank 1 --dim 8 --overwrite", "--dim 8"),
    ],
)
def test_flags_that_are_left_out(flags, left):
    assert _without(flags.split(), "--overwrite", "--resume", "--local_rank") == left.split()
