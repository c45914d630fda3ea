"""model/reasoning.py: an answer's format, splitting thinking from answer, whole or streamed, and majority votes."""

import pytest
import torch

from model.chat import render_chat
from model.reasoning import (
    TAGS,
    ReasoningStream,
    is_well_formed,
    majority,
    split_reasoning,
    tag_sequences,
    with_thought,
)
from model.tokenizer_check import check_tokenizer
from tests.families import with_llama_3s_pattern
from train_distill_reason import tag_weights

GOOD = "<think>\n12 + 30 = 42\n42 - 7 = 35\n</think>\n<answer>\n35\n</answer>"


@pytest.mark.parametrize("text", [GOOD, "<think>\na < b > c <x>\n</think>\n<answer>\n你好\n再见\n</answer>"])
def test_well_formed(text):
    assert is_well_formed(text)


@pytest.mark.parametrize(
    "text",
    [
        "35",
        GOOD + "\n",
        " " + GOOD,
        GOOD.replace("</think>\n", "</think>"),
        GOOD.replace("<answer>\n", "<answer>"),
        GOOD.replace("\n35\n", "\n"),
        GOOD.replace("\n35", ""),
        GOOD.removesuffix("</answer>"),
        GOOD.replace("42 - 7", "<think>"),
        GOOD.replace("35\n", "35\n</answer>\n<answer>\n36\n"),
        GOOD + "\n" + GOOD,
        GOOD.replace("think", "THINK"),
    ],
)
def test_not_well_formed(text):
    assert not is_well_formed(text)


@pytest.mark.parametrize(
    ("text", "thinking", "answer"),
    [
        (GOOD, "12 + 30 = 42\n42 - 7 = 35", "35"),
        ("just an answer\nof two lines", "", "just an answer\nof two lines"),
        ("<think>\nnever finished\n", "never finished", ""),
        ("<think>a</think>b", "a", "b"),
        ("<think>\n1 < 2 and <thin> is no tag\n</think>\n<answer>\nx <", "1 < 2 and <thin> is no tag", "x <"),
        ("before <think>one</think> between <think>two</think>after", "one\ntwo", "before\nbetween\nafter"),
        ("<think>\n\n</think>\n\n<answer>\n\n</answer>\n", "", ""),
        ("", "", ""),
    ],
)
def test_split(text, thinking, answer):
    assert split_reasoning(text) == (thinking, answer)


@pytest.mark.parametrize("step", [1, 2, 3, 7, 1000])
def test_a_stream_in_pieces_of_any_size_says_the_same(step):
    for text in (GOOD, "before <think>one \n two</think> between <answer> x </answe <answer>y</answer> \n", "a <", "<"):
        stream = ReasoningStream()
        pieces = [text[i : i + step] for i in range(0, len(text), step)]
        parts = [part for piece in pieces for part in stream.push(piece)] + stream.flush()
        assert all(text for _, text in parts)
        joined = {name: "".join(text for part, text in parts if part == name) for name in ("thinking", "answer")}
        assert (joined["thinking"], joined["answer"]) == split_reasoning(text)


def test_a_stream_holds_back_only_what_may_become_a_tag():
    stream = ReasoningStream()
    assert stream.push("<think>\n1 <") == [("thinking", "1")]
    assert stream.push(" 2 ") == [("thinking", " < 2")]
    assert stream.push("\n</thi") == []
    assert stream.push("nk>\n4") == [("answer", "4")]


def test_the_tags_of_both_kinds_of_tokenizer(tiny_tokenizer, plain_tokenizer):
    assert [len(ids) for ids in tag_sequences(tiny_tokenizer)] == [1, 1, 1, 1]
    plain = tag_sequences(plain_tokenizer)
    assert all(len(ids) > 1 for ids in plain)
    assert [plain_tokenizer.decode(ids) for ids in plain] == list(TAGS)


def reply(thinking: str, answer: str) -> str:
    return f"<think>\n{thinking}\n</think>\n<answer>\n{answer}\n</answer>"


def test_majority_counts_answers_not_thoughts():
    replies = [reply("1 + 1", "3"), reply("one way", "2"), reply("another way", "2")]
    assert majority(replies) == (replies[1], 2)
    assert majority(["b", "a", "a", "b"]) == ("b", 2)
    assert majority(["3", "1\n2 ", "1  2"]) == ("1\n2 ", 2)
    assert majority(["<think>\nmore", "<think>\nand more", reply("", "7")]) == (reply("", "7"), 1)
    assert majority(["<think>\nmore", "<think>\nand more"]) == ("<think>\nmore", 2)
    with pytest.raises(ValueError, match="at least one"):
        majority([])


@pytest.mark.parametrize("special_tags", [False, True])
def test_tags_are_found_where_a_line_break_shares_their_last_token(special_tags):
    tokenizer = with_llama_3s_pattern(special_tags)
    check_tokenizer(tokenizer)
    answer = "<think>\nWhy?\n</think>\n<answer>\nSo.\n</answer>"
    ids, mask = render_chat(tokenizer, [{"role": "user", "content": "a"}, {"role": "assistant", "content": answer}])
    learned = torch.tensor([[i if kept else -100 for i, kept in zip(ids, mask, strict=True)]])
    weights = tag_weights(learned, tag_sequences(tokenizer), 10)[0].tolist()
    heavy = [i for i, weight in zip(ids, weights, strict=True) if weight == 10]
    assert tokenizer.decode(heavy) == "<think>\n</think>\n<answer>\n</answer>"


def test_an_answer_with_a_thought_remembers_both():
    text = with_thought("12 + 30 = 42", "42")
    assert text == "<think>\n12 + 30 = 42\n</think>\n<answer>\n42\n</answer>"
    assert (text.thought, text.answer) == ("12 + 30 = 42", "42")
    with pytest.raises(ValueError, match="the answer already contains the tag </think>"):
        with_thought("a", "b</think>")
