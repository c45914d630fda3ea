"""An OpenAI API over a generation engine, as a FastAPI app: chats, completions, models, health."""

import asyncio
import secrets
import time
import uuid
from collections.abc import Callable, Sequence
from typing import Annotated

from fastapi import Depends, FastAPI, Request
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import JSONResponse, StreamingResponse
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from pydantic.json_schema import models_json_schema
from starlette.exceptions import HTTPException

from model.chat import render_chat, render_text
from model.inference import scheduler as engine
from model.inference.constraint import Constraint
from model.template_chat import lays_out_thinking
from model.tokenizer import StreamDecoder
from scripts.serving import schema as schema
from scripts.serving.admission import read_request
from scripts.serving.constraining import check_tools, constraint_of, listed_functions
from scripts.serving.image_parts import read_turns
from scripts.serving.requests import RunningRequest, ServerState
from scripts.serving.responses import (
    CompletionPrompt,
    chat_chunks,
    completion_chunks,
    events,
    opens_thought,
    whole_chat,
    whole_completion,
)
from scripts.serving.schema import ApiError, ChatRequest, CompletionRequest
from trainer.inference_arguments import SAMPLING

NAME = "minimind"
COMPLETION_TOKENS = 16  # where a completion names no max_tokens; OpenAI's
NO_LIMIT = ANY_SEED = -1
SCHEMAS = "#/components/schemas/{model}"  # where the OpenAPI document has them


# ---------------------------------------------------------------------------------------------- from HTTP to the engine


def sampling(body: schema.Sampling) -> dict:
    """A request's settings for the engine, without those specific to chats or completions."""
    stop = [body.stop] if isinstance(body.stop, str) else body.stop or []
    given = {
        "temperature": SAMPLING["temperature"] if body.temperature is None else body.temperature,
        "top_p": SAMPLING["top_p"] if body.top_p is None else body.top_p,
        "top_k": 0 if body.top_k == NO_LIMIT else body.top_k,
        "repetition_penalty": body.repetition_penalty,
        "frequency_penalty": body.frequency_penalty,
        "presence_penalty": body.presence_penalty,
        "stop": stop,
        "eos_token_id": () if body.ignore_eos else None,
    }
    return {name: value for name, value in given.items() if value is not None}


def choices(body: schema.Sampling, **settings) -> list[engine.Request]:
    """`n` requests that differ in their seed."""
    seeds = [None if body.seed in (None, ANY_SEED) else body.seed + i for i in range(body.n or 1)]
    return [engine.Request(**settings, **sampling(body), seed=seed) for seed in seeds]


def new_tokens(asked: int | None, usual: int | None = None) -> int | None:
    """The maximum length of an answer for the engine; None = up to the end of the context."""
    return usual if asked is None else None if asked == NO_LIMIT else asked


async def chat_requests(server: ServerState, body: ChatRequest) -> list[engine.Request]:
    """The engine's requests for a chat.

    Raises:
        ApiError: its messages cannot be read, or the requested form is not supported.
    """
    if opens_thought(body) and not lays_out_thinking(server.tokenizer):
        raise ApiError(400, "open_thinking: this model's chat template has no thinking", "chat_template_kwargs")
    check_tools(body)
    constraint = await asyncio.to_thread(constraint_of, server, body)
    if constraint and opens_thought(body):
        raise ApiError(400, "open_thinking: a constrained answer has no thinking", "chat_template_kwargs")
    turns = await asyncio.to_thread(read_turns, body.messages, server.place_images is not None, server.fetch)
    if functions := listed_functions(body):
        turns[0]["tools"] = functions
    embeddings = None
    try:
        if any(isinstance(turn["content"], list) for turn in turns):
            look = asyncio.get_running_loop().run_in_executor(server.looking, server.place_images, turns)
            prompt, embeddings = await look
        else:
            thinking = {"open_thinking": True} if opens_thought(body) else {}
            prompt, _ = await asyncio.to_thread(
                render_chat, server.tokenizer, turns, add_generation_prompt=True, **thinking
            )
    except ValueError as error:  # half a character; an image that is none
        raise ApiError(400, str(error), "messages") from error
    return choices(
        body,
        prompt=prompt,
        embeddings=embeddings,
        constraint=constraint,
        max_new_tokens=new_tokens(body.max_completion_tokens or body.max_tokens),
        logprobs=(body.top_logprobs or 0) if body.logprobs else None,
    )


def completion_requests(
    body: CompletionRequest, prompts: Sequence[CompletionPrompt], constraint: Constraint | None = None
) -> list[engine.Request]:
    """The engine's requests for a completion: the choices of each prompt."""
    settings = {
        "constraint": constraint,
        "max_new_tokens": new_tokens(body.max_tokens, usual=COMPLETION_TOKENS),
        "logprobs": body.logprobs,
        "prompt_logprobs": bool(body.echo) and body.logprobs is not None,
    }
    return [request for prompt in prompts for request in choices(body, prompt=prompt.ids, **settings)]


def texts_or_ids(body: CompletionRequest) -> list[str] | list[list[int]]:
    """A completion's one or several prompts."""
    prompt = body.prompt
    return [prompt] if isinstance(prompt, str) or isinstance(prompt[0], int) else prompt


def completion_prompts(server: ServerState, body: CompletionRequest) -> list[CompletionPrompt]:
    """A completion's prompts from texts or token ids.

    Raises:
        ApiError: a text that cannot be encoded.
    """
    several = texts_or_ids(body)
    if isinstance(several[0], str):
        try:
            rendered = render_text(server.tokenizer, several)
        except ValueError as error:
            raise ApiError(400, str(error), "prompt") from error
        return [CompletionPrompt(ids[:-1], text, 1) for ids, text in zip(rendered, several, strict=True)]
    prompts = []
    for ids in several:
        decoder = StreamDecoder(server.thread.engine.token_bytes)
        prompts.append(CompletionPrompt(ids, "".join(map(decoder.push, ids)) + decoder.flush(), 0))
    return prompts


# ------------------------------------------------------------------------------------------------------------- the app


def make_app(server: ServerState, api_key: str | None = None, origins: Sequence[str] = ()) -> FastAPI:
    """The app.

    Args:
        api_key: the bearer token that clients must send; None = none.
        origins: web origins whose pages may call the API from a browser; "*" = all.
    """
    app = FastAPI(title="MiniMind", version="1", description=__doc__)
    if origins:
        app.add_middleware(CORSMiddleware, allow_origins=origins, allow_methods=["*"], allow_headers=["*"])

    async def known(
        credentials: Annotated[HTTPAuthorizationCredentials | None, Depends(HTTPBearer(auto_error=False))],
    ) -> None:
        given = credentials.credentials if credentials else ""
        if api_key and not secrets.compare_digest(given.encode(), api_key.encode()):
            raise ApiError(
                401, "the API key is missing or wrong", code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"}
            )

    async def is_open() -> None:
        server.places.check_open()

    def check_name(name: str | None) -> None:
        if name not in (None, NAME):
            raise ApiError(
                404, f"the model {name!r} does not exist; this server has {NAME!r}", "model", "model_not_found"
            )

    def answer_of_error(http: Request, error: Exception) -> JSONResponse:
        if not isinstance(error, HTTPException):
            error = ApiError(500, "internal server error; see the server's log", code="internal")
        elif not isinstance(error, ApiError):
            said = error.detail
            if error.status_code == 404:
                said = f"this server has no {http.scope['path']:.200}; it has {', '.join(app.openapi()['paths'])}"
            error = ApiError(error.status_code, said, headers=error.headers)
        return JSONResponse(error.body(), error.status_code, error.headers)

    for kind in (HTTPException, Exception):
        app.add_exception_handler(kind, answer_of_error)

    errors = {"4XX": {"model": schema.ErrorBody}, "5XX": {"model": schema.ErrorBody}}

    def documented(model: type, streams: bool = False) -> dict:
        content = {"text/event-stream": {"schema": {"type": "string"}}} if streams else {}
        return {"responses": errors | {200: {"model": model, "content": content}}, "response_model": None}

    def takes(kind: type) -> dict:
        """Documents a request body that FastAPI does not parse, because the key is checked before the body is read."""
        content = {"application/json": {"schema": {"$ref": SCHEMAS.format(model=kind.__name__)}}}
        return {"openapi_extra": {"requestBody": {"required": True, "content": content}}}

    def document() -> dict:
        if app.openapi_schema is None:
            document = FastAPI.openapi(app)
            kinds = [(kind, "validation") for kind in (ChatRequest, CompletionRequest)]
            document["components"]["schemas"] |= models_json_schema(kinds, ref_template=SCHEMAS)[1]["$defs"]
        return app.openapi_schema

    app.openapi = document

    def head(kind: str) -> dict:
        facts = {"object": "text_completion", "created": int(time.time()), "model": NAME}
        return {"id": f"{kind}-{uuid.uuid4().hex}"} | facts

    def get(path: str, **described) -> Callable:
        """GET, and HEAD, with which load balancers ask."""

        def register(endpoint: Callable) -> Callable:
            app.add_api_route(path, endpoint, methods=["GET"], **described)
            app.add_api_route(path, endpoint, methods=["HEAD"], include_in_schema=False, **described)
            return endpoint

        return register

    writers = {"dependencies": [Depends(known), Depends(is_open)]}
    chats = documented(schema.ChatCompletion, streams=True) | takes(ChatRequest)
    texts = documented(schema.Completion, streams=True) | takes(CompletionRequest)

    @app.post("/v1/chat/completions", **writers, **chats)
    async def chat_completions(http: Request):
        body = await read_request(http, ChatRequest)
        check_name(body.model)
        with server.places.taking(body.n or 1):
            requests = await chat_requests(server, body)
            writing, first = RunningRequest(server, requests, http, "messages"), head("chatcmpl")
        if body.stream:
            chunks = chat_chunks(writing, body, first)
            return StreamingResponse(events(writing, chunks), media_type="text/event-stream")
        return JSONResponse(await whole_chat(writing, body, first))

    @app.post("/v1/completions", **writers, **texts)
    async def completions(http: Request):
        body = await read_request(http, CompletionRequest)
        check_name(body.model)
        with server.places.taking(len(texts_or_ids(body)) * (body.n or 1)):
            prompts = await asyncio.to_thread(completion_prompts, server, body)
            requests = completion_requests(body, prompts, await asyncio.to_thread(constraint_of, server, body))
            writing, first = RunningRequest(server, requests, http, "prompt"), head("cmpl")
        if body.stream:
            chunks = completion_chunks(writing, body, first, prompts)
            return StreamingResponse(events(writing, chunks), media_type="text/event-stream")
        return JSONResponse(await whole_completion(writing, body, first, prompts))

    @get("/v1/models", dependencies=[Depends(known)], **documented(schema.ModelList))
    async def models():
        return {"object": "list", "data": [await model(NAME)]}

    @get("/v1/models/{name}", dependencies=[Depends(known)], **documented(schema.Model))
    async def model(name: str):
        check_name(name)
        return {"id": NAME, "object": "model", "created": server.created, "owned_by": NAME}

    @get("/health", **documented(schema.Health))
    async def health():
        server.places.check_open()
        if server.thread.broken:
            raise ApiError(503, "the device has failed: restart the server", code="broken")
        engine = server.thread.engine
        return {"status": "ok", "running": engine.running, "waiting": server.places.taken - engine.running}

    return app
