"""train_pretrain.py, run for real: what it learns, what it writes, and which settings change nothing."""

import copy
import json
import re

import pytest
import torch

from model.tokenizer import tokenizer_hash
from tests.conftest import write_jsonl
from tests.running import one_error_line
from tests.stages.terminal import Terminal
from tests.stages.training import about, distance, losses, reports, snapshot, weights
from trainer.device import default_dtype

EPOCHS = ("--epochs", "3")


@pytest.fixture(scope="module")
def plain(pretrain, tiny_data, tmp_path_factory):
    """Three epochs in fp32, with evaluation and every report: (--out_dir, output)."""
    out = tmp_path_factory.mktemp("plain")
    held_out = write_jsonl(
        out / "held_out.jsonl", [{"text": "小机器人会数苹果，也会回答问题。"}, {"text": "def add(a, b):"}]
    )
    return out, pretrain(out, *EPOCHS, "--eval_interval", "6", "--eval_path", held_out)


def test_it_learns(plain):
    loss = losses(plain[0])
    assert len(loss) == 18
    assert loss[0] == pytest.approx(torch.tensor(589.0).log().item(), abs=0.1)  # untrained: uniform over 589
    assert loss[-1] < loss[0] - 0.3
    assert [line["lr"] for line in reports(plain[0])[:3]] == pytest.approx([5e-4, 1e-3, 1e-3])


def test_weights_are_a_plain_state_dict_and_the_json_beside_them_tells_their_story(plain, tiny_tokenizer, tiny_data):
    out, _ = plain
    state = weights(out)
    assert {value.dtype for value in state.values()} == {torch.float32}
    assert {"tok_embeddings.weight", "layers.1.feed_forward.w3.weight", "output.weight"} <= state.keys()
    story = about(out)
    assert story["stage"] == "pretrain"
    assert story["step"] == 18
    assert story["tokens"] == reports(out)[-1]["tokens"]
    assert story["tokens"] % 3 == 0  # each epoch sees all of them
    assert story["tokenizer"] == tokenizer_hash(tiny_tokenizer)
    assert story["data_path"] == str(tiny_data / "pretrain_hq.jsonl")
    assert story["config"]["dim"] == 32
    assert story["config"]["n_layers"] == 2
    assert story["metrics"]["loss"] == losses(out)[-1]
    assert story["metrics"]["eval_loss"] == reports(out)[-1]["eval_loss"]


def test_what_people_see_where_there_is_no_terminal(plain):
    _, done = plain
    assert done.stderr == ""
    first, held_out, model, *lines = done.stdout.splitlines()
    assert "60 samples" in first
    assert "of 64 filled" in first
    assert held_out.startswith("held out: ")
    assert model == "pretrain_32: 0.05 M parameters, 18 steps on cpu, float32, eager, adamw"
    steps = [line for line in lines if "held out" not in line]
    for number, line in enumerate(steps, 1):
        pattern = rf"step {number}/18  loss \d\.\d{{4}}  lr \d\.\d\de-0\d  [\d,]+ tokens/s  \d+:\d\d left"
        assert re.fullmatch(pattern, line), line
    assert [line.split("  ")[0] for line in lines if "held out" in line] == ["step 6", "step 12", "step 18"]
    assert re.search(r"held out: loss \d\.\d{4}, bits per byte \d\.\d{4}", lines[-1])


def test_what_people_see_at_a_terminal(plain, pretrain, tmp_path):
    """A bar with loss, rate, speed and time left instead of log lines; evaluations are printed above it."""
    held_out = plain[0] / "held_out.jsonl"
    screen = pretrain(tmp_path, "--eval_interval", "3", "--eval_path", held_out, by=Terminal)
    assert screen.end() == 0
    assert re.search(r"held out: loss \d\.\d{4}", screen.shown)
    assert re.search(r"50%\|.+\| 3/6 \[\d\d:\d\d<\d\d:\d\d.+loss \d\.\d+ +lr .+ tokens/s", screen.shown)
    assert re.search(r"100%\|.+\| 6/6 \[", screen.shown)
    assert "step 1/6" not in screen.shown


def test_a_curve_is_drawn(plain):
    image = (plain[0] / "pretrain_32.png").read_bytes()
    assert image.startswith(b"\x89PNG")
    assert len(image) > 10_000


CUTS = {
    "accumulation": (("--batch_size", "4", "--accumulation_steps", "2"), 1),
    "two ranks and accumulation": (("--batch_size", "2", "--accumulation_steps", "2"), 2),
}


@pytest.mark.parametrize("use_moe", ["0", "1"])
@pytest.mark.parametrize("packing", ["1", "0"])
def test_a_step_is_the_same_however_it_is_cut_up(pretrain, tmp_path, use_moe, packing):
    """Accumulation, a large batch and two ranks agree, over two epochs whose last step has fewer rows."""
    name = "pretrain_32_moe" if use_moe == "1" else "pretrain_32"
    flags = ("--use_moe", use_moe, "--packing", packing, "--epochs", "2")
    pretrain(tmp_path / "whole", *flags, "--batch_size", "8")
    for cut, (how, processes) in CUTS.items():
        pretrain(tmp_path / cut, *flags, *how, processes=processes)
        assert losses(tmp_path / cut, name) == pytest.approx(losses(tmp_path / "whole", name), abs=1e-5)
        assert distance(weights(tmp_path / cut, name), weights(tmp_path / "whole", name)) < 1e-5


def test_settings_for_memory_and_speed_change_no_number(plain, pretrain, tmp_path):
    out, _ = plain
    pretrain(tmp_path, *EPOCHS, "--gradient_checkpointing", "--num_workers", "2", "--log_interval", "6")
    assert distance(weights(tmp_path), weights(out)) < 1e-6
    assert [line["step"] for line in reports(tmp_path)] == [6, 12, 18]
    assert reports(tmp_path)[-1]["tokens"] == reports(out)[-1]["tokens"]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_learns_the_same_within_its_precision(plain, pretrain, tmp_path, dtype):
    out, _ = plain
    pretrain(tmp_path, *EPOCHS, "--dtype", dtype)
    assert losses(tmp_path)[:5] == pytest.approx(losses(out)[:5], abs=0.05)
    assert losses(tmp_path)[-1] < losses(tmp_path)[0] - 0.25
    assert {value.dtype for value in weights(tmp_path).values()} == {torch.float32}
    (state,) = tmp_path.glob("pretrain_32.resume/step_*/optimizer.pt")
    scaler = torch.load(state, weights_only=True)["scaler"]
    assert bool(scaler) == (dtype == "float16")  # it is enabled for float16 only


def test_the_default_precision_is_the_machines(pretrain, tmp_path):
    asked = copy.copy(pretrain)
    asked.common = [flag for flag in pretrain.common if flag not in ("--dtype", "float32")]
    done = asked(tmp_path, "--max_steps", "1")
    assert f" on cpu, {default_dtype(torch.device('cpu'))}, eager" in done.stdout


def test_muon_learns_faster(plain, pretrain, tmp_path):
    pretrain(tmp_path, *EPOCHS, "--optimizer", "muon", "--learning_rate", "5e-3")
    assert losses(tmp_path)[-1] < losses(plain[0])[-1]


def test_every_hundredth_sample_is_held_out_where_no_file_is_named(pretrain, tiny_data, tmp_path):
    data = tmp_path / "data.jsonl"
    data.write_text((tiny_data / "pretrain_hq.jsonl").read_text(encoding="utf-8") * 4, encoding="utf-8")
    done = pretrain(tmp_path, "--data_path", data, "--eval_interval", "2", "--max_steps", "3")
    assert "238 samples" in done.stdout
    assert "held out: " in done.stdout
    assert [line["step"] for line in reports(tmp_path) if "eval_loss" in line] == [2, 3]


def test_steps_with_infinite_loss_are_skipped_and_counted_and_many_in_a_row_stop_the_run(pretrain, tmp_path):
    """A learning rate that drives the weights out of float16's range: every later loss is infinite or NaN."""
    pretrain(tmp_path, "--max_steps", "4")
    before = weights(tmp_path)
    far = ("--epochs", "9", "--resume", "--save_interval", "100", "--learning_rate", "1e30")
    done = pretrain(tmp_path, *far, exit_code=2)
    assert "10 times in a row" in one_error_line(done)
    assert "learning_rate was 0.001 and is now 1e+30" in done.stdout
    assert distance(weights(tmp_path), before) == 0
    skipped = [line for line in reports(tmp_path) if line["skipped"]]
    assert [line["skipped"] for line in skipped] == list(range(1, 10))
    assert all(line["loss"] is None or line["grad_norm"] is None for line in skipped)
    assert "9 steps skipped" in done.stdout
    for line in (tmp_path / "pretrain_32.metrics.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=pytest.fail)  # no NaN, which is not JSON
    done = pretrain(tmp_path, "--epochs", "1", "--resume")  # and it resumes as if nothing had happened
    assert about(tmp_path)["step"] == 6
    assert about(tmp_path)["skipped"] == 0


def test_weights_and_biases_offline(pretrain, tmp_path):
    env = {"WANDB_MODE": "offline", "WANDB_DIR": str(tmp_path), "WANDB_SILENT": "true", "HOME": str(tmp_path)}
    pretrain(tmp_path / "out", "--max_steps", "2", "--use_wandb", "--wandb_project", "tiny", env=env)
    (record,) = tmp_path.glob("wandb/offline-run-*/run-*.wandb")
    content = record.read_bytes()
    for word in (b"tokens_per_second", b"pretrain_32", b"accumulation_steps", b"tiny"):
        assert word in content


def test_swanlab_offline(pretrain, tmp_path):
    env = {"SWANLAB_MODE": "offline", "SWANLAB_LOG_DIR": str(tmp_path / "swanlog"), "HOME": str(tmp_path)}
    pretrain(tmp_path / "out", "--max_steps", "2", "--tracker", "swanlab", "--wandb_project", "tiny", env=env)
    (record,) = tmp_path.glob("swanlog/run-*/run-*.swanlab")
    content = record.read_bytes()
    for word in (b"tokens_per_second", b"pretrain_32", b"tiny"):
        assert word in content
    assert "accumulation_steps" in (record.parent / "files" / "config.yaml").read_text(encoding="utf-8")


def test_tensorboard(pretrain, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    pretrain(tmp_path, "--max_steps", "2", "--tracker", "tensorboard")
    events = EventAccumulator(str(tmp_path / "pretrain_32.tensorboard"))
    events.Reload()
    assert [event.value for event in events.Scalars("loss")] == pytest.approx(losses(tmp_path))


def test_weights_and_biases_without_an_account(pretrain, tmp_path):
    env = {"WANDB_MODE": "online", "WANDB_DIR": str(tmp_path), "HOME": str(tmp_path), "WANDB_API_KEY": "", "NETRC": ""}
    done = pretrain(tmp_path / "out", "--max_steps", "2", "--use_wandb", env=env, exit_code=2)
    assert "WANDB_MODE=offline" in one_error_line(done)
    assert not snapshot(tmp_path / "out")
