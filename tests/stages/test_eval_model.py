"""eval_model.py, run for real: in a pipe, at a terminal, with our weights and with a transformers folder."""

import json
import re
import shutil
import subprocess
import sys

import pytest
import torch

import eval_model
from model import MiniMindLM
from model.chat import render_chat
from model.inference.request import Piece
from model.inference.scheduler import Engine
from scripts.formats.transformers_folder import write_folder
from tests.running import ROOT, RunningScript, one_error_line, run_script
from tests.stages.terminal import Terminal
from tests.stages.training import about
from trainer.weights import load_weights

SPEED = re.compile(r"\[\d+ tokens, [\d.]+ tokens/s\]")
SHORT = ("--max_new_tokens", "12")


@pytest.fixture(scope="module")
def common(tiny_out, tokenizer_dir) -> tuple:
    return ("--dim", "32", "--device", "cpu", "--out_dir", tiny_out, "--tokenizer", tokenizer_dir, *SHORT)


@pytest.fixture(scope="module")
def ask(common):
    def run(*flags, **how):
        return run_script("eval_model.py", *common, *flags, **how)

    return run


@pytest.fixture(scope="module")
def talker(tiny_out, tiny_tokenizer) -> MiniMindLM:
    return load_weights(tiny_out / "full_sft_32.pth", None, tiny_tokenizer).eval()


def greedy(model, tokenizer, ids: list[int]) -> str:
    """The model's greedy text, by full forward passes without a cache."""
    start = len(ids)
    for _ in range(12):
        with torch.no_grad():
            ids = [*ids, int(model(torch.tensor([ids])).logits[0, -1].argmax())]
        if ids[-1] == tokenizer.eos_token_id:
            break
    return tokenizer.decode(ids[start:], skip_special_tokens=True)


def test_answers_to_prompts(ask, talker, tiny_tokenizer):
    questions = ("What is the capital?", "你好，请问今天的天气怎么样？")
    prompts = [flag for question in questions for flag in ("--prompt", question)]
    done = ask("--temperature", "0", *prompts)
    answers = []
    for question in questions:
        ids, _ = render_chat(tiny_tokenizer, [{"role": "user", "content": question}], add_generation_prompt=True)
        answers.append(f"> {question}\n{greedy(talker, tiny_tokenizer, ids)}\n")
    assert done.stdout == "\n".join(answers)
    assert [SPEED.fullmatch(line) is not None for line in done.stderr.splitlines()] == [True, True]
    piped = ask("--temperature", "0", stdin="\n\n".join(questions))  # empty lines are not questions
    assert piped.stdout == done.stdout
    assert ask("--temperature", "0", "--no-stream", *prompts).stdout == done.stdout


def test_a_pretrained_model_continues_a_text(ask, tiny_out, tiny_tokenizer):
    model = load_weights(tiny_out / "pretrain_32.pth", None, tiny_tokenizer).eval()
    ids = [1, *tiny_tokenizer.encode("The little robot", add_special_tokens=False)]
    done = ask("--model_mode", "0", "--temperature", "0", "--prompt", "The little robot")
    assert done.stdout == f"> The little robot\n{greedy(model, tiny_tokenizer, ids)}\n"


def test_no_adapter_is_named_as_minimind2s_commands_name_none(ask, talker, tiny_tokenizer):
    ids, _ = render_chat(tiny_tokenizer, [{"role": "user", "content": "你好"}], add_generation_prompt=True)
    done = ask("--lora_name", "None", "--temperature", "0", "--prompt", "你好")
    assert done.stdout == f"> 你好\n{greedy(talker, tiny_tokenizer, ids)}\n"


def test_a_seed_makes_sampling_repeatable(ask):
    one, again, other = (
        ask("--seed", seed, "--prompt", "你好", "--temperature", "2").stdout for seed in ("1", "1", "2")
    )
    assert one == again
    assert one != other


@pytest.mark.parametrize(
    ("mode", "maker"),
    [("0", "train_pretrain.py"), ("2", "train_dpo.py"), ("4", "train_grpo.py"), ("5", "train_ppo.py")],
)
def test_missing_weights_name_the_script_that_makes_them(ask, tmp_path, mode, maker):
    line = one_error_line(ask("--out_dir", tmp_path, "--model_mode", mode, exit_code=2))
    assert maker in line
    assert str(tmp_path) in line


def test_the_json_decides_the_sizes_and_the_flags_only_where_there_is_none(ask, tiny_out, tmp_path):
    flags = ("--prompt", "你好", "--temperature", "0")
    known = ask(*flags, "--n_layers", "5").stdout
    assert "full_sft_64.pth is missing" in one_error_line(ask(*flags, "--dim", "64", exit_code=2))
    shutil.copy(tiny_out / "full_sft_32.pth", tmp_path)
    done = ask(*flags, "--out_dir", tmp_path, "--n_layers", "2")
    assert done.stdout == known
    assert "has no json beside it" in done.stderr
    line = one_error_line(ask(*flags, "--out_dir", tmp_path, exit_code=2))  # 8 layers by default
    assert "n_layers 2" in line
    assert "n_layers 8" in line


def test_a_transformers_folder(ask, talker, tiny_tokenizer, tmp_path):
    talker.save_pretrained(tmp_path / "ours")
    tiny_tokenizer.save_pretrained(tmp_path / "ours")
    flags = ("--load", "1", "--temperature", "0", "--prompt", "你好")
    assert ask(*flags, "--out_dir", tmp_path / "ours").stdout == ask(*flags[2:]).stdout

    line = one_error_line(ask(*flags, "--out_dir", tmp_path, exit_code=2))
    assert "config.json" in line
    write_folder(talker, tiny_tokenizer, tmp_path / "llama")
    assert ask(*flags, "--out_dir", tmp_path / "llama").stdout == ask(*flags[2:]).stdout
    about = tmp_path / "llama" / "config.json"
    about.write_text(about.read_text().replace('"llama"', '"gpt2"'))
    assert "gpt2" in one_error_line(ask(*flags, "--out_dir", tmp_path / "llama", exit_code=2))
    shard = tmp_path / "ours" / "model.safetensors"
    shard.write_bytes(shard.read_bytes()[:1000])
    assert "model.safetensors is truncated" in one_error_line(ask(*flags, "--out_dir", tmp_path / "ours", exit_code=2))


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (("--temperature", "-1"), "--temperature"),
        (("--top_p", "0"), "--top_p"),
        (("--repetition_penalty", "0"), "--repetition_penalty"),
        (("--max_new_tokens", "8192"), "8192"),
        (("--model_mode", "6"), "--model_mode"),
        (("--load", "2"), "--load"),
        (("--device", "cuda"), "--device cpu"),
        (("--prompt", "long " * 9000), " fit"),
        (("--model_mode", "0", "--prompt", "long " * 9000), " fit"),
        (("--tokenizer", "/nowhere"), "--tokenizer"),
    ],
)
def test_wrong_flags(ask, flags, told):
    assert told in one_error_line(ask(*flags, exit_code=2, stdin="hello\n"))


def test_a_pipe_that_is_not_utf8(common, tmp_path):
    (tmp_path / "latin").write_bytes("caf\u00e9?\n".encode("latin-1"))
    done = RunningScript("eval_model.py", *common, stdin=tmp_path / "latin").wait()
    assert done.returncode == 2
    assert "not UTF-8" in one_error_line(done)


@pytest.fixture
def shown(monkeypatch, common):
    """Runs the script in this process with a model that answers "One."; returns the prompts that it was given."""

    def run(*flags, questions: list[str]) -> list[list[int]]:
        prompts = []

        def stream(self, request):
            prompts.append(request.prompt)
            return iter([Piece("One."), Piece(finish_reason="stop")])

        monkeypatch.setattr(Engine, "stream", stream)
        asked = [flag for question in questions for flag in ("--prompt", question)]
        monkeypatch.setattr(sys, "argv", ["eval_model.py", *map(str, common), *map(str, flags), *asked])
        eval_model.main()
        return prompts

    return run


def turns(*contents: str) -> list[dict[str, str]]:
    return [{"role": ("user", "assistant")[n % 2], "content": content} for n, content in enumerate(contents)]


@pytest.mark.parametrize(
    ("count", "last"),
    [
        ("0", ("C?",)),
        ("1", ("B?", "One.", "C?")),
        ("2", ("A?", "One.", "B?", "One.", "C?")),
        ("9", ("A?", "One.", "B?", "One.", "C?")),
    ],
)
def test_the_model_is_shown_so_many_earlier_questions(shown, tiny_tokenizer, count, last):
    prompts = shown("--history_cnt", count, questions=["A?", "B?", "C?"])
    assert prompts[2] == render_chat(tiny_tokenizer, turns(*last), add_generation_prompt=True)[0]


def test_what_does_not_fit_goes_whole_turns_from_the_front_and_the_system_prompt_stays(
    shown, tiny_tokenizer, tiny_out, tmp_path
):
    system = {"role": "system", "content": "Be brief."}
    whole = [system, *turns("A?", "One.", "B?", "One.", "C?")]
    for suffix in (".pth", ".json"):
        shutil.copy(tiny_out / f"full_sft_32{suffix}", tmp_path)
    story = about(tmp_path, "full_sft_32")
    room = len(render_chat(tiny_tokenizer, whole, add_generation_prompt=True)[0]) - 1  # one token too few for all
    story["config"]["max_seq_len"] = room + 12
    (tmp_path / "full_sft_32.json").write_text(json.dumps(story))
    flags = ("--history_cnt", "9", "--system", "Be brief.", "--out_dir", tmp_path)
    prompts = shown(*flags, questions=["A?", "B?", "C?"])
    left = [system, *turns("B?", "One.", "C?")]
    assert prompts[2] == render_chat(tiny_tokenizer, left, add_generation_prompt=True)[0]


def test_a_talk_at_a_terminal(common):
    screen = Terminal("eval_model.py", *common, "--history_cnt", "2")
    screen.see("[0] sample prompts  [1] type your own: ")
    screen.type("1\n")
    for question in ("What is the sea?", "今天天气很好？"):
        screen.see("\n> ")
        screen.type(f"{question}\n")
        screen.see("tokens/s]")
    screen.see("\n> ")
    screen.type("long " * 700 + "\n")  # a terminal's line ends at 4,096 characters
    screen.see("\n> ")
    screen.type("\x04")  # Ctrl-D
    assert screen.end() == 0
    assert screen.shown.count("今天天气很好？") == 1  # as typed


def test_a_question_that_does_not_fit_does_not_end_the_talk(common):
    screen = Terminal("eval_model.py", *common, "--max_new_tokens", "8100")
    screen.see("type your own: ")
    screen.type("1\n")
    screen.see("\n> ")
    screen.type("long " * 100 + "\n")
    assert " fit" in screen.see(" fit")
    screen.see("\n> ")
    screen.type("\n")
    assert screen.end() == 0


ENDLESS = """
import sys
import time
import torch
sys.path.insert(0, ROOT)
import eval_model
from model.inference.scheduler import Engine
from trainer.errors import run_main

predict = Engine._predict

def endless(self, logits, predicted):
    time.sleep(0.01)
    only = torch.full_like(logits, -1e9)
    only[:, 70] = 0
    return predict(self, only, predicted)

Engine._predict = endless
run_main(eval_model.main)
"""


def test_ctrl_c_ends_an_answer_and_not_the_talk(common, tiny_tokenizer, tmp_path):
    script = tmp_path / "endless.py"
    script.write_text(ENDLESS.replace("ROOT", repr(str(ROOT))))
    letter = tiny_tokenizer.decode([70])
    screen = Terminal(script, *common, "--max_new_tokens", "8000")
    screen.see("type your own: ")
    screen.type("1\n")
    for _ in range(2):
        screen.see("\n> ")
        screen.type("Count!\n")
        screen.see("Count!\r\n" + letter)
        screen.type("\x03")
        screen.see("[stopped]")
    screen.see("\n> ")
    screen.type("\x03")  # without an answer under way it ends the chat
    assert screen.end(again="\x03") == 130
    shown = screen.shown.partition("Exception ignored in atexit")[0]  # a repeated Ctrl-C may strike Python's own exit
    assert "Traceback" not in shown


def test_samples_at_a_terminal(common):
    screen = Terminal("eval_model.py", *common, "--max_new_tokens", "2")
    screen.see("type your own: ")
    screen.type("0\n")
    assert screen.end() == 0
    for question in eval_model.SAMPLE_QUESTIONS:
        assert f"> {question}" in screen.shown


HELP = """
import runpy, sys
sys.argv = ["eval_model.py", "--help"]
try:
    runpy.run_path("eval_model.py", run_name="__main__")
except SystemExit as end:
    assert not end.code
assert not {"torch", "transformers", "numpy"} & sys.modules.keys()
"""


def test_help_waits_for_nothing_heavy():
    done = subprocess.run([sys.executable, "-c", HELP], cwd=ROOT, capture_output=True, text=True, check=True)
    assert "--model_mode" in done.stdout
