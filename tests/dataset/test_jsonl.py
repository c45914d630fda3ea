"""Every kind of bad line is reported with file, line, reason and first characters; valid files of any form load."""

import json
import tracemalloc
from collections import Counter

import pytest

from dataset.jsonl import DataError, JsonlReader, excerpt, named_counts
from dataset.records import parse_chat, parse_text

GOOD_TEXT = b'{"text": "good"}'
GOOD_CHAT = b'{"conversations": [{"content": "q"}, {"content": "a"}]}'
TURN = '{"role": "user", "content": "q"}'
DEEP = b"[" * 200_000

BAD_LINES = [
    (b'{"text": "a"', "not valid JSON (Expecting ',' delimiter, column 13)"),
    (b"plain words", "not valid JSON (Expecting value, column 1)"),
    (b'{"text": "a"} {"text": "b"}', "not valid JSON (Extra data, column 15)"),
    (b'{"text": "a\tb"}', "not valid JSON (Invalid control character at, column 12)"),
    (b'{"text": "\\ud83d"}', '"text" contains a lone surrogate'),
    (b'{"text": 1' + b"0" * 5000 + b"}", "not valid JSON (Exceeds the limit (4300 digits)"),
    (DEEP, "not valid JSON (nested too deeply)"),
    (b"\xff\xfe{\x00", "not UTF-8 (invalid start byte at byte 1)"),
    (b'{"text": "caf\xe9"}', "not UTF-8 (invalid continuation byte at byte 14)"),
    (b'{"text": "a", "text": "b"}', 'the key "text" appears twice in one object'),
    (b'["text"]', "not a JSON object"),
    (b'"text"', "not a JSON object"),
    (b"null", "not a JSON object"),
    (b"", "the line is empty"),
    (b"  \t\r", "the line is empty"),
    (b"{}", 'the key "text" is missing'),
    (b'{"Text": "a"}', 'the key "text" is missing'),
    (b'{"text": null}', '"text" is not a string'),
    (b'{"text": 3}', '"text" is not a string'),
    (b'{"text": ["a"]}', '"text" is not a string'),
    (b'{"text": ""}', '"text" is empty'),
    (b'{"text": " \\n\\u3000"}', '"text" is empty'),
    (b'{"text": "<s></s>"}', '"text" is empty'),
]
BAD_CHATS = [
    ("{}", 'the key "conversations" is missing'),
    ('{"conversations": "q"}', '"conversations" is not a list'),
    ('{"conversations": []}', '"conversations" is empty'),
    ('{"conversations": ["q", "a"]}', 'turn 1 of "conversations": not an object'),
    (f'{{"conversations": [{TURN}, {{"role": "assistant"}}]}}', 'turn 2 of "conversations": the key "content" is'),
    (f'{{"conversations": [{TURN}, {{"content": null}}]}}', 'turn 2 of "conversations": "content" is not a string'),
    (f'{{"conversations": [{TURN}, {{"content": "\\udc00"}}]}}', '"content" contains a lone surrogate'),
    ('{"conversations": [{"role": "gpt", "content": "a"}]}', "turn 1 of \"conversations\": unknown role 'gpt'"),
    ('{"conversations": [{"role": ["user"], "content": "a"}]}', "unknown role ['user']"),
    (f'{{"conversations": [{TURN}, {{"role": "system", "content": "s"}}]}}', "turn 2 of \"conversations\": a system"),
    (f'{{"conversations": [{TURN}]}}', '"conversations" has no assistant turn'),
    (f'{{"conversations": [{TURN}, {{"content": " \\n"}}]}}', 'turn 2 of "conversations": an empty answer would train'),
]  # fmt: skip


def write(path, lines, end=b"\n"):
    path.write_bytes(b"".join(line + end for line in lines))
    return path


@pytest.mark.parametrize(("bad", "reason"), BAD_LINES, ids=range(len(BAD_LINES)))
def test_a_bad_text_line_is_told_with_file_line_reason_and_excerpt(tmp_path, bad, reason):
    path = write(tmp_path / "texts.jsonl", [GOOD_TEXT, GOOD_TEXT, bad, GOOD_TEXT])

    with pytest.raises(DataError) as error:
        list(JsonlReader(path, parse_text))

    message = str(error.value)
    assert message.startswith(f"{path}, line 3: {reason}")
    assert "\n" not in message
    assert message.endswith(excerpt(bad) if bad.strip() else reason)
    assert len(message) < len(str(path)) + 300  # a short message, however long the bad line


@pytest.mark.parametrize(("bad", "reason"), BAD_CHATS)
def test_a_bad_chat_line_is_told_with_file_line_reason_and_excerpt(tmp_path, bad, reason):
    path = write(tmp_path / "chats.jsonl", [GOOD_CHAT, bad.encode(), GOOD_CHAT])

    with pytest.raises(DataError) as error:
        list(JsonlReader(path, parse_chat))

    message = str(error.value)
    assert message.startswith(f"{path}, line 2: ")
    assert reason in message
    assert message.endswith(excerpt(bad.encode()))


def test_skip_bad_lines_counts_every_bad_line_and_keeps_every_good_one(tmp_path):
    lines = [line for bad, _ in BAD_LINES for line in (bad, GOOD_TEXT)]
    reader = JsonlReader(write(tmp_path / "texts.jsonl", lines), parse_text, skip_bad_lines=True)

    assert list(reader) == ["good"] * len(BAD_LINES)
    assert reader.bad_lines == len(BAD_LINES)
    assert reader.bad_reports[0] == f"line 1: {BAD_LINES[0][1]}: {BAD_LINES[0][0].decode()}"
    assert len(reader.bad_reports) == 20
    assert reader.bytes_read == reader.path.stat().st_size


@pytest.mark.parametrize("newline", [b"\n", b"\r\n"])
@pytest.mark.parametrize("bom", [b"", b"\xef\xbb\xbf"])
@pytest.mark.parametrize("end", [b"", b"\n", b"\n\n  \n\r\n"])
def test_bom_crlf_a_missing_last_newline_and_blank_lines_at_the_end_are_fine(tmp_path, bom, newline, end):
    path = tmp_path / "texts.jsonl"
    path.write_bytes(
        bom + newline.join([b'{"text": "one"}', '{"text": "两\\r\\n"}'.encode(), b'{"text": "three"}']) + end
    )

    assert list(JsonlReader(path, parse_text)) == ["one", "两\r\n", "three"]


def test_unicode_line_separators_inside_a_text_do_not_end_the_line(tmp_path):
    path = write(tmp_path / "texts.jsonl", [json.dumps({"text": "a\u2028b\x85c"}, ensure_ascii=False).encode()])

    assert list(JsonlReader(path, parse_text)) == ["a\u2028b\x85c"]


def test_a_turn_without_a_role_is_the_users_or_the_assistants_in_turn():
    contents = [{"content": text} for text in "abcd"]
    roles = [turn["role"] for turn in parse_chat({"conversations": contents}, Counter())]
    with_system = [{"role": "system", "content": "s"}, *contents]

    assert roles == ["user", "assistant", "user", "assistant"]
    assert [turn["role"] for turn in parse_chat({"conversations": with_system}, Counter())] == ["system", *roles]


@pytest.mark.parametrize(
    ("line", "shown"),
    [
        (b"x" * 80, "x" * 80),
        (b"x" * 81, "x" * 80 + "…"),
        ("字".encode() * 100, "字" * 80 + "…"),
        (b"a\x1b[31mb\x00\xff", "a\\x1b[31mb\\x00\ufffd"),
        ("\ufeffa\u202eb".encode(), "\\ufeffa\\u202eb"),
        (b"a\r\n", "a"),
    ],
)
def test_an_excerpt_is_80_characters_that_are_safe_to_print(line, shown):
    assert excerpt(line) == shown


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda path: None, "does not exist: download it from https://"),
        (lambda path: path.mkdir(), "is not a file"),
        (lambda path: path.touch(), "is empty"),
    ],
)
def test_a_file_that_cannot_be_read_is_told_before_reading(tmp_path, make, reason):
    make(path := tmp_path / "texts.jsonl")

    with pytest.raises(DataError, match=reason) as error:
        JsonlReader(path, parse_text)
    assert str(error.value).startswith(str(path))


def test_keys_that_mean_nothing_are_counted_in_good_lines_only(tmp_path):
    lines = [
        {"text": "a", "id": 1, "url": None},
        {"text": "b", "id": 2, "\x1b[31mred": 1},
        {"text": "", "id": 3},
        {"text": "c"},
    ]
    reader = JsonlReader(
        write(tmp_path / "texts.jsonl", [json.dumps(line).encode() for line in lines]), parse_text, True
    )

    assert list(reader) == ["a", "b", "c"]
    assert reader.ignored == {"id": 2, "url": 1, "\\x1b[31mred": 1}
    assert named_counts(reader.ignored) == "id 2, \\x1b[31mred 1, url 1"


def test_a_key_that_holds_half_a_character_is_counted_too(tmp_path):
    (tmp_path / "texts.jsonl").write_bytes(b'{"text": "a", "\\ud83d": 1}\n')
    reader = JsonlReader(tmp_path / "texts.jsonl", parse_text)
    assert [*reader] == ["a"]
    assert reader.ignored == {"?": 1}


def test_a_file_whose_keys_are_data_does_not_fill_the_memory(tmp_path):
    lines = [json.dumps({"text": "a"} | {f"{n} {'x' * 99}": 1}).encode() for n in range(1100)]
    reader = JsonlReader(write(tmp_path / "texts.jsonl", lines), parse_text)

    assert len(list(reader)) == 1100
    assert reader.ignored.total() == 1100
    assert len(reader.ignored) == 1001
    assert reader.ignored["others"] == 100
    told = named_counts(reader.ignored)
    assert told.startswith("others 100, 0 xx")
    assert told.endswith("x… 1, and 981 more")


def test_memory_holds_one_line_however_long_the_file(tmp_path):
    line = b'{"text": "' + b"x" * 99_986 + b'"}'
    path = write(tmp_path / "texts.jsonl", [line] * 500)
    tracemalloc.start()

    assert sum(map(len, JsonlReader(path, parse_text))) == 500 * 99_986
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()

    assert peak < 2_000_000  # for a file of 50 MB
