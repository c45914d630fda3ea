"""Files in each benchmark's published format, with a few questions each; right options begin with "right"."""

import csv
import json
from pathlib import Path

from tests.conftest import write_jsonl

LETTERS = "ABCD"
N = 8


def letters(path: Path, header: list[str], n: int = N, answered: bool = True) -> None:
    """A CSV of CMMLU (whose header begins with an empty field) or C-Eval; some options look like numbers."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", encoding="utf-8", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(header)
        for i in range(n):
            options = ["1.0", "NA", "007", f"{i}, “甲”\n乙"]
            explained = ["because"] if "explanation" in header else []
            rows.writerow([i, f"第 {i} 题？", *options, *([LETTERS[i % 4]] if answered else []), *explained])


def labelled(i: int, options: int = 4) -> dict:
    texts = [f"right {i}" if place == i % options else f"wrong {i} {place}" for place in range(options)]
    choices = [{"text": text, "label": "ABCDE"[place]} for place, text in enumerate(texts)]
    return {"id": str(i), "question": {"stem": f"Stem {i}", "choices": choices}, "answerKey": "ABCDE"[i % options]}


def write_all(folder: Path) -> Path:
    """Write the files of every benchmark that is read from files, in a folder of its name."""
    for split in ("dev", "test"):
        letters(folder / "cmmlu" / split / "agronomy.csv", ["", "Question", *LETTERS, "Answer"])
        letters(folder / "cmmlu" / split / "ancient_chinese.csv", ["", "Question", *LETTERS, "Answer"])
    for subject in ("accountant", "logic"):
        explained = ["id", "question", *LETTERS, "answer", "explanation"]
        letters(folder / "ceval" / "dev" / f"{subject}_dev.csv", explained, 5)
        letters(folder / "ceval" / "val" / f"{subject}_val.csv", explained[:-1])
        letters(folder / "ceval" / "test" / f"{subject}_test.csv", explained[:-2], answered=False)
    for name in ("openbookqa/Data/Main", "arc_easy/ARC-Easy", "arc_challenge/ARC-Challenge"):
        (folder / name).mkdir(parents=True)
    fact = {"fact1": "a fact"}
    write_jsonl(folder / "openbookqa/Data/Main/test.jsonl", [labelled(i) | fact for i in range(N)])
    write_jsonl(folder / "openbookqa/Data/Main/train.jsonl", [labelled(i) for i in range(N)])
    write_jsonl(folder / "arc_easy/ARC-Easy/ARC-Easy-Test.jsonl", [labelled(i, 3 + i % 3) for i in range(N)])
    write_jsonl(folder / "arc_challenge/ARC-Challenge/ARC-Challenge-Test.jsonl", [labelled(i) for i in range(N)])

    for name in ("piqa", "siqa", "hellaswag", "sciq"):
        (folder / name).mkdir()
    solutions = [
        {
            "goal": f"Goal {i}",
            "sol1": f"{'wrong' if i % 2 else 'right'} {i}",
            "sol2": f"{'right' if i % 2 else 'wrong'} {i}",
        }
        for i in range(N)
    ]
    write_jsonl(folder / "piqa/valid.jsonl", solutions)
    (folder / "piqa/valid-labels.lst").write_text("".join(f"{i % 2}\n" for i in range(N)), encoding="utf-8")
    social = [
        {"context": f"Context {i}.", "question": "Why?"}
        | {f"answer{c}": f"{'right' if place == i % 3 else 'wrong'} {i}" for place, c in enumerate("ABC")}
        for i in range(N)
    ]
    write_jsonl(folder / "siqa/dev.jsonl", social)
    (folder / "siqa/dev-labels.lst").write_text("".join(f"{i % 3 + 1}\n" for i in range(N)), encoding="utf-8")
    endings = [[f"{'right' if place == i % 4 else 'wrong'} {i}." for place in range(4)] for i in range(N)]
    stories = [
        {"ind": i, "activity_label": "Cooking", "ctx_a": f"A pan {i}.", "ctx_b": "it", "ctx": "", "endings": endings[i]}
        | {"label": i % 4}
        for i in range(N)
    ]
    write_jsonl(folder / "hellaswag/hellaswag_val.jsonl", stories)
    science = [
        {"question": f"Question {i}?", "support": "", "correct_answer": f"right {i}"}
        | {f"distractor{place}": f"wrong {i} {place}" for place in (1, 2, 3)}
        for i in range(N)
    ]
    (folder / "sciq/test.json").write_text(json.dumps(science), encoding="utf-8")
    own = [
        {"question": f"我的第 {i} 题", "choices": ["right yes", "wrong no"][:: 1 - 2 * (i % 2)], "answer": "AB"[i % 2]}
        for i in range(N)
    ]
    write_jsonl(folder / "mine.jsonl", own)
    return folder
