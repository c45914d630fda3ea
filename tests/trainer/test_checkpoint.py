"""Checkpoint without a stage: saving, verification by hashes, and which settings may change on resume."""

import errno
import json
import os
import shutil
import threading
from pathlib import Path
from types import MappingProxyType, SimpleNamespace

import pytest
import torch

import trainer.checkpoint
import trainer.run_lock
from dataset.locks import NoLocksError
from model import LMConfig, MiniMindLM
from trainer.arguments import training_parser
from trainer.checkpoint import Checkpoint
from trainer.errors import UserError
from trainer.files import file_hash
from trainer.progress import SKIPPED_LIMIT, Progress
from trainer.runtime import Runtime, Totals
from trainer.schedule import make_optimizer


@pytest.fixture
def run(monkeypatch):
    run = Runtime(torch.device("cpu"), torch.float32)
    monkeypatch.setattr(Runtime, "start_loop", lambda self: None)
    return run


@pytest.fixture
def open_checkpoint(run, tiny_tokenizer, tmp_path):
    config = LMConfig(dim=32, n_layers=1, n_heads=4, vocab_size=64)

    def make(resume: bool, flags: dict = MappingProxyType({}), **how):
        args = SimpleNamespace(
            **{"out_dir": str(tmp_path), "dim": 32, "use_moe": False, "data_path": "data.jsonl", "max_seq_len": 64},
            **{"resume": resume, "overwrite": False, "deepspeed": None, "eval_interval": 0, "eval_path": None},
            **{
                "learning_rate": 1e-3,
                "optimizer": "adamw",
                "keep_last": 2,
                "keep_every": 0,
                "save_best": False,
                **flags,
            },
        )
        model = MiniMindLM(config)
        parts = (model, make_optimizer(model, args), torch.amp.GradScaler("cpu", enabled=False))
        return Checkpoint(args, "stage", config, tiny_tokenizer, run, **how), parts

    return make


def test_random_state_goes_on_where_it_was(open_checkpoint):
    checkpoint, parts = open_checkpoint(resume=False)
    torch.manual_seed(5)
    torch.rand(3)
    progress = Progress()
    progress.advance(Totals(1, 1, 1), skipped=False)
    checkpoint.save(*parts, progress, {})
    checkpoint.wait()
    expected = torch.rand(4)
    del checkpoint  # and its lock
    checkpoint, parts = open_checkpoint(resume=True)
    assert checkpoint.load(*parts).step == 1
    assert torch.equal(torch.rand(4), expected)


def test_progress_adds_up_steps_tokens_and_time(monkeypatch):
    clock = iter([100.0, 103.0, 105.0])
    monkeypatch.setattr(trainer.progress.time, "monotonic", lambda: next(clock))
    progress = Progress(step=7, tokens=50, seconds=20.0)
    for skipped in (False, True):
        progress.advance(Totals(4, 2, 6), skipped)
    assert vars(progress).items() >= {"step": 9, "tokens": 62, "seconds": 25.0, "skipped": 1}.items()


def test_steps_that_are_not_finite_are_counted_until_there_are_too_many_in_a_row():
    progress = Progress(step=20, skipped=3)
    for _ in range(SKIPPED_LIMIT - 1):
        progress.advance(Totals(1, 1, 1), skipped=True)
    progress.advance(Totals(1, 1, 1), skipped=False)
    for _ in range(SKIPPED_LIMIT - 1):
        progress.advance(Totals(1, 1, 1), skipped=True)
    with pytest.raises(UserError, match=f"not finite {SKIPPED_LIMIT} times in a row; the last checkpoint is intact"):
        progress.advance(Totals(1, 1, 1), skipped=True)
    assert progress.skipped == 3 + 2 * SKIPPED_LIMIT - 1


def test_only_the_keys_to_keep_are_saved_and_the_others_stay_as_they_are(open_checkpoint, tmp_path):
    def keep(key: str) -> bool:
        return key.startswith("layers.0.attention.")

    checkpoint, parts = open_checkpoint(resume=False, keep=keep, rank=4)
    saved = parts[0].state_dict()
    checkpoint.save(*parts, Progress(step=3), {})
    checkpoint.wait()
    assert torch.load(tmp_path / "stage_32.pth", weights_only=True).keys() == set(filter(keep, saved))
    del checkpoint  # and its lock
    checkpoint, parts = open_checkpoint(resume=True, keep=keep, rank=4)
    before = {key: value.clone() for key, value in parts[0].state_dict().items()}
    assert checkpoint.load(*parts).step == 3
    for key, value in parts[0].state_dict().items():
        assert torch.equal(value, saved[key] if keep(key) else before[key])


def test_a_parameter_with_two_names_takes_its_place_once(open_checkpoint, tmp_path):
    checkpoint, parts = open_checkpoint(resume=False)
    checkpoint.save(*parts, Progress(step=1), {})
    checkpoint.wait()
    state = torch.load(tmp_path / "stage_32.pth", weights_only=True)
    assert state["output.weight"].data_ptr() == state["tok_embeddings.weight"].data_ptr()


def flip(path, place: float = 0.5) -> None:
    """Change one bit of a file."""
    content = bytearray(path.read_bytes())
    content[int(len(content) * place)] ^= 1
    path.write_bytes(content)


@pytest.fixture
def saved(open_checkpoint, tmp_path):
    """The resume folder of a run that has saved its third step."""
    checkpoint, parts = open_checkpoint(resume=False)
    checkpoint.save(*parts, Progress(step=3), {})
    checkpoint.wait()
    folder = tmp_path / "stage_32.resume"
    return folder / (folder / "latest").read_text()


def test_every_file_that_is_read_to_go_on_is_known_by_its_hash(saved, tmp_path):
    hashes = json.loads((saved / "state.json").read_text())["sha256"]
    assert hashes.keys() == {path.name for path in saved.iterdir()} - {"model.json"}
    assert all(file_hash(saved / name) == value for name, value in hashes.items() if name != "state.json")
    about = json.loads((tmp_path / "stage_32.json").read_text())
    assert about["sha256"] == hashes["model.pth"] == file_hash(tmp_path / "stage_32.pth")


def test_each_rank_has_a_random_state_of_its_own(open_checkpoint, run, monkeypatch, tmp_path):
    """Rank 0 writes all of them, because another machine may not see its folder."""
    first, second = torch.get_rng_state(), torch.Generator().manual_seed(7).get_state()
    monkeypatch.setattr(run, "gather", lambda value: [{"cpu": first}, {"cpu": second}], raising=False)
    checkpoint, parts = open_checkpoint(resume=False)
    checkpoint.save(*parts, Progress(step=1), {})
    checkpoint.wait()
    (folder,) = (tmp_path / "stage_32.resume").glob("step_*")
    for rank, state in enumerate((first, second)):
        assert torch.equal(torch.load(folder / f"rank_{rank}.pt", weights_only=True)["cpu"], state)
    assert "rank_1.pt" in json.loads((folder / "state.json").read_text())["sha256"]
    del checkpoint  # and its lock
    checkpoint, parts = open_checkpoint(resume=True)
    run.rank = 1
    checkpoint._restore(folder, *parts)
    assert torch.equal(torch.get_rng_state(), second)


@pytest.mark.parametrize("name", ["model.pth", "optimizer.pt", "rank_0.pt"])
@pytest.mark.parametrize("place", [0.3, 0.6])
def test_a_flipped_bit_is_seen_and_its_file_named(open_checkpoint, saved, name, place):
    flip(saved / name, place)
    checkpoint, parts = open_checkpoint(resume=True)
    with pytest.raises(UserError, match=f"{saved / name} is damaged.*--overwrite"):
        checkpoint.load(*parts)


@pytest.mark.parametrize("place", [0.02, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6])
def test_a_flipped_bit_in_the_state_itself(open_checkpoint, saved, place):
    """Whether the file is then still JSON, with another number in it, or not JSON."""
    path = saved / "state.json"
    flip(path, place)
    checkpoint, parts = open_checkpoint(resume=True)
    with pytest.raises(UserError, match=r"state\.json is damaged"):
        checkpoint.load(*parts)


def test_another_step_in_the_state_is_seen(open_checkpoint, saved):
    path = saved / "state.json"
    path.write_text(path.read_text().replace('"step": 3', '"step": 2'))
    checkpoint, parts = open_checkpoint(resume=True)
    with pytest.raises(UserError, match=r"state\.json is damaged"):
        checkpoint.load(*parts)


@pytest.mark.parametrize("place", [0.02, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6])
def test_a_flipped_bit_in_what_is_told_of_the_weights(open_checkpoint, saved, place, tmp_path):
    """It would be copied beside the weights, where the next stage relies on it."""
    published = (tmp_path / "stage_32.json").read_bytes()
    flip(saved / "model.json", place)
    checkpoint, parts = open_checkpoint(resume=True)
    with pytest.raises(UserError, match=f"{saved / 'model.json'} is damaged.*--overwrite"):
        checkpoint.load(*parts)
    assert (tmp_path / "stage_32.json").read_bytes() == published


def test_metrics_may_be_added_to_what_is_told_of_the_weights(open_checkpoint, saved):
    checkpoint, parts = open_checkpoint(resume=True)
    checkpoint.load(*parts)
    checkpoint.save(*parts, Progress(step=4), {"loss": 2.0})
    checkpoint.wait()
    checkpoint.add_metrics(Progress(step=4), {"loss": 2.0, "eval_loss": 3.0})
    del checkpoint
    checkpoint, parts = open_checkpoint(resume=True)
    assert checkpoint.load(*parts).step == 4


@pytest.mark.parametrize("content", [b"", b"step_00000009", b"step_0000000\xb3", b"."])
def test_a_damaged_pointer_does_not_cost_the_run_it_points_to(open_checkpoint, saved, content, capsys):
    pointer = saved.parent / "latest"
    pointer.write_bytes(content)
    checkpoint, parts = open_checkpoint(resume=True)
    assert checkpoint.load(*parts).step == 3
    assert f"{pointer} is damaged: it names " in capsys.readouterr().err
    assert pointer.read_text() == saved.name


def test_without_a_pointer_the_first_save_was_cut_short(open_checkpoint, saved, capsys):
    (saved.parent / "latest").unlink()
    checkpoint, parts = open_checkpoint(resume=True)
    assert checkpoint.load(*parts).step == 3
    assert capsys.readouterr().err == ""


# ------------------------------------------------------------------------------------------------- several states


@pytest.fixture
def save_steps(open_checkpoint, tmp_path):
    """Saves these steps of a new run, each with other weights; returns the resume folder."""

    def save(*steps: int, **flags):
        checkpoint, parts = open_checkpoint(resume=False, flags=flags)
        for step in steps:
            torch.nn.init.constant_(parts[0].norm.weight, step)
            checkpoint.save(*parts, Progress(step=step), {})
        checkpoint.wait()
        return tmp_path / "stage_32.resume"

    return save


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.is_dir())


@pytest.mark.parametrize(
    ("flags", "kept"),
    [
        ({}, [4, 5]),
        ({"keep_last": 1}, [5]),
        ({"keep_last": 9}, [1, 2, 3, 4, 5]),
        ({"keep_every": 2}, [2, 4, 5]),
        ({"keep_last": 1, "keep_every": 3}, [3, 5]),
    ],
)
def test_as_many_states_stay_as_the_flags_say(save_steps, flags, kept):
    assert names(save_steps(1, 2, 3, 4, 5, **flags)) == [f"step_{step:08d}" for step in kept]


@pytest.mark.parametrize("name", ["model.pth", "optimizer.pt", "rank_0.pt", "state.json", "model.json"])
@pytest.mark.parametrize("damage", ["flip", "truncate", "empty", "remove"])
def test_a_damaged_state_is_named_and_the_one_before_it_used(open_checkpoint, save_steps, name, damage, capsys):
    folder = save_steps(1, 2, 3)
    path = folder / "step_00000003" / name
    content = path.read_bytes()
    if damage == "flip":
        flip(path, 0.3)
    elif damage == "remove":
        path.unlink()
    else:
        path.write_bytes(content[: len(content) // 2] if damage == "truncate" else b"")
    checkpoint, parts = open_checkpoint(resume=True)
    assert checkpoint.load(*parts).step == 2
    assert parts[0].norm.weight[0] == 2
    told = capsys.readouterr().err
    assert str(path) in told
    published = torch.load(folder.parent / "stage_32.pth", weights_only=True)
    assert published["norm.weight"][0] == 2
    assert (folder / "latest").read_text() == "step_00000002"
    checkpoint.save(*parts, Progress(step=3), {})
    checkpoint.wait()
    assert len(names(folder)) == 2  # the damaged one is gone
    del checkpoint
    checkpoint, parts = open_checkpoint(resume=True)
    assert checkpoint.load(*parts).step == 3


def test_of_two_damaged_states_the_one_before_both_is_used(open_checkpoint, save_steps, capsys):
    folder = save_steps(1, 2, 3, keep_last=3)
    for step in (2, 3):
        flip(folder / f"step_0000000{step}" / "model.pth")
    checkpoint, parts = open_checkpoint(resume=True)
    assert checkpoint.load(*parts).step == 1
    told = capsys.readouterr().err.splitlines()
    assert ["step_00000003" in told[0], "step_00000002" in told[1], len(told)] == [True, True, 2]


def test_states_that_a_later_run_left_are_not_gone_back_to(open_checkpoint, save_steps):
    """A state after the one that the pointer names does not belong to the run's past."""
    folder = save_steps(1, 2, 3, keep_last=3)
    (folder / "latest").write_text("step_00000002")
    flip(folder / "step_00000002" / "model.pth")
    checkpoint, parts = open_checkpoint(resume=True)
    assert checkpoint.load(*parts).step == 1


def test_all_states_damaged(open_checkpoint, save_steps):
    folder = save_steps(1, 2)
    for step in (1, 2):
        flip(folder / f"step_0000000{step}" / "model.pth")
    checkpoint, parts = open_checkpoint(resume=True)
    with pytest.raises(
        UserError, match=r"step_00000002/model\.pth is damaged.*no earlier state is intact.*--overwrite"
    ):
        checkpoint.load(*parts)


def test_a_save_that_fails_is_told_by_the_next_and_the_one_before_is_whole(open_checkpoint, save_steps, monkeypatch):
    folder = save_steps(1)
    checkpoint, parts = open_checkpoint(resume=True)
    checkpoint.load(*parts)

    def full(content, path):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(trainer.checkpoint, "save_tensors", full)
        checkpoint.save(*parts, Progress(step=2), {})
        with pytest.raises(UserError, match="step_00000002: No space left on device; the previous file is intact"):
            checkpoint.save(*parts, Progress(step=3), {})
    assert names(folder) == ["step_00000001"]
    checkpoint.wait()  # it is reported once
    del checkpoint
    checkpoint, parts = open_checkpoint(resume=True)
    assert checkpoint.load(*parts).step == 1


def test_what_is_trained_while_a_save_is_written_is_not_in_it(open_checkpoint, tmp_path, monkeypatch):
    going_on, write = threading.Event(), Checkpoint._write

    def later(self, *content):
        going_on.wait(60)
        write(self, *content)

    monkeypatch.setattr(Checkpoint, "_write", later)
    checkpoint, parts = open_checkpoint(resume=False)
    model, optimizer, _ = parts
    for step in (1, 2):  # the second in the first one's memory
        for p in model.parameters():
            p.grad = torch.ones_like(p)
        optimizer.step()
        expected = {key: value.clone() for key, value in model.state_dict().items()}
        moment = optimizer.state[model.norm.weight]["exp_avg"].clone()
        going_on.clear()
        checkpoint.save(*parts, Progress(step=step), {})
        for p in model.parameters():
            torch.nn.init.zeros_(p)
        optimizer.state[model.norm.weight]["exp_avg"].zero_()
        going_on.set()
        checkpoint.wait()
        folder = tmp_path / "stage_32.resume" / f"step_0000000{step}"
        saved = torch.load(folder / "model.pth", weights_only=True)
        assert all(torch.equal(saved[key], value) for key, value in expected.items())
        states = torch.load(folder / "optimizer.pt", weights_only=True)["optimizer"]["state"].values()
        assert any(torch.equal(state["exp_avg"], moment) for state in states)


def test_the_best_weights_by_held_out_loss_are_kept_beside_the_last(open_checkpoint, tmp_path):
    best = {"save_best": True}
    checkpoint, parts = open_checkpoint(resume=False, flags=best)
    for step, loss in ((1, 3.0), (2, 2.0), (3, None), (4, 2.5)):
        torch.nn.init.constant_(parts[0].norm.weight, step)
        checkpoint.save(*parts, Progress(step=step), {})
        checkpoint.add_metrics(Progress(step=step), {"eval_loss": loss})

    def kept() -> tuple[int, float]:
        weights = torch.load(tmp_path / "stage_best_32.pth", weights_only=True)
        about = json.loads((tmp_path / "stage_best_32.json").read_text())
        assert about["sha256"] == file_hash(tmp_path / "stage_best_32.pth")
        assert about["step"] == weights["norm.weight"][0]
        return about["step"], about["metrics"]["eval_loss"]

    assert kept() == (2, 2.0)
    del checkpoint
    checkpoint, parts = open_checkpoint(resume=True, flags=best)
    checkpoint.load(*parts)
    for step, loss in ((5, 2.2), (6, 1.5)):
        torch.nn.init.constant_(parts[0].norm.weight, step)
        checkpoint.save(*parts, Progress(step=step), {})
        checkpoint.add_metrics(Progress(step=step), {"eval_loss": loss})
        assert kept() == {5: (2, 2.0), 6: (6, 1.5)}[step]


def test_a_run_of_a_version_that_kept_no_hashes_goes_on(open_checkpoint, saved, tmp_path):
    for path in (saved / "state.json", saved / "model.json", tmp_path / "stage_32.json"):
        content = json.loads(path.read_text())
        del content["sha256"]
        content.pop("about", None)
        path.write_text(json.dumps(content))
    checkpoint, parts = open_checkpoint(resume=True)
    assert checkpoint.load(*parts).step == 3
    flip(tmp_path / "stage_32.pth")
    del checkpoint
    checkpoint, parts = open_checkpoint(resume=True)
    assert checkpoint.load(*parts).step == 3


def test_resume_mends_weights_that_were_damaged_where_people_look_for_them(open_checkpoint, saved, tmp_path):
    flip(tmp_path / "stage_32.pth")
    checkpoint, parts = open_checkpoint(resume=True)
    assert checkpoint.load(*parts).step == 3
    assert (tmp_path / "stage_32.pth").read_bytes() == (saved / "model.pth").read_bytes()


def test_resume_mends_a_json_that_a_crash_left_behind_its_weights(open_checkpoint, saved, tmp_path):
    beside = tmp_path / "stage_32.json"
    beside.write_text(beside.read_text().replace('"step": 3', '"step": 2'))
    checkpoint, parts = open_checkpoint(resume=True)
    assert checkpoint.load(*parts).step == 3
    assert beside.read_bytes() == (saved / "model.json").read_bytes()


def test_a_step_is_saved_though_folders_of_earlier_runs_have_its_name(open_checkpoint, saved, tmp_path):
    """Two folders, of which one could not be deleted."""
    shutil.copytree(saved, saved.with_name(saved.name + "_"))
    checkpoint, parts = open_checkpoint(resume=True)
    checkpoint.save(*parts, Progress(step=3, tokens=77), {})
    checkpoint.wait()
    del checkpoint
    checkpoint, parts = open_checkpoint(resume=True)
    assert checkpoint.load(*parts).tokens == 77
    assert [path.name for path in saved.parent.glob("step_*")] == [(saved.parent / "latest").read_text()]


def test_a_file_system_without_locks_is_told_and_the_run_goes_on(open_checkpoint, monkeypatch, capsys, tmp_path):
    def lock(path, wait):
        raise NoLocksError(errno.ENOLCK, "No locks available", str(path))

    monkeypatch.setattr(trainer.run_lock, "lock", lock)
    checkpoint, parts = open_checkpoint(resume=False)
    checkpoint.save(*parts, Progress(step=3), {})
    checkpoint.wait()
    told = capsys.readouterr().err
    assert "file system without locks" in told
    assert told.count("\n") == 1
    assert (tmp_path / "stage_32.pth").is_file()


def test_a_worker_does_not_keep_the_lock_of_a_run_that_is_gone(open_checkpoint):
    checkpoint, _ = open_checkpoint(resume=False)
    go_on, ended = os.pipe()
    started, begun = os.pipe()
    pid = os.fork()
    if pid == 0:  # like a DataLoader's worker, it lives on for a while
        os.write(begun, b".")  # the fork handlers have run in the child
        os.close(ended)
        os.read(go_on, 1)
        os._exit(0)
    os.read(started, 1)
    with pytest.raises(UserError, match=f"process {os.getpid()} on "):
        open_checkpoint(resume=False)
    del checkpoint
    open_checkpoint(resume=False)
    os.close(ended)
    os.waitpid(pid, 0)
    for end in (go_on, started, begun):
        os.close(end)


# ---------------------------------------------------------------------------------------- changes allowed on resume

CHANGES = {  # settings that change the numbers, each with another value
    **{"max_seq_len": 32, "packing": False, "optimizer": "muon", "seed": 1},
    "eval_interval": 0,
}
SHARING = {"batch_size", "accumulation_steps", "deepspeed", "zero_stage"}  # if a step still has the same rows
MAY_CHANGE = {
    *("epochs", "max_steps", "learning_rate", "warmup_iters", "grad_clip", "dtype"),
    *("out_dir", "device", "num_workers", "log_interval", "save_interval", "eval_path", "resume", "overwrite"),
    *("compile", "gradient_checkpointing", "tracker", "use_wandb", "wandb_project", "local_rank", "ddp"),
    *("dim", "n_layers", "use_moe", "tokenizer"),  # compared through the architecture and the tokenizer's hash,
    *("generation", "num_experts_per_tok", "rope_theta", "rope_scaling", "inference_rope_scaling"),  # as are these
    *("data_path", "cache_limit"),  # the data by its content
    *("save_minutes", "keep_last", "keep_every", "save_best", "stop_after", "stall_timeout"),
    *("offload", "skip_bad_lines"),
}


def training_args(*flags: str):
    return training_parser("", data_path="data.jsonl", batch_size=4, learning_rate=1e-3).parse_args(flags)


def test_each_flag_is_one_that_changes_the_numbers_or_one_that_does_not():
    assert vars(training_args()).keys() == CHANGES.keys() | MAY_CHANGE | SHARING


@pytest.fixture
def resumed_with(run, tiny_tokenizer, tmp_path):
    """Resumes a saved run with other settings; returns the step that it resumes at."""
    config = LMConfig(dim=32, n_layers=1, n_heads=4, vocab_size=64)

    def start(resume: bool, config: LMConfig = config, facts: dict | None = None, **changes):
        args = training_args("--out_dir", str(tmp_path), "--dim", "32", *(["--resume"] if resume else []))
        for name, value in changes.items():
            setattr(args, name, value)
        deepspeed = args.deepspeed or "zero_stage" in changes
        run.deepspeed_config = {"zero_optimization": {"stage": args.zero_stage}} if deepspeed else None
        model = MiniMindLM(config)
        parts = (model, make_optimizer(model, args), torch.amp.GradScaler("cpu", enabled=False))
        return Checkpoint(args, "stage", config, tiny_tokenizer, run, **facts or {"beta": 0.1}), parts

    checkpoint, parts = start(False)
    checkpoint.save(*parts, Progress(step=1), {})
    checkpoint.wait()
    del checkpoint

    def go_on(**changes) -> int:
        checkpoint, parts = start(True, **changes)
        return checkpoint.load(*parts).step

    return go_on


@pytest.mark.parametrize("name", CHANGES)
def test_what_changes_the_numbers_is_refused(resumed_with, name):
    told = "held out of data_path" if name == "eval_interval" else name
    with pytest.raises(UserError, match=f"the saved run had {told} "):
        resumed_with(**{name: CHANGES[name]})


def test_held_out_lines_of_their_own_file_are_not_kept_aside(resumed_with):
    with pytest.raises(UserError, match="the saved run had held out of data_path True"):
        resumed_with(eval_path="other.jsonl")


@pytest.mark.parametrize("changes", [{"facts": {"beta": 0.2}}, {"n_kv_heads": 4}, {"rope_theta": 1e4}])
def test_so_is_another_model(resumed_with, changes):
    (name,) = changes
    if name != "facts":
        changes = {"config": LMConfig(dim=32, n_layers=1, n_heads=4, vocab_size=64, **changes)}
    with pytest.raises(UserError, match=f"the saved run had {'beta' if name == 'facts' else name} "):
        resumed_with(**changes)


@pytest.mark.parametrize(
    ("name", "value"), [("learning_rate", 2e-3), ("num_workers", 2), ("save_interval", 7), ("cache_limit", 8)]
)
def test_what_does_not_is_taken(resumed_with, capsys, name, value):
    assert resumed_with(**{name: value}) == 1
    assert (f"--resume: {name} was 0.001 and is now 0.002" in capsys.readouterr().out) == (name == "learning_rate")


@pytest.mark.parametrize(
    ("batch_size", "accumulation_steps", "world_size", "told"),
    [
        (8, 1, 1, "this one has 8: with 1 processes, --batch_size x --accumulation_steps must be 4;"),
        (4, 3, 1, "batch_size 4 x accumulation_steps 1 x 1 processes = 4 rows, this one has 12"),
        (4, 1, 2, "this one has 8: with 2 processes, --batch_size x --accumulation_steps must be 2;"),
        (4, 1, 3, "this one has 12: 4 rows cannot be divided among 3 processes: use 1;"),
    ],
)
def test_a_step_has_the_same_rows_when_a_run_goes_on(
    resumed_with, run, monkeypatch, batch_size, accumulation_steps, world_size, told
):
    run.world_size = world_size
    monkeypatch.setattr(run, "gather", lambda value: [value] * world_size, raising=False)
    with pytest.raises(UserError, match=told):
        resumed_with(batch_size=batch_size, accumulation_steps=accumulation_steps)


@pytest.mark.parametrize(("batch_size", "accumulation_steps"), [(2, 2), (1, 4)])
def test_a_step_may_be_cut_up_otherwise(resumed_with, capsys, batch_size, accumulation_steps):
    assert resumed_with(batch_size=batch_size, accumulation_steps=accumulation_steps) == 1
    told = capsys.readouterr().out
    assert f"batch_size was 4 and is now {batch_size}" in told
    assert f"accumulation_steps was 1 and is now {accumulation_steps}" in told
    assert "the same rows as before" in told


@pytest.mark.parametrize("theirs", [{"grad_clip": 2.0}, {"teacher_hash": "abc"}])
def test_ranks_with_other_settings_than_rank_0_are_named(open_checkpoint, monkeypatch, theirs):
    checkpoint, parts = open_checkpoint(resume=False)
    monkeypatch.setattr(checkpoint.runtime, "gather", lambda value: [value, value, value | theirs], raising=False)
    (name,) = theirs
    with pytest.raises(UserError, match=f"rank 2 has {name} {theirs[name]}, but rank 0 has "):
        checkpoint.load(*parts)
