"""From a request's requirements on the answer's form to a constraint for the engine."""

from typing import Any

from model.inference.constraint import Constraint
from scripts.serving.requests import ServerState
from scripts.serving.schema import ApiError, ChatRequest, Sampling
from scripts.serving.tool_forms import NamedTool, ObjectFormat, SchemaFormat

MISSING = "structured output needs the package llguidance on the server: pip install llguidance"


def listed_functions(body: ChatRequest) -> list[dict[str, Any]]:
    """The functions that a chat's answer may call, {"name", "description", "parameters"} each; empty if it must not."""
    if "none" in (body.tool_choice, body.function_call):
        return []
    functions = [tool.function for tool in body.tools or ()] or body.functions or ()
    return [function.model_dump(exclude_unset=True, exclude={"strict"}) for function in functions]


def check_tools(body: ChatRequest) -> None:
    """Refuse fields on tools that contradict each other.

    Raises:
        ApiError: tools in both formats; a forced call of an unlisted function.
    """
    if body.tools and body.functions:
        raise ApiError(400, "functions: this is the older form of tools; give only one of the two", "functions")
    name = _forced_name(body)
    if name is None and body.tool_choice != "required":
        return
    place = "tool_choice" if body.tool_choice else "function_call"
    names = [function["name"] for function in listed_functions(body)]
    if not names:
        raise ApiError(400, f"{place}: no tools are listed", place)
    if name is not None and name not in names:
        raise ApiError(400, f"{place}: {name!r:.60} is not among those listed", place)


def _forced_name(body: ChatRequest) -> str | None:
    """The function that must be called; None if the request names none."""
    if isinstance(body.tool_choice, NamedTool):
        return body.tool_choice.function.name
    return None if body.function_call in (None, "auto", "none") else body.function_call.name


def one_call(body: ChatRequest) -> bool:
    """Whether an answer may have at most one call."""
    return body.parallel_tool_calls is False or bool(body.functions)


def constraint_of(server: ServerState, body: Sampling) -> Constraint | None:
    """The constraint on the answer to a request; None for free text.

    Raises:
        ApiError: two forms at once, or an unsupported one.
    """
    given = _forms(body)
    functions: list[dict[str, Any]] = []
    forced = False
    if isinstance(body, ChatRequest):
        functions, name = listed_functions(body), _forced_name(body)
        forced = name is not None or body.tool_choice == "required"
        functions = [function for function in functions if name in (None, function["name"])]
    if not given and not forced:
        return None
    if len(given) > 1:
        raise ApiError(400, f"{given[1][0]}: the output is already constrained by {given[0][0]}", given[1][0])
    try:
        from scripts.serving import grammars  # llguidance loads quickly, the tokenizer's tree takes a second
    except ImportError:
        raise ApiError(400, MISSING, given[0][0] if given else "tool_choice") from None

    param, parts = "tool_choice" if isinstance(body, ChatRequest) and body.tool_choice else "function_call", []
    try:
        if functions:
            parts.append(grammars.calls_form(functions, several=name is None and not one_call(body)))
        if given and not forced:
            param, kind, value = given[0]
            form = {"schema": grammars.schema_form, "regex": grammars.pattern_form, "choice": grammars.choice_form}
            parts.insert(0, form[kind](value))
        return server.grammars.make(" | ".join(parts), pattern=bool(given) and given[0][1] != "schema")
    except ValueError as error:
        raise ApiError(400, f"{param}: {error}", param, "unsupported_parameter") from None


def _forms(body: Sampling) -> list[tuple[str, str, Any]]:
    """The output formats that a request asks for, each as (field, kind, value)."""
    found: list[tuple[str, str, Any]] = []
    wanted, several = body.response_format, body.structured_outputs
    if isinstance(wanted, ObjectFormat):
        found.append(("response_format", "schema", {"type": "object"}))
    if isinstance(wanted, SchemaFormat):
        found.append(("response_format", "schema", wanted.json_schema.schema_))
    for field, kind, value in (
        ("structured_outputs", "schema", several and several.json_),
        ("structured_outputs", "regex", several and several.regex),
        ("structured_outputs", "choice", several and several.choice),
        ("guided_json", "schema", body.guided_json),
        ("guided_regex", "regex", body.guided_regex),
        ("guided_choice", "choice", body.guided_choice),
        ("regex", "regex", body.regex),
        ("choice", "choice", body.choice),
    ):
        if value is not None:
            found.append((field, kind, value))
    return found
