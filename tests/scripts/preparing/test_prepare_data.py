"""scripts/prepare_data.py, run as a user runs it: input formats, output, and reproducibility."""

import bz2
import gzip
import json
import lzma
import random
import re

import pytest

from dataset.jsonl import JsonlReader
from dataset.records import parse_chat, parse_pair, parse_text
from tests.conftest import write_jsonl
from tests.running import call_script

WORDS = (
    "river mountain harvest winter lantern market bridge garden teacher sailor window letter morning stranger village "
    "forest kitchen journey thunder history castle picture shadow island promise"
).split()
FAST = ("--workers", "1")


def sentences(rng: random.Random, count: int) -> str:
    """Text that no other call returns."""
    return " ".join(
        f"The {' '.join(rng.choices(WORDS, k=9))} were seen by {rng.randrange(10**6)} people." for _ in range(count)
    )


def chat(question: str, answer: str, **more) -> dict:
    return {"conversations": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]} | more


@pytest.fixture
def prepare(tmp_path, tokenizer_dir, capsys):
    """Runs the script on files; returns the lines that it wrote, its output, and its report."""

    def run(*arguments, stage: str = "pretrain", exit_code: int = 0) -> tuple[list[dict], str, str]:
        out = tmp_path / "out" / "data.jsonl"
        flags = ("--stage", stage, "--out", out, "--tokenizer", tokenizer_dir, *FAST)
        call_script("scripts/prepare_data.py", *arguments, *flags, exit_code=exit_code)
        printed, error = capsys.readouterr()
        if exit_code:
            return [], printed, error
        lines = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
        return lines, printed, (tmp_path / "out" / "data.report.md").read_text(encoding="utf-8")

    return run


def test_many_formats_become_one_file(prepare, tmp_path):
    rng = random.Random(0)
    texts = [sentences(rng, 2) for _ in range(12)]
    records = [{"text": text} for text in texts]
    data = tmp_path / "in"
    data.mkdir()
    write_jsonl(data / "a.jsonl", records[:1])
    (data / "b.json").write_text(json.dumps(records[1:3], indent=2), encoding="utf-8")
    (data / "c.json").write_bytes(b"\xef\xbb\xbf" + json.dumps(records[3]).encode())
    (data / "d.csv").write_text(f'id,text\r\n1,"{texts[4]}\n{texts[5]}"\r\n2\r\n', encoding="utf-8", newline="")
    (data / "e.tsv").write_text(f'id\ttext\n1\t"{texts[6]}\n', encoding="utf-16")
    (data / "f.txt").write_text(texts[7], encoding="utf-8")
    for name, opener, text in (("g", gzip.open, texts[8]), ("h", lzma.open, texts[9]), ("i", bz2.open, texts[10])):
        ending = {"g": "gz", "h": "xz", "i": "bz2"}[name]
        with opener(data / f"{name}.jsonl.{ending}", "wt", encoding="utf-8") as file:
            file.write(json.dumps({"content": text}) + "\n")
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.table({"text": [texts[11]], "nested": [{"a": [1]}]}), data / "j.parquet")
    lines, printed, report = prepare(data)
    wanted = [*texts[:4], f"{texts[4]}\n{texts[5]}", '"' + texts[6], *texts[7:]]
    assert sorted(line["text"] for line in lines) == sorted(wanted)
    assert "1 cells in a table of 2 columns 1" in printed
    assert 'i.jsonl.bz2 (jsonl, bzip2): a text in "content" (1)' in printed
    assert "e.tsv (csv, utf-16): text (1)" in printed
    assert "j.parquet (parquet): text (1)" in printed
    assert "## What was removed" in report


def test_shapes_become_chats_that_training_reads(prepare, tmp_path):
    source = tmp_path / "mixed.jsonl"
    write_jsonl(
        source,
        [
            chat("What is the first question about?", "The first answer, in our own form."),
            {"instruction": "Translate the sentence.", "input": "Good day", "output": "An Alpaca answer to it."},
            {"conversations": [{"from": "human", "value": "Said by ShareGPT"}, {"from": "gpt", "value": "Its reply."}]},
            {
                "messages": [
                    {"role": "user", "content": "Asked of OpenAI"},
                    {"role": "assistant", "content": "Replied."},
                ]
            },
            {"question": "How is it called?", "answer": "By question and answer."},
            {"prompt": "Which one is better?", "chosen": "The chosen of two.", "rejected": "The other."},
            {"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "tool_calls": [1], "content": ""}]},
        ],
    )
    lines, printed, _ = prepare(source, stage="sft")
    assert [len(line["conversations"]) for line in lines] == [2] * 6
    assert sorted(parse_chat(line, {})[0]["content"] for line in lines) == [
        "Asked of OpenAI",
        "How is it called?",
        "Said by ShareGPT",
        "Translate the sentence.\nGood day",
        "What is the first question about?",
        "Which one is better?",
    ]
    for shape in ("ours (1)", "Alpaca (1)", "ShareGPT (1)", "OpenAI (1)", "question/answer (1)"):
        assert shape in printed
    assert "not usable: uses tools, which are not prepared: train_full_sft.py reads them as they are 1" in printed


def test_pairs_and_reasoning_come_out_in_the_stages_forms(prepare, tmp_path):
    pairs, thoughts = tmp_path / "pairs.jsonl", tmp_path / "thoughts.jsonl"
    write_jsonl(
        pairs,
        [
            {"prompt": "Who?", "chosen": "The good answer.", "rejected": "The bad answer."},
            {"chosen": "\n\nHuman: Where?\n\nAssistant: Here.", "rejected": "\n\nHuman: Where?\n\nAssistant: There."},
            {"text": "no pair at all"},
        ],
    )
    lines, printed, _ = prepare(pairs, stage="dpo")
    assert sorted(parse_pair(line, {})[1][-1]["content"] for line in lines) == ["The bad answer.", "There."]
    assert "not usable: a plain text, but --stage dpo needs chats 1" in printed
    write_jsonl(
        thoughts,
        [
            chat("How many are two and three?", "<think>Count on from two.</think>\n\nThey are five."),
            {
                "question": "And three and four of them?",
                "answer": "Seven.",
                "reasoning_content": "Count on from three.",
            },
            chat("Without a thought?", "An answer that does not think."),
        ],
    )
    lines, printed, _ = prepare(thoughts, "--overwrite", stage="reason")
    assert sorted(line["conversations"][1]["content"] for line in lines) == [
        "<think>\nCount on from three.\n</think>\n<answer>\nSeven.\n</answer>",
        "<think>\nCount on from two.\n</think>\n<answer>\nThey are five.\n</answer>",
    ]
    assert "removed: thoughts 1" in printed


def test_keys_can_be_named(prepare, tmp_path):
    source = tmp_path / "own.jsonl"
    write_jsonl(source, [{"meta": {"q": "What is asked"}, "more": "And how", "a": "What is answered"}])
    _, _, error = prepare(source, stage="sft", exit_code=2)
    assert "an unknown shape: name its keys with --map (keys: meta, more, a): 1" in error
    lines, _, _ = prepare(source, "--map", "user=meta.q+more assistant=a", stage="sft")
    assert parse_chat(lines[0], {})[0]["content"] == "What is asked\nAnd how"


def test_what_is_broken_costs_no_more_than_itself(prepare, tmp_path):
    rng = random.Random(1)
    texts = [sentences(rng, 2) for _ in range(9)]
    good = [json.dumps({"text": text}).encode() for text in texts]
    broken = [
        b'{"text": "cut',
        b"\x00\x00\x00",
        b'{"text": "\xff\xfe"}',
        b'{"text": "half \\ud83d of it, and so on."}',
        b"[1]",
    ]
    lines = [piece for pair in zip(good[:5], broken, strict=True) for piece in pair]
    (tmp_path / "a.jsonl").write_bytes(b"\xef\xbb\xbf" + b"\r\n".join(lines) + b"\r\n\r\n")
    packed = gzip.compress(b"\n".join(good[5:8]) + b"\n", mtime=0)
    (tmp_path / "b.jsonl.gz").write_bytes(packed[: -len(packed) // 3])
    (tmp_path / "c.jsonl").write_bytes(b"")
    (tmp_path / "d.json").write_bytes(b"[" + good[8] + b', {"text": "no end')
    written, printed, report = prepare(
        *(tmp_path / f"{name}" for name in ("a.jsonl", "b.jsonl.gz", "c.jsonl", "d.json"))
    )
    found = {line["text"] for line in written}
    assert found >= {*texts[:5], texts[8]}
    assert found <= {*texts}
    assert "bad lines: not valid JSON (" in printed
    assert "not UTF-8 1" in printed
    assert "not a JSON object 1" in printed
    assert "removed: broken 1" in printed
    assert re.search(r"b\.jsonl\.gz: nothing was read after line \d+: the gzip archive is broken", printed)
    assert "d.json: nothing was read after value 1: the text ends within a value" in printed
    assert "c.jsonl (jsonl): nothing to read" in printed
    assert "Not read to the end:" in report


def test_what_is_removed_is_counted_and_shown(prepare, tmp_path):
    rng = random.Random(2)
    kept = [sentences(rng, 3) for _ in range(4)]
    near = kept[0].replace("were seen by", "are seen by")
    mojibake = "这是一个用来测试的句子，它被错误地解码了。".encode().decode("latin-1")
    asked = "Which of the seven rivers in the old northern country is the longest one of all?"
    texts = [
        *(*kept, near, kept[1], mojibake, "short"),
        *("Я помню чудное мгновенье: передо мной явилась ты", "the same again and again, " * 30),
        *("Sorry, but as an AI language model I cannot help with that request.", f"{sentences(rng, 1)} {asked}"),
        f"{sentences(rng, 2)} Write to somebody@example.com.",
    ]
    write_jsonl(tmp_path / "a.jsonl", [{"text": text} for text in texts])
    write_jsonl(tmp_path / "exam.jsonl", [{"question": asked, "answer": "None."}])
    lines, printed, report = prepare(
        tmp_path / "a.jsonl", "--against", tmp_path / "exam.jsonl", "--source", "a.jsonl:CC0"
    )
    assert {line["text"] for line in lines} == {*kept, texts[-1].replace("somebody@example.com", "[EMAIL]")}
    removed = re.search("removed: (.*)", printed)[1].split(", ")
    assert sorted(removed) == [
        *("broken 1", "contaminated 1", "exact duplicates 1", "language 1", "length 1", "near duplicates 1"),
        *("refusals 1", "repeated 1"),
    ]
    assert "masked: emails 1" in printed
    assert "a.jsonl, line 8: short" in report
    assert "| CC0 |" in report
    assert (tmp_path / "out" / "data.report.png").read_bytes().startswith(b"\x89PNG")
    assert len(list(JsonlReader(tmp_path / "out" / "data.jsonl", parse_text))) == 5


def test_every_turn_of_a_line_is_cleaned(prepare, tmp_path):
    asked, said, other = (f"Wri\u200bte to {name}@example.com, please." for name in ("one", "two", "three"))
    wanted = "Write to [EMAIL], please."
    write_jsonl(tmp_path / "a.jsonl", [chat(asked, said)])
    (line,), printed, _ = prepare(tmp_path / "a.jsonl", stage="sft")
    assert [turn["content"] for turn in line["conversations"]] == [wanted, wanted]
    assert "masked: emails 1" in printed  # lines
    pair = {"prompt": asked, "chosen": f"Yes. {said}", "rejected": f"No. {other}"}
    write_jsonl(tmp_path / "b.jsonl", [pair])
    (line,), printed, _ = prepare(tmp_path / "b.jsonl", "--overwrite", stage="dpo")
    found = [[turn["content"] for turn in line[side]] for side in ("chosen", "rejected")]
    assert found == [[wanted, f"Yes. {wanted}"], [wanted, f"No. {wanted}"]]
    assert "masked: emails 1" in printed


def test_boilerplate_is_taken_out_of_documents(prepare, tmp_path):
    rng = random.Random(3)
    footer = "All rights reserved, read our cookie policy"
    texts = [sentences(rng, 1) for _ in range(6)]
    write_jsonl(tmp_path / "a.jsonl", [{"text": f"{text}\n{footer}"} for text in texts])
    lines, printed, _ = prepare(tmp_path / "a.jsonl", "--boilerplate", "6")
    assert sorted(line["text"] for line in lines) == sorted(texts)
    assert "lines of boilerplate taken out of documents: 6" in printed
    lines, _, _ = prepare(tmp_path / "a.jsonl", "--boilerplate", "7", "--overwrite", "--near_dup", "0")
    assert all(line["text"].endswith(footer) for line in lines)


@pytest.fixture
def three_hundred(tmp_path):
    rng = random.Random(4)
    path = tmp_path / "a.jsonl"
    write_jsonl(path, [{"text": sentences(rng, 1)} for _ in range(300)])
    return path


def test_lines_are_held_out_shuffled_and_cut_into_shards(prepare, tmp_path, three_hundred):
    lines, printed, _ = prepare(three_hundred, "--val_share", "0.1")
    held = [json.loads(line) for line in (tmp_path / "out" / "data.val.jsonl").read_text().splitlines()]
    given = [json.loads(line) for line in three_hundred.read_text().splitlines()]
    assert len(held) == 30
    assert "300 lines read, 300 written, 30 of them held out" in printed
    order = [given.index(line) for line in lines]
    assert sorted(order + [given.index(line) for line in held]) == list(range(300))
    assert order != sorted(order)
    again, _, _ = prepare(three_hundred, "--val_share", "0.1", "--overwrite")
    assert again == lines
    other, _, _ = prepare(three_hundred, "--val_share", "0.1", "--overwrite", "--seed", "7")
    assert other != lines
    plain, _, _ = prepare(three_hundred, "--max_lines", "199", "--no-shuffle", "--overwrite")
    order = [given.index(line) for line in plain]
    assert len(order) == 199
    assert order == sorted(order)
    assert not (tmp_path / "out" / "data.val.jsonl").exists()
    call_script(  # shards replace the file
        "scripts/prepare_data.py",
        *(three_hundred, "--stage", "pretrain", "--out", tmp_path / "out" / "data.jsonl", "--shard_lines", "120"),
        *("--overwrite", "--val_lines", "0", *FAST),
    )
    names = sorted(path.name for path in (tmp_path / "out").glob("*.jsonl"))
    assert names == ["data-00001.jsonl", "data-00002.jsonl", "data-00003.jsonl"]
    assert [len((tmp_path / "out" / name).read_text().splitlines()) for name in names] == [120, 120, 60]


def test_a_mix_has_the_shares_that_are_asked_for(prepare, tmp_path):
    rng = random.Random(5)
    for name, count in (("a", 100), ("b", 100)):
        write_jsonl(tmp_path / f"{name}.jsonl", [{"text": f"{name} {sentences(rng, 1)}"} for _ in range(count)])
    lines, _, _ = prepare("--mix", f"{tmp_path}/a.jsonl:3", f"{tmp_path}/b.jsonl:1")
    chars = {name: sum(len(line["text"]) for line in lines if line["text"][0] == name) for name in "ab"}
    assert sum(line["text"][0] == "a" for line in lines) == 100
    assert abs(chars["b"] / sum(chars.values()) - 0.25) < 0.01


def test_what_is_there_is_kept_unless_it_may_go(prepare, tmp_path, three_hundred):
    out = tmp_path / "out"
    out.mkdir()
    (out / "data.jsonl").write_text("mine")
    _, _, error = prepare(three_hundred, exit_code=2)
    assert "data.jsonl already exists: use --overwrite" in error
    assert (out / "data.jsonl").read_text() == "mine"
    assert [path.name for path in out.iterdir()] == ["data.jsonl"]


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("nowhere.jsonl",), "nowhere.jsonl does not exist"),
        ((), "name what to read: IN…"),
        (("FILE", "--map", "user=q"), "does not describe a whole record"),
        (("FILE", "--languages", "fr"), "languages are zh, en, other"),
        (("FILE", "--near_dup", "0.2"), "--near_dup must be 0.5 to 1"),
        (("FILE", "--source", "x"), "must be NAME:LICENCE"),
        (("FILE", "--min_chars", "100000"), "of 300 lines nothing is left (length: 300)"),
        (("FILE", "--ppl_model", "no.pth"), "--ppl_model no.pth does not exist"),
    ],
)
def test_what_cannot_be_ends_in_one_line(prepare, three_hundred, flags, words):
    _, _, error = prepare(*(three_hundred if flag == "FILE" else flag for flag in flags), exit_code=2)
    assert words in error
    assert error.strip().count("\n") == 0


def test_the_number_of_processes_and_a_kill_change_no_byte(tmp_path, monkeypatch):
    rng = random.Random(6)
    for number in range(4):
        texts = [sentences(rng, 1) for _ in range(80)]
        write_jsonl(
            tmp_path / f"{number}.jsonl", [{"text": f"{text}\nA line that every one of them has"} for text in texts]
        )
    flags = ("--stage", "pretrain", "--boilerplate", "20", "--seed", "3", "--near_dup", "0.7")
    files = [tmp_path / f"{number}.jsonl" for number in range(4)]

    def written(folder: str) -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in (tmp_path / folder).glob("*.jsonl")}

    call_script("scripts/prepare_data.py", *files, *flags, "--out", tmp_path / "one" / "x.jsonl", "--workers", "1")
    call_script("scripts/prepare_data.py", *files, *flags, "--out", tmp_path / "two" / "x.jsonl", "--workers", "2")
    assert len(written("one")) == 2
    assert written("one") == written("two")

    from scripts.preparing import cleaning, comparing

    calls = []
    for module, name in ((cleaning, "clean"), (comparing, "prepare")):
        work = getattr(module, name)

        def fails_at_the_third(*arguments, work=work, name=name, **named):
            calls.append(name)
            if calls.count(name) == 3:
                raise KeyboardInterrupt
            return work(*arguments, **named)

        monkeypatch.setattr(module, name, fails_at_the_third)
    command = ("scripts/prepare_data.py", *files, *flags, "--out", tmp_path / "three" / "x.jsonl", "--workers", "1")
    call_script(*command, exit_code=130)
    assert len(list((tmp_path / "three" / "x.work" / "clean").glob("*.json"))) == 2
    call_script(*command, exit_code=130)
    call_script(*command)
    assert written("three") == written("one")
    assert not (tmp_path / "three" / "x.work").exists()


def test_another_setting_starts_anew(tmp_path, three_hundred, monkeypatch, capsys):
    from scripts.preparing import comparing

    prepare = comparing.prepare
    monkeypatch.setattr(comparing, "prepare", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    command = ("scripts/prepare_data.py", three_hundred, "--out", tmp_path / "x.jsonl", "--stage", "pretrain", *FAST)
    call_script(*command, exit_code=130)
    monkeypatch.setattr(comparing, "prepare", prepare)
    call_script(*command, "--max_lines", "5")
    assert "x.work: left by a run with other settings or inputs; starting over" in capsys.readouterr().err
    assert len((tmp_path / "x.jsonl").read_text().splitlines()) == 5


def test_a_folder_that_another_run_works_in_is_refused(tmp_path, three_hundred, capsys):
    from dataset.locks import lock

    (tmp_path / "x.work").mkdir()
    held = lock(tmp_path / "x.work" / "lock", wait=False)
    call_script(
        "scripts/prepare_data.py",
        *(three_hundred, "--out", tmp_path / "x.jsonl", "--stage", "sft", *FAST),
        exit_code=2,
    )
    held.close()
    assert "another run is preparing there" in capsys.readouterr().err
