"""The comparisons of stages, apart from training: which lines they train on, and how they report a result."""

import pytest

from benchmarks import distillation_memory, real_text
from benchmarks.comparison.training_runs import spread
from benchmarks.distillation_gain import first_lines
from benchmarks.reasoning_gain import without_thinking
from scripts.demo.measures import with_error
from trainer.errors import UserError


def test_the_last_lines_are_kept_aside_and_none_is_lost(tmp_path, monkeypatch):
    monkeypatch.setattr(real_text, "OUT", tmp_path / "out")
    (tmp_path / "out").mkdir()
    lines = [f'{{"text": "第{n}行,\u2028 one line"}}\n' for n in range(real_text.HELD_OUT_LINES + 3)]
    (tmp_path / "x.jsonl").write_text("".join(lines), encoding="utf-8-sig")
    learned, kept = (path.read_text(encoding="utf-8") for path in real_text.split(tmp_path / "x.jsonl"))
    assert learned == "".join(lines[:3])
    assert kept == "".join(lines[3:])


@pytest.mark.parametrize(("lines", "told"), [(None, "--data_dir"), (real_text.HELD_OUT_LINES, "none would be left")])
def test_a_file_that_cannot_be_split_is_told(tmp_path, lines, told):
    if lines is not None:
        (tmp_path / "x.jsonl").write_text("{}\n" * lines, encoding="utf-8")
    with pytest.raises(UserError, match=told):
        real_text.split(tmp_path / "x.jsonl")


def test_the_split_files_are_not_split_again(tmp_path, monkeypatch):
    monkeypatch.setattr(real_text, "OUT", tmp_path)
    (tmp_path / "x.jsonl").write_text("{}\n" * (real_text.HELD_OUT_LINES + 1), encoding="utf-8")
    with pytest.raises(UserError, match="name the folder of the whole ones"):
        real_text.split(tmp_path / "x.jsonl")


def test_answers_alone_are_what_stood_between_the_answer_tags():
    def chat(answer):
        return {"conversations": [{"role": "user", "content": "<think>?"}, {"role": "assistant", "content": answer}]}

    thought = "<think>\n1 + 2 = 3\n</think>\n<answer>\n3\n</answer>"
    lines = [chat(thought), chat("Paris.")]
    assert without_thinking(lines) == [chat("3"), chat("Paris.")]
    assert lines == [chat(thought), chat("Paris.")]


def test_the_first_lines_are_written_and_too_many_are_told(tmp_path):
    (tmp_path / "x.jsonl").write_text('{"一": "\u2028"}\n{"b": 2}\n{"c": 3}\n', encoding="utf-8")
    written = first_lines(tmp_path / "x.jsonl", 2, tmp_path / "new" / "y.jsonl")
    assert written.read_text(encoding="utf-8") == '{"一": "\u2028"}\n{"b": 2}\n'
    assert (
        first_lines(tmp_path / "x.jsonl", 3, tmp_path / "z.jsonl").read_bytes() == (tmp_path / "x.jsonl").read_bytes()
    )
    with pytest.raises(UserError, match="has 3"):
        first_lines(tmp_path / "x.jsonl", 4, tmp_path / "y.jsonl")


def test_mean_and_spread():
    assert spread([1.0, 2.0, 3.0], ".1f") == "2.0 ± 1.0"
    assert spread([1.25], ".2f") == "1.25"
    assert with_error(50, 100) == "50.0% ± 5.0%"


def test_the_three_forms_of_a_distillation_step_learn_the_same(monkeypatch, capsys):
    monkeypatch.setattr(distillation_memory, "SIZES", {"student": {"dim": 32, "n_layers": 1}, "teacher": {"dim": 48}})
    learned = []

    def target_mask(labels, right=distillation_memory.target_mask):
        learned.append(int((labels >= 0).sum()))
        return right(labels)

    monkeypatch.setattr(distillation_memory, "target_mask", target_mask)
    flags = "--batch_size 3 --max_seq_len 16 --learned 0.25 --rounds 1 --dtype float32 --device cpu"
    monkeypatch.setattr("sys.argv", ["distillation_memory.py", *flags.split()])
    distillation_memory.main()
    rows = [line.split() for line in capsys.readouterr().out.splitlines()[-3:]]
    assert set(learned) == {3 * 4}
    assert [row[0] for row in rows] == ["all", "learned", "in"]
    assert len({tuple(row[-2:]) for row in rows}) == 1  # loss, gradient
    assert all(float(row[-4].replace(",", "")) >= 0 for row in rows)
