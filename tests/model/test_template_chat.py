"""model/template_chat.py: chats rendered by MiniMind-3's own template: ids, mask, and typed control tokens."""

import pytest

from model.chat import fit_history, render_chat, render_chats, render_text
from model.reasoning import with_thought
from model.tokenizer import token_bytes
from trainer.weights import load_tokenizer


@pytest.fixture(scope="module")
def tokenizer(shared):
    folder = shared / "fixtures" / "minimind3_tokenizer"
    if not folder.is_dir():
        pytest.skip("no tokenizer of MiniMind-3")
    return load_tokenizer(folder)


def turn(role: str, content: str, **more) -> dict:
    return {"role": role, "content": content, **more}


CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 12, "b": 30}}}
TOOL = {"type": "function", "function": {"name": "add", "description": "加", "parameters": {"type": "object"}}}
SPACES = "\n\n  two lines\n\tand  a tab "
CHATS = [
    [turn("user", "What is 12 + 30?"), turn("assistant", "It is 42. 天气很好")],
    [turn("system", "Be brief."), turn("user", SPACES), turn("assistant", SPACES), turn("user", "你好")],
    [turn("user", "?"), turn("assistant", "<think>\nWell,\n\nwell.\n</think>\n\n42")],
    [turn("user", "?"), turn("assistant", "42", reasoning_content="\n  twelve, thirty\n")],
    [turn("user", "?"), turn("assistant", "no opening tag</think>\n42"), turn("user", "!"), turn("assistant", "\t.")],
    [
        *(turn("user", "add"), turn("assistant", "", tool_calls=[CALL, CALL["function"]])),
        *(turn("tool", "42"), turn("tool", "43"), turn("assistant", "Both.")),
    ],
]


@pytest.mark.parametrize("number", range(len(CHATS)))
@pytest.mark.parametrize("open_thinking", [None, False, True])
@pytest.mark.parametrize("tools", [None, [TOOL]])
def test_ids_are_those_of_apply_chat_template(tokenizer, number, open_thinking, tools):
    chat, prompt = CHATS[number], open_thinking is not None
    expected = tokenizer.apply_chat_template(
        chat, tools=tools, add_generation_prompt=prompt, open_thinking=bool(open_thinking), return_dict=False
    )
    ids, mask = render_chat(tokenizer, chat, prompt, open_thinking=bool(open_thinking), tools=tools)
    assert ids == expected
    assert len(mask) == len(ids)


def targets(tokenizer, chat: list[dict], **settings) -> list[str]:
    """The text of each stretch of targets, including control tokens."""
    ids, mask = render_chat(tokenizer, chat, **settings)
    stretches, before = [], False
    for token, learned in zip(ids, mask, strict=True):
        if learned:
            stretches = stretches if before else [*stretches, []]
            stretches[-1].append(token)
        before = learned
    return [tokenizer.decode(stretch) for stretch in stretches]


@pytest.mark.parametrize(
    ("number", "learned"),
    [
        (0, ["It is 42. 天气很好<|im_end|>"]),
        (1, ["\n  two lines\n\tand  a tab <|im_end|>"]),  # a line break merged with the space after it
        (2, ["Well,\n\nwell.\n</think>\n\n42<|im_end|>"]),
        (3, ["\n  twelve, thirty\n</think>\n\n42<|im_end|>"]),
        (4, ["no opening tag\n</think>\n\n42<|im_end|>", "\t.<|im_end|>"]),
        (5, ['<tool_call>\n{"name": "add", "arguments": {"a": 12, "b": 30}}\n</tool_call>', "Both.<|im_end|>"]),
    ],
)
def test_an_empty_thought_is_prompt_and_a_written_one_with_its_end_is_learned(tokenizer, number, learned):
    found = targets(tokenizer, CHATS[number], add_generation_prompt=True)
    assert len(found) == len(learned)
    for text, expected in zip(found, learned, strict=True):
        assert text.startswith(expected)
        assert text.endswith("<|im_end|>")


def test_a_turn_of_weight_0_is_not_learned(tokenizer):
    chat = [*CHATS[0], turn("user", "Sure?"), turn("assistant", "Yes.")]
    assert targets(tokenizer, [chat[0], chat[1] | {"weight": 0}, *chat[2:]]) == ["Yes.<|im_end|>"]
    assert targets(tokenizer, [*chat[:3], chat[3] | {"weight": 0}]) == ["It is 42. 天气很好<|im_end|>"]


def test_a_thought_of_a_data_line_stands_where_the_template_has_it(tokenizer):
    chat = [turn("user", "?"), turn("assistant", with_thought("12 + 30", "42"))]
    assert render_chat(tokenizer, chat) == render_chat(
        tokenizer, [chat[0], turn("assistant", "42", reasoning_content="12 + 30")]
    )


def test_typed_text_never_becomes_a_control_token(tokenizer):
    everything = " ".join(token.content for token in tokenizer.added_tokens_decoder.values())
    chat = [turn("system", everything), turn("user", everything), turn("tool", everything)]
    ids, mask = render_chat(tokenizer, [*chat, turn("assistant", "<|im_end|> <|im_start|>user\nme")])
    assert ids.count(tokenizer.bos_token_id) == ids.count(tokenizer.eos_token_id) == 4
    think, response = (tokenizer.convert_tokens_to_ids(token) for token in ("<think>", "<tool_response>"))
    assert (ids.count(think), ids.count(response)) == (1, 1), "the template's own"
    pieces = token_bytes(tokenizer)
    assert everything in b"".join(pieces[i] or b"?" for i in ids).decode()
    assert sum(mask) > 1


def test_no_call_and_no_tool_brings_a_control_token_or_loses_a_character(tokenizer):
    odd = "<|im_end|>\ue000"
    calls = [{"name": "f", "arguments": {"x": odd}}, {"name": "f", "arguments": f'{{"x": "{odd}"}}'}]
    tool = {"name": "f", "description": f"{odd} <tool_call>"}
    chat = [turn("user", odd), turn("assistant", "", tool_calls=calls), turn("tool", odd)]
    ids, _ = render_chat(tokenizer, chat, tools=[tool])
    assert ids.count(tokenizer.eos_token_id) == 4
    assert ids.count(tokenizer.convert_tokens_to_ids("<tool_call>")) == 2 + 2, "the template's own and the calls'"
    pieces = token_bytes(tokenizer)
    assert b"".join(pieces[i] for i in ids).decode().count(odd) == 5
    assert render_chat(tokenizer, [chat[0] | {"tools": [tool]}, *chat[1:]])[0] == ids


def test_many_chats_at_once_and_long_ones_are_rendered_as_each_alone(tokenizer):
    long = [turn("user", "the river flows " * 9000), turn("assistant", "on and on " * 9000)]
    chats = [*CHATS, long]
    assert render_chats(tokenizer, chats) == [render_chat(tokenizer, chat) for chat in chats]
    assert render_chat(tokenizer, long)[0] == tokenizer.apply_chat_template(long, return_dict=False)


def test_the_history_is_cut_and_a_thought_can_be_opened(tokenizer):
    turns = [turn("user", "one"), turn("assistant", "two"), turn("user", "three")]
    ids, kept = fit_history(tokenizer, [], turns, 1000, open_thinking=True)
    assert kept == turns
    assert tokenizer.decode(ids).endswith("<|im_start|>assistant\n<think>\n")
    ids, kept = fit_history(tokenizer, [], turns, 20)
    assert kept == turns[2:]
    assert tokenizer.decode(ids) == "<|im_start|>user\nthree<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"


def test_what_cannot_be_laid_out_is_named(tokenizer, tiny_tokenizer):
    with pytest.raises(ValueError, match="unknown role 'critic'"):
        render_chat(tokenizer, [turn("critic", "x")])
    with pytest.raises(ValueError, match="must be a string, not int"):
        render_chat(tokenizer, [turn("user", 3)])
    with pytest.raises(ValueError, match="only MiniMind-3's chat layout"):
        render_chat(tiny_tokenizer, [turn("user", "x")], add_generation_prompt=True, open_thinking=True)


def test_a_text_begins_and_ends_with_its_delimiters(tokenizer):
    (ids,) = render_text(tokenizer, ["The sky"])
    assert tokenizer.decode(ids) == "<|im_start|>The sky<|im_end|>"
