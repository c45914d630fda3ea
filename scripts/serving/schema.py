"""The requests and responses of the OpenAI API, as far as `scripts/serve_openai_api.py` supports them.

A null field counts as absent. For other fields in requests see `unsupported`.
"""

from typing import Annotated, Any, Literal, get_args

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    StrictBool,
    StringConstraints,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)
from starlette.exceptions import HTTPException

from scripts.serving.forms import Form
from scripts.serving.tool_forms import (
    CalledFunction,
    Choices,
    Function,
    FunctionName,
    Pattern,
    ResponseFormat,
    Schema,
    StructuredOutputs,
    Tool,
    ToolCall,
    ToolChoice,
    without_empty_forms,
)

MOST_CHOICES = 16
MOST_PROMPTS = 64
MOST_TOP_LOGPROBS = 20
MOST_IMAGES = 16
MOST_TOOLS = 128

Probability = Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)]
Temperature = Annotated[float, Field(ge=0, le=2, allow_inf_nan=False)]
Penalty = Annotated[float, Field(ge=-2, le=2, allow_inf_nan=False)]
StopText = Annotated[str, StringConstraints(min_length=1, max_length=1000)]
TokenId = Annotated[int, Field(ge=0)]
TokenIds = Annotated[list[TokenId], Field(min_length=1, fail_fast=True)]
NoLimit = Literal[-1]


# --------------------------------------------------------------------------------------------------------- requests


class StreamOptions(Form):
    include_usage: bool | None = None


class Sampling(Form):
    """The fields that chats and completions share."""

    model: str | None = Field(None, description="a name from /v1/models; default: the served model")
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: NoLimit | Annotated[int, Field(ge=0)] | None = Field(None, description="-1: as many as fit")
    temperature: Temperature | None = None
    top_p: Probability | None = None
    top_k: NoLimit | Annotated[int, Field(ge=0)] | None = Field(
        None, description="extension of OpenAI's API: 0 or -1 = no limit"
    )
    repetition_penalty: Annotated[float, Field(gt=0, le=10, allow_inf_nan=False)] | None = None
    ignore_eos: bool | None = Field(None, description="extension of OpenAI's API: generate until max_tokens")
    frequency_penalty: Penalty | None = None
    presence_penalty: Penalty | None = None
    stop: StopText | Annotated[list[StopText], Field(max_length=16)] | None = None
    n: Annotated[int, Field(ge=1, le=MOST_CHOICES)] | None = None
    seed: int | None = Field(None, description="-1: different each time, as without a seed")
    response_format: ResponseFormat | None = None
    regex: Pattern | None = Field(None, description="extension of OpenAI's API: the whole answer must match")
    choice: Choices | None = Field(None, description="extension of OpenAI's API: the answer must be one of these")
    structured_outputs: StructuredOutputs | None = Field(None, description="extension of OpenAI's API, as of vLLM")
    guided_json: Schema | None = Field(None, description="vLLM's older name for a schema")
    guided_regex: Pattern | None = Field(None, description="vLLM's older name for regex")
    guided_choice: Choices | None = Field(None, description="vLLM's older name for choice")

    @model_validator(mode="before")
    @classmethod
    def _free_text_is_no_form(cls, given: Any) -> Any:
        return without_empty_forms(given)

    @field_validator("*", mode="before")
    @classmethod
    def _true_is_no_number(cls, value: Any, info: ValidationInfo) -> Any:
        if isinstance(value, bool) and bool not in get_args(cls.model_fields[info.field_name].annotation):
            raise ValueError(f"Input should not be {str(value).lower()}")  # which pydantic would take for 1 or 0
        return value


class TextPart(Form):
    type: Literal["text"]
    text: str


class ImageURL(Form):
    url: str = Field(description="data:image/…;base64,…, or http(s) if the server has --fetch_images")


class ImagePart(Form):
    type: Literal["image_url"]
    image_url: ImageURL


def usual_part(part: Any) -> Any:
    """A part of a message's content in the form of chats, converted from that of OpenAI's Responses API."""
    if not isinstance(part, dict):
        return part
    kind, image = part.get("type"), part.get("image_url")
    if kind == "input_text":
        return part | {"type": "text"}
    if kind in ("image_url", "input_image"):
        return part | {"type": "image_url", "image_url": {"url": image} if isinstance(image, str) else image}
    return part


Part = Annotated[TextPart | ImagePart, Field(discriminator="type"), BeforeValidator(usual_part)]


class Message(Form):
    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: str | Annotated[list[Part], Field(fail_fast=True)] | None = None
    tool_calls: Annotated[list[ToolCall], Field(fail_fast=True)] | None = Field(
        None, description="for the role assistant"
    )
    tool_call_id: str | None = Field(None, description="for the role tool: the id of the call")
    function_call: CalledFunction | None = Field(None, description="for the role assistant; older form of tool_calls")


class TemplateSettings(Form):
    model_config = ConfigDict(extra="forbid")

    open_thinking: StrictBool | None = Field(None, description="MiniMind-3: think before the answer")


class ChatRequest(Sampling):
    messages: list[Message] = Field(min_length=1, fail_fast=True)
    tools: Annotated[list[Tool], Field(max_length=MOST_TOOLS, fail_fast=True)] | None = None
    tool_choice: ToolChoice | None = Field(None, description="default: auto")
    parallel_tool_calls: bool | None = Field(None, description="false: at most one call per answer")
    functions: Annotated[list[Function], Field(max_length=MOST_TOOLS, fail_fast=True)] | None = Field(
        None, description="older form of tools; calls come as function_call"
    )
    function_call: Literal["auto", "none"] | FunctionName | None = Field(None, description="older form of tool_choice")
    chat_template_kwargs: TemplateSettings | None = Field(None, description="extension of OpenAI's API, as of vLLM")
    max_completion_tokens: NoLimit | Annotated[int, Field(ge=1)] | None = Field(None, description="-1: as many as fit")
    max_tokens: NoLimit | Annotated[int, Field(ge=1)] | None = Field(
        None, description="older name of max_completion_tokens"
    )
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MOST_TOP_LOGPROBS)] | None = None

    @field_validator("top_logprobs")
    @classmethod
    def _wanted(cls, value: int | None, info: ValidationInfo) -> int | None:
        if value is not None and not info.data.get("logprobs"):
            raise ValueError("needs logprobs to be true")
        return value


class CompletionRequest(Sampling):
    prompt: (
        str
        | TokenIds
        | Annotated[list[str], Field(min_length=1, max_length=MOST_PROMPTS, fail_fast=True)]
        | Annotated[list[TokenIds], Field(min_length=1, max_length=MOST_PROMPTS, fail_fast=True)]
    ) = ""
    echo: bool | None = None
    logprobs: Annotated[int, Field(ge=0, le=MOST_TOP_LOGPROBS)] | None = Field(None, description="false: none")

    @model_validator(mode="before")
    @classmethod
    def _no_logprobs(cls, given: Any) -> Any:
        return given | {"logprobs": None} if isinstance(given, dict) and given.get("logprobs") is False else given


# ---------------------------------------------------------------------------------------------------------- answers


class Usage(BaseModel):
    class Details(BaseModel):
        cached_tokens: int

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: Details


class TokenLogprob(BaseModel):
    class Alternative(BaseModel):
        token: str
        logprob: float
        bytes: list[int]

    token: str
    logprob: float
    bytes: list[int]
    top_logprobs: list[Alternative]


class ChatLogprobs(BaseModel):
    content: list[TokenLogprob]


class AnsweredCall(BaseModel):
    class Function(BaseModel):
        name: str
        arguments: str

    id: str
    type: Literal["function"]
    function: Function


class ChatMessage(BaseModel):
    role: Literal["assistant"]
    content: str | None
    reasoning_content: str | None = None
    tool_calls: list[AnsweredCall] | None = None
    function_call: AnsweredCall.Function | None = None


class ChatChoice(BaseModel):
    index: int
    message: ChatMessage
    logprobs: ChatLogprobs | None
    finish_reason: Literal["stop", "length", "tool_calls", "function_call"]


class ChatCompletion(BaseModel):
    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage


class CompletionLogprobs(BaseModel):
    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class CompletionChoice(BaseModel):
    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: Literal["stop", "length"]


class Completion(BaseModel):
    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage


class Model(BaseModel):
    id: str
    object: Literal["model"]
    created: int
    owned_by: str


class ModelList(BaseModel):
    object: Literal["list"]
    data: list[Model]


class Health(BaseModel):
    status: Literal["ok"]
    running: int
    waiting: int


class Error(BaseModel):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    """The body of every response with a status of 400 or above."""

    model_config = ConfigDict(json_schema_extra={"required": ["error"]})
    error: Error


# ----------------------------------------------------------------------------------------------------------- errors


class ApiError(HTTPException):
    """An error that ends a request with an error object."""

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ):
        super().__init__(status, message, headers)
        self.param = param
        self.code = code

    def body(self) -> dict[str, Any]:
        kinds = {401: "authentication_error", 429: "rate_limit_error"}
        kind = kinds.get(self.status_code, "invalid_request_error" if self.status_code < 500 else "server_error")
        message = self.detail.encode("utf-8", "backslashreplace").decode()  # it may quote half a character
        return {"error": {"message": message, "type": kind, "param": self.param, "code": self.code}}


def invalid(error: ValidationError) -> ApiError:
    """pydantic's error on a request, in our form."""
    worst = max(error.errors(include_url=False, include_input=False), key=_fit)
    param = _place(worst["loc"])
    if not param:
        return ApiError(400, "the body must be a JSON object, with Content-Type: application/json")
    return ApiError(400, f"{param}: {worst['msg'].removeprefix('Value error, ')}", param)


def _fit(error: dict) -> tuple[bool, bool, int]:
    """How close a value is to matching a member of a union: the closest member's error is reported."""
    kind = error["type"]
    return kind != "literal_error", not kind.endswith(("_type", "_parsing")), len(error["loc"])


def _place(loc: tuple[str | int, ...]) -> str:
    """('messages', 0, 'content', 'str') -> 'messages[0].content': fields and indices without the types tried."""
    place = ""
    for part in loc:
        if isinstance(part, int):
            place += f"[{part}]"
        elif part in ("text", "image_url"):  # which kind of part it was taken for
            break
        elif part.isidentifier() and part not in ("str", "int"):
            place += f".{part}" if place else part
    return place
