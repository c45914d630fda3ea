"""model/chat_template.py: the Jinja template renders the same as `render_chat`, mask included."""

import itertools
import json
import random

import jinja2
import pytest
from jinja2.sandbox import ImmutableSandboxedEnvironment
from transformers import AutoTokenizer

from model.chat import DEFAULT_SYSTEM_PROMPT, render_chat
from model.chat_template import CHAT_TEMPLATE, without_generation_marks
from tests.running import ROOT

HEAD = f"<s>system\n{DEFAULT_SYSTEM_PROMPT}</s>\n"
USER = {"role": "user", "content": "hi"}
ASKED = HEAD + "<s>user\nhi</s>\n"


@pytest.fixture(scope="module", params=["tiny", "plain", "shipped"])
def tokenizer(request, tiny_tokenizer, plain_tokenizer):
    if request.param == "shipped":
        return AutoTokenizer.from_pretrained(ROOT / "model" / "minimind_tokenizer", local_files_only=True)
    return {"tiny": tiny_tokenizer, "plain": plain_tokenizer}[request.param]


def answer(content=None, **more) -> dict:
    return {"role": "assistant", "content": content} | more


def raise_exception(message: str):
    raise jinja2.TemplateError(message)


def plain_jinja(chat: list[dict], template: str = without_generation_marks(CHAT_TEMPLATE), **settings) -> str:
    """Renders like llama-cpp-python does a GGUF's template: without transformers' extensions."""
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    rendering = environment.from_string(template)
    known = {"bos_token": "<s>", "eos_token": "</s>", "raise_exception": raise_exception}
    return rendering.render(messages=chat, **known | settings)


@pytest.fixture(params=["transformers", "plain Jinja"])
def render(request, tiny_tokenizer):
    if request.param == "plain Jinja":
        return plain_jinja
    return lambda chat, **settings: tiny_tokenizer.apply_chat_template(chat, tokenize=False, **settings)


# ---------------------------------------------------------------------------------------------- equal to render_chat

CONTENTS = [
    "Hello.",
    "你好，世界！\n天气很好。",
    "<think>\n1 + 1\n</think>\n<answer>\n2\n</answer>",
    " one space at both ends ",
    "\nline breaks at both ends\n",
    "white space at the end  \n\n ",
    "🙂",
    "",
    "def f(x):\n    return {'a': \"{{ x }}\"}  # {% if %}",
    "12 + 30 = 42",
]
TAGGED = (2,)  # a tag that a user types is text to `render_chat`, but an entry to a tokenizer that has it


def chats_of(seed: int) -> list[dict[str, str]]:
    rng = random.Random(seed)
    theirs = [content for number, content in enumerate(CONTENTS) if number not in TAGGED]
    chat = [{"role": "system", "content": rng.choice(theirs)}] if rng.random() < 0.5 else []
    for _ in range(rng.randint(1, 4)):
        chat += [{"role": "user", "content": rng.choice(theirs)}, answer(rng.choice(CONTENTS))]
    return chat[: rng.choice([None, -1])]


def test_ids_and_mask_are_those_of_render_chat_token_by_token(tokenizer):
    chats = [chats_of(seed) for seed in range(60)] + [[USER, answer(content)] for content in CONTENTS]
    assert {turn["content"] for chat in chats for turn in chat} > set(CONTENTS)
    for chat in chats:
        ids, mask = render_chat(tokenizer, chat)
        theirs = tokenizer.apply_chat_template(chat, return_dict=True, return_assistant_tokens_mask=True)
        assert theirs["input_ids"] == ids, chat
        assert theirs["assistant_masks"] == [int(trained) for trained in mask], chat
        prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
        assert prompt == render_chat(tokenizer, chat, add_generation_prompt=True)[0]


@pytest.mark.parametrize("content", ["  two spaces first", "\n\n\nline breaks first", "    "])
def test_white_space_in_a_row_at_the_beginning_is_kept_and_learned_though_tokens_may_differ(content, tokenizer):
    """The template yields one string, in which the header's newline may share a token with the content."""
    chat = [USER, answer(content)]
    theirs = tokenizer.apply_chat_template(chat, return_dict=True, return_assistant_tokens_mask=True)
    assert tokenizer.decode(theirs["input_ids"]) == tokenizer.decode(render_chat(tokenizer, chat)[0])
    learned = [token for token, trained in zip(theirs["input_ids"], theirs["assistant_masks"], strict=True) if trained]
    assert tokenizer.decode(learned) in (f"{content}</s>", f"\n{content}</s>")


def test_a_batch_is_masked_row_by_row(tiny_tokenizer):
    chats = [[USER, answer("One.")], [USER, answer("Two, and a longer one."), USER, answer("三")]]
    batch = tiny_tokenizer.apply_chat_template(chats, return_dict=True, return_assistant_tokens_mask=True)
    for chat, *row in zip(chats, batch["input_ids"], batch["assistant_masks"], strict=True):
        assert tuple(row) == render_chat(tiny_tokenizer, chat)


def test_other_control_tokens_are_the_tokenizers_own(tiny_tokenizer):
    text = tiny_tokenizer.apply_chat_template(
        [USER, answer("Hello.")], tokenize=False, bos_token="<|begin|>", eos_token="<|end|>"
    )
    assert text.count("<|begin|>") == text.count("<|end|>") == 3
    assert "<s>" not in text
    assert "</s>" not in text


# ----------------------------------------------------------------------------------------------- messages of clients


def test_contents_of_every_form(render):
    parts = [{"type": "text", "text": "one "}, {"type": "text", "text": "two"}]
    assert render([{"role": "user", "content": parts}]) == HEAD + "<s>user\none two</s>\n"
    for nothing in ({"content": None}, {}, {"content": []}, {"content": ""}):
        assert render([USER, {"role": "assistant"} | nothing]) == ASKED + "<s>assistant\n</s>\n"


def test_developer_is_system_wherever_it_stands(render):
    brief = {"role": "developer", "content": "Be brief."}
    assert render([brief, USER]) == "<s>system\nBe brief.</s>\n<s>user\nhi</s>\n"
    assert render([USER, brief]) == ASKED + "<s>system\nBe brief.</s>\n"


def test_a_thought_is_in_the_tags_of_the_reasoning_stage(render):
    chat = [USER, answer("42", reasoning_content="40 + 2")]
    assert render(chat) == ASKED + "<s>assistant\n<think>\n40 + 2\n</think>\n<answer>\n42\n</answer></s>\n"
    for none in (None, ""):
        assert render([USER, answer("42", reasoning_content=none)]) == ASKED + "<s>assistant\n42</s>\n"


def test_tool_calls_and_their_results(render):
    call = {"id": "1", "type": "function", "function": {"name": "add", "arguments": '{"b": 2, "a": "为"}'}}
    bare = {"name": "now", "arguments": {"zone": "UTC"}}
    spelled = '<tool_call>\n{"name": "add", "arguments": {"b": 2, "a": "为"}}\n</tool_call>'
    also = '<tool_call>\n{"name": "now", "arguments": {"zone": "UTC"}}\n</tool_call>'
    result = {"role": "tool", "tool_call_id": "1", "content": "42"}
    assert json.loads(spelled.split("\n")[1])["arguments"] == json.loads(call["function"]["arguments"])
    for turn, text in (
        (answer(tool_calls=[call]), spelled),
        (answer(tool_calls=[call, bare]), f"{spelled}\n{also}"),
        (answer("Let me see.", tool_calls=[bare]), f"Let me see.\n{also}"),
        (answer(reasoning_content="A sum.", tool_calls=[call]), f"<think>\nA sum.\n</think>\n{spelled}"),
        (answer(tool_calls=[]), ""),
        (answer("No.", tool_calls=None), "No."),
    ):
        assert render([USER, turn, result]) == f"{ASKED}<s>assistant\n{text}</s>\n<s>tool\n42</s>\n"


def test_a_prompt_ends_ready_for_an_answer(render):
    assert render([USER], add_generation_prompt=True) == ASKED + "<s>assistant\n"


def test_no_messages_are_the_default_system_prompt():
    assert plain_jinja([]) == HEAD


@pytest.mark.parametrize(
    ("turn", "said"),
    [
        ({"role": "critic", "content": "x"}, "unknown role 'critic': use system, developer, user, assistant or tool"),
        ({"content": "x"}, "unknown role ''"),
        ({"role": "user", "content": [{"type": "image_url"}]}, "not parts of type 'image_url'"),
        ({"role": "user", "content": [{"type": "text", "text": None}]}, "not parts of type 'text'"),
        ({"role": "user", "content": 3}, "text, null or a list of parts, not 3"),
        ({"role": "user", "content": {"text": "x"}}, "text, null or a list of parts, not {'text': 'x'}"),
    ],
)
def test_what_cannot_be_laid_out_is_refused_by_name(turn, said, render):
    with pytest.raises(jinja2.TemplateError, match=said):
        render([USER, turn])


TOOL = {"type": "function", "function": {"description": "d", "name": "f", "parameters": {"type": "object"}}}
LISTED = (
    '\n\nYou may call these functions:\n{"description": "d", "name": "f", "parameters": {"type": "object"}}\n'
    'A call is written as\n<tool_call>\n{"name": "…", "arguments": {…}}\n</tool_call></s>\n'
)


def test_the_listing_of_tools_ends_the_system_turn_and_no_tools_are_none(render):
    brief = {"role": "developer", "content": "Be brief."}
    asked = f"<s>system\n{DEFAULT_SYSTEM_PROMPT}{LISTED}<s>user\nhi</s>\n"
    assert render([USER], tools=[TOOL]) == render([USER], tools=[TOOL["function"]]) == asked
    assert render([brief, USER, brief], tools=[TOOL]) == (
        f"<s>system\nBe brief.{LISTED}<s>user\nhi</s>\n<s>system\nBe brief.</s>\n"
    )
    assert render([USER], tools=None) == render([USER], tools=[]) == ASKED


CALLS = [
    {"type": "function", "function": {"name": "f", "arguments": {"a": "为 <b>", "n": [1, 2.5]}}},
    {"name": "g", "arguments": "{}"},
]


@pytest.mark.parametrize("tools", [None, [TOOL, {"name": "g", "description": "<tool_call> 'x' & y"}]])
@pytest.mark.parametrize("content", ["", "Let me see.", "<think>\nA sum.\n</think>"])
def test_tools_calls_and_results_are_those_of_render_chat(tokenizer, tools, content):
    chat = [USER, answer(content, tool_calls=CALLS), {"role": "tool", "content": "42"}, {"role": "tool", "content": ""}]
    chat += [answer("It is 42."), USER, answer("hi")]
    for talk in (chat, [{"role": "system", "content": "Be brief."}, *chat]):
        ids, mask = render_chat(tokenizer, talk, tools=tools)
        theirs = tokenizer.apply_chat_template(talk, tools=tools, return_dict=True, return_assistant_tokens_mask=True)
        assert theirs["input_ids"] == ids
        assert theirs["assistant_masks"] == [int(trained) for trained in mask]
        assert render_chat(tokenizer, [talk[0] | {"tools": tools}, *talk[1:]]) == (ids, mask)
        learned = tokenizer.decode([i for i, trained in zip(ids, mask, strict=True) if trained])
        assert learned.startswith(content + "\n" * bool(content) + '<tool_call>\n{"name": "f", "arguments": {"a": "为')
        assert learned.endswith('{"name": "g", "arguments": {}}\n</tool_call></s>It is 42.</s>hi</s>')


# ------------------------------------------------------------------------------------------------ continuing an answer

BEGINNINGS = ["He", "He ", " He\n", "你好", "<think>\nHe", "CONTINUE", "hi"]


@pytest.mark.parametrize("content", BEGINNINGS)
def test_an_answer_begun_is_continued_where_it_ends(content, tiny_tokenizer):
    def text_of(turn: dict) -> str:
        return tiny_tokenizer.apply_chat_template([USER, turn], tokenize=False, continue_final_message=True)

    assert text_of(answer(content)) == f"{ASKED}<s>assistant\n{content}"
    assert text_of(answer([{"type": "text", "text": content}])) == f"{ASKED}<s>assistant\n{content}"
    thinking = f"{ASKED}<s>assistant\n<think>\n1 + 1\n</think>\n<answer>\n{content}"
    assert text_of(answer(content, reasoning_content="1 + 1")) == thinking


def test_a_thought_begun_is_continued_too(tiny_tokenizer):
    turn = answer(reasoning_content="First, ")
    text = tiny_tokenizer.apply_chat_template([USER, turn], tokenize=False, continue_final_message="reasoning_content")
    assert text == f"{ASKED}<s>assistant\n<think>\nFirst, "


# ----------------------------------------------------------------------------------------------------- any Jinja


@pytest.mark.parametrize(
    ("marked", "text"),
    [
        ("{% generation %}a {% endgeneration %} b", "a  b"),
        ("x {%- generation -%} a {%- endgeneration -%} b", "xab"),  # the marks strip white space
        ("{%+ generation %}a{%endgeneration%}", "a"),
        ("{{ generation }}{% set endgeneration = 1 %}", "c"),
    ],
)
def test_generation_marks_go_and_what_they_enclose_stays(marked, text):
    assert plain_jinja([], without_generation_marks(marked), generation="c") == text


def test_the_marks_are_none_of_plain_jinjas():
    with pytest.raises(jinja2.TemplateSyntaxError, match="generation"):
        plain_jinja([USER], CHAT_TEMPLATE)


def test_the_settings_of_a_jinja_do_not_matter(tiny_tokenizer):
    chat = [*chats_of(3), answer("x", reasoning_content="y", tool_calls=[{"name": "f", "arguments": "{}"}])]
    texts = {tiny_tokenizer.apply_chat_template(chat, tokenize=False)}
    for trim, lstrip, keep in itertools.product([True, False], repeat=3):
        environment = jinja2.Environment(trim_blocks=trim, lstrip_blocks=lstrip, keep_trailing_newline=keep)
        template = environment.from_string(without_generation_marks(CHAT_TEMPLATE))
        texts.add(template.render(messages=chat, bos_token="<s>", eos_token="</s>", raise_exception=raise_exception))
    assert len(texts) == 1
