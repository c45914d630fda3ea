"""Which tokenizers a MiniMind can be trained with, and the errors for the others."""

import json
import re

import pytest
from tokenizers import AddedToken, Tokenizer, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from model.chat import render_text
from model.tokenizer import special_ids, tokenizer_hash
from model.tokenizer_check import check_tokenizer
from tests.families import FAMILIES, bpe_of_characters, byte_level, family, unigram

ROLES = FAMILIES["qwen with bos"][1]


def changed(change) -> PreTrainedTokenizerFast:
    """A valid tokenizer with a change to its backend's state."""
    state = json.loads(byte_level(FAMILIES["qwen with bos"][0]).to_str())
    change(state)
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(state)), **ROLES)


@pytest.mark.parametrize("name", ["gpt2", "llama3", "qwen with bos"])
def test_families_that_can_work_are_taken(name):
    check_tokenizer(family(name))


def test_our_own_are_taken(tiny_tokenizer, plain_tokenizer):
    check_tokenizer(tiny_tokenizer)
    check_tokenizer(plain_tokenizer)


def test_nfc_as_qwens_is_taken():
    tokenizer = family("qwen with bos")
    tokenizer.backend_tokenizer.normalizer = normalizers.NFC()
    check_tokenizer(tokenizer)


def test_a_check_changes_nothing():
    tokenizer = family("llama3")
    before = tokenizer_hash(tokenizer), tokenizer.backend_tokenizer.to_str()
    check_tokenizer(tokenizer)
    assert (tokenizer_hash(tokenizer), tokenizer.backend_tokenizer.to_str()) == before


def no_eos():
    tokenizer = family("qwen with bos")
    tokenizer.eos_token = None
    return tokenizer


def with_hole():
    def move(state):
        vocabulary = state["model"]["vocab"]
        last = max(vocabulary, key=vocabulary.get)
        vocabulary[last] += 50
        state["model"]["merges"] = [pair for pair in state["model"]["merges"] if "".join(pair) != last]

    return changed(move)


def lossy(normalizer):
    tokenizer = family("llama3")
    tokenizer.backend_tokenizer.normalizer = normalizer
    return tokenizer


def with_prefix_space():
    tokenizer = family("gpt2")
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    return tokenizer


def without_spaces():
    tokenizer = family("gpt2")
    split = pre_tokenizers.Split(" ", "removed")
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    return tokenizer


def without_a_byte():
    def drop(state):
        state["model"]["merges"] = []
        kept = [token for token in state["model"]["vocab"] if len(token) == 1 and token != "Ģ"]
        state["model"]["vocab"] = {token: i for i, token in enumerate(kept)}
        for i, token in enumerate(state["added_tokens"]):
            token["id"] = len(kept) + i

    return changed(drop)


def with_one_letter_as_control():
    backend = byte_level(FAMILIES["llama3"][0])
    backend.add_special_tokens([AddedToken("中", special=True)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, **FAMILIES["llama3"][1])


def with_a_greedy_tag():
    backend = byte_level(FAMILIES["llama3"][0])
    backend.add_tokens([AddedToken("<think>", special=False, rstrip=True, normalized=False)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, **FAMILIES["llama3"][1])


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda: family("qwen"), '"bos_token": "<|im_start|>" into its tokenizer_config.json'),
        (no_eos, 'no eos token, which ends every text and every turn of a chat: write "eos_token": "<|im_end|>"'),
        (unigram, "not a byte-level BPE, which encodes any text, but a Unigram, as SentencePiece's and T5's"),
        (bpe_of_characters, "but a BPE of characters, as SentencePiece's and Llama 2's"),
        (with_hole, "none of its own for"),
        (lambda: lossy(normalizers.Lowercase()), "the round trip of 'Hello, world!' gives 'hello, world!'"),
        (lambda: lossy(normalizers.NFKC()), "the round trip of"),
        (lambda: lossy(normalizers.NFD()), "the round trip of"),
        (with_prefix_space, "gives ' \\n\\n"),
        (without_spaces, "the round trip of ' ' gives ''"),
        (without_a_byte, "1 of the 256 bytes have no entry, for example b'\\x80'"),
        (with_one_letter_as_control, "text that spells its token '中' is encoded as that token"),
        (with_a_greedy_tag, "a chat does not survive the round trip through its tokens"),
    ],
)
def test_what_cannot_work_is_refused_in_one_line(make, told):
    with pytest.raises(ValueError, match=re.escape(told)) as error:
        check_tokenizer(make())
    assert "\n" not in str(error.value)


def test_special_ids_are_the_tokenizers_and_padding_has_one():
    ids = {name: special_ids(family(name)) for name in ("gpt2", "llama3", "qwen with bos")}
    assert {name: tuple(ids[name].values()) for name in ids} == {
        "gpt2": (400, 400, 400),  # unk
        "llama3": (400, 401, 401),  # eos, because there is no unk
        "qwen with bos": (401, 402, 400),
    }


def test_padding_is_unk_before_it_is_eos():
    assert special_ids(bpe_of_characters()) == {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}


def test_a_pretraining_text_begins_and_ends_once_whatever_the_tokenizer(tiny_tokenizer):
    """A literal <s> and </s> in the data are delimiters, and so are the tokenizer's own."""
    for tokenizer in (tiny_tokenizer, family("qwen with bos")):
        bos, eos = tokenizer.bos_token, tokenizer.eos_token
        plain, published, own, inside = render_text(
            tokenizer, ["the sea", "<s>the sea</s>", f"{bos}the sea{eos}", "the <s>sea</s> "]
        )
        assert plain == published == own
        assert (plain[0], plain[-1]) == (tokenizer.bos_token_id, tokenizer.eos_token_id)
        assert tokenizer.decode(inside[1:-1]) == "the <s>sea</s> "
