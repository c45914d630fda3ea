"""Tools in a line of a data file: the common formats, converted to the one that is rendered.

Available tools are in the line ("tools", the older "functions") or in the system turn, as in MiniMind-3's files; calls
are in an assistant's turn ("tool_calls", the older "function_call"); both as JSON, or as a string of JSON. A result is
a turn with the role "tool", or the older "function".
"""

import json
from collections.abc import Callable, Iterator
from typing import Any

from dataset.jsonl import BadRecord
from model.tool_calls import Call, as_json, function_of, in_call_order, parse_arguments

IN_LINE = ("tools", "functions")
IN_TURN = ("tools", "tool_calls", "function_call", "tool_call_id")
RESULT_ROLES = {"tool": "tool", "function": "tool"}
OTHER_RESULT_ROLES = ("observation", "ipython", "tool_response")


def read_tools(found: dict[str, Any]) -> list[dict]:
    """The tools that a line or a system turn lists; empty if it lists none.

    Raises:
        BadRecord: neither a list of objects with a "name" nor its JSON; a repeated name; two different lists.
    """
    lists = [_list_of(found, key, _tool) for key in IN_LINE if not says_nothing(found.get(key))]
    if not lists:
        return []
    if any(other != lists[0] for other in lists[1:]):
        raise BadRecord('"tools" and "functions" differ')
    names = [tool["name"] for tool in lists[0]]
    if double := next((name for name in names if names.count(name) > 1), None):
        raise BadRecord(f'two tools have the name "{double}"')
    return lists[0]


def read_calls(turn: dict[str, Any]) -> list[dict]:
    """The calls of a turn, {"name", "arguments"} and, if the line has one, "id"; empty if it has none.

    Raises:
        BadRecord: neither such a list nor its JSON, no name, or arguments that are not an object.
    """
    calls = _list_of(turn, "tool_calls", _call) if not says_nothing(turn.get("tool_calls")) else []
    if says_nothing(turn.get("function_call")):
        return calls
    if calls:
        raise BadRecord('it has both "tool_calls" and "function_call"')
    call = _parsed(turn, "function_call")
    return [_call(call, '"function_call"')]


def settle(chat: list[dict], tools: list[dict], key: str) -> list[dict]:
    """The chat in the form to be rendered: results in the order of their calls, no ids, the tools in the first turn.

    Args:
        tools: the line's tools.
        key: the key of the chat, for messages.

    Raises:
        BadRecord: a call of an unlisted tool, a call without a result although the chat continues, a result without a
            call, or different tools in the line and in the system turn.
    """
    listed = chat[0].get("tools") if chat else None
    if listed and tools and listed != tools:
        raise BadRecord('"tools" differs from those of the system turn')
    tools = listed or tools
    names = {tool["name"] for tool in tools}
    for number, turn in enumerate(chat, 1):
        for call in turn.get("tool_calls", ()):
            if tools and call["name"] not in names:
                raise BadRecord(f'turn {number} of "{key}": it calls {call["name"]!r:.40}, which "tools" does not list')
        if turn.get("tool_calls") and number < len(chat) and chat[number]["role"] != "tool":
            raise BadRecord(f'turn {number + 1} of "{key}": it should be a tool turn, the result of the call before it')
    try:
        ordered = in_call_order(chat)
    except ValueError as fault:
        number, why = str(fault).split(": ", 1)
        raise BadRecord(f'turn {number} of "{key}": {why}') from None
    settled = [_without_ids(turn) for turn in ordered]
    return [settled[0] | {"tools": tools}, *settled[1:]] if tools and settled else settled


def uses_tools(chat: list[dict]) -> bool:
    """Whether a chat lists tools, calls one, or has a result."""
    return any(turn["role"] == "tool" or turn.get("tools") or turn.get("tool_calls") for turn in chat)


def _without_ids(turn: dict) -> dict:
    turn = {name: value for name, value in turn.items() if name not in ("tool_call_id", "tools")}
    if calls := turn.get("tool_calls"):
        turn["tool_calls"] = [{name: call[name] for name in ("name", "arguments")} for call in calls]
    return turn


def _list_of(found: dict[str, Any], key: str, read: Callable[[object, str], dict]) -> list[dict]:
    entries = _parsed(found, key)
    if not isinstance(entries, list):
        raise BadRecord(f'"{key}" is neither a list nor a list as JSON text')
    return list(_each(entries, key, read))


def _each(entries: list, key: str, read: Callable[[object, str], dict]) -> Iterator[dict]:
    for number, entry in enumerate(entries, 1):
        yield read(entry, f'entry {number} of "{key}"')


def _parsed(found: dict[str, Any], key: str) -> object:
    value = found[key]
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            raise BadRecord(f'"{key}" is a text that is not valid JSON') from None
    return value


def _tool(entry: object, where: str) -> dict:
    """A tool's function, with or without the {"type": "function"} around it."""
    function = function_of(entry) if isinstance(entry, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str) or not function["name"].strip():
        raise BadRecord(f'{where} is not an object with a "name", or with one in its "function"')
    _check_text(function, where)
    return function


def _call(entry: object, where: str) -> Call:
    function = function_of(entry) if isinstance(entry, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str) or not function["name"].strip():
        raise BadRecord(f'{where} is not an object with a "name", or with one in its "function"')
    arguments = parse_arguments(function.get("arguments"))
    if arguments is None:
        raise BadRecord(f'{where}: its "arguments" are neither an object nor an object as JSON text')
    call = {"name": function["name"], "arguments": arguments}
    _check_text(call, where)
    return call | ({"id": entry["id"]} if entry.get("id") is not None else {})


def _check_text(value: dict, where: str) -> None:
    try:
        as_json(value).encode()
    except UnicodeEncodeError:
        raise BadRecord(f"{where} contains a lone surrogate (half a character)") from None


def says_nothing(value: object) -> bool:
    """Whether a value counts as absent: null, or an empty text, list or object."""
    return value is None or (isinstance(value, str | list | dict) and not value)
