"""The metrics file and the curve: what a crash or a number that is none cannot spoil."""

import json

from trainer.metrics import draw_curve, read_metrics


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
