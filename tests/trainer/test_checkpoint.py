"""A checkpoint without a stage: what is saved and known by its hash, and what may differ when a run goes on."""

import errno
import hashlib
import json
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import trainer.checkpoint
import trainer.run_lock
from dataset.locks import NoLocksError
from model import LMConfig, MiniMindLM
from trainer.arguments import training_parser
from trainer.checkpoint import SKIPPED_LIMIT, Checkpoint, Progress
from trainer.errors import UserError
from trainer.files import file_hash
from trainer.runtime import Runtime, Totals
from trainer.schedule import make_optimizer


@pytest.fixture
def run(monkeypatch):
    run = Runtime(torch.device("cpu"), torch.float32)
    monkeypatch.setattr(Runtime, "catch_signals", lambda self: None)
    return run


@pytest.fixture
def open_checkpoint(run, tiny_tokenizer, tmp_path):
    config = LMConfig(dim=32, n_layers=1, n_heads=4, vocab_size=64)

    def make(resume: bool, **how):
        args = SimpleNamespace(
            **{"out_dir": str(tmp_path), "dim": 32, "use_moe": False, "data_path": "data.jsonl", "max_seq_len": 64},
            **{"resume": resume, "overwrite": False, "deepspeed": None, "eval_interval": 0, "eval_path": None},
            **{"learning_rate": 1e-3, "optimizer": "adamw"},
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
    expected = torch.rand(4)
    del checkpoint  # and its lock
    checkpoint, parts = open_checkpoint(resume=True)
    assert checkpoint.load(*parts).step == 1
    assert torch.equal(torch.rand(4), expected)


def test_progress_adds_up_steps_tokens_and_time(monkeypatch):
    clock = iter([100.0, 103.0, 105.0])
    monkeypatch.setattr(trainer.checkpoint.time, "monotonic", lambda: next(clock))
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
    state = torch.load(tmp_path / "stage_32.pth", weights_only=True)
    assert state["output.weight"].data_ptr() == state["tok_embeddings.weight"].data_ptr()


def flip(path, place: float = 0.5) -> None:
    """Change one bit of a file."""
    content = bytearray(path.read_bytes())
    content[int(len(content) * place)] ^= 1
    path.write_bytes(content)


@pytest.fixture
def saved(open_checkpoint, tmp_path):
    """The folder of a run that has saved its third step."""
    checkpoint, parts = open_checkpoint(resume=False)
    checkpoint.save(*parts, Progress(step=3), {})
    folder = tmp_path / "stage_32.resume"
    return folder / (folder / "latest").read_text()


def test_every_file_that_is_read_to_go_on_is_known_by_its_hash(saved, tmp_path):
    hashes = json.loads((saved / "state.json").read_text())["sha256"]
    assert hashes.keys() == {path.name for path in saved.iterdir()} - {"model.json"}
    assert all(file_hash(saved / name) == value for name, value in hashes.items() if name != "state.json")
    about = json.loads((tmp_path / "stage_32.json").read_text())
    assert about["sha256"] == hashes["model.pth"] == file_hash(tmp_path / "stage_32.pth")


def test_each_rank_has_a_random_state_of_its_own(open_checkpoint, run, monkeypatch, tmp_path):
    """Rank 0 writes them all: another machine may not see its folder."""
    first, second = torch.get_rng_state(), torch.Generator().manual_seed(7).get_state()
    monkeypatch.setattr(run, "gather", lambda value: [{"cpu": first}, {"cpu": second}], raising=False)
    checkpoint, parts = open_checkpoint(resume=False)
    checkpoint.save(*parts, Progress(step=1), {})
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
    """Whether it is still JSON then, with another number in it, or none."""
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
    """It would be copied beside the weights, where the next stage goes by it."""
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
    checkpoint.add_metrics(Progress(step=4), {"loss": 2.0, "eval_loss": 3.0})
    del checkpoint
    checkpoint, parts = open_checkpoint(resume=True)
    assert checkpoint.load(*parts).step == 4


@pytest.mark.parametrize("content", [b"", b"step_00000009", b"step_0000000\xb3", b"."])
def test_a_damaged_pointer_does_not_cost_the_run_it_points_to(open_checkpoint, saved, content):
    pointer = saved.parent / "latest"
    pointer.write_bytes(content)
    checkpoint, parts = open_checkpoint(resume=True)
    with pytest.raises(UserError, match=f"{pointer} is damaged, .*: write the existing {saved.name} into it"):
        checkpoint.load(*parts)
    pointer.write_text(saved.name)
    assert checkpoint.load(*parts).step == 3


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
    """Two, where one of them could not be deleted."""
    shutil.copytree(saved, saved.with_name(saved.name + "_"))
    checkpoint, parts = open_checkpoint(resume=True)
    checkpoint.save(*parts, Progress(step=3, tokens=77), {})
    del checkpoint
    checkpoint, parts = open_checkpoint(resume=True)
    assert checkpoint.load(*parts).tokens == 77
    assert [path.name for path in saved.parent.glob("step_*")] == [(saved.parent / "latest").read_text()]


def test_what_a_state_holds_beyond_ours_is_flushed_and_hashed(open_checkpoint, tmp_path, monkeypatch):
    """DeepSpeed's files, which it neither flushes nor hashes: all are on the disk before the folder gets its name."""
    flushed, rename = [], os.replace
    monkeypatch.setattr(trainer.checkpoint, "flush_to_disk", lambda path: flushed.append(path.name))

    def replace(old, new) -> None:
        if Path(new).name.startswith("step_"):
            flushed.append("the folder's name")
        rename(old, new)

    monkeypatch.setattr(os, "replace", replace)
    checkpoint, (model, *others) = open_checkpoint(resume=False)
    checkpoint.runtime.deepspeed_config = {"zero_optimization": {}}

    def save_checkpoint(folder: str, tag: str) -> None:
        (Path(folder) / tag).mkdir()
        (Path(folder) / tag / "part.pt").write_bytes(b"12")

    model.save_checkpoint = save_checkpoint
    monkeypatch.setattr(trainer.checkpoint, "full_state_dict", lambda *_: {})
    checkpoint.save(model, *others, Progress(step=1), {})
    checkpoint.runtime.deepspeed_config = None
    assert flushed == ["part.pt", "the folder's name"]
    (folder,) = (tmp_path / "stage_32.resume").glob("step_*")
    hashes = json.loads((folder / "state.json").read_text())["sha256"]
    assert hashes["engine/part.pt"] == hashlib.sha256(b"12").hexdigest()


def test_a_file_system_without_locks_is_told_and_the_run_goes_on(open_checkpoint, monkeypatch, capsys, tmp_path):
    def lock(path, wait):
        raise NoLocksError(errno.ENOLCK, "No locks available", str(path))

    monkeypatch.setattr(trainer.run_lock, "lock", lock)
    checkpoint, parts = open_checkpoint(resume=False)
    checkpoint.save(*parts, Progress(step=3), {})
    told = capsys.readouterr().err
    assert "file system without locks" in told
    assert told.count("\n") == 1
    assert (tmp_path / "stage_32.pth").is_file()


def test_a_worker_does_not_keep_the_lock_of_a_run_that_is_gone(open_checkpoint):
    checkpoint, _ = open_checkpoint(resume=False)
    go_on, ended = os.pipe()
    started, begun = os.pipe()
    pid = os.fork()
    if pid == 0:  # as a DataLoader's worker does, it lives on for a while
        os.write(begun, b".")  # what is done at a fork has been done in here
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


# ------------------------------------------------------------------------------- what may change when a run goes on

CHANGES = {  # what changes the numbers, and something else to give
    **{"max_seq_len": 32, "packing": False, "skip_bad_lines": True, "batch_size": 7, "accumulation_steps": 3},
    **{"optimizer": "muon", "seed": 1, "deepspeed": True, "zero_stage": 1, "eval_interval": 0},
}
MAY_CHANGE = {
    *("epochs", "max_steps", "learning_rate", "warmup_iters", "grad_clip", "dtype"),
    *("out_dir", "device", "num_workers", "log_interval", "save_interval", "eval_path", "resume", "overwrite"),
    *("compile", "gradient_checkpointing", "tracker", "use_wandb", "wandb_project", "local_rank", "ddp"),
    *("dim", "n_layers", "use_moe", "tokenizer"),  # by the architecture and the tokenizer's hash,
    *("generation", "num_experts_per_tok", "rope_theta", "rope_scaling", "inference_rope_scaling"),  # and these, too
    *("data_path", "cache_limit"),  # the data by what it holds
}


def training_args(*flags: str):
    return training_parser("", data_path="data.jsonl", batch_size=4, learning_rate=1e-3).parse_args(flags)


def test_each_flag_is_one_that_changes_the_numbers_or_one_that_does_not():
    assert vars(training_args()).keys() == CHANGES.keys() | MAY_CHANGE


@pytest.fixture
def resumed_with(run, tiny_tokenizer, tmp_path):
    """A run that is saved, and goes on with other settings."""
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


@pytest.mark.parametrize(
    "changes", [{"world_size": 2}, {"facts": {"beta": 0.2}}, {"n_kv_heads": 4}, {"rope_theta": 1e4}]
)
def test_so_is_another_model_or_number_of_processes(resumed_with, run, monkeypatch, changes):
    (name,) = changes
    if name == "world_size":
        run.world_size = 2
        monkeypatch.setattr(run, "gather", lambda value: [value, value], raising=False)
        changes = {}
    elif name != "facts":
        changes = {"config": LMConfig(dim=32, n_layers=1, n_heads=4, vocab_size=64, **changes)}
    with pytest.raises(UserError, match=f"the saved run had {'beta' if name == 'facts' else name} "):
        resumed_with(**changes)


@pytest.mark.parametrize(
    ("name", "value"), [("learning_rate", 2e-3), ("num_workers", 2), ("save_interval", 7), ("cache_limit", 8)]
)
def test_what_does_not_is_taken(resumed_with, capsys, name, value):
    assert resumed_with(**{name: value}) == 1
    assert (f"--resume: {name} was 0.001 and is now 0.002" in capsys.readouterr().out) == (name == "learning_rate")


@pytest.mark.parametrize("theirs", [{"grad_clip": 2.0}, {"teacher_hash": "abc"}])
def test_ranks_with_other_settings_than_rank_0_are_named(open_checkpoint, monkeypatch, theirs):
    checkpoint, parts = open_checkpoint(resume=False)
    monkeypatch.setattr(checkpoint.runtime, "gather", lambda value: [value, value, value | theirs], raising=False)
    (name,) = theirs
    with pytest.raises(UserError, match=f"rank 2 has {name} {theirs[name]}, and rank 0 has "):
        checkpoint.load(*parts)
