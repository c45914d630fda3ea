"""A run that is stopped, killed or repeated: nothing is lost, and a resumed run is as if never interrupted."""

import json
import os
import shutil
import signal

import pytest
import torch

from tests.running import ROOT, call_script, one_error_line
from tests.stages.terminal import Terminal
from tests.stages.training import MEASURED, about, distance, losses, reports, snapshot, weights

SOME = ("--max_steps", "8")  # two more than in an epoch
KINDS = {
    "AdamW": ("pretrain_32", ()),
    "Muon, experts, workers, accumulation": (
        "pretrain_32_moe",
        ("--optimizer", "muon", "--use_moe", "--num_workers", "2", "--batch_size", "2", "--accumulation_steps", "2"),
    ),
    "AdamW in 8 bits": ("pretrain_32", ("--optimizer", "adamw8bit")),
}


def state_of(out, name="pretrain_32") -> dict:
    """The files that a run would resume from, by name."""
    folder = out / f"{name}.resume"
    folder = folder / (folder / "latest").read_text()
    state = {path.name: torch.load(path, weights_only=True) for path in folder.glob("*.pt*")}
    story = json.loads((folder / "state.json").read_text())["progress"]
    return state | {"progress": {key: value for key, value in story.items() if key not in MEASURED}}


def assert_equal(ours, theirs) -> None:
    """Check equality bit for bit, through everything that torch.load returns."""
    assert type(ours) is type(theirs)
    if isinstance(ours, torch.Tensor):
        assert torch.equal(ours, theirs)
    elif isinstance(ours, dict):
        assert ours.keys() == theirs.keys()
        for key in ours:
            assert_equal(ours[key], theirs[key])
    elif isinstance(ours, list):
        for our, their in zip(ours, theirs, strict=True):
            assert_equal(our, their)
    else:
        assert ours == theirs


@pytest.fixture(scope="module")
def whole(pretrain, tmp_path_factory):
    """8 uninterrupted steps, saved after 4 and 8."""
    out = tmp_path_factory.mktemp("whole")
    pretrain(out, "--epochs", "2", *SOME, "--save_interval", "4")
    return out


@pytest.mark.parametrize("kind", KINDS)
def test_stopped_by_a_signal_and_resumed_is_as_if_never_stopped(pretrain, tmp_path, kind):
    name, flags = KINDS[kind]
    flags = ("--epochs", "2", *SOME, *flags)
    pretrain(tmp_path / "whole", *flags)
    stopped = tmp_path / "stopped"
    done = pretrain.interrupted(stopped, "SIGINT", "log", 3, *flags, exit_code=130)
    assert "SIGINT: saving after this step" in done.stderr
    assert "Traceback" not in done.stderr
    assert about(stopped, name)["step"] in (3, 4)  # the signal came while step 3 was logged
    done = pretrain.interrupted(stopped, "SIGTERM", "log", 6, *flags, "--resume", exit_code=143)
    assert "resumed at step " in done.stdout
    assert about(stopped, name)["step"] in (6, 7)
    pretrain(stopped, *flags, "--resume")
    assert_equal(state_of(stopped, name), state_of(tmp_path / "whole", name))
    assert reports(stopped, name) == reports(tmp_path / "whole", name)
    assert_equal(weights(stopped, name), weights(tmp_path / "whole", name))
    assert len(losses(stopped, name)) == 8


def test_ctrl_c_from_outside(pretrain, tmp_path):
    run = pretrain.started(tmp_path, "--epochs", "100000", "--save_interval", "100000")
    run.wait_for("step 3/")
    run.send(signal.SIGINT)
    run.send(signal.SIGINT)  # at a terminal under torchrun it comes twice
    done = run.wait()
    assert done.returncode == 130
    assert about(tmp_path)["step"] >= 3
    assert weights(tmp_path)
    assert (tmp_path / "pretrain_32.png").exists()


@pytest.mark.parametrize(("place", "nth"), [("log", 4), ("save", 1), ("evaluate", 1), ("close", 1)])
def test_a_signal_after_the_last_step_does_not_make_a_finished_run_an_interrupted_one(pretrain, tmp_path, place, nth):
    flags = ("--max_steps", "4", "--eval_interval", "4", "--eval_path", pretrain.data_path)
    done = pretrain.interrupted(tmp_path, "SIGTERM", place, nth, *flags)
    assert "SIGTERM: saving" in done.stderr
    assert about(tmp_path)["step"] == 4
    assert (tmp_path / "pretrain_32.png").exists()


def test_a_hang_up_saves(pretrain, tmp_path):
    flags = ("--epochs", "100000", "--save_interval", "100000")
    done = pretrain.interrupted(tmp_path, "SIGHUP", "log", 3, *flags, exit_code=129)
    assert "SIGHUP: saving after this step" in done.stderr
    assert about(tmp_path)["step"] in (3, 4)


def test_a_terminal_that_goes_away_costs_nothing(pretrain, tmp_path):
    """As after a dropped SSH connection: the terminal is gone, and each print to it fails."""
    flags = (*pretrain.common, "--out_dir", tmp_path, "--epochs", "100000", "--save_interval", "100000")
    terminal = Terminal(pretrain.script, *flags)
    terminal.see("loss ")  # after the first step
    assert terminal.drop() == 129
    assert about(tmp_path)["step"] >= 1
    assert weights(tmp_path)


@pytest.mark.parametrize("nth", range(1, 12))
def test_killed_at_any_moment_of_a_save_there_is_a_whole_state(pretrain, tmp_path, whole, nth):
    """Killed before each renaming and deletion of the second save."""
    flags = ("--epochs", "2", *SOME)
    done = pretrain.interrupted(tmp_path, "SIGKILL", "file", nth, *flags, "--save_interval", "4", exit_code=None)
    if done.returncode == 0:
        assert nth > 10  # there are no more
        return
    assert done.returncode == -signal.SIGKILL
    assert weights(tmp_path).keys() == weights(whole).keys()
    assert about(tmp_path)["step"] in (4, 8)
    assert state_of(tmp_path)["progress"]["step"] in (4, 8)
    if nth % 3 == 1:
        pretrain(tmp_path, *flags, "--resume")
        assert_equal(state_of(tmp_path), state_of(whole))
        assert_equal(weights(tmp_path), weights(whole))
        assert about(tmp_path)["step"] == 8
        left = {path.name for path in tmp_path.rglob("*")}
        assert not [name for name in left if name.endswith(".tmp") or name == ".saving"]
        assert {name.rstrip("_") for name in left if name.startswith("step_")} == {"step_00000004", "step_00000008"}


def test_a_full_disk_during_a_save(pretrain, tmp_path, whole):
    """The kernel refuses to let a file grow beyond the size of the first save, like a full disk."""
    out = tmp_path / "out"
    shutil.copytree(whole, out)
    before = snapshot(out)
    done = pretrain.interrupted(out, "SIGXFSZ", "size", 100_000, "--epochs", "3", "--resume", exit_code=2)
    line = one_error_line(done)
    assert "cannot write" in line
    assert "File too large" in line
    after = snapshot(out)
    assert {name: after[name] for name in before if "metrics" not in name} == {
        name: content for name, content in before.items() if "metrics" not in name
    }
    assert after.keys() == before.keys()
    pretrain(out, "--epochs", "3", "--max_steps", "9", "--resume")
    assert about(out)["step"] == 9


def test_a_run_that_is_there_is_not_touched(pretrain, whole):
    before = snapshot(whole)
    line = one_error_line(pretrain(whole, *SOME, exit_code=2))
    assert "--resume" in line
    assert "--overwrite" in line
    assert "pretrain_32.pth" in line
    assert snapshot(whole) == before


def test_a_finished_run_that_is_resumed_ends_at_once(pretrain, whole):
    before = snapshot(whole)
    done = pretrain(whole, "--epochs", "2", *SOME, "--resume")
    assert "resumed at step 8" in done.stdout
    after = snapshot(whole)
    del before["pretrain_32.png"], after["pretrain_32.png"]
    assert after == before


def test_resume_mends_what_is_missing_beside_the_state(pretrain, tmp_path, whole):
    shutil.copytree(whole, tmp_path / "out")
    (tmp_path / "out" / "pretrain_32.pth").unlink()
    (tmp_path / "out" / "pretrain_32.json").write_text("{}")
    assert "already exists" in one_error_line(pretrain(tmp_path / "out", exit_code=2))  # its state is
    pretrain(tmp_path / "out", "--epochs", "2", *SOME, "--resume")
    assert distance(weights(tmp_path / "out"), weights(whole)) == 0
    assert about(tmp_path / "out") == about(whole)


def test_resume_starts_where_nothing_is_saved(pretrain, tmp_path, whole):
    pretrain(tmp_path, "--epochs", "2", *SOME, "--resume")
    assert_equal(weights(tmp_path), weights(whole))


def test_resume_does_not_replace_weights_it_cannot_go_on_from(pretrain, tmp_path, whole):
    shutil.copy(whole / "pretrain_32.pth", tmp_path)
    before = snapshot(tmp_path)
    assert "--overwrite" in one_error_line(pretrain(tmp_path, "--resume", exit_code=2))
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize(
    ("flags", "sides"),
    [
        (("--batch_size", "2"), ("batch_size", "4", "2")),
        (("--max_seq_len", "32"), ("max_seq_len", "64", "32")),
        (("--n_layers", "1"), ("n_layers", "2", "1")),
        (("--seed", "1"), ("seed", "42", "1")),
        (("--optimizer", "muon"), ("optimizer", "adamw", "muon")),
        (("--packing", "0"), ("packing", "True", "False")),
        (("--eval_interval", "5"), ("held out", "False", "True")),
    ],
)
def test_resume_with_other_settings_names_both_sides(pretrain, whole, flags, sides):
    before = snapshot(whole)
    line = one_error_line(pretrain(whole, "--epochs", "2", *SOME, *flags, "--resume", exit_code=2))
    assert all(side in line for side in sides), line
    assert snapshot(whole) == before


class TestData:
    """The data file's content is compared, not its path or modification time."""

    @pytest.fixture
    def data(self, pretrain, tmp_path):
        return shutil.copy(pretrain.data_path, tmp_path / "data.jsonl")

    @pytest.fixture
    def train(self, pretrain, tmp_path):
        def run(data, *flags, **how):
            return pretrain(tmp_path / "out", "--epochs", "2", "--data_path", data, *flags, **how)

        return run

    def test_an_edit_of_the_same_size_and_time_is_refused(self, train, data):
        train(data, "--max_steps", "1")
        times, content = data.stat(), data.read_bytes()
        data.write_bytes(content.replace(b"robot", b"ROBOT", 1))
        os.utime(data, ns=(times.st_atime_ns, times.st_mtime_ns))
        line = one_error_line(train(data, "--max_steps", "2", "--resume", exit_code=2))
        assert f"--resume: {data} has changed since the saved run began" in line
        data.write_bytes(content)
        assert "resumed at step 1" in train(data, "--max_steps", "2", "--resume").stdout

    def test_a_line_more_is_refused(self, train, data):
        train(data, "--max_steps", "1")
        with data.open("a") as file:
            file.write('{"text": "one more"}\n')
        line = one_error_line(train(data, "--max_steps", "2", "--resume", exit_code=2))
        assert "has changed since" in line

    def test_it_may_be_moved_linked_and_copied(self, train, data, tmp_path):
        train(data, "--max_steps", "1")
        (tmp_path / "other").mkdir()
        moved = data.rename(tmp_path / "other" / "moved.jsonl")
        (tmp_path / "link.jsonl").symlink_to(moved)
        train(tmp_path / "link.jsonl", "--max_steps", "2", "--resume")
        copied = shutil.copy(moved, tmp_path / "copied.jsonl")
        os.utime(copied, (1, 1))
        assert "resumed at step 2" in train(copied, "--max_steps", "3", "--resume").stdout

    def test_a_run_saved_by_an_earlier_version_goes_on(self, train, data, tmp_path):
        train(data, "--max_steps", "1")
        resume = tmp_path / "out" / "pretrain_32.resume"
        path = resume / (resume / "latest").read_text() / "state.json"
        state = json.loads(path.read_text())
        assert len(state["settings"].pop("data")["sha256"]) == 64
        del state["sha256"]  # nor had it hashes
        state["settings"] |= {"data_path": "/elsewhere/data.jsonl", "size of data_path": 7}
        path.write_text(json.dumps(state))
        assert "resumed at step 1" in train(data, "--max_steps", "2", "--resume").stdout

    def test_a_name_that_is_not_utf_8(self, pretrain, data, tmp_path):
        """Also the name of the output folder."""
        named = data.rename(tmp_path / os.fsdecode(b"caf\xe9.jsonl"))
        out = tmp_path / os.fsdecode(b"out\xe9")
        pretrain(out, "--data_path", named, "--max_steps", "1", by=call_script)
        pretrain(out, "--data_path", named, "--max_steps", "2", "--resume", by=call_script)
        assert json.loads((out / "pretrain_32.json").read_text(encoding="utf-8"))["data_path"] == str(named)


@pytest.mark.parametrize("script", sorted(path.name for path in ROOT.glob("train_*.py")))
def test_every_stage_compares_its_data(script):
    assert "checkpoint.load(model, optimizer, scaler, loader.dataset)" in (ROOT / script).read_text(encoding="utf-8")


def test_resume_with_another_rate_says_so(pretrain, tmp_path, whole):
    shutil.copytree(whole, tmp_path / "out")
    done = pretrain(tmp_path / "out", "--max_steps", "9", "--epochs", "2", "--learning_rate", "2e-3", "--resume")
    assert "--resume: learning_rate was 0.001 and is now 0.002" in done.stdout
    assert "--resume: max_steps was 8 and is now 9" in done.stdout
    assert about(tmp_path / "out")["step"] == 9


def test_resume_in_float16_begins_with_a_scale_of_its_own(pretrain, tmp_path, whole):
    shutil.copytree(whole, tmp_path / "out")
    flags = ("--max_steps", "9", "--epochs", "2", "--dtype", "float16", "--resume")
    assert "dtype was float32 and is now float16" in pretrain(tmp_path / "out", *flags).stdout
    assert about(tmp_path / "out")["step"] == 9


@pytest.mark.parametrize("damage", ["cut off", "no pointer to", "deleted", "no JSON", "of another kind"])
def test_a_state_that_is_damaged(pretrain, tmp_path, whole, damage):
    out = tmp_path / "out"
    shutil.copytree(whole, out)
    resume = out / "pretrain_32.resume"
    folder = resume / (resume / "latest").read_text()
    if damage == "cut off":
        (folder / "optimizer.pt").write_bytes((folder / "optimizer.pt").read_bytes()[:1000])
    elif damage == "no pointer to":
        (resume / "latest").write_text("step_00000099")
    elif damage == "deleted":
        (folder / "rank_0.pt").unlink()
    elif damage == "no JSON":
        (folder / "state.json").write_text('{"progress": {')
    else:
        torch.save({"scaler": {}, "optimizer": {"state": {}, "param_groups": []}}, folder / "optimizer.pt")
    done = pretrain(out, "--epochs", "2", *SOME, "--resume")
    (line,) = done.stderr.splitlines()
    assert str(resume / "latest" if damage == "no pointer to" else folder) in line
    assert f"resumed at step {8 if damage == 'no pointer to' else 4} from" in done.stdout
    assert_equal(state_of(out), state_of(whole))
    assert_equal(weights(out), weights(whole))


def test_overwrite_loses_nothing_before_it_has_something_new(pretrain, tmp_path, whole):
    out = tmp_path / "out"
    shutil.copytree(whole, out)
    before = snapshot(out)
    pretrain(out, "--overwrite", "--data_path", tmp_path / "missing.jsonl", exit_code=2)
    assert snapshot(out) == before
    done = pretrain.interrupted(out, "SIGKILL", "log", 1, "--overwrite", exit_code=None)
    assert done.returncode == -signal.SIGKILL
    after = snapshot(out)
    assert losses(out) != losses(whole)  # it had begun to log
    del before["pretrain_32.metrics.jsonl"], after["pretrain_32.metrics.jsonl"]
    assert after == before


def test_overwrite_begins_anew(pretrain, tmp_path, whole):
    """The new run saves at the same step at which the old one ended."""
    out = tmp_path / "out"
    shutil.copytree(whole, out)
    pretrain(out, "--epochs", "2", *SOME, "--seed", "7", "--overwrite")
    assert about(out)["step"] == 8
    assert distance(weights(out), weights(whole)) > 1e-3
    assert len(losses(out)) == 8
    assert losses(out) != losses(whole)
    assert len([path for path in (out / "pretrain_32.resume").iterdir() if path.is_dir()]) == 1
    pretrain(out, "--epochs", "2", "--max_steps", "9", "--seed", "7", "--resume")
    assert about(out)["step"] == 9


def test_two_runs_into_one_place(pretrain, tmp_path):
    first = pretrain.started(tmp_path, "--epochs", "100000", "--save_interval", "3")
    first.wait_for("step 4/")
    for flags in (("--resume",), ("--overwrite",)):
        line = one_error_line(pretrain(tmp_path, *flags, exit_code=2))
        assert f"process {first.pids[0]}" in line
    assert "already exists" in one_error_line(pretrain(tmp_path, exit_code=2))
    first.send(signal.SIGTERM)
    assert first.wait().returncode == 143
    pretrain(tmp_path, "--max_steps", "1", "--resume")  # free again


def test_files_and_folders_under_links_stay_where_they_lie(pretrain, tmp_path):
    """A large disk behind a small one that contains only links."""
    out, big = tmp_path / "out", tmp_path / "big"
    out.mkdir()
    big.mkdir()
    for name in ("pretrain_32.pth", "pretrain_32.json", "pretrain_32.metrics.jsonl", "pretrain_32.png"):
        (out / name).symlink_to(big / name.replace("pretrain_32", "mine"))
    (big / "state").mkdir()
    (out / "pretrain_32.resume").symlink_to(big / "state")
    left = big / ".mine.pth.123.tmp"
    left.write_text("what a killed run was writing")
    pretrain(out, "--epochs", "2", "--max_steps", "4")
    pretrain(out, "--epochs", "2", *SOME, "--resume")
    assert all(path.is_symlink() for path in out.iterdir())
    assert len(list(out.iterdir())) == 5
    assert about(out)["step"] == 8
    assert not left.exists()
    assert sorted(os.listdir(big)) == ["mine.json", "mine.metrics.jsonl", "mine.png", "mine.pth", "state"]


def test_a_flipped_bit_in_what_a_run_goes_on_from(pretrain, tmp_path, whole, capsys):
    """tests/trainer/test_checkpoint.py tests each file; here: without any whole state the run ends with an error."""
    out = tmp_path / "out"
    shutil.copytree(whole, out)
    for path in out.rglob("optimizer.pt"):
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
    before = snapshot(out)
    pretrain(out, "--epochs", "3", "--resume", by=call_script, exit_code=2)
    told = capsys.readouterr().err
    assert "step_00000008/optimizer.pt is damaged" in told
    assert "no earlier state is intact" in told
    assert snapshot(out) == before


def test_what_a_kill_left_behind_is_cleared(pretrain, tmp_path):
    left = tmp_path / ".pretrain_32.pth.123.tmp"
    left.write_text("half of it")
    others = tmp_path / ".full_sft_32.pth.123.tmp"
    others.write_text("being written")
    pretrain(tmp_path, "--max_steps", "1")
    assert not left.exists()
    assert others.exists()
    assert os.listdir(tmp_path / "pretrain_32.resume")
