"""DPODataset: the targets of a pair, packing of pairs, and what is cut, dropped and refused."""

import json
from itertools import pairwise

import numpy as np
import pytest
import torch

from dataset import DataError, DPODataset, StepLoader
from model.chat import DEFAULT_SYSTEM_PROMPT
from model.loss import IGNORE_INDEX
from tests.conftest import write_jsonl


def turns(*contents, system=None):
    first = [{"role": "system", "content": system}] if system else []
    return first + [{"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate(contents)]


def pair(question, better, worse, *history, system=None):
    sides = {"chosen": better, "rejected": worse}
    return {side: turns(*history, question, text, system=system) for side, text in sides.items()}


@pytest.fixture
def pairs(tmp_path, tiny_tokenizer):
    """Makes a DPODataset from records."""

    def make(*records, **settings):
        return DPODataset(write_jsonl(tmp_path / "dpo.jsonl", list(records)), tiny_tokenizer, **settings)

    return make


def samples(row):
    """The samples of a row as (ids, labels)."""
    starts = [*torch.nonzero(row["position_ids"] == 0).flatten().tolist(), len(row["input_ids"])]
    return [(row["input_ids"][a:b], row["labels"][a:b]) for a, b in pairwise(starts)]


def targets(tokenizer, row):
    return [tokenizer.decode(labels[labels != IGNORE_INDEX]) for _, labels in samples(row)]


def test_the_answers_are_learned_side_by_side(pairs, tiny_tokenizer):
    (row,) = pairs(pair("What is 2 + 2?", "It is 4.", "It is 5, I think.", system="Be brief."))
    texts = [tiny_tokenizer.decode(ids) for ids, _ in samples(row)]
    prompt = "<s>system\nBe brief.</s>\n<s>user\nWhat is 2 + 2?</s>\n<s>assistant\n"
    assert texts == [prompt + "It is 4.</s>\n", prompt + "It is 5, I think.</s>\n"]
    assert targets(tiny_tokenizer, row) == ["It is 4.</s>", "It is 5, I think.</s>"]


def test_what_both_chats_share_is_not_learned(pairs, tiny_tokenizer):
    history = ("Hello", "Hi!", "Are you well?", "Yes.")
    (row,) = pairs(pair("Tell me more", "With pleasure.", "No.", *history))
    assert targets(tiny_tokenizer, row) == ["With pleasure.</s>", "No.</s>"]
    longer = {"chosen": turns("Q", "A", "Q2", "A2"), "rejected": turns("Q", "B")}
    (row,) = pairs(longer)
    assert targets(tiny_tokenizer, row) == ["A</s>A2</s>", "B</s>"]


def answer(text, **more):
    return {"role": "assistant", "content": text} | more


QUESTION = turns("Before", "Yes.", "Hi")
BOTH = {"chosen": [answer("Hello")], "rejected": [answer("Go away")]}


@pytest.mark.parametrize(
    "record",
    [
        {"prompt": QUESTION} | BOTH,
        {"prompt": QUESTION, "chosen": "Hello", "rejected": [answer("Go away")]},
        {"prompt": QUESTION} | {side: QUESTION + turns for side, turns in BOTH.items()},
        {"prompt": QUESTION, "chosen": "Hello", "rejected": QUESTION + BOTH["rejected"]},
        {side: QUESTION + turns for side, turns in BOTH.items()},
    ],
    ids=["answers", "texts", "repeated in both", "repeated in one", "none"],
)
@pytest.mark.parametrize("system", [None, "field", "turn"])
def test_the_prompt_comes_in_front_of_both(pairs, tiny_tokenizer, record, system):
    first = "<s>system\nBe kind.</s>\n" if system else f"<s>system\n{DEFAULT_SYSTEM_PROMPT}</s>\n"
    if system == "field":
        record = record | {"system": "Be kind."}
    elif system == "turn":
        turn = {"role": "system", "content": "Be kind."}
        record = {
            key: [turn, *value] if isinstance(value, list) and (key == "prompt" or len(value) > 1) else value
            for key, value in record.items()
        }
    (row,) = pairs(record)
    prompt = first + "<s>user\nBefore</s>\n<s>assistant\nYes.</s>\n<s>user\nHi</s>\n<s>assistant\n"
    texts = [tiny_tokenizer.decode(ids) for ids, _ in samples(row)]
    assert texts == [prompt + "Hello</s>\n", prompt + "Go away</s>\n"]
    assert targets(tiny_tokenizer, row) == ["Hello</s>", "Go away</s>"]


def test_a_prompt_may_be_a_text(pairs, tiny_tokenizer):
    (row,) = pairs({"prompt": "Hi", "chosen": "Hello", "rejected": "Go away", "score": 3})
    prompt = f"<s>system\n{DEFAULT_SYSTEM_PROMPT}</s>\n<s>user\nHi</s>\n<s>assistant\n"
    texts = [tiny_tokenizer.decode(ids) for ids, _ in samples(row)]
    assert texts == [prompt + "Hello</s>\n", prompt + "Go away</s>\n"]


def test_thoughts_and_weights_are_those_of_the_line(pairs, tiny_tokenizer):
    shared = turns("Q", "A", "R")
    unlearned = [shared[0], shared[1] | {"weight": 0}, shared[2]]
    chosen = [*shared, answer("B", reasoning_content="T"), *turns("S"), answer("C", train=False)]
    data = pairs({"chosen": chosen, "rejected": [*unlearned, answer("D"), *turns("S"), answer("E")], "id": 7})
    (row,) = data
    thought = "<think>\nT\n</think>\n<answer>\nB\n</answer></s>"
    assert targets(tiny_tokenizer, row) == [thought, "D</s>E</s>"]
    assert data.summary.endswith(", ignored keys: id 1")


@pytest.mark.parametrize("side", ["chosen", "rejected"])
def test_a_pair_of_which_one_side_is_cut_before_its_answer_is_dropped(pairs, tiny_tokenizer, side):
    other = {"chosen": "rejected", "rejected": "chosen"}[side]
    late = [*turns("Q"), answer("A b, c! " * 50, weight=0), *turns("Q"), answer("A")]
    data = pairs({side: late, other: turns("Q", "B")}, pair("Q", "C", "D"), max_seq_len=100)
    assert "1 dropped without targets" in data.summary
    assert [targets(tiny_tokenizer, row) for row in data] == [["C</s>", "D</s>"]]


@pytest.mark.parametrize("packing", [True, False])
def test_pairs_stay_together(pairs, tiny_tokenizer, packing):
    records = [pair(f"{n} + {n}?", f"{2 * n}", f"{3 * n + 1} or more") for n in range(30)]
    data = pairs(*records, max_seq_len=256, packing=packing)
    assert data.max_seq_len == 512
    seen = []
    for row in data:
        assert len(row["input_ids"]) <= 512
        answers = targets(tiny_tokenizer, row)
        seen += zip(answers[::2], answers[1::2], strict=True)
    assert sorted(seen) == sorted((f"{2 * n}</s>", f"{3 * n + 1} or more</s>") for n in range(30))
    assert len(data) == 30 if not packing else len(data) < 25
    shapes = {tuple(batch["input_ids"].shape) for (batch,) in StepLoader(data, 4, 1, 1, seed=0).steps()}
    assert shapes == {(4, 512)} if packing else len(shapes) > 1


def test_cut_dropped_and_counted(pairs, tiny_tokenizer):
    long = "very " * 60
    records = [
        pair("Short?", "Yes.", "No."),
        pair("Long?", "Yes, " + long, "No."),  # cut
        pair("Equal?", "The same.", "The same."),
        pair("Equal before the cut?", long + "yes", long + "no"),
        pair("A question of a " + long + "length?", "Yes.", "No."),  # no room for an answer
    ]
    data = pairs(*records, max_seq_len=100, packing=False)
    assert "2 pairs" in data.summary
    assert "1 cut at 100 tokens" in data.summary
    assert "3 dropped without targets" in data.summary
    assert [len(samples(row)) for row in data] == [2, 2]
    assert len(samples(data[1])[0][0]) == 100
    with pytest.raises(DataError, match="no sample has a target within 100 tokens"):
        pairs(*records[2:], max_seq_len=100)


def test_parts_are_of_pairs(pairs):
    records = [pair(f"{n}?", f"{n}", "no") for n in range(200)]
    parts = {part: pairs(*records, part=part, packing=False) for part in ("all", "train", "eval")}
    assert [len(data) for data in parts.values()] == [200, 198, 2]
    keys = {tuple(map(str, data.rows_key)) for data in parts.values()}
    assert len(keys) == 3


def test_a_reference_comes_with_its_tokens(pairs):
    data = pairs(*[pair(f"{n} + {n}?", f"{2 * n}", f"{3 * n + 1}") for n in range(9)], max_seq_len=96)
    every = np.concatenate([data.cache.ids(sample, 0, n) for sample, n in enumerate(data.cache.lengths)])
    data.reference = every.astype(np.float32)  # a number that identifies its token
    for row in data:
        assert torch.equal(row["reference"], row["input_ids"].float())
    for (batch,) in StepLoader(data, 4, 1, 1, seed=0).steps():
        assert batch["reference"].shape == batch["input_ids"].shape
        assert torch.equal(batch["reference"], batch["input_ids"].float() * batch["attention_mask"])


@pytest.mark.parametrize(
    ("record", "told"),
    [
        ({"chosen": turns("Q", "A")}, 'the key "rejected" is missing'),
        ({"chosen": turns("Q", "A"), "rejected": 3}, '"rejected" is not a list'),
        (
            {"chosen": turns("Q", "A"), "rejected": "B"},
            '"rejected" is a text without a "prompt" that it answers',
        ),
        (
            {"prompt": "P", "chosen": turns("Q", "A"), "rejected": "B"},
            '"chosen" begins neither with an answer nor with',
        ),
        (
            {"prompt": "P", "chosen": "A", "rejected": [{"content": "B"}]},
            'turn 1 of "rejected": the key "role" is missing',
        ),
        ({"prompt": turns("P", "A"), "chosen": "A", "rejected": "B"}, '"prompt" does not end with a user turn'),
        ({"prompt": " ", "chosen": "A", "rejected": "B"}, '"prompt" is empty'),
        ({"prompt": 3, "chosen": "A", "rejected": "B"}, '"prompt" is neither a string nor a list of turns'),
        ({"prompt": "P", "chosen": "A", "rejected": " "}, 'turn 1 of "rejected": an empty answer would train'),
        ({"prompt": turns("P", "", "Q"), "chosen": "A", "rejected": "B"}, 'turn 2 of "prompt": an empty answer'),
        (
            {"prompt": "P", "chosen": {"role": "assistant", "content": "A"}, "rejected": "B"},
            "but a single turn: put it",
        ),
        (
            {"prompt": "P", "chosen": [answer("A", weight=0)], "rejected": "B"},
            'each has "weight" 0',
        ),
        (
            {"chosen": [*turns("Q", "A", "R"), answer("B", weight=0)], "rejected": turns("Q", "A", "R", "C")},
            '"chosen" has no answer to train on after the two diverge',
        ),
        (
            {"conversations": turns("Q"), "chosen": "A", "rejected": "B"},
            'the key for the turns that both answer is "prompt"',
        ),
        ({"chosen": turns("Q", "A"), "rejected": turns("Q")}, '"rejected" has no assistant turn'),
        (
            {"chosen": turns("Q", "A"), "rejected": turns("R", "B")},
            "not two answers to one prompt: they diverge at turn 1",
        ),
        ({"chosen": turns("Q", "A"), "rejected": turns("Q", "A", "R", "B")}, "they diverge at turn 3"),
        ({"chosen": turns("Q", "A", system="S"), "rejected": turns("Q", "B")}, "they diverge at turn 1"),
        ({"chosen": turns("Q", "A", "R", "B"), "rejected": turns("Q", "A", "S", "C")}, "they diverge at turn 3"),
        ({"chosen": [], "rejected": turns("Q", "B")}, '"chosen" is empty'),
        ([], "not a JSON object"),
    ],
)
def test_a_bad_line_is_named(pairs, tmp_path, tiny_tokenizer, record, told):
    good = pair("Q", "A", "B")
    with pytest.raises(DataError, match=r"dpo.jsonl, line 2: ") as error:
        pairs(good, record, good)
    assert told in str(error.value)
    data = pairs(good, record, good, skip_bad_lines=True)
    assert "1 bad lines skipped" in data.summary
    assert "2 pairs" in data.summary


def test_the_real_file(shared, tmp_path, tiny_tokenizer):
    lines = (shared / "data" / "dpo.jsonl").read_text(encoding="utf-8").splitlines()[:50]
    (tmp_path / "dpo.jsonl").write_text("\n".join(lines), encoding="utf-8")
    data = DPODataset(tmp_path / "dpo.jsonl", tiny_tokenizer, max_seq_len=1024, packing=False)
    for row, line in zip(data, map(json.loads, lines), strict=True):
        expected = [line[side][-1]["content"] + "</s>" for side in ("chosen", "rejected")]
        assert targets(tiny_tokenizer, row) == expected
