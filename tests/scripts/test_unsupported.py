"""scripts/serving/unsupported.py, scripts/serving/schema.py: what a request may contain, by parsing bodies alone."""

import json
import math

import pytest

from scripts.serving.admission import parse
from scripts.serving.schema import ApiError, ChatRequest, CompletionRequest

CHAT = {"messages": [{"role": "user", "content": "hi"}]}
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}
CALL = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}


def chat(**fields) -> ChatRequest:
    return parse(ChatRequest, json.dumps(CHAT | fields).encode())


def completion(**fields) -> CompletionRequest:
    return parse(CompletionRequest, json.dumps({"prompt": "hi"} | fields).encode())


BOTH = [
    ("logit_bias", {"5": -100}),
    ("audio", {"voice": "alloy", "format": "wav"}),
    ("modalities", ["text", "audio"]),
    ("prediction", {"type": "content", "content": "x"}),
    ("web_search_options", {}),
    ("best_of", 2),
    ("stop_token_ids", [2]),
    ("min_tokens", 3),
    ("bad_words", ["x"]),
    ("logits_processors", ["x"]),
    ("chat_template", "{{ x }}"),
    ("chat_template_kwargs", {"enable_thinking": False}),
    ("continue_final_message", True),
    ("add_generation_prompt", False),
    ("include_stop_str_in_output", True),
    ("skip_special_tokens", False),
    ("return_token_ids", True),
    ("return_tokens_as_token_ids", True),
    ("documents", [{"text": "x"}]),
    ("truncate_prompt_tokens", 5),
    ("use_beam_search", True),
    ("prompt_logprobs", 0),
    ("min_p", 0.1),
    ("mirostat", 2),
    ("xtc_probability", 0.5),
    ("dry_multiplier", 0.8),
    ("typical_p", 0.9),
    ("repeat_penalty", 1.1),
    *((name, "Be brief.") for name in ("system", "instructions")),
    *((name, "x") for name in ("input", "previous_response_id", "conversation", "prompt_embeds")),
    ("images", ["aGk="]),
    *((name, {"temperature": 0}) for name in ("extra_body", "options")),
    ("text", {"format": {"type": "json_schema"}}),
    *((name, [5]) for name in ("allowed_token_ids", "banned_tokens")),
    ("n_probs", 5),
    *((name, 0.5) for name in ("dynatemp_range", "top_a", "tfs_z", "length_penalty")),
    *((name, 5) for name in ("max_new_tokens", "max_output_tokens", "num_predict", "n_predict")),
    *((name, "x") for name in ("guided_grammar", "grammar", "ebnf", "structural_tag", "format")),
    *((name, {"type": "object"}) for name in ("json_schema", "response_schema")),
]


@pytest.mark.parametrize("make", [chat, completion])
@pytest.mark.parametrize(("name", "value"), BOTH)
def test_what_is_not_done_is_refused_by_name(name, value, make):
    with pytest.raises(ApiError, match=f"^400: {name}: ") as caught:
        make(**{name: value})
    assert (caught.value.status_code, caught.value.param) == (400, name)
    assert caught.value.code == "unsupported_parameter"
    assert "\n" not in caught.value.detail


def test_what_only_one_of_the_two_does():
    with pytest.raises(ApiError, match="echo"):
        chat(echo=True)
    assert completion(echo=True).echo
    with pytest.raises(ApiError, match="suffix"):
        completion(suffix=" the end")
    with pytest.raises(ApiError, match=r"^400: prompt: put the conversation into messages"):
        chat(prompt="hi")


@pytest.mark.parametrize("make", [chat, completion])
@pytest.mark.parametrize("name", sorted({name for name, _ in BOTH} | {"suffix"}))
def test_null_asks_for_nothing(name, make):
    assert make(**{name: None}) == make()


@pytest.mark.parametrize(
    "fields",
    [
        {"response_format": {"type": "text"}},
        {"response_format": {"type": "text", "json_schema": None}},
        {"logit_bias": {}},
        {"modalities": ["text"]},
        {"best_of": 1},
        {"text": {"format": {"type": "text"}}, "n_probs": 0, "tfs_z": 1, "length_penalty": 1.0, "top_a": 0},
        {"min_tokens": 0, "min_p": 0.0, "typical_p": 1.0, "mirostat": 0, "repeat_penalty": 1},
        {
            "guided_json": "",
            "guided_choice": [],
            "suffix": "",
            "continue_final_message": False,
            "prompt_logprobs": False,
        },
        {"skip_special_tokens": True, "add_generation_prompt": True},
        {"user": "u", "metadata": {"a": "b"}, "store": False, "service_tier": "auto"},
        {"safety_identifier": "x", "prompt_cache_key": "x", "reasoning_effort": "low", "chatId": "x", "detail": True},
    ],
)
def test_what_asks_for_nothing_is_taken(fields):
    assert chat(**fields) == chat()
    assert completion(**fields) == completion()


def test_as_many_as_the_best_of_them_is_nothing_either():
    assert completion(n=3, best_of=3) == completion(n=3)
    with pytest.raises(ApiError, match="best_of"):
        completion(n=2, best_of=3)


@pytest.mark.parametrize(
    ("message", "param"),
    [
        ({"role": "user", "content": "x", "tool_calls": [CALL]}, "tool_calls"),
        ({"role": "user", "content": "x", "function_call": CALL["function"]}, "function_call"),
        ({"role": "user", "content": "x", "tool_call_id": "1"}, "tool_call_id"),
        ({"role": "assistant", "content": "So", "prefix": True}, "prefix"),
        ({"role": "assistant", "content": "So", "partial": True}, "partial"),
        ({"role": "user", "content": "x", "images": ["aGk="]}, "images"),
        ({"role": "assistant", "content": None, "audio": {"id": "1"}}, "audio"),
        ({"role": "assistant", "content": None, "refusal": "No."}, "refusal"),
    ],
)
def test_what_a_message_holds_is_not_ignored_either(message, param):
    with pytest.raises(ApiError) as caught:
        chat(messages=[*CHAT["messages"], message])
    assert (caught.value.status_code, caught.value.param) == (400, f"messages[1].{param}")
    assert caught.value.detail.startswith(f"messages[1].{param}: ")


def test_tools_are_of_chats_alone():
    with pytest.raises(ApiError, match=r"^400: tools: completions cannot call tools: use /v1/chat/completions$"):
        completion(tools=[TOOL])
    for fields in ({"functions": [TOOL["function"]]}, {"function_call": {"name": "f"}}, {"tool_choice": "required"}):
        with pytest.raises(ApiError, match="completions cannot call tools"):
            completion(**fields)
    assert completion(functions=[TOOL["function"]], function_call="none") == completion()
    for fields in ({"tools": []}, {"tool_choice": "auto"}, {"tool_choice": "none"}):
        assert completion(**fields) == completion()
        chat(**fields)
    answer = {"role": "assistant", "content": None, "tool_calls": [CALL]}
    body = chat(
        tools=[TOOL], messages=[*CHAT["messages"], answer, {"role": "tool", "content": "42", "tool_call_id": "1"}]
    )
    assert body.tools[0].function.name == body.messages[1].tool_calls[0].function.name == "f"
    for wrong, place in (
        ({}, "tools[0]"),
        (TOOL | {"type": "code"}, "tools[0].type"),
        ({"type": "function"}, "tools[0]"),
    ):
        with pytest.raises(ApiError) as caught:
            chat(tools=[wrong])
        assert caught.value.status_code == 400
        assert caught.value.param.startswith(place)


def test_an_answer_of_ours_can_be_sent_back_as_it_came():
    names = ("name", "tool_calls", "function_call", "refusal", "audio", "annotations")
    answer = {"role": "assistant", "content": "x", "reasoning_content": "hm"} | dict.fromkeys(names)
    assert not chat(messages=[answer | {"tool_calls": []}]).messages[0].tool_calls
    assert chat(messages=[answer]).messages[0].content == "x"


def test_null_is_absent_in_every_field_of_every_form():
    for make, kind in ((chat, ChatRequest), (completion, CompletionRequest)):
        optional = [name for name, field in kind.model_fields.items() if not field.is_required()]
        assert make(**dict.fromkeys(optional)) == (make() if kind is ChatRequest else completion(prompt=""))
        assert (
            make(stream=True, stream_options={"include_usage": None, "other": None}).stream_options.include_usage
            is None
        )
    part = {"type": "text", "text": "hi", "image_url": None, "cache_control": None}
    assert chat(messages=[{"role": "user", "content": [part], "name": None}]).messages[0].content[0].text == "hi"
    with pytest.raises(ApiError, match="messages: Field required"):
        chat(messages=None)


def test_minus_one_is_no_limit():
    body = chat(max_tokens=-1, max_completion_tokens=-1, top_k=-1)
    assert (body.max_tokens, body.max_completion_tokens, body.top_k) == (-1, -1, -1)
    assert completion(max_tokens=-1).max_tokens == -1
    for make, fields in (
        *((make, {name: -2}) for make in (chat, completion) for name in ("max_tokens", "top_k")),
        *((chat, {name: 0}) for name in ("max_tokens", "max_completion_tokens")),
        (chat, {"max_completion_tokens": -2}),
    ):
        (name,) = fields
        with pytest.raises(ApiError, match=f"^400: {name}: Input should be greater than or equal to ") as caught:
            make(**fields)
        assert caught.value.param == name
    with pytest.raises(ApiError, match=r"^400: max_tokens: Input should be a valid integer"):
        chat(max_tokens="many")


@pytest.mark.parametrize("value", [True, False])
@pytest.mark.parametrize(
    "name", ["max_tokens", "n", "seed", "top_k", "temperature", "top_p", "presence_penalty", "stop"]
)
def test_true_and_false_are_no_numbers(name, value):
    for make in (chat, completion):
        with pytest.raises(ApiError, match=f"^400: {name}: Input should not be {str(value).lower()}$"):
            make(**{name: value})


def test_no_logprobs_are_no_logprobs():
    assert completion(logprobs=False) == completion()
    with pytest.raises(ApiError, match=r"^400: logprobs: Input should not be true$"):
        completion(logprobs=True)
    assert not chat(logprobs=False).logprobs
    assert chat(logprobs=True, stream=False, ignore_eos=True).logprobs


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (b"", "not JSON"),
        (b"{", "not JSON"),
        (b"\xff{}", "not JSON"),
        (b"[" * 99_999, "nested too deeply"),
        (b'{"seed": ' + b"9" * 5000 + b"}", "not JSON"),
        (b"[]", "must be a JSON object"),
        (b"null", "must be a JSON object"),
    ],
)
def test_what_is_no_body(body, said):
    with pytest.raises(ApiError, match=said) as caught:
        parse(ChatRequest, body)
    assert caught.value.status_code == 400
    assert len(caught.value.detail) < 300


def test_a_body_of_too_many_values_is_not_parsed(monkeypatch):
    """Thirty megabytes of `[]` would take a gigabyte once parsed."""
    right = json.dumps({"prompt": [[5] * 16_000] * 64}).encode()
    assert len(parse(CompletionRequest, right).prompt) == 64
    monkeypatch.setattr(json, "loads", lambda _: pytest.fail("it is parsed"))
    for filling in (b"[],", b"{},", b"0,", b"["):
        with pytest.raises(ApiError, match="more than 1048576 values") as caught:
            parse(CompletionRequest, b'{"prompt": [' + filling * (2**20 + 1) + b"0]}")
        assert caught.value.status_code == 413


def test_a_list_that_is_wrong_everywhere_is_told_of_once():
    with pytest.raises(ApiError, match=r"^400: prompt\[0\]"):
        completion(prompt=[math.pi] * 300_000)
