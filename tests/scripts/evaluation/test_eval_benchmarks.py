"""scripts/eval_benchmarks.py, run for real: what it prints and writes, how it resumes, what it refuses."""

import importlib.util
import json
import math
import os
import shutil
import subprocess
import sys

import pytest
import torch
from PIL import Image

from scripts.eval_benchmarks import partial_of
from scripts.evaluation.journal import Journal
from scripts.formats.transformers_folder import write_folder
from tests.conftest import SENTENCES, write_jsonl
from tests.running import ROOT, call_script
from tests.scripts.conversion import make_model, save_model
from tests.scripts.evaluation.publisher_files import N, write_all
from tests.scripts.vlm_weights import save_vlm

SCRIPT = "scripts/eval_benchmarks.py"


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return write_all(tmp_path_factory.mktemp("files"))


@pytest.fixture(scope="module")
def weights(tiny_tokenizer, tmp_path_factory):
    """One model as a .pth and as a Llama folder, an MoE model, and a folder of another architecture."""
    from transformers import GPT2Config, GPT2LMHeadModel

    folder = tmp_path_factory.mktemp("weights")
    model = make_model(len(tiny_tokenizer), max_seq_len=1024)
    save_model(model, tiny_tokenizer, folder / "full_sft_64.pth")
    write_folder(model, tiny_tokenizer, folder / "llama")
    save_model(make_model(len(tiny_tokenizer), use_moe=True), tiny_tokenizer, folder / "full_sft_64_moe.pth")
    torch.manual_seed(0)
    ids = {"bos_token_id": 1, "eos_token_id": 2}
    other = GPT2LMHeadModel(GPT2Config(vocab_size=len(tiny_tokenizer), n_embd=32, n_layer=1, n_head=2, **ids))
    other.save_pretrained(folder / "gpt2")
    tiny_tokenizer.save_pretrained(folder / "gpt2")
    return folder


@pytest.fixture(scope="module")
def common(files, tokenizer_dir):
    return ("--data_dir", files, "--tokenizer", tokenizer_dir, "--device", "cpu", "--batch_size", "4")


def read(path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))


def test_models_of_every_kind_stand_side_by_side(weights, common, tmp_path, capsys):
    these = [weights / name for name in ("full_sft_64.pth", "llama", "full_sft_64_moe.pth", "gpt2")]
    out, samples = tmp_path / "r.json", tmp_path / "s.jsonl"
    flags = ("--tasks", "cmmlu", "piqa", "--num_fewshot", "0", "--output", out, "--log_samples", samples)
    call_script(SCRIPT, *flags, *common, "--weights", *these)
    shown = capsys.readouterr()
    assert "gpt2 is evaluated with transformers, because it is not a MiniMind" in shown.err
    for words in ("cmmlu", "  China-specific", "  agronomy", "piqa", "chance", "share of answers by place"):
        assert words in shown.out
    models = read(out)["models"]
    assert list(models) == [str(path) for path in these]
    results = [models[str(path)]["results"] for path in these]
    assert results[0] == results[1] != results[3]
    for found in results:
        assert {*found["piqa"]} == {"n", "acc", "acc_norm", "stderr", "chance", "p"}
        assert found["cmmlu"]["n"] == 2 * N
        assert found["cmmlu"]["chance"] == 0.25
    lines = [json.loads(line) for line in samples.read_text(encoding="utf-8").splitlines()]
    assert len(lines) == 4 * 3 * N
    assert lines[0].keys() >= {"model", "task", "prompt", "options", "logprobs", "target", "chosen", "right"}
    assert sum(line["right"] for line in lines[: 2 * N]) / (2 * N) == results[0]["cmmlu"]["acc"]
    with Image.open(tmp_path / "r.png") as chart:
        assert chart.width > 500
    assert not partial_of(out).exists()

    call_script(SCRIPT, "--compare", out)
    shown = capsys.readouterr().out
    assert "against" in shown
    assert "McNemar" in shown
    assert f"+0.0 ± 0.0 points, right alone 0 and 0 of {2 * N}, p 1" in shown


def test_a_model_is_found_by_the_flags_of_eval_model(weights, common, tmp_path, capsys):
    flags = ("--tasks", "sciq", "--out_dir", weights, "--dim", "64", "--n_layers", "2")
    call_script(SCRIPT, *flags, *common, "--output", tmp_path / "a.json")
    call_script(SCRIPT, *flags, *common, "--use_moe", "--prompt", "raw", "chat", "--output", tmp_path / "b.json")
    by_file = ("--tasks", "sciq", "--weights", weights / "full_sft_64.pth")
    call_script(SCRIPT, *by_file, *common, "--output", tmp_path / "c.json")
    assert read(tmp_path / "a.json")["results"] == read(tmp_path / "c.json")["results"]
    assert list(read(tmp_path / "b.json")["models"]) == ["full_sft_64_moe (raw)", "full_sft_64_moe (chat)"]
    capsys.readouterr()
    call_script(SCRIPT, "--compare", tmp_path / "a.json", tmp_path / "b.json")
    assert "full_sft_64_moe (chat) against a" in capsys.readouterr().out


def test_the_language_half_of_a_vlm_is_asked(files, tiny_tokenizer, tokenizer_dir, clip_dir, tmp_path, capsys):
    path = save_vlm(tiny_tokenizer, clip_dir, tmp_path / "sft_vlm_32.pth")
    flags = ("--data_dir", files, "--tokenizer", tokenizer_dir, "--device", "cpu", "--limit", "2")
    call_script(SCRIPT, "--tasks", "siqa", "--weights", path, *flags)
    assert "siqa" in capsys.readouterr().out


def test_a_run_cut_short_goes_on_to_the_same_results(weights, common, tmp_path, capsys, monkeypatch):
    flags = ("--tasks", "cmmlu", *common, "--weights", weights / "full_sft_64.pth")
    call_script(SCRIPT, *flags, "--output", tmp_path / "whole.json")
    out, written = tmp_path / "cut.json", []
    add = Journal.add_partial

    def add_until_killed(self, *answer):
        if len(written) == 37:
            raise KeyboardInterrupt
        written.append(answer)
        add(self, *answer)

    monkeypatch.setattr(Journal, "add_partial", add_until_killed)
    call_script(SCRIPT, *flags, "--output", out, exit_code=130)
    monkeypatch.setattr(Journal, "add_partial", add)
    assert not out.exists()
    with open(partial_of(out), "a", encoding="utf-8") as file:
        file.write('{"key": "cut in two')
    capsys.readouterr()
    call_script(SCRIPT, *flags, "--output", out, exit_code=2)
    assert "a run was interrupted; --resume continues it" in capsys.readouterr().err
    call_script(SCRIPT, *flags, "--output", out, "--resume")
    assert f"37 of {8 * N} are known" in capsys.readouterr().err
    assert read(out) == read(tmp_path / "whole.json")
    assert not partial_of(out).exists()


def test_another_model_knows_nothing_of_what_the_first_answered(tmp_path):
    first = Journal(tmp_path / "j", "one")
    first.add_partial("loglikelihood", ("a", "b"), (-1.5, True))
    first.close()
    again, other = Journal(tmp_path / "j", "one"), Journal(tmp_path / "j", "another")
    assert again.known[again.key("loglikelihood", ("a", "b"))] == [-1.5, True]
    assert other.key("loglikelihood", ("a", "b")) not in other.known
    assert again.key("loglikelihood", ("a", "c")) not in again.known
    for journal in (again, other):
        journal.close()


def test_controls_and_perplexity(weights, common, tmp_path, capsys):
    text = tmp_path / "held_out.txt"
    text.write_text("".join(SENTENCES), encoding="utf-8")
    lines = write_jsonl(tmp_path / "held_out.jsonl", [{"text": sentence} for sentence in SENTENCES])
    out = tmp_path / "r.json"
    flags = ("--tasks", "sciq", "--control", "shuffle", "--ppl", text, lines, "--window", "32", "--output", out)
    call_script(SCRIPT, *flags, *common, "--weights", weights / "full_sft_64.pth")
    found = read(out)
    assert found["settings"]["control"] == "shuffle"
    assert set(found["ppl"]) == {str(text), str(lines)}
    for predicted in found["ppl"].values():
        assert predicted["bytes"] == sum(len(sentence.encode()) for sentence in SENTENCES)
        assert predicted["bits_per_byte"] == pytest.approx(predicted["nats"] / math.log(2) / predicted["bytes"])
    assert "bits/byte" in capsys.readouterr().out


def test_c_evals_test_split_is_written_for_its_site(weights, common, tmp_path, capsys):
    out = tmp_path / "submit.json"
    call_script(SCRIPT, "--tasks", "ceval", "--submission", out, *common, "--weights", weights / "llama")
    found = read(out)
    assert set(found) == {"accountant", "logic"}
    assert list(found["logic"]) == [str(number) for number in range(N)]
    assert set(found["logic"].values()) <= set("ABCD")
    assert "acc" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        ((), "nothing to evaluate: give --tasks NAME, --ppl FILE or --compare JSON"),
        (("--tasks", "mmlu"), "--tasks mmlu: choose from ceval"),
        (("--tasks", "piqa", "--resume"), "--resume continues the run of an --output"),
        (("--tasks", "piqa", "--submission", "x.json"), "--submission is for --tasks ceval only"),
        (("--tasks", "piqa", "--weights", "nowhere.pth"), "nowhere.pth is missing"),
        (("--ppl", "nowhere.txt"), "nowhere.txt is missing"),
        (("--compare", "nowhere.json"), "nowhere.json is not a file written by --output"),
    ],
)
def test_what_cannot_be_done_ends_in_one_line(weights, common, capsys, flags, told):
    chosen = () if "--weights" in flags else ("--weights", weights / "full_sft_64.pth")
    call_script(SCRIPT, *flags, *common, *chosen, exit_code=2)
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert told in errors[0]


def test_nothing_is_replaced_unasked(weights, common, tmp_path, capsys):
    flags = ("--tasks", "piqa", *common, "--weights", weights / "full_sft_64.pth", "--limit", "2")
    for name in ("r.json", "r.png", "s.jsonl"):
        (tmp_path / name).write_text("mine", encoding="utf-8")
        written = ("--log_samples", tmp_path / name) if name == "s.jsonl" else ("--output", tmp_path / "r.json")
        call_script(SCRIPT, *flags, *written, exit_code=2)
        assert f"{name} already exists" in capsys.readouterr().err
        assert (tmp_path / name).read_text(encoding="utf-8") == "mine"
        if name == "r.json":
            (tmp_path / name).unlink()
    call_script(SCRIPT, *flags, "--output", tmp_path / "r.json", "--overwrite")
    assert read(tmp_path / "r.json")["results"]["piqa"]["n"] == 2


def test_a_damaged_folder_says_both_readers_reasons(weights, common, tmp_path, capsys):
    folder = shutil.copytree(weights / "gpt2", tmp_path / "broken")
    (folder / "model.safetensors").write_bytes(b"nothing")
    call_script(SCRIPT, "--tasks", "piqa", *common, "--weights", folder, exit_code=2)
    assert "nor can transformers load it" in capsys.readouterr().err


def test_without_the_harness_it_says_what_to_type(monkeypatch, capsys):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    call_script(SCRIPT, "--tasks", "piqa", exit_code=2)
    told = "error: lm_eval, the harness, is not installed: python -m pip install -r requirements-eval.txt\n"
    assert capsys.readouterr().err == told


def test_help_waits_for_nothing_heavy():
    code = "import sys, scripts.eval_benchmarks; print(*sys.modules)"
    env = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'scripts'}"}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True, text=True, check=True)
    assert not {"lm_eval", "torch", "datasets", "transformers"} & set(done.stdout.split())
