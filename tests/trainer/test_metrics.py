"""The reports of a run: when they come, their wording, and that neither a crash nor a NaN spoils them."""

import json
import math
import sys
import time
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from dataset import DataError
from tests.running import call_script
from trainer.errors import UserError
from trainer.evaluation import EvaluationError
from trainer.metrics import Metrics, _clock, draw_curve, read_metrics
from trainer.progress import Progress
from trainer.runtime import Runtime

NOT_UTF8 = b"a\xff".decode("utf-8", "surrogateescape")


@pytest.fixture
def metrics(tmp_path, monkeypatch):
    """Makes the Metrics of a run of 10 steps, with the clock stopped at 100 s."""
    monkeypatch.setattr(time, "monotonic", lambda: 100.0)

    def make(progress: Progress, rank: int = 0) -> Metrics:
        args = SimpleNamespace(dtype="float32", use_wandb=False, tracker=None, optimizer="adamw")
        run = Runtime(torch.device("cpu"), torch.float32, rank=rank)
        return Metrics(args, tmp_path / "stage_32.pth", nn.Linear(2000, 5), 10, progress, run)

    return make


def test_what_is_due_at_a_step(metrics):
    progress = Progress()
    measured = metrics(progress)
    due = []
    for progress.step in range(1, 11):
        due.append(measured.due(4))
    assert [step for step, is_due in enumerate(due, 1) if is_due] == [4, 8, 10]  # and at the end
    progress.step = 5
    assert measured.due(4, stopping=True)


def test_a_line_of_a_step(metrics, monkeypatch, capsys, tmp_path):
    """Speed is measured since the last line, and the time left follows from all steps."""
    progress = Progress(step=2, tokens=1000, seconds=30.0)
    measured = metrics(progress)
    assert "stage_32: 0.01 M parameters, 10 steps on cpu, float32, eager, adamw\n" in capsys.readouterr().out
    progress.step, progress.tokens, progress.seconds = 3, 3000, 60.0
    monkeypatch.setattr(time, "monotonic", lambda: 104.0)
    measured.log(loss=2.0, margin=0.25, lr=1e-3, grad_norm=0.5)
    progress.step, progress.tokens, progress.seconds, progress.skipped = 4, 3200, 3600.0, 2
    monkeypatch.setattr(time, "monotonic", lambda: 114.0)
    measured.log(loss=math.inf, margin=math.nan, lr=2e-3, grad_norm=0.5)
    assert capsys.readouterr().out.splitlines() == [
        "step 3/10  loss 2.0000  lr 1.00e-03  margin 0.25  500 tokens/s  2:20 left",
        "step 4/10  loss inf  lr 2.00e-03  margin nan  20 tokens/s  2 steps skipped (not finite)  1:30:00 left",
    ]
    first, second = read_metrics(tmp_path / "stage_32.metrics.jsonl")
    assert first == {
        **{"step": 3, "tokens": 3000, "seconds": 60.0, "loss": 2.0, "margin": 0.25, "lr": 1e-3},
        **{"grad_norm": 0.5, "tokens_per_second": 500.0, "skipped": 0},
    }
    assert (second["loss"], second["margin"], second["skipped"]) == (None, None, 2)
    assert measured.last.items() >= {"loss": None, "lr": 2e-3, "skipped": 2}.items()


@pytest.mark.parametrize(("step", "kept"), [(0, []), (2, [1, 2, 2])])
def test_a_run_drops_what_an_earlier_one_told_of_steps_that_it_takes_itself(metrics, tmp_path, step, kept):
    path = tmp_path / "stage_32.metrics.jsonl"
    path.write_text("".join(json.dumps({"step": n}) + "\n" for n in (1, 2, 2, 3)))
    measured = metrics(Progress(step=step))
    assert len(read_metrics(path)) == 4  # unchanged until there is something to log
    for _ in range(2):
        measured.progress.step += 1
        measured.log(loss=1.0, lr=1e-3, grad_norm=1.0)
    assert [line["step"] for line in read_metrics(path)] == [*kept, step + 1, step + 2]


def test_the_other_ranks_say_nothing(metrics, tmp_path, capsys):
    measured = metrics(Progress(step=3, tokens=9, seconds=1.0), rank=1)
    measured.log(loss=1.0, lr=1e-3, grad_norm=1.0)
    measured.log_evaluation(lambda: {"eval_loss": 1.5})
    measured.close()
    assert capsys.readouterr().out == ""
    assert list(tmp_path.iterdir()) == []


def test_an_evaluation_is_told(metrics, tmp_path, capsys):
    measured = metrics(Progress(step=3))
    capsys.readouterr()
    measured.log_evaluation(lambda: {"eval_loss": 1.5, "eval_bits_per_byte": 0.75})
    assert capsys.readouterr().out == "step 3  held out: loss 1.5000, bits per byte 0.7500\n"
    assert read_metrics(tmp_path / "stage_32.metrics.jsonl")[0].items() >= {"step": 3, "eval_loss": 1.5}.items()
    measured.log_evaluation(lambda: {"eval_loss": 1.25})
    assert measured.last == {"eval_loss": 1.25, "eval_bits_per_byte": 0.75}  # the newest value of each


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize(
    ("cause", "told"),
    [
        (DataError("a.png is gone"), "evaluation at step 3 failed (a.png is gone)\n"),
        (ValueError("odd\nshape"), "evaluation at step 3 failed (ValueError: odd shape)\n"),
        (None, ""),  # another rank says why
    ],
)
def test_an_evaluation_that_failed_is_told_by_the_rank_that_knows_why(metrics, capsys, monkeypatch, rank, cause, told):
    monkeypatch.setenv("RANK", str(rank))
    measured = metrics(Progress(step=3), rank)

    def evaluate():
        raise EvaluationError from cause

    measured.log_evaluation(evaluate)
    assert capsys.readouterr().err == told
    assert measured.last == {}


def test_what_else_goes_wrong_in_an_evaluation_is_no_failed_evaluation(metrics):
    def evaluate():
        raise UserError("another rank has ended")

    with pytest.raises(UserError):
        metrics(Progress(step=3)).log_evaluation(evaluate)


def test_a_line_that_a_crash_cut_off_is_left_out(tmp_path):
    path = tmp_path / "a.metrics.jsonl"
    assert read_metrics(path) == []
    path.write_text('{"step": 1, "loss": 2.0}\n[3]\n{"loss": 1}\n\x00\x00\n{"step": 2, "loss": 1.5}\n{"step": 3, "lo')
    assert read_metrics(path) == [{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.5}]


def test_a_curve_of_what_there_is(tmp_path):
    path = tmp_path / "stage_32.metrics.jsonl"
    assert draw_curve(path) is None
    path.write_text('{"step": 1, "loss": null}\n')
    assert draw_curve(path) is None
    lines = [{"step": n, "loss": 3 / n} for n in range(1, 9)] + [{"step": 9, "loss": None}, {"step": 8, "eval_loss": 1}]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    image = draw_curve(path)
    assert image == tmp_path / "stage_32.png"
    assert image.read_bytes().startswith(b"\x89PNG")


def test_a_finished_run_does_not_fail_for_want_of_its_curve(tmp_path, monkeypatch, capsys):
    path = tmp_path / "a.metrics.jsonl"
    path.write_text('{"step": 1, "loss": 2.0}\n', encoding="utf-8")
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert draw_curve(path) is None
    assert "loss curve not plotted: " in capsys.readouterr().err


def test_a_name_that_is_not_utf8_has_a_curve(tmp_path):
    path = tmp_path / f"{NOT_UTF8}.metrics.jsonl"
    path.write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "loss": 1.0}\n', encoding="utf-8")
    assert draw_curve(path).read_bytes().startswith(b"\x89PNG")


def test_a_run_and_a_talk_in_folders_that_are_not_utf8(tmp_path, tiny_data, tokenizer_dir, capsys):
    folder = tmp_path / NOT_UTF8
    folder.mkdir()
    data = folder / "lines.jsonl"
    data.write_bytes((tiny_data / "pretrain_hq.jsonl").read_bytes())
    model = ("--dim", "32", "--n_layers", "2", "--device", "cpu", "--tokenizer", tokenizer_dir, "--out_dir", folder)
    training = (*model, "--max_seq_len", "64", "--batch_size", "4", "--dtype", "float32", "--compile", "0")
    call_script("train_pretrain.py", *training, "--data_path", data, "--max_steps", "1")
    assert json.loads((folder / "pretrain_32.json").read_text(encoding="utf-8"))["data_path"] == str(data)
    assert (folder / "pretrain_32.png").is_file()
    talk = ("--model_mode", "0", "--max_new_tokens", "2", "--prompt")
    call_script("eval_model.py", *model, *talk, "The")
    capsys.readouterr()
    call_script("eval_model.py", *model, *talk, NOT_UTF8, exit_code=2)
    assert capsys.readouterr().err == "error: argument --prompt: not valid UTF-8 (--help lists the flags)\n"


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [(0, "0:00"), (59.9, "0:59"), (60, "1:00"), (3599, "59:59"), (3600, "1:00:00"), (90_061, "25:01:01")],
)
def test_time_left_as_a_clock_shows_it(seconds, shown):
    assert _clock(seconds) == shown


@pytest.mark.parametrize(
    ("flags", "kind"),
    [
        ({"use_wandb": True, "tracker": None}, "wandb"),
        ({"use_wandb": False, "tracker": "swanlab"}, "swanlab"),
        ({"use_wandb": False, "tracker": None}, None),
    ],
)
def test_a_tracker_hears_what_the_file_is_told(flags, kind, tmp_path, monkeypatch):
    started, told = [], []
    tracker = SimpleNamespace(log=lambda values, step: told.append((step, values)), finish=lambda: told.append("end"))
    monkeypatch.setattr("trainer.metrics.start_tracker", lambda *given: started.append(given) or tracker)
    args = SimpleNamespace(wandb_project="tiny", dtype=None, optimizer="adamw", **flags)
    run = Runtime(torch.device("cpu"), torch.bfloat16)
    path = tmp_path / "stage_32.pth"
    measured = Metrics(args, path, nn.Linear(2, 2), 10, Progress(step=3, tokens=5, seconds=1.0), run)
    measured.log_evaluation(lambda: {"eval_loss": math.nan})
    measured.close()
    if kind is None:
        assert (started, told) == ([], [])
    else:
        assert started == [(kind, "tiny", path, vars(args) | {"dtype": "bfloat16"}, 3)]
        assert told == [(3, {"eval_loss": None}), "end"]


def test_the_lines_of_a_curve(tmp_path, monkeypatch):
    from matplotlib.figure import Figure

    drawn, save = [], Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *to, **how: drawn.append(self) or save(self, *to, **how))
    lines = [{"step": 1, "loss": 3.0}, {"step": 2, "loss": None}, {"step": 2, "eval_loss": 0.0}, {"step": 3, "loss": 0}]
    path = tmp_path / "stage_32.metrics.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    draw_curve(path)
    (axes,) = drawn[0].axes
    assert {line.get_label(): line.get_xydata().tolist() for line in axes.lines} == {
        "training": [[1, 3], [3, 0]],
        "held out": [[2, 0]],
    }
    assert (axes.get_title(), axes.get_xlabel(), axes.get_ylabel()) == ("stage_32", "optimizer step", "loss (nats)")
    path.write_text('{"step": 1, "loss": 3.0}\n')
    draw_curve(path)
    assert [line.get_label() for line in drawn[1].axes[0].lines] == ["training"]


def test_a_file_that_cannot_be_written_to_is_named(metrics, tmp_path):
    measured = metrics(Progress(step=3))
    measured.log_evaluation(lambda: {"eval_loss": 1.0})
    (tmp_path / "stage_32.metrics.jsonl").unlink()
    (tmp_path / "stage_32.metrics.jsonl").mkdir()
    with pytest.raises(UserError, match=r"stage_32\.metrics\.jsonl"):
        measured.log_evaluation(lambda: {"eval_loss": 1.0})


def test_the_reason_of_a_failed_evaluation_is_cut(metrics, capsys):
    def evaluate():
        raise EvaluationError from DataError("x" * 400)

    metrics(Progress(step=3)).log_evaluation(evaluate)
    assert f"({'x' * 300})" in capsys.readouterr().err
