"""Fields that would change the answer but are not supported: a request with one of them gets a 400 that names it.

There are three kinds of request fields. Those that `schema` declares are used. Those listed in the tables here are
refused unless their value asks for nothing. All others are accepted and ignored, as clients send many fields that do
not affect the answer: user, metadata, store, service_tier, safety_identifier, prompt_cache_key, reasoning_effort,
verbosity, an image's detail, and their own.
"""

from typing import Any, NamedTuple

from scripts.serving.forms import Form, without_nulls
from scripts.serving.schema import ApiError

NOTHING = (False, "", [], {})


class Undone(NamedTuple):
    """Fields that are refused.

    Attributes:
        why: the rest of the error after the field's name.
        harmless: values that have no effect, besides null.
    """

    names: tuple[str, ...]
    why: str
    harmless: tuple = NOTHING


NO_FORMAT = "not supported here: use response_format, regex or choice"
NO_TOOLS = "completions cannot call tools: use /v1/chat/completions"
NO_TEMPLATE = "the chat template is fixed: it is the one that the model was trained with"
NO_SAMPLER = "this sampling method is not supported"
NO_BIAS = "biasing or banning tokens is not supported"
NO_BEGINNING = "continuing a given answer is not supported"

IN_REQUESTS = (
    Undone(("guided_grammar",), NO_FORMAT),
    Undone(("json_schema", "grammar", "ebnf", "structural_tag", "format", "response_schema"), NO_FORMAT),
    Undone(("text",), NO_FORMAT, ({"format": {"type": "text"}}, *NOTHING)),  # OpenAI's Responses API has it
    Undone(("tool_choice", "function_call"), NO_TOOLS, ("none", "auto")),
    Undone(("tools", "functions"), NO_TOOLS),
    Undone(("audio",), "answers are text only"),
    Undone(("modalities",), "answers are text only", (["text"], [])),
    Undone(("web_search_options",), "web search is not supported", ()),  # {} is a search, too
    Undone(("prediction",), "predicted outputs are not supported"),
    Undone(("suffix",), "infilling is not supported"),
    Undone(("best_of",), "answers are not ranked and discarded: use n", (0, 1)),
    Undone(
        ("logit_bias", "bad_words", "logits_processors", "allowed_token_ids", "banned_tokens"),
        NO_BIAS,
    ),
    Undone(("stop_token_ids",), "stopping at token ids is not supported: use stop"),
    Undone(("include_stop_str_in_output",), "the stop text is never part of an answer"),
    Undone(("min_tokens",), "a minimum length is not supported", (0,)),
    Undone(("skip_special_tokens",), "special tokens are never part of an answer", (True,)),
    Undone(("return_token_ids", "return_tokens_as_token_ids"), "tokens are returned as text only: use logprobs"),
    Undone(("n_probs",), "it is called logprobs here", (0,)),
    Undone(
        ("prompt_logprobs",), "for the prompt's log-probabilities use /v1/completions with echo and logprobs", (False,)
    ),
    Undone(("continue_final_message", "echo"), NO_BEGINNING),
    Undone(("add_generation_prompt",), NO_TEMPLATE, (True,)),
    Undone(("chat_template", "documents"), NO_TEMPLATE),
    Undone(
        ("chat_template_kwargs",),
        f"{NO_TEMPLATE}; its only option is MiniMind-3's open_thinking",
        ({"open_thinking": True}, {"open_thinking": False}, {}),
    ),
    Undone(("truncate_prompt_tokens",), "prompts are never truncated", ()),
    Undone(("use_beam_search",), NO_SAMPLER),
    Undone(("min_p", "mirostat", "xtc_probability", "dry_multiplier", "dynatemp_range", "top_a"), NO_SAMPLER, (0,)),
    Undone(("typical_p", "tfs_z", "length_penalty"), NO_SAMPLER, (1,)),
    Undone(("repeat_penalty",), "it is called repetition_penalty here", (1,)),
    Undone(("max_new_tokens", "max_output_tokens", "num_predict", "n_predict"), "it is called max_tokens here", ()),
    Undone(("system", "instructions"), "put the system prompt into messages, with the role system"),
    Undone(("input", "prompt", "previous_response_id", "conversation"), "put the conversation into messages"),
    Undone(("images",), "put images into a message's content, as parts of the type image_url"),
    Undone(("prompt_embeds",), "a prompt is text or token ids"),
    Undone(("extra_body", "options"), "put its fields into the request itself"),
)
IN_MESSAGES = (
    Undone(("prefix", "partial"), NO_BEGINNING),
    Undone(("images",), "put images into the content, as parts of the type image_url"),
    Undone(("audio",), "messages hold only text and images"),
    Undone(("refusal",), "put the assistant's text into content"),
)
IN_WHICH_ROLE = {"tool_calls": "assistant", "function_call": "assistant", "tool_call_id": "tool"}


def refuse_undone(body: dict[str, Any], kind: type[Form]) -> None:
    """Refuse a request that asks for something unsupported.

    Args:
        body: the body as received.
        kind: its model; the fields that it declares are used, whatever the tables say.

    Raises:
        ApiError: it asks for something unsupported; `param` is the field.
    """
    uncalled = {"tools"} if body.get("tool_choice") == "none" else set()
    uncalled |= {"functions"} if body.get("function_call") == "none" else set()
    if body.get("best_of") == body.get("n"):
        uncalled.add("best_of")
    _refuse(
        {name: value for name, value in body.items() if name not in kind.model_fields.keys() | uncalled}, IN_REQUESTS
    )
    for name in {"chat_template_kwargs"} & kind.model_fields.keys() & body.keys():
        _refuse({name: body[name]}, IN_REQUESTS)  # used, and yet no other setting of it
    messages = body.get("messages")
    for number, message in enumerate(messages if isinstance(messages, list) else ()):
        if not isinstance(message, dict):
            continue
        place = f"messages[{number}]."
        _refuse(message, IN_MESSAGES, place)
        for name, role in IN_WHICH_ROLE.items():
            if message.get(name) not in (None, []) and message.get("role") != role:
                raise _refusal(place + name, f"it belongs in a message with the role {role}")


def _refuse(given: dict[str, Any], table: tuple[Undone, ...], place: str = "") -> None:
    for names, why, harmless in table:
        for name in names:
            value = given.get(name)
            if value is not None and not any(_same(without_nulls(value), each) for each in harmless):
                raise _refusal(place + name, why)


def _same(a: Any, b: Any) -> bool:
    return a == b and isinstance(a, bool) == isinstance(b, bool)  # to Python 0 is False


def _refusal(param: str, why: str) -> ApiError:
    return ApiError(400, f"{param}: {why}", param, "unsupported_parameter")
