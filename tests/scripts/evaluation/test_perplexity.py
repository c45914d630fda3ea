"""Bits per byte: each token is predicted once, whatever the window, and as in one forward pass if the text fits."""

import math

import pytest
import torch

from scripts.evaluation.harness_model import MiniMindHarness
from scripts.evaluation.perplexity import perplexity, read_texts, windows
from tests.conftest import SENTENCES, write_jsonl
from tests.scripts.conversion import make_model
from trainer.errors import UserError


def test_windows_by_hand():
    assert list(windows([1, 2, 3], 0, 4, 2)) == [([0], [1, 2, 3])]
    assert list(windows([1, 2, 3, 4, 5, 6, 7], 0, 4, 2)) == [
        ([0], [1, 2, 3, 4]),
        ([2, 3, 4], [5, 6]),
        ([3, 4, 5, 6], [7]),
    ]
    assert list(windows([], 0, 4, 2)) == []


@pytest.mark.parametrize("n", range(1, 40))
@pytest.mark.parametrize("window", [1, 2, 5, 8])
def test_each_token_is_predicted_once_with_enough_before_it(n, window):
    stride = max(1, window // 2)
    predicted = []
    for context, tokens in windows(range(1, n + 1), 0, window, stride):
        assert len(context) + len(tokens) - 1 <= window
        assert len(context) >= min(tokens[0], window - stride + 1)
        assert context == list(range(tokens[0] - len(context), tokens[0]))
        predicted += tokens
    assert predicted == list(range(1, n + 1))


def test_bits_per_byte_are_those_of_a_forward_pass(tiny_tokenizer):
    model = make_model(len(tiny_tokenizer))
    found = perplexity(MiniMindHarness(model, tiny_tokenizer), SENTENCES, 256)
    nats = tokens = 0
    for text in SENTENCES:
        ids = [tiny_tokenizer.bos_token_id, *tiny_tokenizer.encode(text, add_special_tokens=False)]
        with torch.no_grad():
            logprobs = model(torch.tensor([ids])).logits[0].log_softmax(-1)
        nats -= sum(float(logprobs[i - 1, ids[i]]) for i in range(1, len(ids)))
        tokens += len(ids) - 1
    size = sum(len(text.encode()) for text in SENTENCES)
    assert (found.texts, found.tokens, found.bytes) == (len(SENTENCES), tokens, size)
    assert found.nats_per_token == pytest.approx(nats / tokens, abs=1e-3)
    assert found.bits_per_byte == pytest.approx(nats / math.log(2) / size, abs=1e-3)


def test_texts_are_read_from_lines_chats_and_files(tmp_path):
    chat = {"conversations": [{"role": "user", "content": "甲"}, {"role": "assistant", "content": "B"}]}
    lines = write_jsonl(tmp_path / "x.jsonl", [{"text": "one"}, chat])
    assert list(read_texts(lines)) == ["one", "甲\nB"]
    (tmp_path / "x.txt").write_text("\ufeffa\nb\n", encoding="utf-8")
    assert list(read_texts(tmp_path / "x.txt")) == ["a\nb\n"]


def test_what_is_no_text_is_named(tmp_path, tiny_tokenizer):
    lines = write_jsonl(tmp_path / "x.jsonl", [{"text": "one"}, {"title": "two"}])
    with pytest.raises(ValueError, match='line 2: there is neither a "text" nor a chat'):
        list(read_texts(lines))
    (tmp_path / "x.txt").write_bytes("题".encode("gbk"))
    with pytest.raises(UserError, match=r"x.txt is not UTF-8"):
        list(read_texts(tmp_path / "x.txt"))
    with pytest.raises(UserError, match=r"nowhere.txt is missing"):
        list(read_texts(tmp_path / "nowhere.txt"))
    with pytest.raises(UserError, match="there is no text"):
        perplexity(MiniMindHarness(make_model(len(tiny_tokenizer)), tiny_tokenizer), [], 64)
