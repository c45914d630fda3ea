"""train_distill_reason.py: which tokens get a tag's weight, the loss, and real runs."""

import pytest
import torch

from model.chat import render_chat
from model.reasoning import TAGS, tag_sequences
from model.tokenizer import token_bytes
from train_distill_reason import tag_weights, weighted_next_token_loss

WEIGHT = 10.0
ANSWERS = [
    "<think>\n12 + 30 = 42\n</think>\n<answer>\n42\n</answer>",
    "<think>\nthe user asks the assistant: is 1 < 2 > 0? think, answer. a<b>c </ x> <thin <answers> 你好\n</think>\n"
    "<answer>\nuser\n</answer>",
    "an answer without any tag, but < and > and think and answer and </",
    "<answer>\n<answer>\n</answer></answer><think>",
]
QUESTION = "user: what does <think> mean? </think> <answer> 1 < 2 </answer>"


def weights_by_characters(tokenizer, ids: list[int], mask: list[bool], answer: str) -> list[float]:
    """The oracle: decode every token to bytes, and find its place in the answer's text."""
    pieces = token_bytes(tokenizer)
    learned = [i for i, on in enumerate(mask) if on]
    assert b"".join(pieces[ids[i]] for i in learned) == answer.encode()  # </s> is not text
    inside = bytearray(len(answer.encode()))
    for tag in TAGS:
        start = answer.find(tag)
        while start >= 0:
            begin = len(answer[:start].encode())
            inside[begin : begin + len(tag)] = b"\1" * len(tag)
            start = answer.find(tag, start + 1)
    weights, place = [0.0] * len(ids), 0
    for i in learned:
        piece = pieces[ids[i]]
        weights[i] = WEIGHT if any(inside[place : place + len(piece)]) else 1.0
        place += len(piece)
    return weights


@pytest.mark.parametrize("kind", ["tiny_tokenizer", "plain_tokenizer", "shipped"])
@pytest.mark.parametrize("answer", ANSWERS)
def test_the_weight_falls_on_the_tags_of_the_answer_and_nowhere_else(kind, answer, request):
    from trainer.weights import load_tokenizer

    tokenizer = load_tokenizer() if kind == "shipped" else request.getfixturevalue(kind)
    chat = [
        {"role": "system", "content": "<think>\nuser\n</think>"},
        {"role": "user", "content": QUESTION},
        {"role": "assistant", "content": answer},
    ]
    ids, mask = render_chat(tokenizer, chat)
    labels = torch.tensor([[token if on else -100 for token, on in zip(ids, mask, strict=True)]])
    weights = tag_weights(labels, tag_sequences(tokenizer), WEIGHT)
    assert weights.tolist() == [weights_by_characters(tokenizer, ids, mask, answer)]
    assert weights.dtype == torch.float32


def test_a_tag_that_the_row_cuts_off_keeps_weight_one(plain_tokenizer):
    tags = tag_sequences(plain_tokenizer)
    labels = torch.tensor([tags[0] + tags[3][:-1]])
    assert tag_weights(labels, tags, WEIGHT).tolist() == [[WEIGHT] * len(tags[0]) + [1.0] * (len(tags[3]) - 1)]
    short = torch.tensor([tags[1][:2]])
    assert tag_weights(short, tags, WEIGHT).tolist() == [[1.0, 1.0]]


def test_the_loss_is_a_weighted_sum_of_cross_entropies():
    torch.manual_seed(0)
    logits = torch.randn(2, 4, 5, dtype=torch.float64)
    labels = torch.tensor([[1, 2, -100, 4], [-100, 0, 0, 3]])
    weights = torch.tensor([[7.0, 10.0, 0.0, 1.0], [0.0, 1.0, 10.0, 2.5]])
    by_hand = 0.0
    for row, place in ((0, 1), (0, 3), (1, 1), (1, 2), (1, 3)):
        scores = logits[row, place - 1].exp()
        by_hand -= weights[row, place].item() * (scores[labels[row, place]] / scores.sum()).log().item()
    learned = logits[:, :-1][labels[:, 1:] != -100]
    assert weighted_next_token_loss(learned, labels, weights).item() == pytest.approx(by_hand, rel=1e-6)


def test_a_tag_is_found_also_where_a_row_has_room_for_nothing_else():
    assert tag_weights(torch.tensor([[5, 6, 7]]), [[5, 6, 7], [5, 6, 7, 8]], WEIGHT).tolist() == [[WEIGHT] * 3]
