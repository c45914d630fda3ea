"""benchmarks/cleaning_gain.py: the dirt has its shares, cleaning removes it, and each text is trained on equally."""

import json
import random
from collections import Counter

import pytest

from benchmarks import cleaning_gain
from tests.conftest import write_jsonl
from tests.running import call_script
from trainer.errors import UserError

CHARACTERS = "红色小鸟在海上飞天空云雨山水石头花草木书本桌子学校"
WORDS = "yellow bird over the old sea sings near green hills while grey rain falls on seven quiet boats".split()


def texts(n: int) -> list[str]:
    rng = random.Random(0)
    return [
        f"{''.join(rng.choices(CHARACTERS, k=20))}。\n{' '.join(rng.choices(WORDS, k=12))} {number}."
        for number in range(n)
    ]


def test_the_dirt_has_the_shares_that_it_is_said_to_have():
    clean = texts(1000)
    dirty = cleaning_gain.make_dirty(clean)
    assert dirty == cleaning_gain.make_dirty(clean)
    counts = Counter(dirty)
    assert len(dirty) == 1250
    assert len(dirty) - len(counts) == 250, "a fifth of the file are copies"
    with_furniture = [text for text in counts if set(text.splitlines()) & set(cleaning_gain.PAGE_FURNITURE)]
    refused = [text for text in counts if text.splitlines()[-1] in cleaning_gain.REFUSALS]
    untouched = set(clean) & set(counts)
    assert (len(with_furniture), len(refused), len(untouched)) == (100, 50, 750)
    assert all(text.splitlines()[0] in {one.splitlines()[0] for one in clean} for text in refused)
    broken = set(counts) - untouched - set(with_furniture) - set(refused)
    assert len(broken) == 100
    latin = [text for text in broken if text.isascii() or max(text) < "\u0100"]
    assert 20 < len(latin) < 80
    assert {text.encode("latin-1").decode() for text in latin} <= set(clean)


def test_three_texts_are_trained_on_and_compared_seed_by_seed(tmp_path, tokenizer_dir, monkeypatch, capsys):
    def run(command, check):  # in this process, which has its imports
        call_script("scripts/prepare_data.py", *command[2:], "--workers", "1")

    monkeypatch.setattr(cleaning_gain.subprocess, "run", run)
    monkeypatch.setattr(cleaning_gain, "SIZES", {"7M": {"dim": 32, "n_layers": 1}})
    data = write_jsonl(tmp_path / "texts.jsonl", [{"text": text} for text in texts(400)])
    common = ("--data_path", str(data), "--tokenizer", str(tokenizer_dir), "--out_dir", str(tmp_path / "out"))
    common += ("--tokens", "640", "--max_seq_len", "32", "--batch_size", "2", "--device", "cpu")

    def call(*flags: str) -> str:
        monkeypatch.setattr("sys.argv", ["cleaning_gain.py", *common, *flags])
        cleaning_gain.main()
        return capsys.readouterr().out

    said = call("--seed", "3")
    (folder,) = (tmp_path / "out" / "texts").glob("7M_*")
    results = {path.stem: json.loads(path.read_text()) for path in folder.glob("*.json")}
    assert set(results) == {"original_seed_3", "dirty_seed_3", "cleaned_seed_3"}
    assert {result["steps"] for result in results.values()} == {10}
    assert len({result["eval_loss"] for result in results.values()}) == 3
    lines = (tmp_path / "out" / "texts" / "cleaned.jsonl").read_text(encoding="utf-8").splitlines()
    cleaned = {json.loads(line)["text"] for line in lines}
    assert cleaned
    assert not [text for text in cleaned if any(furniture in text for furniture in cleaning_gain.REFUSALS)]
    held_out = (tmp_path / "out" / "texts" / "held_out.jsonl").read_text(encoding="utf-8")
    assert len(held_out.splitlines()) == 4
    assert "on cpu" in said
    assert "on cpu" not in call("--seed", "3"), "nothing is trained twice"
    assert "on cpu" not in call("--table")


def test_the_table_takes_differences_within_a_seed():
    seen = [("original", 1, 2.0), ("original", 2, 3.0), ("cleaned", 1, 2.1), ("cleaned", 2, 3.3), ("dirty", 2, 3.4)]
    results = [{"text": text, "seed": seed, "eval_bits_per_byte": bits} for text, seed, bits in seen]
    rows = [row.split() for row in cleaning_gain.table(results).splitlines()[1:]]
    assert rows == [
        ["original", "2", "2.5000", "±", "0.7071"],
        ["dirty", "1", "3.4000"],
        ["cleaned", "2", "2.7000", "±", "0.8485"],
        ["cleaned", "-", "original", "2", "0.2000", "±", "0.1414"],
        ["dirty", "-", "cleaned", "1", "0.1000"],
    ]


def test_too_few_lines_and_a_missing_file_are_named(tmp_path):
    few = write_jsonl(tmp_path / "few.jsonl", [{"text": text} for text in texts(199)])
    with pytest.raises(UserError, match="fewer than 200 lines"):
        cleaning_gain.make_files(few, tmp_path)
