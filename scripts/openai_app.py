"""An OpenAI API over a generation engine, as a FastAPI app: chats, completions, models, health."""

import asyncio
import base64
import binascii
import json
import secrets
import time
import uuid
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Annotated

from fastapi import Depends, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import JSONResponse, StreamingResponse
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from starlette.exceptions import HTTPException
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from model import engine
from model.chat import render_chat, render_text
from model.engine import Answer, EngineThread, Piece, Token
from model.reasoning import ReasoningStream, split_reasoning
from model.tokenizer import StreamDecoder
from scripts import openai_schema as schema
from scripts.openai_schema import ApiError, ChatRequest, CompletionRequest

NAME = "minimind"
LARGEST_BODY = 32 * 2**20  # bytes; room for a few photographs
LEAST_LOGPROB = -9999.0  # JSON has no minus infinity
TEMPERATURE = TOP_P = 0.85  # where a request names none, as in eval_model.py: at OpenAI's 1.0 a small model rambles
COMPLETION_TOKENS = 16  # where a completion names no max_tokens; OpenAI's
FAILURES = {  # status, message, param, code of answers that did not come to their end
    "error": (500, "the engine failed at this answer; the server's log says why", None, "failed"),
    "cancelled": (503, "the server shut down before the answer ended", None, "shutting_down"),
}


@dataclass
class Served:
    """The model that is served, and what it has to do.

    Args:
        place_images: from turns whose content is a text, or a list of texts and image bytes, to token ids and the
            prompt's embeddings; None where the model takes no images.
        fetch: from an http(s) address to what is there; None where fetching is off.
        reasoning: the model writes its thinking apart.
        capacity: answers that may be written and wait at a time.
    """

    thread: EngineThread
    tokenizer: PreTrainedTokenizerFast
    place_images: Callable[[list[dict]], tuple[list[int], Tensor | None]] | None = None
    fetch: Callable[[str], bytes] | None = None
    reasoning: bool = False
    capacity: int = 80
    draining: bool = False  # what runs is finished, nothing new begins
    unfinished: set[Answer] = field(default_factory=set)
    created: int = field(default_factory=lambda: int(time.time()))
    _ends: deque[float] = field(default_factory=lambda: deque(maxlen=64))  # when answers ended lately

    @property
    def context(self) -> int:
        """How long a prompt and its answer can be together."""
        return self.thread.engine.decoder.slot_len

    def end(self, answer: Answer) -> None:
        self.unfinished.discard(answer)
        self._ends.append(time.monotonic())

    def retry_after(self) -> str:
        """Whole seconds until a place is likely to be free, by how fast answers ended lately."""
        each = (time.monotonic() - self._ends[0]) / len(self._ends) if self._ends else 1
        return str(min(60, max(1, round(each))))

    def spelling(self, token: int) -> tuple[str, list[int]]:
        """A token as text and as bytes; half a character is spelled 'bytes:\\xe4', as OpenAI does it."""
        raw = self.thread.engine.token_bytes[token]
        if not raw:
            return self.tokenizer.convert_ids_to_tokens(token), []
        try:
            return raw.decode(), list(raw)
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw), list(raw)


class Writing:
    """The answers to one HTTP request while they are written. A client that goes away ends them.

    Args:
        param: the request's field that the prompts came from.

    Raises (on construction):
        ApiError: no place for them, or one of the requests cannot be done.
    """

    def __init__(self, served: Served, requests: Sequence[engine.Request], http: Request, param: str):
        self.served = served
        self._check(requests, param)
        self._arrived: asyncio.Queue[tuple[int, Piece]] = asyncio.Queue()
        self._loop = asyncio.get_running_loop()
        self.answers = [
            served.thread.submit(request, partial(self._deliver, index)) for index, request in enumerate(requests)
        ]
        self._unfinished = len(self.answers)
        served.unfinished |= set(self.answers)
        self._watcher = asyncio.create_task(self._watch(http))

    def _check(self, requests: Sequence[engine.Request], param: str) -> None:
        served = self.served
        if served.draining:
            raise ApiError(503, "the server is shutting down", code="shutting_down", headers={"Retry-After": "5"})
        if len(requests) > served.capacity:
            raise ApiError(400, f"{len(requests)} answers at once: this server has places for {served.capacity}", "n")
        for request in requests:
            if len(request.prompt) + (request.max_new_tokens != 0) > served.context:
                raise ApiError(
                    400,
                    f"the prompt has {len(request.prompt)} tokens, and the model's context of {served.context} "
                    "must hold it and an answer: shorten it",
                    param,
                    "context_length_exceeded",
                )
            try:
                served.thread.engine.check(request)
            except ValueError as error:
                raise ApiError(400, str(error), param) from error  # the schema has looked at the settings
        if len(served.unfinished) + len(requests) > served.capacity:
            raise ApiError(
                429,
                f"{len(served.unfinished)} answers are being written or wait, and {served.capacity} are possible: "
                "try again later",
                code="queue_full",
                headers={"Retry-After": served.retry_after()},
            )

    def _deliver(self, index: int, piece: Piece) -> None:
        """Called in the engine's thread."""
        self._loop.call_soon_threadsafe(self._arrive, index, piece)

    def _arrive(self, index: int, piece: Piece) -> None:
        self._arrived.put_nowait((index, piece))
        if piece.finish_reason:
            self.served.end(self.answers[index])
            self._unfinished -= 1
            if not self._unfinished:
                self._watcher.cancel()

    async def _watch(self, http: Request) -> None:
        while (await http.receive())["type"] != "http.disconnect":
            pass
        self.cancel()

    def cancel(self) -> None:
        for answer in self.answers:
            if answer.finish_reason is None:
                self.served.thread.cancel(answer)

    async def pieces(self) -> AsyncIterator[tuple[int, Piece]]:
        """What arrives, until all answers have ended: (index, piece). Pieces that arrived together are joined.

        Raises:
            ApiError: an answer did not come to its end.
        """
        left = len(self.answers)
        while left:
            arrived = [await self._arrived.get()]
            while not self._arrived.empty():
                arrived.append(self._arrived.get_nowait())
            joined: dict[int, Piece] = {}
            for index, piece in arrived:
                before = joined.get(index, Piece())
                joined[index] = Piece(before.text + piece.text, before.tokens + piece.tokens, piece.finish_reason)
            for index, piece in joined.items():
                failure = FAILURES.get(piece.finish_reason)
                left -= piece.finish_reason is not None
                yield index, piece._replace(finish_reason=None) if failure else piece
                if failure:
                    raise ApiError(*failure)

    async def finish(self) -> list[str]:
        """Wait for all answers; their finish_reasons."""
        reasons = [""] * len(self.answers)
        async for index, piece in self.pieces():
            reasons[index] = piece.finish_reason or ""
        return reasons


# ---------------------------------------------------------------------------------------------- from HTTP to the engine


def sampling(body: schema.Sampling) -> dict:
    """A request's settings for the engine, without what is particular to chats or completions."""
    stop = [body.stop] if isinstance(body.stop, str) else body.stop or []
    given = {
        "temperature": TEMPERATURE if body.temperature is None else body.temperature,
        "top_p": TOP_P if body.top_p is None else body.top_p,
        "top_k": body.top_k,
        "repetition_penalty": body.repetition_penalty,
        "frequency_penalty": body.frequency_penalty,
        "presence_penalty": body.presence_penalty,
        "stop": stop,
        "eos_token_id": () if body.ignore_eos else None,
    }
    return {name: value for name, value in given.items() if value is not None}


def choices(body: schema.Sampling, **settings) -> list[engine.Request]:
    """`n` requests that differ in their seed."""
    seeds = [None if body.seed is None else body.seed + i for i in range(body.n or 1)]
    return [engine.Request(**settings, **sampling(body), seed=seed) for seed in seeds]


def chat_requests(served: Served, body: ChatRequest) -> list[engine.Request]:
    """What a chat asks of the engine.

    Raises:
        ApiError: its messages cannot be read.
    """
    turns = [
        {"role": "system" if message.role == "developer" else message.role, "content": content_of(served, message)}
        for message in body.messages
    ]
    embeddings = None
    try:
        if any(isinstance(turn["content"], list) for turn in turns):
            prompt, embeddings = served.place_images(turns)
        else:
            prompt, _ = render_chat(served.tokenizer, turns, add_generation_prompt=True)
    except ValueError as error:  # half a character; an image that is none
        raise ApiError(400, str(error), "messages") from error
    return choices(
        body,
        prompt=prompt,
        embeddings=embeddings,
        max_new_tokens=body.max_completion_tokens or body.max_tokens,
        logprobs=(body.top_logprobs or 0) if body.logprobs else None,
    )


def content_of(served: Served, message: schema.Message) -> str | list[str | bytes]:
    """A message's text; with its images, where it has any."""
    if message.content is None or isinstance(message.content, str):
        return message.content or ""
    parts = [part.text if part.type == "text" else image_bytes(served, part.image_url.url) for part in message.content]
    return "".join(parts) if all(isinstance(part, str) for part in parts) else parts


def image_bytes(served: Served, url: str) -> bytes:
    """What an image part refers to.

    Raises:
        ApiError: the model takes no images, or there is none.
    """
    if served.place_images is None:
        raise ApiError(400, "this model reads text only: image parts need a vision-language model", "messages")
    scheme, _, rest = url.partition(":")
    if scheme.lower() == "data":
        header, comma, data = rest.partition(",")
        if not comma or not header.lower().endswith(";base64"):
            raise ApiError(400, "an image's data: URL must be of the form data:image/png;base64,…", "messages")
        try:
            return base64.b64decode(data, validate=True)
        except (binascii.Error, ValueError):
            raise ApiError(400, "the base64 of an image's data: URL is damaged", "messages") from None
    if scheme.lower() not in ("http", "https"):
        raise ApiError(400, "an image_url must be a data: URL", "messages")
    if served.fetch is None:
        raise ApiError(400, "this server fetches no addresses: send the image as a data: URL", "messages")
    return served.fetch(url)


def completion_requests(body: CompletionRequest, prompts: Sequence["CompletionPrompt"]) -> list[engine.Request]:
    """What a completion asks of the engine: for each prompt its choices."""
    settings = {
        "max_new_tokens": COMPLETION_TOKENS if body.max_tokens is None else body.max_tokens,
        "logprobs": body.logprobs,
        "prompt_logprobs": bool(body.echo) and body.logprobs is not None,
    }
    return [request for prompt in prompts for request in choices(body, prompt=prompt.ids, **settings)]


@dataclass
class CompletionPrompt:
    """A completion's prompt.

    Attributes:
        text: to be echoed.
        begun: leading ids that are ours, and no part of it.
    """

    ids: list[int]
    text: str
    begun: int


def completion_prompts(served: Served, body: CompletionRequest) -> list[CompletionPrompt]:
    """A completion's prompts, one or several, from texts or token ids.

    Raises:
        ApiError: a text that cannot be encoded.
    """
    prompt = body.prompt
    several = [prompt] if isinstance(prompt, str) or isinstance(prompt[0], int) else prompt
    if isinstance(several[0], str):
        try:
            rendered = render_text(served.tokenizer, several)
        except ValueError as error:
            raise ApiError(400, str(error), "prompt") from error
        return [CompletionPrompt(ids[:-1], text, 1) for ids, text in zip(rendered, several, strict=True)]
    prompts = []
    for ids in several:
        decoder = StreamDecoder(served.thread.engine.token_bytes)
        prompts.append(CompletionPrompt(ids, "".join(map(decoder.push, ids)) + decoder.flush(), 0))
    return prompts


# ---------------------------------------------------------------------------------------------- from the engine to HTTP


def usage(answers: Sequence[Answer], prompts: Sequence[Sequence[int]]) -> dict:
    """Tokens of an HTTP request; a prompt with several choices counts once."""
    read, written = sum(map(len, prompts)), sum(answer.count for answer in answers)
    first_choices = answers[:: len(answers) // len(prompts)]
    return {
        "prompt_tokens": read,
        "completion_tokens": written,
        "total_tokens": read + written,
        "prompt_tokens_details": {"cached_tokens": sum(answer.reused for answer in first_choices)},
    }


def finite(logprob: float) -> float:
    return max(logprob, LEAST_LOGPROB)


def chat_logprobs(served: Served, tokens: Sequence[Token]) -> dict:
    """The form in which chats give log-probabilities."""

    def entry(token: int, logprob: float) -> dict:
        text, raw = served.spelling(token)
        return {"token": text, "logprob": finite(logprob), "bytes": raw}

    return {
        "content": [
            entry(token.id, token.logprob) | {"top_logprobs": [entry(*alternative) for alternative in token.top]}
            for token in tokens
        ]
    }


def completion_logprobs(served: Served, tokens: Sequence[Token], offset: int) -> dict:
    """The form in which completions give log-probabilities; `offset` is where the first token's text begins."""
    offsets, decoder = [], StreamDecoder(served.thread.engine.token_bytes)
    for token in tokens:
        offsets.append(offset)
        offset += len(decoder.push(token.id))
    return {
        "tokens": [served.spelling(token.id)[0] for token in tokens],
        "token_logprobs": [None if token.logprob is None else finite(token.logprob) for token in tokens],
        "top_logprobs": [
            None if token.logprob is None else {served.spelling(i)[0]: finite(value) for i, value in token.top}
            for token in tokens
        ],
        "text_offset": offsets,
    }


def event(content: dict | str) -> str:
    """A server-sent event."""
    return f"data: {content if isinstance(content, str) else json.dumps(content, ensure_ascii=False)}\n\n"


async def events(writing: Writing, chunks: AsyncIterator[dict]) -> AsyncIterator[str]:
    """Chunks as events; an error in the middle is one too."""
    try:
        async for chunk in chunks:
            yield event(chunk)
        yield event("[DONE]")
    except ApiError as error:
        yield event(error.body())
    finally:
        writing.cancel()


async def chat_chunks(writing: Writing, body: ChatRequest, head: dict) -> AsyncIterator[dict]:
    """A chat's answers chunk by chunk."""
    served = writing.served
    head = head | {"object": "chat.completion.chunk"}
    counted = bool(body.stream_options and body.stream_options.include_usage)
    if counted:
        head |= {"usage": None}
    parts = [ReasoningStream() for _ in writing.answers]

    def chunk(index: int, delta: dict, logprobs: dict | None = None, finish_reason: str | None = None) -> dict:
        choice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish_reason}
        return head | {"choices": [choice]}

    for index in range(len(parts)):
        yield chunk(index, {"role": "assistant", "content": ""})
    async for index, piece in writing.pieces():
        logprobs = chat_logprobs(served, piece.tokens) if body.logprobs and piece.tokens else None
        deltas = [{"content": piece.text}] if piece.text or logprobs else []
        if served.reasoning:
            told = parts[index].push(piece.text) + (parts[index].flush() if piece.finish_reason else [])
            names = {"thinking": "reasoning_content", "answer": "content"}
            deltas = [{names[part]: text} for part, text in told] or ([{"content": ""}] if logprobs else [])
        for delta in deltas:
            yield chunk(index, delta, logprobs)
            logprobs = None
        if piece.finish_reason:
            yield chunk(index, {}, None, piece.finish_reason)
    if counted:
        yield head | {"choices": [], "usage": usage(writing.answers, [writing.answers[0].request.prompt])}


async def whole_chat(writing: Writing, body: ChatRequest, head: dict) -> dict:
    """A chat's answers at once."""
    served, reasons = writing.served, await writing.finish()
    said = []
    for index, (answer, reason) in enumerate(zip(writing.answers, reasons, strict=True)):
        message = {"role": "assistant", "content": answer.text}
        if served.reasoning:
            thinking, text = split_reasoning(answer.text)
            message |= {"content": text, "reasoning_content": thinking}
        logprobs = chat_logprobs(served, answer.tokens) if body.logprobs else None
        said.append({"index": index, "message": message, "logprobs": logprobs, "finish_reason": reason})
    counted = usage(writing.answers, [writing.answers[0].request.prompt])
    return head | {"object": "chat.completion", "choices": said, "usage": counted}


class CompletionText:
    """The text and log-probabilities of completions, piece by piece, with their prompts where they are echoed."""

    def __init__(self, writing: Writing, body: CompletionRequest, prompts: list[CompletionPrompt]):
        self.writing, self.body = writing, body
        each = len(writing.answers) // len(prompts)
        self.prompts = [prompt for prompt in prompts for _ in range(each)]
        self._offsets = [0] * len(self.prompts)
        self._echoed = [False] * len(self.prompts)

    def add(self, index: int, text: str, tokens: Sequence[Token], last: bool) -> tuple[str, dict | None]:
        """What is next: text, and the log-probabilities of its tokens; with the last of it, of the end token too."""
        answer, prompt = self.writing.answers[index], self.prompts[index]
        if self.body.echo and not self._echoed[index]:
            self._echoed[index] = True
            text = prompt.text + text
            tokens = [*answer.prompt_tokens[prompt.begun :], *tokens]
        offset = self._offsets[index]
        self._offsets[index] += len(text)
        if self.body.logprobs is None:
            return text, None
        if last and answer.end_token:  # evaluation tools count on max_tokens tokens behind the prompt's, or an end
            tokens = [*tokens, answer.end_token]
        return text, completion_logprobs(self.writing.served, tokens, offset)


async def completion_chunks(writing, body: CompletionRequest, head: dict, prompts) -> AsyncIterator[dict]:
    """Completions chunk by chunk."""
    counted = bool(body.stream_options and body.stream_options.include_usage)
    if counted:
        head = head | {"usage": None}
    texts = CompletionText(writing, body, prompts)
    async for index, piece in writing.pieces():
        text, logprobs = texts.add(index, piece.text, piece.tokens, piece.finish_reason is not None)
        if text or (logprobs and logprobs["tokens"]) or piece.finish_reason:
            choice = {"index": index, "text": text, "logprobs": logprobs, "finish_reason": piece.finish_reason}
            yield head | {"choices": [choice]}
    if counted:
        yield head | {"choices": [], "usage": usage(writing.answers, [prompt.ids for prompt in prompts])}


async def whole_completion(writing, body: CompletionRequest, head: dict, prompts) -> dict:
    """Completions at once."""
    reasons = await writing.finish()
    texts, written = CompletionText(writing, body, prompts), []
    for index, (answer, reason) in enumerate(zip(writing.answers, reasons, strict=True)):
        text, logprobs = texts.add(index, answer.text, answer.tokens, last=True)
        written.append({"index": index, "text": text, "logprobs": logprobs, "finish_reason": reason})
    return head | {"choices": written, "usage": usage(writing.answers, [prompt.ids for prompt in prompts])}


# ------------------------------------------------------------------------------------------------------------- the app


class LimitedBody:
    """Middleware that refuses bodies of more than `largest` bytes."""

    def __init__(self, app, largest: int):
        self.app, self.largest = app, largest

    async def __call__(self, scope, receive, send) -> None:
        refusal = ApiError(413, f"the body is larger than {self.largest >> 20} MiB")
        received = 0

        async def counted():
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            if received > self.largest:
                raise refusal
            return message

        declared = dict(scope.get("headers", ())).get(b"content-length", b"0")
        if scope["type"] == "http" and int(declared) > self.largest:
            await JSONResponse(refusal.body(), 413)(scope, receive, send)
        else:
            await self.app(scope, counted, send)


def make_app(served: Served, api_key: str | None = None, origins: Sequence[str] = ()) -> FastAPI:
    """The app.

    Args:
        api_key: what callers must send as a bearer token; None = nothing.
        origins: web pages that browsers may call from; "*" = all.
    """
    app = FastAPI(title="MiniMind", version="1", description=__doc__)
    app.add_middleware(LimitedBody, largest=LARGEST_BODY)
    if origins:
        app.add_middleware(CORSMiddleware, allow_origins=origins, allow_methods=["*"], allow_headers=["*"])

    def known(
        credentials: Annotated[HTTPAuthorizationCredentials | None, Depends(HTTPBearer(auto_error=False))],
    ) -> None:
        given = credentials.credentials if credentials else ""
        if api_key and not secrets.compare_digest(given.encode(), api_key.encode()):
            raise ApiError(
                401, "the API key is missing or wrong", code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"}
            )

    def check_name(name: str | None) -> None:
        if name not in (None, NAME):
            raise ApiError(404, f"the model {name!r} is not here; there is {NAME!r}", "model", "model_not_found")

    def answer_of_error(_: Request, error: Exception) -> JSONResponse:
        if not isinstance(error, HTTPException | RequestValidationError):
            error = ApiError(500, "an error inside the server; its log says which", code="internal")
        error = schema.api_error(error)
        return JSONResponse(error.body(), error.status_code, error.headers)

    for kind in (HTTPException, RequestValidationError, Exception):
        app.add_exception_handler(kind, answer_of_error)

    errors = {"4XX": {"model": schema.ErrorBody}, "5XX": {"model": schema.ErrorBody}}

    def documented(model: type, streams: bool = False) -> dict:
        content = {"text/event-stream": {"schema": {"type": "string"}}} if streams else {}
        return {"responses": errors | {200: {"model": model, "content": content}}, "response_model": None}

    def head(kind: str) -> dict:
        facts = {"object": "text_completion", "created": int(time.time()), "model": NAME}
        return {"id": f"{kind}-{uuid.uuid4().hex}"} | facts

    @app.post("/v1/chat/completions", dependencies=[Depends(known)], **documented(schema.ChatCompletion, streams=True))
    async def chat_completions(body: ChatRequest, http: Request):
        check_name(body.model)
        requests = await asyncio.to_thread(chat_requests, served, body)
        writing, first = Writing(served, requests, http, "messages"), head("chatcmpl")
        if body.stream:
            chunks = chat_chunks(writing, body, first)
            return StreamingResponse(events(writing, chunks), media_type="text/event-stream")
        return JSONResponse(await whole_chat(writing, body, first))

    @app.post("/v1/completions", dependencies=[Depends(known)], **documented(schema.Completion, streams=True))
    async def completions(body: CompletionRequest, http: Request):
        check_name(body.model)
        prompts = await asyncio.to_thread(completion_prompts, served, body)
        requests = completion_requests(body, prompts)
        writing, first = Writing(served, requests, http, "prompt"), head("cmpl")
        if body.stream:
            chunks = completion_chunks(writing, body, first, prompts)
            return StreamingResponse(events(writing, chunks), media_type="text/event-stream")
        return JSONResponse(await whole_completion(writing, body, first, prompts))

    @app.get("/v1/models", dependencies=[Depends(known)], **documented(schema.ModelList))
    async def models():
        return {"object": "list", "data": [await model(NAME)]}

    @app.get("/v1/models/{name}", dependencies=[Depends(known)], **documented(schema.Model))
    async def model(name: str):
        check_name(name)
        return {"id": NAME, "object": "model", "created": served.created, "owned_by": NAME}

    @app.get("/health", **documented(schema.Health))
    async def health():
        if served.draining:
            raise ApiError(503, "the server is shutting down", code="shutting_down")
        if served.thread.broken:
            raise ApiError(503, "the device computes no more: start the server anew", code="broken")
        engine = served.thread.engine
        return {"status": "ok", "running": engine.running, "waiting": len(served.unfinished) - engine.running}

    return app
