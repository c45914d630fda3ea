"""Encoding a very long text in stretches changes only the memory it takes."""

import pytest

from model import chat
from model.chat import render_chats, render_text
from model.tokenizer import token_bytes
from tests.conftest import SENTENCES

LONG = "\n\n".join(
    [
        *SENTENCES,
        "It's the users' <think>s, isn't it?   Three spaces,\ttabs\t\tand\r\nline ends  \n  of every kind. ",
        "数字 12 345 和 标点，都 在 这里。 <s>不是 开头</s> 👩‍👩‍👧‍👦 emoji 😀 ",
    ]
    * 3
)


@pytest.mark.parametrize("tokenizer", ["tiny_tokenizer", "plain_tokenizer"])
@pytest.mark.parametrize("stretch", [16, 40, 256])
def test_stretches_give_the_same_tokens(request, monkeypatch, tokenizer, stretch):
    tokenizer = request.getfixturevalue(tokenizer)
    texts = ["short", LONG, "", LONG[100:900], "again short"]
    chats = [[{"role": "user", "content": text}, {"role": "assistant", "content": text}] for text in texts]
    expected = render_text(tokenizer, texts), render_chats(tokenizer, chats)

    monkeypatch.setattr(chat, "STRETCH_CHARS", stretch)
    monkeypatch.setattr(chat, "CALL_CHARS", 2 * stretch)
    in_stretches = render_text(tokenizer, texts), render_chats(tokenizer, chats)

    if stretch == 256:  # if no word is longer than half a stretch
        assert in_stretches == expected
    bytes_of = token_bytes(tokenizer)
    for ids, text in zip(in_stretches[0], texts, strict=True):
        assert b"".join(bytes_of[i] for i in ids).decode() == text
    for ids, mask in in_stretches[1]:
        assert len(ids) == len(mask)


def test_a_call_and_a_stretch_are_bounded(monkeypatch):
    monkeypatch.setattr(chat, "STRETCH_CHARS", 100)
    monkeypatch.setattr(chat, "CALL_CHARS", 1000)
    texts = [["x" * 10_000], *([["y" * 30]] * 50), ["a b " * 99, "<", "s>"]]

    calls = list(chat._calls(texts))

    lengths = [[sum(map(len, parts)) for _, parts in call] for call in calls]
    assert max(map(max, lengths)) <= 100
    assert max(map(sum, lengths)) <= 1100
    for number, parts in enumerate(texts):
        assert "".join(part for call in calls for n, some in call if n == number for part in some) == "".join(parts)


def test_a_stretch_ends_before_a_run_of_white_space_never_inside_it(monkeypatch):
    monkeypatch.setattr(chat, "STRETCH_CHARS", 16)
    assert [*chat._stretches(["a river flows    to the sea"])] == [["a river flows"], ["    to the sea"]]
