"""Tool calls as text: how a chat lists tools, how an answer calls them, and how such an answer is parsed.

<tool_call>
{"name": "calculator", "arguments": {"expression": "12 * 30"}}
</tool_call>

Several calls follow each other. A tool's result is a turn of the role "tool". The listing ends the system turn;
MiniMind-3's template has its own wording, see `model.template_chat`, but the same format for calls.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

CALL_BEGIN, CALL_END = "<tool_call>", "</tool_call>"
LISTING_HEAD = "\n\nYou may call these functions:"
LISTING_TAIL = '\nA call is written as\n<tool_call>\n{"name": "…", "arguments": {…}}\n</tool_call>'

Call = dict[str, Any]  # {"name": str, "arguments": dict}


def function_of(tool: Mapping[str, Any]) -> Mapping[str, Any]:
    """The function of a tool or call: of {"type": "function", "function": {…}} or of the bare {"name", …}."""
    return tool.get("function") or tool


def listing(tools: Sequence[Mapping[str, Any]]) -> str:
    """The end of the system turn in a chat with tools: the JSON of each function, one per line."""
    lines = [f"\n{as_json(function_of(tool))}" for tool in tools]
    return "".join([LISTING_HEAD, *lines, LISTING_TAIL])


def with_calls(content: str, calls: Sequence[Mapping[str, Any]]) -> str:
    """The text of an answer that ends with calls; arguments that are already text are inserted as they are."""
    spelled = []
    for call in map(function_of, calls):
        arguments = call["arguments"]
        arguments = arguments if isinstance(arguments, str) else as_json(arguments)
        name = as_json(call["name"])
        spelled.append(f'{CALL_BEGIN}\n{{"name": {name}, "arguments": {arguments}}}\n{CALL_END}')
    return "\n".join([content, *spelled] if content else spelled)


def as_json(value: object) -> str:
    """JSON in the form of the filter `tojson` of chat templates."""
    return json.dumps(value, ensure_ascii=False)


def parse_arguments(arguments: object) -> dict | None:
    """A call's arguments, an object or its JSON text; "" and null count as empty, anything else gives None."""
    if arguments is None or arguments == "":
        return {}
    if isinstance(arguments, str):
        arguments = _loads(arguments)
    return arguments if isinstance(arguments, dict) else None


def parse_call(text: str) -> Call | None:
    """The call between the two tags; None if it is not JSON with a name and an object of arguments."""
    found = _loads(text)
    if not isinstance(found, dict) or not isinstance(found.get("name"), str) or not found["name"]:
        return None
    arguments = parse_arguments(found.get("arguments"))
    return None if arguments is None else {"name": found["name"], "arguments": arguments}


def _loads(text: str) -> object:
    """The value of a JSON text; None if it is not JSON, or cannot be written as UTF-8 again."""
    try:
        found = json.loads(text, parse_constant=_refuse)
        as_json(found).encode()  # half a character cannot be sent
    except (ValueError, RecursionError):
        return None
    return found


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is not JSON")


class CallStream:
    """Separates calls from text while an answer is generated.

    Text that may become a tag is held back until that is clear, as are white space before it and an unfinished call. A
    call that cannot be parsed stays text. White space around calls is dropped.
    """

    def __init__(self):
        self._waiting = ""
        self._after_call = False  # nothing but white space since the last call

    def push(self, text: str) -> list[str | Call]:
        """The texts, none of them empty, and the calls that are complete now, in order."""
        self._waiting += text
        clear: list[str | Call] = []
        while (begin := self._waiting.find(CALL_BEGIN)) >= 0:
            end = self._waiting.find(CALL_END, begin)
            if end < 0:
                break
            begin = self._waiting.rfind(CALL_BEGIN, 0, end)  # one that was never closed, before it, is text
            call = parse_call(self._waiting[begin + len(CALL_BEGIN) : end])
            after = end + len(CALL_END)
            if call is None:
                clear += self._text(self._waiting[:after])
            else:
                clear += self._text(self._waiting[:begin].rstrip())
                clear.append(call)
                self._after_call = True
            self._waiting = self._waiting[after:]
        if begin < 0:
            begin = _begun(self._waiting)
        certain = self._waiting[:begin].rstrip()
        self._waiting = self._waiting[len(certain) :]
        return clear + self._text(certain)

    def flush(self) -> list[str]:
        """The text that was still held back when the answer ended."""
        rest, self._waiting = self._waiting, ""
        return self._text(rest)

    def _text(self, text: str) -> list[str]:
        if self._after_call:
            text = text.lstrip()
        if not text:
            return []
        self._after_call = False
        return [text]


def _begun(text: str) -> int:
    """The index at which the text may begin to spell a tag; the text's length if there is none."""
    longest = min(len(text), len(CALL_BEGIN) - 1)
    return len(text) - next((n for n in range(longest, 0, -1) if CALL_BEGIN.startswith(text[-n:])), 0)


def split_calls(text: str) -> tuple[str, list[Call]]:
    """The text of an answer without its calls, and the calls; see `CallStream`."""
    stream = CallStream()
    parts = [*stream.push(text), *stream.flush()]
    return "".join(p for p in parts if isinstance(p, str)), [p for p in parts if not isinstance(p, str)]


def in_call_order(chat: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """A chat in which results that name their call ("tool_call_id") come in the order of the calls.

    A result is not rendered with its id: the model tells several apart by their order.

    Raises:
        ValueError: a result names a call that the answer before it did not make, or that has its result already; there
            are more results than calls. The message begins with the number of the turn, from 1.
    """
    ordered: list[dict[str, Any]] = []
    waiting: list[Any] = []  # the ids of the calls before, None where they have none
    group: list[tuple[int, dict[str, Any]]] = []

    def close() -> None:
        ordered.extend(turn for _, turn in sorted(group, key=lambda one: one[0]))
        group.clear()

    for number, turn in enumerate(chat, 1):
        if turn["role"] != "tool":
            close()
            ordered.append(turn)
            waiting = [call.get("id") for call in turn.get("tool_calls") or ()]
            continue
        taken = {place for place, _ in group}
        free = [place for place in range(len(waiting)) if place not in taken]
        named = turn.get("tool_call_id")
        if named is not None and any(i is not None for i in waiting):
            free = [place for place in free if waiting[place] == named]
        if not free:
            about = f" of the call {named!r:.40}" if named is not None else ""
            raise ValueError(f"{number}: a result{about} that nothing before it asks for")
        group.append((free[0], turn))
    close()
    return ordered
