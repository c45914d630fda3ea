"""The parts of a request on tools and on the form of the answer."""

from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, StrictBool, StringConstraints

from scripts.serving.forms import Form, without_nulls

MOST_CHOICES_OF_TEXT = 1000
LONGEST_PATTERN = 10_000  # characters

Name = Annotated[str, StringConstraints(min_length=1)]
Pattern = Annotated[str, StringConstraints(min_length=1, max_length=LONGEST_PATTERN)]
Choices = Annotated[list[Name], Field(min_length=1, max_length=MOST_CHOICES_OF_TEXT, fail_fast=True)]
Schema = dict[str, Any] | StrictBool  # as JSON Schema has it, true is a schema


class CalledFunction(Form):
    name: Name
    arguments: str = Field("", description="a JSON object, as text")


class ToolCall(Form):
    id: str | None = None
    type: Literal["function"] = "function"
    function: CalledFunction


class Function(Form):
    name: Name
    description: str | None = None
    parameters: dict[str, Any] | None = Field(None, description="a JSON schema")
    strict: bool | None = Field(None, description="changes nothing: a forced call always keeps to the schema")


class Tool(Form):
    type: Literal["function"]
    function: Function


class FunctionName(Form):
    name: Name


class NamedTool(Form):
    type: Literal["function"]
    function: FunctionName


ToolChoice = Literal["auto", "none", "required"] | NamedTool


class TextFormat(Form):
    type: Literal["text"]


class ObjectFormat(Form):
    type: Literal["json_object"]


class NamedSchema(Form):
    model_config = ConfigDict(populate_by_name=True)

    name: str | None = None
    description: str | None = Field(None, description="changes nothing")
    schema_: Schema = Field(alias="schema", description="a JSON schema")
    strict: bool | None = Field(None, description="changes nothing: an answer always keeps to the schema")


class SchemaFormat(Form):
    type: Literal["json_schema"]
    json_schema: NamedSchema


ResponseFormat = Annotated[TextFormat | ObjectFormat | SchemaFormat, Field(discriminator="type")]


class StructuredOutputs(Form):
    """One of several forms of an answer, under vLLM's name."""

    model_config = ConfigDict(extra="forbid")

    json_: Schema | None = Field(None, alias="json", description="a JSON schema")
    regex: Pattern | None = None
    choice: Choices | None = None


def without_empty_forms(given: Any) -> Any:
    """A request without fields that only ask for free text."""
    if not isinstance(given, dict):
        return given
    named = ("regex", "choice", "structured_outputs", "guided_json", "guided_regex", "guided_choice")
    empty = [name for name in named if given.get(name) in (False, "", [], {})]
    if without_nulls(given.get("response_format")) in ({}, {"type": "text"}):
        empty.append("response_format")
    return {name: value for name, value in given.items() if name not in empty}
