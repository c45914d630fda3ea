"""Python functions as tools: schemas from signature and docstring, and calls with checked arguments."""

import inspect
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal, NamedTuple, get_args, get_origin, get_type_hints

JSON_TYPES = {str: "string", int: "integer", float: "number", bool: "boolean"}
MOST_CHARS = 2000  # of a result: a longer one would fill the model's context
ERROR = "error: "  # how the result of a call that failed begins


class Tool(NamedTuple):
    """A function that a model may call.

    schema: {"name", "description", "parameters"}, as in OpenAI's "function".
    foreign: from a third party, which also checks the arguments; the user is asked before it runs.
    """

    function: Callable[..., object]
    schema: dict[str, Any]
    foreign: bool = False


def tool_of(function: Callable[..., object]) -> Tool:
    """A tool from a function.

    Each parameter has a type (str, int, float, bool, Literal of texts). The first paragraph of the docstring becomes
    the description, its "Args:" those of the parameters.

    Raises:
        TypeError: a parameter has another type, or none.
    """
    text = inspect.getdoc(function) or ""
    about = dict(re.findall(r"^ +(\w+): (.+)$", text.partition("Args:")[2], re.MULTILINE))
    hints = get_type_hints(function)
    properties, required = {}, []
    for name, parameter in inspect.signature(function).parameters.items():
        properties[name] = _json_type(function, name, hints.get(name))
        if name in about:
            properties[name]["description"] = about[name]
        if parameter.default is inspect.Parameter.empty:
            required.append(name)
    parameters = {"type": "object", "properties": properties, "required": required}
    description = " ".join(text.split("\n\n")[0].split())
    return Tool(function, {"name": function.__name__, "description": description, "parameters": parameters})


def _json_type(function: Callable, name: str, hint: object) -> dict[str, Any]:
    if hint in JSON_TYPES:
        return {"type": JSON_TYPES[hint]}
    if get_origin(hint) is Literal and all(isinstance(choice, str) for choice in get_args(hint)):
        return {"type": "string", "enum": list(get_args(hint))}
    raise TypeError(f"{function.__name__}: the parameter {name} has the type {hint}, which is not one for a tool")


class Registry:
    """Tools by name.

    Args:
        allow: asked with the name and the arguments before a third-party tool runs.

    Raises (on construction):
        ValueError: two tools have the same name.
    """

    def __init__(
        self, tools: Iterable[Tool], allow: Callable[[str, dict[str, Any]], bool] = lambda name, arguments: False
    ):
        self.allow = allow
        self._tools: dict[str, Tool] = {}
        for tool in tools:
            if tool.schema["name"] in self._tools:
                raise ValueError(f"two tools are named {tool.schema['name']}")
            self._tools[tool.schema["name"]] = tool

    @property
    def schemas(self) -> list[dict[str, Any]]:
        """The tools as OpenAI's API lists them, {"type": "function", "function": {…}}."""
        return [{"type": "function", "function": tool.schema} for tool in self._tools.values()]

    def call(self, name: str, arguments: dict[str, Any] | None) -> str:
        """Run a tool; returns its result as text. An error is a result, too, for the model to read."""
        tool = self._tools.get(name)
        if tool is None:
            return f"{ERROR}there is no tool {name!r:.40}; the tools are {', '.join(self._tools)}"
        if not isinstance(arguments, dict):
            return f"{ERROR}the arguments must be a JSON object"
        if not tool.foreign and (fault := _fault(tool.schema["parameters"], arguments)):
            return ERROR + fault
        if tool.foreign and not self.allow(name, arguments):
            return f"{ERROR}the user did not allow this call"
        try:
            result = str(tool.function(**arguments))
        except Exception as error:  # whatever a tool does wrong, the chat continues
            result = f"{ERROR}{error or type(error).__name__}"
        return result if len(result) <= MOST_CHARS else f"{result[:MOST_CHARS]}…"


def _fault(parameters: dict[str, Any], arguments: dict[str, Any]) -> str | None:
    """The fault in a call's arguments; None if there is none."""
    known: dict[str, dict] = parameters["properties"]
    if other := next((name for name in arguments if name not in known), None):
        return f"there is no argument {other!r:.40}; the arguments are {', '.join(known)}"
    if missing := next((name for name in parameters["required"] if name not in arguments), None):
        return f"the argument {missing!r} is missing"
    for name, value in arguments.items():
        if not _fits(value, known[name]["type"]):
            return f"{name} must be of the type {known[name]['type']}"
        choices: Sequence[str] | None = known[name].get("enum")
        if choices and value not in choices:
            return f"{name} must be one of {', '.join(choices)}"
    return None


def _fits(value: object, kind: str) -> bool:
    if isinstance(value, bool):
        return kind == "boolean"
    python = {"string": str, "integer": int, "number": (int, float), "boolean": bool}[kind]
    return isinstance(value, python)
