"""No key and no turn of a line is silently ignored: it is used, counted by name, or refused with a reason."""

import itertools
from collections import Counter

import pytest

from dataset.jsonl import BadRecord
from dataset.records import parse_chat, parse_image_chat, parse_pair, parse_question, parse_text

Q, A = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
SYSTEM = {"role": "system", "content": "s"}
CHAT = {"conversations": [Q, A]}
PAIR = {"prompt": "q", "chosen": "a", "rejected": "b"}


def read(parse, record):
    """A parser's result for a record, and the keys that it ignored."""
    ignored = Counter()
    return parse(record, ignored), dict(ignored)


def refusal(parse, record) -> str:
    with pytest.raises(BadRecord) as fault:
        parse(record, Counter())
    return str(fault.value)


@pytest.mark.parametrize(
    ("parse", "record"),
    [
        (parse_text, {"text": "t"}),
        (parse_chat, CHAT),
        (parse_image_chat, CHAT | {"image": None}),
        (parse_pair, PAIR),
        (parse_question, {"question": "q"}),
        (parse_question, {"conversations": [Q]}),
    ],
)
def test_what_means_nothing_is_counted_by_name(parse, record):
    plain, nothing = read(parse, record)
    assert not nothing
    assert read(parse, record | {"id": 3, "source": {"url": "u"}, "score": None}) == (
        plain,
        {"id": 1, "source": 1, "score": 1},
    )


def test_keys_of_turns_are_counted_apart():
    turns = [Q | {"name": "Ann", "id": 1}, A | {"name": "Bob"}]
    assert read(parse_chat, {"conversations": turns, "id": 7}) == ([Q, A], {"name (turn)": 2, "id (turn)": 1, "id": 1})
    pair = {"prompt": [turns[0]], "chosen": [turns[1]], "rejected": "b"}
    assert read(parse_pair, pair)[1] == {"name (turn)": 2, "id (turn)": 1}


IN_TURN = "it belongs in a turn, not in the line"


@pytest.mark.parametrize(
    ("key", "reason"),
    [
        ("tool_calls", IN_TURN),
        ("function_call", IN_TURN),
        ("messages", "a second chat in one line"),
        ("weight", "it belongs in a turn, not in the line"),
        ("reasoning_content", "it belongs in a turn, not in the line"),
        ("system_prompt", 'the key for a system prompt is "system"'),
        ("history", "earlier turns belong in the chat"),
        ("image", "only train_pretrain_vlm.py and train_sft_vlm.py train on pictures"),
        ("audio", "only text and pictures are supported"),
    ],
)
@pytest.mark.parametrize(
    ("parse", "record"), [(parse_chat, CHAT), (parse_pair, PAIR), (parse_question, {"question": "q"})]
)
def test_what_would_change_what_is_learned_is_refused(parse, record, key, reason):
    assert refusal(parse, record | {key: ["x"]}) == f'the key "{key}" is refused: {reason}'
    for empty in (None, "", [], {}):
        assert read(parse, record | {key: empty})[1] == {key: 1}


@pytest.mark.parametrize(
    ("more", "reason"),
    [
        ({"tool_calls": "f()"}, '"tool_calls" is a text that is not valid JSON'),
        ({"tool_calls": {"name": "f"}}, '"tool_calls" is neither a list nor a list as JSON text'),
        ({"tool_calls": [{"function": {}}]}, 'entry 1 of "tool_calls" is not an object with a "name"'),
        ({"function_call": {"name": "f", "arguments": "{"}}, '"function_call": its "arguments" are neither an object'),
        ({"tool_calls": [{"name": "\ud83d"}]}, 'entry 1 of "tool_calls" contains a lone surrogate (half a character)'),
        ({"tools": [{"name": "f"}]}, 'only a turn of the role "system" can have "tools"'),
        ({"tool_call_id": "1"}, 'only a turn of the role "tool" can have "tool_call_id"'),
        ({"reasoning": "t"}, 'the key "reasoning" is refused: the key for thoughts is "reasoning_content"'),
        ({"cot": "t"}, 'the key "cot" is refused: the key for thoughts is "reasoning_content"'),
        ({"loss_mask": 0}, 'the key "loss_mask" is refused: use "weight" or "train" to mask a turn'),
        ({"loss": False}, 'the key "loss" is refused: use "weight" or "train" to mask a turn'),
        ({"value": "v"}, 'the key "value" is refused: the key for a turn\'s text is "content"'),
        ({"weight": 0.5}, '"weight" is 0.5, but must be 0 or 1'),
        ({"weight": "1"}, "\"weight\" is '1', but must be 0 or 1"),
        ({"weight": True}, '"weight" is True, but must be 0 or 1'),
        ({"weight": [0]}, '"weight" is [0], but must be 0 or 1'),
        ({"train": 0}, '"train" is 0, but must be true or false'),
        ({"train": "false"}, "\"train\" is 'false', but must be true or false"),
        ({"weight": 1, "train": False}, '"weight" and "train" contradict each other'),
        ({"reasoning_content": ["t"]}, '"reasoning_content" is not a string'),
        ({"reasoning_content": "a </think> b"}, "the thought already contains the tag </think>"),
        ({"reasoning_content": "t", "content": "<answer>a"}, "the answer already contains the tag <answer>"),
        ({"reasoning_content": "t", "content": ""}, "an empty answer would train the model to stop at once"),
        ({"reasoning_content": "\ud83d"}, '"reasoning_content" contains a lone surrogate (half a character)'),
        ({"content": " \n"}, "an empty answer would train the model to stop at once"),
        ({"content": None}, '"content" is not a string but null'),
        ({"content": [{"type": "text", "text": "a"}]}, '"content" is not a string but a list of parts: join'),
        ({"role": "observation"}, "unknown role 'observation': use \"tool\""),
        ({"role": "tool", "weight": 1}, "only the assistant's turns can be trained on, not a tool turn"),
        ({"role": "gpt"}, "unknown role 'gpt': use \"assistant\""),
        ({"role": "Assistant"}, "unknown role 'Assistant': use \"assistant\""),
        ({"role": "judge"}, "unknown role 'judge': use system, user, assistant, tool"),
        ({"role": "system"}, "a system turn can only come first"),
    ],
)
def test_an_answer_that_is_not_what_it_says_is_refused(more, reason):
    for turns in ([Q, A | more], [Q, A | more, Q, A]):
        assert refusal(parse_chat, {"conversations": turns}).startswith(f'turn 2 of "conversations": {reason}')
    if more.get("role") != "system":
        with_pair = {"prompt": "q", "chosen": "b", "rejected": [A | more]}
        assert refusal(parse_pair, with_pair).startswith(f'turn 1 of "rejected": {reason}')


def test_turns_without_a_role_are_the_users_and_the_assistants_in_turn():
    """As in MiniMind's own first files."""
    bare = [{"content": text} for text in "qaqa"]
    told = [Q, A, Q, A]
    for given in (bare, [Q, *bare[1:]], [bare[0], A, *bare[2:]], [SYSTEM, *bare]):
        chat, _ = read(parse_chat, {"conversations": given})
        assert chat == read(parse_chat, {"conversations": [SYSTEM, *told] if given[0] == SYSTEM else told})[0]
    assert 'the key "role" is missing' in refusal(parse_pair, PAIR | {"chosen": bare[:1]})


@pytest.mark.parametrize(
    ("more", "reason"),
    [
        ({"weight": 1}, "only the assistant's turns can be trained on, not a user turn"),
        ({"train": True}, "only the assistant's turns can be trained on, not a user turn"),
        ({"weight": 2}, '"weight" is 2, but must be 0 or 1'),
        ({"reasoning_content": "t"}, 'only the assistant\'s turns can have "reasoning_content"'),
        ({"images": ["a.jpg"]}, 'the key "images" is refused: only train_pretrain_vlm.py'),
    ],
)
def test_a_question_cannot_be_learned_nor_thought(more, reason):
    assert refusal(parse_chat, {"conversations": [Q | more, A]}).startswith(f'turn 1 of "conversations": {reason}')


def test_a_weight_of_0_leaves_an_answer_out_of_what_is_learned():
    for said in ({"weight": 0}, {"train": False}, {"weight": 0.0, "train": False}, {"weight": 0, "train": None}):
        chat, ignored = read(parse_chat, {"conversations": [Q | said, A | said, Q, A]})
        assert chat == [Q, A | {"weight": 0}, Q, A]
        assert not ignored
        told = refusal(parse_chat, {"conversations": [Q, A | said]})
        assert told == '"conversations" has no assistant turn to train on: each has "weight" 0'
    for said in ({"weight": 1}, {"train": True}, {"weight": 1.0, "train": True}, {"weight": None}):
        assert read(parse_chat, {"conversations": [Q, A | said]}) == ([Q, A], {})
    assert read(parse_chat, {"conversations": [Q, A | {"content": "", "weight": 0}, A]})[0][1]["content"] == ""


@pytest.mark.parametrize("parse", [parse_chat, parse_image_chat])
def test_a_thought_stands_in_the_tags_of_the_reasoning_stage(parse):
    turns = [
        Q,
        A | {"reasoning_content": " one\ntwo "},
        Q,
        A | {"reasoning_content": None},
        Q,
        A | {"reasoning_content": " \n"},
    ]
    chat = parse({"conversations": turns}, Counter())
    chat = chat[1] if parse is parse_image_chat else chat
    assert [turn["content"] for turn in chat[1::2]] == [
        "<think>\n one\ntwo \n</think>\n<answer>\na\n</answer>",
        "a",
        "a",
    ]


@pytest.mark.parametrize("parse", [parse_chat, parse_image_chat, parse_question])
def test_the_system_prompt_of_a_line_is_its_system_turn(parse):
    def chat(record):
        found = parse(record, Counter())
        return found[1] if parse is parse_image_chat else found

    turns = [Q, A] if parse is not parse_question else [Q]
    assert chat({"system": "s", "conversations": turns}) == [SYSTEM, *turns]
    assert chat({"system": "s", "conversations": [SYSTEM, *turns]}) == [SYSTEM, *turns]
    assert chat({"system": "", "conversations": turns}) == [SYSTEM | {"content": ""}, *turns]
    assert chat({"system": None, "conversations": turns}) == turns
    other = {"system": "t", "conversations": [SYSTEM, *turns]}
    assert refusal(parse, other) == '"system" differs from the chat system turn'
    assert refusal(parse, {"system": ["s"], "conversations": turns}) == '"system" is not a string'


def test_a_prompt_beside_a_chat_may_only_repeat_its_beginning():
    chat = [SYSTEM, Q, A]
    for prompt in ("q", [Q], [SYSTEM, Q], None):
        assert read(parse_chat, {"prompt": prompt, "conversations": chat}) == (chat, {})
        assert read(parse_question, {"prompt": prompt, "conversations": chat[:2]}) == (chat[:2], {})
    for parse, prompt in itertools.product(
        (parse_chat, parse_question), ("p", [Q, A, Q], [SYSTEM | {"content": "t"}, Q])
    ):
        told = refusal(parse, {"prompt": prompt, "conversations": chat})
        assert told == 'the key "prompt" is refused: "conversations" does not begin with it'


def test_what_is_asked_of_a_chat_ends_with_its_last_question():
    turns = [Q, A | {"weight": 0}, Q, A, A | {"content": ""}]
    assert read(parse_question, {"conversations": turns}) == (turns[:3], {"turns after the question": 2})
    assert read(parse_question, {"question": "q", "system": "s", "answer": "a"}) == ([SYSTEM, Q], {"answer": 1})
    told = refusal(parse_question, {"question": "q", "conversations": [Q]})
    assert told == 'the key "conversations" is refused: a second question, beside "question"'
    assert refusal(parse_question, {"conversations": [Q, A | {"content": ""}, Q]}).startswith(
        'turn 2 of "conversations"'
    )
    assert refusal(parse_question, {"conversations": [A]}) == "it contains no question"


def test_pictures_are_named_by_image_alone():
    record = {"image": "a.jpg", "conversations": [Q | {"content": "<image>"}, A]}
    assert read(parse_image_chat, record)[0][0] == ["a.jpg"]
    assert refusal(parse_image_chat, record | {"images": ["b.jpg"]}).endswith('the key for pictures is "image"')
    for name in ("img", "image_path", "picture"):
        other = {name: "a.jpg", "conversations": record["conversations"]}
        assert refusal(parse_image_chat, other) == f'the key "{name}" is refused: the key for pictures is "image"'
    for nothing in (False, 0, {}):
        assert refusal(parse_image_chat, {"image": nothing} | CHAT).startswith('"image" must be a name')


@pytest.mark.parametrize(
    ("parse", "record", "key", "name"),
    [
        (parse_text, {"text": "t"}, "Text", "text"),
        (parse_chat, CHAT, "System", "system"),
        (parse_pair, PAIR, "Prompt", "prompt"),
        (parse_image_chat, CHAT, "IMAGE", "image"),
        (parse_question, {"question": "q"}, "sys_tem", "system"),
    ],
)
def test_a_key_that_is_ours_but_for_its_letter_case_is_refused(parse, record, key, name):
    assert refusal(parse, record | {key: "x"}) == f'the key "{key}" is refused: it is spelled "{name}"'
    assert read(parse, record | {key: None})[1] == {key: 1}


def test_letter_case_and_underscores_do_not_hide_a_key_of_a_turn():
    for more, reason in (
        ({"Weight": 0}, 'it is spelled "weight"'),
        ({"reasoningContent": "t"}, 'it is spelled "reasoning_content"'),
        ({"toolCalls": [1]}, 'it is spelled "tool_calls"'),
        ({"lossMask": 0}, 'use "weight" or "train" to mask a turn'),
    ):
        (key,) = more
        told = refusal(parse_chat, {"conversations": [Q, A | more]})
        assert told == f'turn 2 of "conversations": the key "{key}" is refused: {reason}'


@pytest.mark.parametrize("name", ["question", "instruction", "query", "input", "context"])
def test_answers_whose_prompt_has_another_name_do_not_lose_it(name):
    b = A | {"content": "b"}
    told = refusal(parse_pair, {name: "q", "chosen": [A], "rejected": [b]})
    assert told == f'the key "{name}" is refused: the key for the turns that both answer is "prompt"'
    assert read(parse_pair, {name: "q", "chosen": [Q, A], "rejected": [Q, b]})[1] == {name: 1}
    assert read(parse_pair, {name: "q", "prompt": "q", "chosen": [A], "rejected": [b]})[1] == {name: 1}


def test_a_text_is_learned_whole():
    for more in ({"weight": 0}, {"weight": 0.3}, {"train": False}):
        (key,) = more
        told = refusal(parse_text, {"text": "t"} | more)
        assert told == f'the key "{key}" is refused: a text cannot be masked: leave its line out'


@pytest.mark.parametrize("key", ["from", "speaker", "author"])
def test_who_speaks_is_not_guessed_where_it_is_told_under_another_name(key):
    turns = [{key: "gpt", "content": "a"}, {key: "human", "content": "q"}]
    told = refusal(parse_chat, {"conversations": turns})
    assert told == f'turn 1 of "conversations": the key for the speaker is "role", not "{key}"'
    assert read(parse_chat, {"conversations": [Q | {key: "Ann"}, A]})[1] == {f"{key} (turn)": 1}


def test_turns_inside_a_string_are_told_as_such():
    told = refusal(parse_chat, {"conversations": '[{"role": "user"}]'})
    assert told == '"conversations" is not a list but JSON inside a string: write the list itself'
