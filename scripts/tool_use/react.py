"""Reason and act in turn (ReAct, Yao et al. 2023, arXiv:2210.03629): the model calls, reads the result, continues."""

from collections.abc import Callable, Sequence
from typing import Any

from model.tool_calls import as_json, function_of, parse_arguments
from scripts.tool_use.registry import ERROR, Registry

Turn = dict[str, Any]
TOO_MANY = f"{ERROR}no more calls are allowed: answer now"


def act(
    ask: Callable[[list[Turn]], Turn],
    turns: Sequence[Turn],
    tools: Registry,
    max_calls: int,
    tell: Callable[[str, str], None] = lambda call, result: None,
) -> list[Turn]:
    """Continue a chat after a question: answers with calls, their results, and the last answer.

    Args:
        ask: returns the assistant's next turn, which may have "tool_calls", for the chat so far.
        turns: the chat, a question last.
        max_calls: the number of calls to run; a model that makes more is told so once and may then give a last answer.
        tell: called with each call, as text, and its result.

    Returns:
        the turns that follow `turns`.
    """
    said: list[Turn] = []
    left = max_calls
    while True:
        answer = ask([*turns, *said])
        said.append(answer)
        calls = answer.get("tool_calls") or []
        if not calls or left < 0:
            return said
        for call in calls:
            left -= 1
            function = function_of(call)
            arguments = parse_arguments(function.get("arguments"))
            result = TOO_MANY if left < 0 else tools.call(function["name"], arguments)
            shown = function["arguments"] if arguments is None else as_json(arguments)
            tell(f"{function['name']}({shown})", result)
            named = {"tool_call_id": call["id"]} if call.get("id") is not None else {}
            said.append({"role": "tool", "content": result, **named})
