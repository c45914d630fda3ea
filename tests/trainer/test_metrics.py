"""The metrics file and the curve: what a crash or a number that is none cannot spoil."""

import json
import sys
from types import SimpleNamespace

from tests.running import call_script
from trainer.arguments import training_parser
from trainer.metrics import _start_wandb, draw_curve, read_metrics

NOT_UTF8 = b"a\xff".decode("utf-8", "surrogateescape")


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
    assert "no loss curve is drawn: " in capsys.readouterr().err


def test_a_name_that_is_not_utf8_has_a_curve(tmp_path):
    path = tmp_path / f"{NOT_UTF8}.metrics.jsonl"
    path.write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "loss": 1.0}\n', encoding="utf-8")
    assert draw_curve(path).read_bytes().startswith(b"\x89PNG")


def test_weights_and_biases_gets_whole_characters(monkeypatch):
    got = {}
    wandb = SimpleNamespace(init=lambda **given: got.update(given), Error=RuntimeError)
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    args = training_parser("A stage.", batch_size=4).parse_args(["--data_path", NOT_UTF8])
    _start_wandb(args, NOT_UTF8)
    assert json.dumps(got, ensure_ascii=False).encode()
    assert got["config"]["data_path"] == got["name"] == "a\\udcff"
    assert got["config"]["batch_size"] == 4


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
    assert capsys.readouterr().err == "error: argument --prompt: it is not UTF-8 (--help lists the flags)\n"
