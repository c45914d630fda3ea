"""The parts of prepare_data.py: cutting values out of JSON, counting characters, normalising, judging answers."""

import json
import unicodedata
from collections import Counter

import numpy as np
import pytest

from scripts.preparing.answers import is_cut_off, is_refusal, turns_fault
from scripts.preparing.characters import GRAM_HAN, GRAM_LATIN, count
from scripts.preparing.choosing import cutoff, draw
from scripts.preparing.chunks import cut_text
from scripts.preparing.encoding_faults import wrongly_decoded
from scripts.preparing.json_values import BrokenValues, cut_values
from scripts.preparing.normalising import normalise
from scripts.preparing.personal import PATTERNS, mask
from scripts.preparing.sources import guess_encoding

pytestmark = pytest.mark.quick


@pytest.mark.parametrize("size", [1, 2, 3, 7, 1000])
def test_values_are_cut_out_wherever_the_blocks_end(size):
    values = [{"a": 'b]"}\\'}, {"c": [{"d": "\\\\"}, []]}, {"中": "文{"}]
    for text in (
        json.dumps(values),
        json.dumps(values, indent=1, ensure_ascii=False),
        "\n".join(map(json.dumps, values)),
    ):
        data = text.encode()
        blocks = [data[start : start + size] for start in range(0, len(data), size)]
        assert [json.loads(value) for value in cut_values(blocks)] == values


@pytest.mark.parametrize("text", ["[{", '[{"a": 1}', '{"a": 1}}', '[{"a": "b}]'])
def test_what_is_no_json_any_more_is_told(text):
    with pytest.raises(BrokenValues):
        list(cut_values([text.encode()]))


def test_repetition_is_counted_as_by_hand():
    texts = [
        "abcdefghijklmnop" * 5,
        "一二三四五六七八九十" * 4,
        "no repetition stands in this",
        "",
        "x" * 50,
        "a---- bbbbb",
    ]
    counts = count(texts)
    for number, text in enumerate(texts):
        gram = GRAM_HAN if "一" in text else GRAM_LATIN
        grams = [text[i : i + gram] for i in range(len(text) - gram + 1)]
        assert counts.repeated[number] == pytest.approx(1 - len(set(grams)) / len(grams) if grams else 0)
    assert counts.runs.tolist() == pytest.approx([0, 0, 0, 0, 1, 0.5])
    assert counts.of("han", "latin").tolist() == [80, 40, 24, 0, 50, 6]


def test_each_character_has_the_kind_that_unicode_says():
    text = "aéж中かª9٣ \n。!+😀\x07\ufffd\u200d"
    kinds = count(list(text)).kinds.argmax(axis=1)
    names = (
        "latin accented other_letter han kana accented digit digit space space punctuation punctuation symbol symbol "
    )
    from scripts.preparing.characters import KINDS

    assert [KINDS[kind] for kind in kinds] == (names + "control broken joiner").split()


@pytest.mark.parametrize(
    ("text", "normal"),
    [
        ("ＡＢＣ１２３，全角标点！", "ABC123，全角标点！"),
        ("cafe\u0301 \xa0a\u200bb\r\nc  \n\n\n\n\nd \n", "café  ab\nc\n\n\nd"),
        ("说：`ｘ = １`，再说１", "说：`ｘ = １`，再说1"),
        ("print('ｘ１')\n中文１", "print('ｘ１')\n中文1"),
        ("```\nａ  \n```\nａ", "```\nａ  \n```\na"),
        ("\n    return x", "    return x"),
    ],
)
def test_normalising_changes_writing_and_no_code(text, normal):
    assert normalise(text) == normal
    assert unicodedata.is_normalized("NFC", normalise(text).replace("`", ""))
    assert normalise(normal) == normal


@pytest.mark.parametrize(
    ("kind", "text", "masked"),
    [
        ("emails", "a b.c+d@mail.example.org.", "a [EMAIL]."),
        ("phones", "打 13812345678 或 +1 415 555 0132 或 010-12345678", "打 [PHONE] 或 [PHONE] 或 [PHONE]"),
        ("phones", "3.13812345678, 13812345678901, 1+13812345678", "3.13812345678, 13812345678901, 1+13812345678"),
        ("ids", "11010519491231002X 110105194912310021", "[ID] 110105194912310021"),
        ("ids", "4539 1488 0343 6467, 4539 1488 0343 6468", "[ID], 4539 1488 0343 6468"),
        ("urls", "见https://a.b/c?d=e。后面 www.x.org", "见[URL]。后面 [URL]"),
    ],
)
def test_what_is_personal_is_masked_and_numbers_are_not(kind, text, masked):
    counts: Counter = Counter()
    assert mask(text, kind, counts) == masked
    assert counts[kind] == masked.count(PATTERNS[kind][0])


@pytest.mark.parametrize(
    ("text", "refused"),
    [
        ("As an AI language model, I cannot do that.", True),
        ("I'm sorry, but I can't help with that.", True),
        ("很抱歉，我无法回答这个问题。", True),
        ("作为一个人工智能助手，我没有个人情感。", True),
        ("As an AI, I am happy to explain it.", False),
        ("抱歉我不能同时旅行", False),
        ("作为一名教师，他不能迟到。", False),
        ("I am sorry for your loss.", False),
    ],
)
def test_a_refusal_is_what_says_so(text, refused):
    assert is_refusal(text) == refused


def test_an_answer_is_cut_off_where_its_last_sentence_has_no_end():
    sentence = "这是一个完整的句子，它说明了一件重要的事情，并且有结尾。"
    assert not is_cut_off(sentence * 5)
    assert is_cut_off(sentence * 5 + "后来他们又")
    assert is_cut_off("```python\nprint(1)")
    assert not is_cut_off("一、苹果\n二、" + "香蕉" * 60)


def test_turns_alternate_and_say_no_thing_twice():
    def chat(*said: str) -> list[dict]:
        return [{"role": "assistant" if n % 2 else "user", "content": text} for n, text in enumerate(said)]

    long = "a text that is longer than twenty characters"
    assert turns_fault(chat("q", "a", "q", "b")) is None
    assert turns_fault([{"role": "system", "content": "s"}, *chat("q", "a")]) is None
    assert turns_fault(chat("q", "a")[::-1]) == "turns that do not alternate"
    assert turns_fault(chat("q")) == "no answer at the end"
    assert turns_fault(chat("q", long, "r", long)) == "a repeated turn"
    assert turns_fault(chat(long, long)) == "an answer that only repeats the question"
    assert turns_fault([chat("q")[0], {"role": "assistant", "content": "a", "weight": 0}]) == "no answer to train on"


@pytest.mark.parametrize("codec", ["latin-1", "cp1252", "gb18030"])
def test_text_that_was_decoded_wrongly_is_found(codec):
    text = "这是一个句子，说的是我们在这里。它很长。"
    garbled = text.encode().decode(codec, errors="replace")
    assert wrongly_decoded(garbled) > 0.01 * len(garbled)
    for right in (text, "Où êtes-vous, élève? Ça va très bien à Zürich, señor.", "锌和锑"):
        assert wrongly_decoded(right) == 0


@pytest.mark.parametrize("encoding", ["utf-8", "utf-16", "utf-16-le", "utf-16-be", "gb18030"])
def test_the_encoding_is_found_out(encoding):
    text = '{"text": "这是中文，还有 English."}\n' * 20
    assert text.encode(encoding).decode(guess_encoding(text.encode(encoding))).lstrip("\ufeff") == text
    assert guess_encoding(("好\n" * 20).encode() + b"\xff\n") == "utf-8"


def test_a_long_text_is_cut_between_paragraphs_and_loses_nothing():
    text = "\n\n".join(f"{number} " + "字" * 900 for number in range(100)) + "\n\n" + "长" * 50_000
    parts = list(cut_text(text, "document"))
    assert "".join(part for _, part in parts) == text
    assert max(len(part) for _, part in parts) < 41_000
    assert all(text.count("\n", 0, text.index(part)) == line for line, part in parts[:3])
    assert [part for _, part in cut_text("a\nb\n\nc", "paragraph")] == ["a\nb\n\n", "c"]
    assert list(cut_text("a\n\nb", "line")) == [(0, "a"), (2, "b")]


def test_lines_are_drawn_exactly_and_at_random():
    numbers = np.arange(10_000)
    keys = draw(1, "order", numbers)
    assert len(set(keys.tolist())) == 10_000
    assert abs(np.corrcoef(keys.astype(float), numbers)[0, 1]) < 0.05
    assert not (keys == draw(2, "order", numbers)).any()
    limit = cutoff(lambda: [(keys[:4000], np.ones(4000)), (keys[4000:], np.ones(6000))], 123)
    assert (keys <= np.uint64(limit)).sum() == 123
    assert cutoff(lambda: [(keys, np.ones(10_000))], 10_000) == (1 << 64) - 1
