"""scripts/inspect_data.py: it shows what training trains on, and its counts are right."""

import json
import re
import sys

import pytest
from PIL import Image

from model.chat import DEFAULT_SYSTEM_PROMPT
from scripts.inspect_data import BRACKETS, COLOURS, STAGES, Spelling, guess_stage
from tests.conftest import SENTENCES, write_jsonl
from tests.running import call_script

DEFAULT = f"<s>system\n{DEFAULT_SYSTEM_PROMPT}</s>\n"


def chat(question: str, answer: str, **more) -> dict:
    return {"conversations": [{"role": "user", "content": question}, {"role": "assistant", "content": answer} | more]}


@pytest.fixture
def inspect(tmp_path, tokenizer_dir, capsys):
    """Writes lines and runs the script on them; returns its output and its error."""

    def run(lines: list[dict] | str, *flags, exit_code: int = 0) -> tuple[str, str]:
        path = tmp_path / "data.jsonl"
        if isinstance(lines, str):
            path.write_text(lines, encoding="utf-8")
        else:
            write_jsonl(path, lines)
        call_script("scripts/inspect_data.py", path, "--tokenizer", tokenizer_dir, *flags, exit_code=exit_code)
        return capsys.readouterr()

    return run


def test_a_chat_is_shown_as_it_is_learned(inspect):
    lines = [
        chat("2 + 3?", "5", reasoning_content="Count.") | {"system": "Be brief.", "id": 1},
        chat("Say </s>", "An \x1b[31m⟦answer⟧") | {"id": 2},
        chat("not shown", "no"),
    ]
    printed, _ = inspect(lines, "--samples", "2")
    assert "data.jsonl as --stage reason reads it (SFTDataset)\n" in printed
    assert (
        "<s>system\nBe brief.</s>\n<s>user\n2 + 3?</s>\n<s>assistant\n"
        "⟦<think>\nCount.\n</think>\n<answer>\n5\n</answer></s>⟧\n\n--- sample 2: "
    ) in printed
    assert DEFAULT + "<s>user\nSay \\</s></s>\n<s>assistant\n⟦An \\x1b[31m\\⟦answer\\⟧</s>⟧\n\n" in printed
    assert "not shown" not in printed
    assert "ignored keys: id 2\nlines: 3\n" in printed
    shown = [tuple(map(int, found)) for found in re.findall(r"--- sample \d: (\d+) tokens, (\d+) targets", printed)]
    assert len(shown) == 2
    assert "lost by" not in printed


def test_pairs_are_shown_side_by_side(inspect):
    printed, _ = inspect([{"prompt": "Hi", "chosen": "Hello", "rejected": "Go away"}])
    for side, answer in (("chosen", "Hello"), ("rejected", "Go away")):
        assert re.search(rf"--- pair 1, {side}: \d+ tokens, \d+ targets\n", printed)
        assert DEFAULT + f"<s>user\nHi</s>\n<s>assistant\n⟦{answer}</s>⟧\n" in printed
    assert "as --stage dpo reads it (DPODataset)" in printed


def test_pictures_are_shown_by_name(inspect, tmp_path, clip_dir):
    Image.new("RGB", (40, 32), "red").save(tmp_path / "red.png")
    line = chat("<image>\nWhat?", "Red.") | {"image": "red.png"}
    printed, _ = inspect([line], "--images_path", tmp_path, "--vision_model", clip_dir)
    assert "as --stage vlm reads it (VLMDataset)" in printed
    assert DEFAULT + "<s>user\n<image red.png: 4 places>\nWhat?</s>\n<s>assistant\n⟦Red.</s>⟧\n" in printed


@pytest.mark.skipif(sys.platform in ("win32", "darwin"), reason="names are Unicode there")
def test_a_picture_s_name_may_be_any_bytes(inspect, tmp_path, clip_dir):
    Image.new("RGB", (40, 32), "red").save(tmp_path / "\udcff.png", "png")
    lines = [chat("<image>\nWhat?", "Red.") | {"image": name} for name in ("\udcff.png", "a\nb.png")]
    flags = ("--images_path", tmp_path, "--vision_model", clip_dir)
    printed, _ = inspect("\n".join(map(json.dumps, lines)), *flags, exit_code=2)
    assert "<image \\udcff.png: 4 places>" in printed
    assert f"line 2: the image {tmp_path}/a\\nb.png does not exist" in printed


@pytest.mark.parametrize(
    ("line", "stage"),
    [
        ({"text": "a text"}, "pretrain reads it (PretrainDataset)"),
        (chat("q", "a"), "sft reads it (SFTDataset)"),
        (chat("q", "<think>\na\n</think>\n<answer>\nb\n</answer>"), "reason reads it (SFTDataset)"),
        (chat("q", "a", reasoning_content="b"), "reason reads it (SFTDataset)"),
        (chat("q", "a") | {"image": ""}, "sft reads it (SFTDataset)"),
        (chat("q", "a") | {"image": None}, "sft reads it (SFTDataset)"),
    ],
)
def test_the_stage_is_told_by_the_first_line(inspect, line, stage):
    assert f"as --stage {stage}\n" in inspect([line])[0]


def test_a_stage_that_is_named_decides(inspect):
    printed, _ = inspect([{"text": "a text"} | chat("q", "a")], "--stage", "lora")
    assert "as --stage lora reads it (SFTDataset)" in printed
    assert "ignored keys: text 1" in printed
    _, error = inspect([chat("q", "a")], "--stage", "dpo", exit_code=2)
    assert 'the key "chosen" is missing (this is a chat, for train_full_sft.py)' in error


def test_what_is_cut_and_dropped_is_counted(inspect):
    lines = [chat("q", SENTENCES[0] * 5), chat("q", "a"), chat(SENTENCES[0] * 5, "aa")]
    whole, _ = inspect(lines)
    printed, _ = inspect(lines, "--max_seq_len", "80")
    assert "lost by" not in whole
    (before, after) = (int(re.search(r"target tokens: (\d+) of", text)[1]) for text in (whole, printed))
    lost = int(re.search(r"lost by cutting and dropping: (\d+) target tokens", printed)[1])
    assert before == after + lost
    assert "1 cut at 80 tokens, 1 dropped without targets" in printed
    assert re.search(r"--- sample 1: 80 of \d+ tokens, \d+ targets\n", printed)
    assert "--- sample 2: " in printed
    assert "--- sample 3: " not in printed


def test_bad_lines_are_listed_and_an_error_unless_they_may_be_skipped(inspect):
    lines = '{"text": "good"}\n{"text": ""}\n' + "{\n" * 30
    printed, error = inspect(lines, exit_code=2)
    assert '31 bad lines:\n  line 2: "text" is empty: {"text": ""}\n  line 3: not valid JSON' in printed
    assert "  and 11 more\n" in printed
    assert "lines: 32\n" in printed
    assert error.splitlines()[-1].startswith("error: ")
    assert "31 bad lines, listed above: training stops at the first" in error
    assert inspect(lines, "--skip_bad_lines") == (printed, "")


@pytest.mark.parametrize(
    ("lines", "shape", "stage"),
    [
        ('{"instruction": "Add", "output": "4"}', "Alpaca 1", "sft"),
        ('[{"text": "a"}, {"text": "b"}]', "text 2", "pretrain"),
        ("a,b\n1,2\n", None, None),
        ('{"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}', "ShareGPT 1", "sft"),
        ('{"question": "q", "chosen": "a", "rejected": "b"}\n{"x"', "question, chosen, rejected 1", "dpo"),
        ('{"unknown": "a"}', None, None),
    ],
)
def test_another_shape_is_shown_with_the_command_for_it(inspect, tmp_path, lines, shape, stage):
    printed, error = inspect(lines, exit_code=2)
    assert error.startswith(f"error: {tmp_path / 'data.jsonl'}: no stage can train on it")
    assert error.count("\n") == 1
    if shape is None:
        assert not printed
    else:
        assert f"shapes: {shape}\n" in printed
        assert f"python scripts/prepare_data.py {tmp_path / 'data.jsonl'} --stage {stage} --out" in error
    assert ("1 bad lines:\n  line 2: not valid JSON" in printed) == ('{"x"' in lines)


def test_lengths_duplicates_languages_and_roles_are_told(inspect, tmp_path):
    lines = [chat("Where are the seven old rivers?", "a" * n) for n in (1, 1, 300)]
    printed, _ = inspect(lines, "--plot", tmp_path / "lengths.png")
    assert "duplicate samples: 1\n" in printed
    assert "roles: user 3, assistant 3\n" in printed
    assert "languages: en 3\n" in printed
    assert (tmp_path / "lengths.png").read_bytes().startswith(b"\x89PNG")
    bars = re.search(r"samples by tokens:\n((?:  .*\n)+)", printed)[1]
    assert sum(int(line.split()[3]) for line in bars.splitlines()) == 3
    table = dict(re.findall(r"^ +(\d+): (.*)$", printed, re.MULTILINE))
    longest = int(re.search(r"longest ([\d,]+)", printed)[1].replace(",", ""))
    assert table["256"] == (
        f"1 cut, 0 dropped, {longest - 256} tokens lost" if longest > 256 else "0 cut, 0 dropped, 0 tokens lost"
    )


def test_a_seed_draws_other_samples_than_the_first(inspect):
    lines = [{"text": f"text {n}"} for n in range(100)]
    first, drawn, again = (
        re.findall(r"--- sample (\d+):", inspect(lines, *flags)[0])
        for flags in ((), ("--seed", "1"), ("--seed", "1", "--samples", "3"))
    )
    assert first == ["1", "2", "3"]
    assert drawn == again != first
    assert re.findall(r"⟦text (\d+)</s>⟧", inspect(lines, "--seed", "1")[0]) == [str(int(n) - 1) for n in drawn]


def test_at_a_terminal_what_is_learned_is_green_and_control_tokens_are_dim(tiny_tokenizer):
    bos, eos = tiny_tokenizer.bos_token_id, tiny_tokenizer.eos_token_id
    (a,) = tiny_tokenizer.encode("a", add_special_tokens=False)
    given = [bos, a, a, eos], [False, False, True, True], {}
    assert Spelling(tiny_tokenizer, COLOURS).write(*given) == "\033[2m<s>\033[0ma\033[32ma</s>\033[0m"
    assert Spelling(tiny_tokenizer, BRACKETS).write(*given) == "<s>a⟦a</s>⟧"
    given = [a, a, a, a], [False] * 4, {1: ("a.png", 2)}
    assert Spelling(tiny_tokenizer, COLOURS).write(*given) == "a\033[2m<image a.png: 2 places>\033[0ma"


def test_what_is_counted_by_hand(inspect):
    """A text of one letter is <s>, the letter and </s>; all but <s> are targets."""
    printed, _ = inspect([{"text": "a"}, {"text": "a"}, {"text": "aaa bbb"}], "--samples", "1")
    assert "\nlines: 3\n" in printed
    longest = int(re.search(r"tokens per sample: median 3, longest (\d+)\n", printed)[1])
    tokens = 6 + longest
    assert f"\ntarget tokens: {tokens - 3} of {tokens} ({(tokens - 3) / tokens:.1%})\n" in printed
    assert "--- sample 1: 3 tokens, 2 targets\n<s>⟦a</s>⟧\n\n" in printed
    assert "bad lines" not in printed


@pytest.mark.parametrize(
    ("record", "stage"),
    [
        ({"chosen": "a", "prompt": "q"}, "dpo"),
        ({"rejected": "a", "prompt": "q"}, "dpo"),
        ({"text": "a", "chosen": "b"}, "pretrain"),
        ({"image": "a.png"}, "vlm"),
        ({"conversations": []}, "sft"),
        ({"conversations": ["<think>"]}, "reason"),
        ({"conversations": [{"reasoning_content": ""}]}, "reason"),
    ],
)
def test_the_stage_of_a_line(tmp_path, record, stage):
    assert guess_stage(write_jsonl(tmp_path / "a.jsonl", [record])) == stage


def test_the_usual_length_of_every_stage():
    assert {name: (stage.dataset, stage.max_seq_len) for name, stage in STAGES.items()} == {
        **{"pretrain": ("PretrainDataset", 512), "sft": ("SFTDataset", 512), "lora": ("SFTDataset", 512)},
        **{"distill": ("SFTDataset", 512), "reason": ("SFTDataset", 1024), "dpo": ("DPODataset", 1024)},
        "vlm": ("VLMDataset", 640),
    }


@pytest.mark.parametrize(
    ("terminal", "no_colour", "coloured"), [(True, "", True), (True, "1", False), (False, "", False)]
)
def test_colours_are_for_a_terminal_that_wants_them(inspect, monkeypatch, terminal, no_colour, coloured):
    monkeypatch.setenv("NO_COLOR", no_colour)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: terminal, raising=False)
    printed, _ = inspect([{"text": "a"}])
    assert ("\033[32m" in printed) is coloured
    assert ("⟦" in printed) is not coloured


def test_a_row_needs_two_tokens_and_no_sample_need_be_shown(inspect):
    assert "--max_seq_len must be 2 or more" in inspect([{"text": "a"}], "--max_seq_len", "1", exit_code=2)[1]
    printed, _ = inspect([{"text": "a"}], "--max_seq_len", "2", "--samples", "0")
    assert "--- sample" not in printed
    assert "\ntarget tokens: 2 of 4 (50.0%)\n" in printed  # split over rows of 2
