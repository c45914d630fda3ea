"""model/tokenizer.py: the bytes of ids, the fingerprint, and streaming in whole characters."""

import copy
import json
import random

import pytest
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from model.tokenizer import StreamDecoder, token_bytes, tokenizer_hash

TEXTS = [
    "Hello, world",
    "你好，请问今天的天气怎么样？",
    "😀👩‍👩‍👧 🇨🇳",
    "龘靐齉 𠮷",
    "\x00\x7f\t\r\n  \u00a0é",
    "<think>plan</think> text",
    "",
]


def ids_of(tokenizer, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def test_the_bytes_of_ids_spell_the_text(tiny_tokenizer, plain_tokenizer):
    for tokenizer in (tiny_tokenizer, plain_tokenizer):
        table = token_bytes(tokenizer)
        assert len(table) == len(tokenizer)
        assert table[:3] == [b"", b"", b""]
        for text in TEXTS:
            assert b"".join(table[i] for i in ids_of(tokenizer, text)) == text.encode()
        assert {bytes([value]) for value in range(256)} <= set(table), "every byte has an id of its own"
    assert token_bytes(tiny_tokenizer)[3:8] == [b"<think>", b"</think>", b"<answer>", b"</answer>", b"<image>"]


def test_a_vocabulary_that_is_not_byte_level_is_refused():
    words = Tokenizer(models.WordLevel({"<unk>": 0, "plain": 1, "你好": 2}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>")
    with pytest.raises(ValueError, match=r"token 2 \('你好'\)"):
        token_bytes(tokenizer)


def test_the_fingerprint_is_of_what_decides_the_ids(tiny_tokenizer, plain_tokenizer, tmp_path):
    fingerprint = tokenizer_hash(tiny_tokenizer)
    assert len(fingerprint) == 16
    assert int(fingerprint, 16) >= 0
    tiny_tokenizer.save_pretrained(tmp_path)
    assert tokenizer_hash(AutoTokenizer.from_pretrained(tmp_path)) == fingerprint

    used = copy.deepcopy(tiny_tokenizer)
    used(["a", "b c"], padding=True, truncation=True, max_length=3)
    used.chat_template = "another"
    assert used.backend_tokenizer.truncation
    assert tokenizer_hash(used) == fingerprint

    assert tokenizer_hash(plain_tokenizer) != fingerprint
    more = copy.deepcopy(tiny_tokenizer)
    more.add_tokens([AddedToken("<more>")])
    assert tokenizer_hash(more) != fingerprint
    state = json.loads(tiny_tokenizer.backend_tokenizer.to_str())
    for change in (
        lambda: state["model"]["merges"].pop(),
        lambda: state["added_tokens"][3].update(special=True),
        lambda: state.update(normalizer={"type": "NFC"}),
        lambda: state["pre_tokenizer"].update(add_prefix_space=True),
    ):
        change()
        changed = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(state)))
        assert tokenizer_hash(changed) != fingerprint
        fingerprint_before, fingerprint = fingerprint, tokenizer_hash(changed)
        assert fingerprint_before != fingerprint


def whole_characters(data: bytes) -> str:
    """The longest prefix of `data` made of whole characters; `data` is the beginning of a valid text."""
    for cut in range(4):
        try:
            return data[: len(data) - cut].decode()
        except UnicodeDecodeError:
            continue
    raise AssertionError(data)


def test_streamed_text_is_whole_characters_as_soon_as_they_are_whole(tiny_tokenizer):
    table = token_bytes(tiny_tokenizer)
    split = 0
    for text in TEXTS:
        decoder, read, written = StreamDecoder(tiny_tokenizer), b"", ""
        for token in ids_of(tiny_tokenizer, text):
            read += table[token]
            written += decoder.push(token)
            assert written == whole_characters(read)
            split += written.encode() != read
        assert decoder.flush() == ""
        assert written == text
    assert split > 20, "the test needs characters that are spread over tokens"


def test_any_bytes_stream_to_what_they_decode_to(tiny_tokenizer):
    table = token_bytes(tiny_tokenizer)
    id_of = {data: token for token, data in enumerate(table) if len(data) == 1}
    rng = random.Random(0)
    for _ in range(300):
        data = bytes(rng.choice([rng.randrange(256), 0xE4, 0xBD, 0xA0, 0xF0, 0x9F]) for _ in range(rng.randrange(12)))
        decoder = StreamDecoder(table)
        pieces = [decoder.push(id_of[bytes([value])]) for value in data]
        assert "".join(pieces) + decoder.flush() == data.decode("utf-8", errors="replace")


def test_special_and_unknown_ids_are_no_text(tiny_tokenizer):
    decoder = StreamDecoder(tiny_tokenizer)
    hao = ids_of(tiny_tokenizer, "龘")
    assert len(hao) == 3
    stream = [1, hao[0], 2, hao[1], len(tiny_tokenizer) + 5, hao[2], 0]
    assert [decoder.push(token) for token in stream] == ["", "", "", "", "", "龘", ""]
    assert decoder.flush() == ""


def test_a_character_that_is_never_finished_shows_at_the_end(tiny_tokenizer):
    decoder = StreamDecoder(tiny_tokenizer)
    assert [decoder.push(token) for token in ids_of(tiny_tokenizer, "龘")[:2]] == ["", ""]
    assert decoder.flush() == "\ufffd"


def test_decoders_share_no_state(tiny_tokenizer):
    table = token_bytes(tiny_tokenizer)
    first, second = StreamDecoder(table), StreamDecoder(table)
    tokens = ids_of(tiny_tokenizer, "龘")
    for token in tokens[:2]:
        first.push(token)
    assert "".join(second.push(token) for token in ids_of(tiny_tokenizer, "你a")) == "你a"
    assert first.push(tokens[2]) == "龘"
