"""model/tool_calls.py: calls in an answer, parsed whole and while streaming; results in the order of their calls."""

import pytest

from model.tool_calls import CallStream, in_call_order, parse_arguments, parse_call, split_calls, with_calls

ADD = {"name": "add", "arguments": {"a": 1, "b": "为 </s>"}}
NOW = {"name": "now", "arguments": {}}
BROKEN = '<tool_call>\n{"name": "add", "arguments": {"a": 1\n</tool_call>'
ANSWERS = [
    ("", "", []),
    (" plain <b> text < \n", " plain <b> text < \n", []),
    (with_calls("", [ADD]), "", [ADD]),
    (with_calls("Let me see.", [ADD, NOW]), "Let me see.", [ADD, NOW]),
    (with_calls("", [NOW]) + "\n\nDone. ", "Done. ", [NOW]),
    (BROKEN, BROKEN, []),
    (f"{BROKEN}\n{with_calls('', [NOW])}", BROKEN, [NOW]),
    ("<tool_call>\n" + with_calls("", [NOW]), "<tool_call>", [NOW]),
    ("never closed <tool_call>\n{", "never closed <tool_call>\n{", []),
    ("</tool_call> <tool_cal", "</tool_call> <tool_cal", []),
    ('<tool_call>{"name": "f", "arguments": "{\\"x\\": 1}"}</tool_call>', "", [{"name": "f", "arguments": {"x": 1}}]),
]


@pytest.mark.parametrize(("text", "said", "calls"), ANSWERS)
@pytest.mark.parametrize("size", [1, 3, 1000])
def test_an_answer_is_read_the_same_in_pieces_of_any_size(text, said, calls, size):
    stream, parts = CallStream(), []
    for begin in range(0, len(text), size):
        parts += stream.push(text[begin : begin + size])
    parts += stream.flush()
    assert "" not in parts
    assert ("".join(p for p in parts if isinstance(p, str)), [p for p in parts if isinstance(p, dict)]) == (said, calls)
    assert split_calls(text) == (said, calls)


def test_text_without_a_call_does_not_wait():
    stream = CallStream()
    assert stream.push("one two") == ["one two"]
    assert stream.push("\n<tool") == []
    assert stream.push("box>") == ["\n<toolbox>"]


@pytest.mark.parametrize(
    "text",
    [
        *("", "[]", "{}", '{"name": ""}', '{"name": 1}', '{"name": "f", "arguments": []}', "[" * 99_999),
        *('{"name": "f", "arguments": "x"}', '{"name": "f", "arguments": {"x": NaN}}', '{"name": "\\ud83d"}'),
        '{"name": "f"} more',
    ],
)
def test_what_is_no_call(text):
    assert parse_call(text) is None


def test_arguments_of_every_form():
    assert parse_arguments(None) == parse_arguments("") == parse_arguments("{}") == {}
    assert parse_arguments('{"a": 1}') == parse_arguments({"a": 1}) == {"a": 1}
    assert parse_arguments("1") is parse_arguments([1]) is parse_arguments(True) is None


def test_results_come_in_the_order_of_their_calls():
    calls = [{"id": "x", **ADD}, {"id": "y", **NOW}]
    asked = {"role": "assistant", "content": "", "tool_calls": calls}
    first, second = ({"role": "tool", "content": i, "tool_call_id": i} for i in "xy")
    end = {"role": "assistant", "content": "."}
    assert in_call_order([asked, second, first, end]) == [asked, first, second, end]
    bare = [{"role": "tool", "content": i} for i in "21"]
    assert in_call_order([asked, *bare]) == [asked, *bare]
    for wrong in ([end, first], [asked, first, first], [asked, first, second, bare[0]]):
        with pytest.raises(ValueError, match=f"^{len(wrong)}: a result.* that nothing before it asks for"):
            in_call_order(wrong)
