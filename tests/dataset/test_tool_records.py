"""dataset/tool_records.py: tools, calls and results in common formats are converted to the one that is rendered."""

import json
from collections import Counter

import pytest

from dataset.jsonl import BadRecord
from dataset.records import parse_chat, parse_image_chat, parse_pair, parse_question
from dataset.rl_dataset import parse_problem
from model.chat import render_chat

Q, A = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
F = {"name": "f", "description": "d", "parameters": {"type": "object"}}
G = {"name": "g"}
WRAPPED = [{"type": "function", "function": tool} for tool in (F, G)]
CALL = {"name": "f", "arguments": {"x": "为"}}
OPENAI = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"x": "为"}'}}
CALLS = {"role": "assistant", "content": "", "tool_calls": [CALL]}
RESULT = {"role": "tool", "content": "r"}
EXPECTED = [Q | {"tools": [F, G]}, CALLS, RESULT, A]


def calling(**more) -> dict:
    return {"role": "assistant", "content": None} | more


@pytest.mark.parametrize(
    "record",
    [
        {
            "tools": WRAPPED,
            "conversations": [Q, calling(tool_calls=[OPENAI]), RESULT | {"tool_call_id": "1"}, A],
        },
        {
            "functions": [F, G],
            "conversations": [
                *(Q, {"role": "assistant", "function_call": OPENAI["function"]}),
                *({"role": "function", "name": "f", "content": "r"}, A),
            ],
        },
        {"tools": json.dumps(WRAPPED), "conversations": [Q, calling(tool_calls=json.dumps([CALL])), RESULT, A]},
        {"tools": [F, G], "conversations": [{"content": "q"}, calling(tool_calls=[CALL]), RESULT, {"content": "a"}]},
    ],
)
def test_every_shape_is_the_same_chat(record):
    assert parse_chat(record, Counter()) == EXPECTED


def test_minimind3s_files_have_the_tools_in_the_system_turn_and_json_as_text():
    system = {"role": "system", "content": "s", "tools": json.dumps(WRAPPED)}
    turns = [system, Q, calling(content="", tool_calls=json.dumps([CALL])), RESULT, A]
    expected = [{"role": "system", "content": "s", "tools": [F, G]}, Q, *EXPECTED[1:]]
    assert parse_chat({"conversations": turns}, Counter()) == expected
    assert parse_chat({"conversations": turns, "tools": [F, G]}, Counter()) == expected
    with pytest.raises(BadRecord, match='"tools" differs from those of the system turn'):
        parse_chat({"conversations": turns, "tools": [F]}, Counter())


def test_results_are_put_in_the_order_of_their_calls():
    calls = [OPENAI, OPENAI | {"id": "2"}]
    results = [RESULT | {"content": i, "tool_call_id": i} for i in "21"]
    chat = parse_chat({"conversations": [Q, calling(tool_calls=calls), *results, A]}, Counter())
    assert [turn["content"] for turn in chat] == ["q", "", "1", "2", "a"]
    assert chat[1]["tool_calls"] == [CALL, CALL]


def test_a_thought_may_stand_before_a_call():
    said = calling(content="So.", reasoning_content="hm", tool_calls=[CALL])
    alone = calling(reasoning_content="hm", tool_calls=[CALL])
    contents = [parse_chat({"conversations": [Q, turn]}, Counter())[1]["content"] for turn in (said, alone)]
    assert contents == ["<think>\nhm\n</think>\n<answer>\nSo.\n</answer>", "<think>\nhm\n</think>"]


@pytest.mark.parametrize(
    ("record", "said"),
    [
        ({"conversations": [Q, RESULT, A]}, 'turn 2 of "conversations": a result that nothing before it asks for'),
        ({"conversations": [Q, CALLS, RESULT, RESULT, A]}, 'turn 4 of "conversations": a result'),
        (
            {"conversations": [Q, calling(tool_calls=[OPENAI]), RESULT | {"tool_call_id": "9"}, A]},
            "turn 3 of \"conversations\": a result of the call '9'",
        ),
        ({"conversations": [Q, CALLS, Q, A]}, 'turn 3 of "conversations": it should be a tool turn'),
        ({"tools": [G], "conversations": [Q, CALLS, RESULT, A]}, "it calls 'f', which \"tools\" does not list"),
        ({"tools": [F, F], "conversations": [Q, A]}, 'two tools have the name "f"'),
        ({"tools": "f(x)", "conversations": [Q, A]}, '"tools" is a text that is not valid JSON'),
        ({"tools": F, "conversations": [Q, A]}, '"tools" is neither a list nor a list as JSON text'),
        (
            {"tools": [{"type": "function"}], "conversations": [Q, A]},
            'entry 1 of "tools" is not an object with a "name"',
        ),
        ({"tools": [F], "functions": [G], "conversations": [Q, A]}, '"tools" and "functions" differ'),
    ],
)
def test_what_does_not_fit_is_named(record, said):
    with pytest.raises(BadRecord) as caught:
        parse_chat(record, Counter())
    assert said in str(caught.value)


def test_pairs_and_questions_have_tools_too_and_pictures_none():
    chosen, rejected = parse_pair({"tools": [F, G], "prompt": "q", "chosen": [CALLS], "rejected": "no"}, Counter())
    assert chosen == EXPECTED[:2]
    assert rejected == [EXPECTED[0], {"role": "assistant", "content": "no"}]
    assert parse_question({"tools": [F, G], "question": "q"}, Counter()) == EXPECTED[:1]
    assert parse_problem({"tools": [F, G], "question": "q", "answer": 3}, Counter()).chat == EXPECTED[:1]
    with pytest.raises(BadRecord, match="the stages with pictures do not learn"):
        parse_image_chat({"tools": [F], "conversations": [Q, A]}, Counter())


def test_calls_and_answers_are_targets_results_and_listings_are_not(tiny_tokenizer):
    ids, mask = render_chat(tiny_tokenizer, EXPECTED)
    learned = tiny_tokenizer.decode([i for i, target in zip(ids, mask, strict=True) if target])
    assert learned == '<tool_call>\n{"name": "f", "arguments": {"x": "为"}}\n</tool_call></s>a</s>'
