"""Datasets with MiniMind-3's tokenizer: ids as rendered by its template, and a separate cache."""

import pytest

from dataset import DPODataset, SFTDataset
from tests.conftest import write_jsonl
from trainer.weights import load_tokenizer


@pytest.fixture
def tokenizer(shared):
    folder = shared / "fixtures" / "minimind3_tokenizer"
    if not folder.is_dir():
        pytest.skip("no tokenizer of MiniMind-3")
    return load_tokenizer(folder)


USER, SAID = {"role": "user", "content": "12 + 30?"}, {"role": "assistant", "content": "42"}
THOUGHT = SAID | {"reasoning_content": "Twelve, thirty."}


def test_rows_are_what_the_template_renders_thoughts_included(tokenizer, tmp_path):
    chats = [[USER, SAID], [USER, THOUGHT], [USER, SAID | {"content": "<think>\nWell.\n</think>\n\n42"}]]
    path = write_jsonl(tmp_path / "chats.jsonl", [{"conversations": chat} for chat in chats])
    rows = SFTDataset(path, tokenizer, 128, packing=False)
    for row, chat in zip(rows, chats, strict=True):
        assert row["input_ids"].tolist() == tokenizer.apply_chat_template(chat, return_dict=False)
    learned = [tokenizer.decode(row["labels"][row["labels"] != -100]) for row in rows]
    assert learned == [
        "42<|im_end|>",
        "Twelve, thirty.\n</think>\n\n42<|im_end|>",
        "Well.\n</think>\n\n42<|im_end|>",
    ]


def test_pairs_are_laid_out_the_same_way(tokenizer, tmp_path):
    pair = {"chosen": [USER, THOUGHT], "rejected": [USER, SAID | {"content": "No."}]}
    (row,) = DPODataset(write_jsonl(tmp_path / "pairs.jsonl", [pair]), tokenizer, 128)
    both = [tokenizer.apply_chat_template(chat, return_dict=False) for chat in pair.values()]
    assert row["input_ids"].tolist() == both[0] + both[1]


def test_the_same_entries_without_the_template_have_another_cache(tokenizer, tmp_path):
    path = write_jsonl(tmp_path / "chats.jsonl", [{"conversations": [USER, SAID]}])
    (first,) = SFTDataset(path, tokenizer, 128)
    tokenizer.chat_template = None
    (second,) = SFTDataset(path, tokenizer, 128)
    assert first["input_ids"].tolist() != second["input_ids"].tolist()
