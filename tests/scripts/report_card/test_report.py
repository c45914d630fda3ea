"""scripts/report.py on weights trained by the real scripts: a first call, a second, an interrupted one, and other files
in the folder."""

import importlib.util
import json
import shutil
import subprocess
import sys

import pytest

from scripts.evaluation.harness_model import MiniMindHarness
from scripts.evaluation.perplexity import perplexity
from scripts.report_card import examining, making, stages_found
from scripts.report_card.examining import predict
from tests.conftest import SENTENCES
from tests.running import ROOT, TINY_TRAINING, call_script, one_error_line, run_script
from trainer.errors import UserError
from trainer.loading import load_for_inference


@pytest.fixture
def out(tiny_out, tmp_path):
    return shutil.copytree(tiny_out, tmp_path / "out")


@pytest.fixture
def text(tmp_path):
    (tmp_path / "held.txt").write_text("\n".join(SENTENCES), encoding="utf-8")
    return tmp_path / "held.txt"


@pytest.fixture
def flags(out, tokenizer_dir, text):
    return ("--out_dir", out, "--tokenizer", tokenizer_dir, "--ppl", text, "--device", "cpu")


def kept(out, name: str) -> dict:
    return json.loads((out / "report" / f"{name}.json").read_text(encoding="utf-8"))["parts"]


def test_a_real_run_writes_both_reports_beside_the_weights(out, flags):
    done = run_script("scripts/report.py", *flags)
    assert done.stdout == f"report: {(out / 'report.html').resolve()}\n"
    for page in ("report.md", "report.html"):
        written = (out / page).read_text(encoding="utf-8")
        for said in ("pretrain_32", "full_sft_32", "bits per byte", "held.txt: 1 texts", "Who are you?"):
            assert said in written, (page, said)
    assert "<svg" in (out / "report.html").read_text(encoding="utf-8")
    assert kept(out, "full_sft_32").keys() == {"parameters", "answers", "held out"}


def test_a_second_call_computes_nothing(out, flags, monkeypatch, capsys):
    call_script("scripts/report.py", *flags)
    first = (out / "report.html").read_text(encoding="utf-8")
    monkeypatch.setattr(examining, "load_for_inference", None)  # not to be called
    call_script("scripts/report.py", *flags)
    assert (out / "report.html").read_text(encoding="utf-8") == first
    assert "not examined" not in capsys.readouterr().err


def test_other_weights_or_another_text_are_examined_anew_and_nothing_else(out, flags, text, monkeypatch):
    call_script("scripts/report.py", *flags)
    before = kept(out, "full_sft_32")
    text.write_text("Something else.", encoding="utf-8")
    call_script("scripts/report.py", *flags)
    after = kept(out, "full_sft_32")
    assert after["answers"] == before["answers"]
    assert after["held out"]["asked"] != before["held out"]["asked"]
    loaded = []
    monkeypatch.setattr(
        examining, "load_for_inference", lambda path, *rest: loaded.append(path.name) or load_for_inference(path, *rest)
    )
    for suffix in (".pth", ".json"):
        shutil.copy(out / f"pretrain_32{suffix}", out / f"full_sft_32{suffix}")
    call_script("scripts/report.py", *flags)
    assert loaded == ["full_sft_32.pth"]


def test_a_call_that_was_cut_short_goes_on(out, flags, monkeypatch):
    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(examining, "predict", stop)
    call_script("scripts/report.py", *flags, exit_code=130)
    assert kept(out, "pretrain_32").keys() == {"parameters", "answers"}
    monkeypatch.undo()
    monkeypatch.setattr(examining, "write_answers", lambda questions, chats, *_: {"Who?": f"chats: {chats}"})
    call_script("scripts/report.py", *flags)
    assert kept(out, "pretrain_32")["answers"]["found"] != {"Who?": "chats: False"}
    assert kept(out, "full_sft_32")["answers"]["found"] == {"Who?": "chats: True"}


def test_what_cannot_be_examined_is_named_and_the_rest_is_examined(out, flags, capsys):
    (out / "foreign_512.pth").write_text("not weights", encoding="utf-8")
    (out / "torn_32.pth").write_bytes((out / "full_sft_32.pth").read_bytes()[:999])
    shutil.copy(out / "full_sft_32.pth", out / "mad_32.pth")
    (out / "mad_32.json").write_text("{", encoding="utf-8")
    (out / "lora").mkdir()
    shutil.copy(out / "full_sft_32.pth", out / "lora" / "lost_32.pth")
    (out / "full_sft_32.metrics.jsonl").write_text('{"step": 1, "loss": "low"}\n{"step"', encoding="utf-8")
    call_script("scripts/report.py", *flags)
    told = capsys.readouterr().err
    page = (out / "report.md").read_text(encoding="utf-8")
    for name in ("foreign_512", "torn_32", "mad_32", "lora/lost_32"):
        assert f"{name} cannot be evaluated: " in told
        assert f"- {name}: " in page
    assert "held out" in kept(out, "full_sft_32")


def test_a_damaged_result_is_made_again(out, flags):
    call_script("scripts/report.py", *flags)
    whole = kept(out, "full_sft_32")
    for damaged in ("{", "[]", '{"weights": 1, "parts": []}'):
        (out / "report" / "full_sft_32.json").write_text(damaged, encoding="utf-8")
        call_script("scripts/report.py", *flags)
        assert kept(out, "full_sft_32") == whole


def test_an_adapter_is_asked_on_its_base(out, flags, tokenizer_dir, tiny_data):
    run_script(
        *("train_lora.py", *TINY_TRAINING, "--out_dir", out, "--tokenizer", tokenizer_dir, "--lora_name", "x"),
        *("--data_path", tiny_data / "sft_mini_512.jsonl", "--max_steps", "2", "--learning_rate", "1"),
    )
    call_script("scripts/report.py", *flags)
    adapter, base = (kept(out, name) for name in ("lora/x_32", "full_sft_32"))
    assert adapter["held out"]["found"]["nats"] != base["held out"]["found"]["nats"]
    assert adapter["parameters"]["found"]["parameters"] < base["parameters"]["found"]["parameters"]
    assert [found.name for found in stages_found.find_stages(out)] == ["pretrain_32", "full_sft_32", "lora/x_32"]


def test_what_a_model_says_never_becomes_markup(out, flags, monkeypatch):
    monkeypatch.setattr(examining, "write_answers", lambda *_: {"Who?": "<script>alert(1)</script>"})
    call_script("scripts/report.py", *flags)
    for page in ("report.md", "report.html"):
        written = (out / page).read_text(encoding="utf-8")
        assert "<script>" not in written
        assert "&lt;script&gt;alert(1)&lt;/script&gt;" in written


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda out: ("--out_dir", out / "none"), "is not a folder"),
        (lambda out: ("--out_dir", out / "pretrain_32.pth"), "is not a folder"),
        (lambda out: ("--out_dir", out / "pretrain_32.resume"), "has no weights"),
        (lambda out: ("--ppl", out / "none.txt"), "is missing"),
        (lambda out: ("--ppl", out / "pretrain_32.pth"), "is not UTF-8"),
        (lambda out: ("--data_dir", out), "has no folder by the name of a benchmark"),
        (lambda out: ("--data_dir", out / "none"), "is not a folder"),
    ],
)
def test_what_is_wrong_is_told_in_one_line(out, flags, change, said):
    done = run_script("scripts/report.py", *flags, *change(out), exit_code=2)
    assert said in one_error_line(done)


def test_a_report_of_the_users_own_is_not_replaced(out, flags):
    (out / "report.md").write_text("my notes", encoding="utf-8")
    done = run_script("scripts/report.py", *flags, exit_code=2)
    assert "was not written by this script" in one_error_line(done)
    assert (out / "report.md").read_text(encoding="utf-8") == "my notes"


def test_benchmarks_are_asked_once(out, flags, tmp_path, monkeypatch):
    for split, count in (("dev", 5), ("test", 8)):
        (tmp_path / "data" / "cmmlu" / split).mkdir(parents=True)
        rows = "".join(f"{n},{n} + 1?,{n},{n + 1},{n + 2},{n + 3},B\n" for n in range(count))
        (tmp_path / "data" / "cmmlu" / split / "anatomy.csv").write_text(f",Question,A,B,C,D,Answer\n{rows}")
    flags = (*flags, "--data_dir", tmp_path / "data", "--num_fewshot", "2")
    call_script("scripts/report.py", *flags)
    scores = kept(out, "full_sft_32")["benchmark cmmlu"]["found"]
    assert scores["cmmlu"]["n"] == 8
    assert scores["cmmlu"]["chance"] == 0.25
    assert "8 questions. Chance level: 25.0%." in (out / "report.html").read_text(encoding="utf-8")
    monkeypatch.setattr(examining, "load_for_inference", None)
    call_script("scripts/report.py", *flags)


def test_a_benchmark_is_asked_again_for_its_own_files_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(examining, "require_harness", lambda: None)
    for name in ("cmmlu", "piqa"):
        (tmp_path / name / "test").mkdir(parents=True)
        (tmp_path / name / "test" / "a.csv").write_text(name)
    benchmarks = examining.Benchmarks(tmp_path, 2, 9)
    before = {name: benchmarks.asked(name) for name in benchmarks.names}
    assert before["cmmlu"]["files"].keys() == {"test/a.csv"}
    (tmp_path / "cmmlu" / "test" / "a.csv").write_text("another")
    assert benchmarks.asked("cmmlu") != before["cmmlu"]
    assert benchmarks.asked("piqa") == before["piqa"]
    others = (examining.Benchmarks(tmp_path, *given).asked("piqa") for given in ((3, 9), (2, 8)))
    assert all(asked != before["piqa"] for asked in others)


def test_without_the_harness_there_are_no_benchmarks_and_all_else(tmp_path, monkeypatch):
    code = "import sys; sys.modules |= {'lm_eval': None, 'datasets': None}; import scripts.report_card.making"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="lm_eval, the harness, is not installed"):
        examining.Benchmarks(tmp_path, 0, None)


def test_bits_per_byte_are_those_of_eval_benchmarks(out, tokenizer_dir, monkeypatch):
    model, tokenizer = load_for_inference(out / "pretrain_32.pth", tokenizer_dir)
    monkeypatch.setattr(examining, "WINDOW", 16)
    ours, theirs = predict(SENTENCES, model, tokenizer), perplexity(MiniMindHarness(model, tokenizer), SENTENCES, 16)
    assert ours[:3] == theirs[:3]
    assert ours.nats == pytest.approx(theirs.nats, rel=1e-5)


def test_the_demos_exams_are_asked_of_the_demos_models(out, flags, tmp_path, monkeypatch):
    data = tmp_path / "demo"
    data.mkdir()
    line = {"question": "Who?", "answers": ["I"], "kind": "who", "lang": "en"}
    (data / "eval_facts.jsonl").write_text(json.dumps(line) + "\n", encoding="utf-8")
    (data / "pretrain_hq.jsonl").write_text('{"text": "It is."}\n' * 200, encoding="utf-8")
    for module in (examining, stages_found):
        monkeypatch.setattr(module, "DATA", data)
    monkeypatch.setattr(stages_found, "OUT", out)
    monkeypatch.setattr(examining, "load_for_inference", lambda path, _, lora: load_for_inference(path, flags[3], lora))
    making.make_report(out, device="cpu")
    assert kept(out, "full_sft_32")["exam eval_facts.jsonl"]["found"] == {"en": [0, 1]}
    examining.remember_exam(out, "full_sft_32", "eval_facts.jsonl", {"en": [1, 1]})  # as the demo does
    monkeypatch.setattr(examining, "load_for_inference", None)
    assert "exam eval_facts.jsonl" not in kept(out, "pretrain_32")
    assert kept(out, "pretrain_32")["held out"]["found"]["texts"] == 2
    making.make_report(out, device="cpu")
    page = (out / "report.md").read_text(encoding="utf-8")
    assert "facts, en (1)" in page
    assert "100.0%" in page
