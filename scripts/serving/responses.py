"""The engine's answers in the form of the OpenAI API: chats and completions, in chunks and whole."""

import json
import uuid
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass

from model.inference.answer import Answer
from model.inference.request import Token
from model.reasoning import THOUGHT_BEGUN, ReasoningStream, split_reasoning
from model.tokenizer import StreamDecoder
from model.tool_calls import Call, CallStream, as_json, split_calls
from scripts.serving.constraining import listed_functions, one_call
from scripts.serving.requests import RunningRequest, ServerState
from scripts.serving.schema import ApiError, ChatRequest, CompletionRequest

LEAST_LOGPROB = -9999.0  # JSON has no minus infinity
PIECE_CHARS = 64  # of a call's arguments in a chunk


@dataclass
class CompletionPrompt:
    """A completion's prompt.

    Attributes:
        text: the text to be echoed.
        begun: the number of leading ids that were added here, and are not part of it.
    """

    ids: list[int]
    text: str
    begun: int


def usage(answers: Sequence[Answer], prompts: Sequence[Sequence[int]]) -> dict:
    """The token counts of an HTTP request; a prompt with several choices counts once."""
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


def chat_logprobs(server: ServerState, tokens: Sequence[Token]) -> dict:
    """Log-probabilities in the format of chats."""

    def entry(token: int, logprob: float) -> dict:
        text, raw = server.spelling(token)
        return {"token": text, "logprob": finite(logprob), "bytes": raw}

    return {
        "content": [
            entry(token.id, token.logprob) | {"top_logprobs": [entry(*alternative) for alternative in token.top]}
            for token in tokens
        ]
    }


def completion_logprobs(server: ServerState, tokens: Sequence[Token], offset: int) -> dict:
    """Log-probabilities in the format of completions; `offset` is the position of the first token's text."""
    offsets, decoder = [], StreamDecoder(server.thread.engine.token_bytes)
    for token in tokens:
        offsets.append(offset)
        offset += len(decoder.push(token.id))
    return {
        "tokens": [server.spelling(token.id)[0] for token in tokens],
        "token_logprobs": [None if token.logprob is None else finite(token.logprob) for token in tokens],
        "top_logprobs": [
            None if token.logprob is None else {server.spelling(i)[0]: finite(value) for i, value in token.top}
            for token in tokens
        ],
        "text_offset": offsets,
    }


def event(content: dict | str) -> str:
    """A server-sent event."""
    return f"data: {content if isinstance(content, str) else json.dumps(content, ensure_ascii=False)}\n\n"


async def events(writing: RunningRequest, chunks: AsyncIterator[dict]) -> AsyncIterator[str]:
    """Chunks as events; an error while streaming becomes an event, too."""
    try:
        async for chunk in chunks:
            yield event(chunk)
        yield event("[DONE]")
    except ApiError as error:
        yield event(error.body())
    finally:
        writing.cancel()


def opens_thought(body: ChatRequest) -> bool:
    """Whether a chat's prompt ends with the beginning of a thought."""
    return bool(body.chat_template_kwargs and body.chat_template_kwargs.open_thinking)


def answered_call(call: Call) -> dict:
    """A call in the form of OpenAI's API, with a new id."""
    function = {"name": call["name"], "arguments": as_json(call["arguments"])}
    return {"id": f"call_{uuid.uuid4().hex}", "type": "function", "function": function}


class ChatParts:
    """One answer of a chat, split into thoughts, texts and calls as its pieces come.

    Attributes:
        calls: the number of calls so far.
    """

    def __init__(self, reasoning: bool, body: ChatRequest):
        self._thoughts = ReasoningStream() if reasoning or opens_thought(body) else None
        if opens_thought(body):
            self._thoughts.push(THOUGHT_BEGUN)
        self._calls = CallStream() if listed_functions(body) else None
        self._one, self._older = one_call(body), bool(body.functions)
        self.calls = 0

    def deltas(self, text: str, last: bool) -> list[dict]:
        """The deltas that can be sent now."""
        told = [("answer", text)] if text else []
        if self._thoughts:
            told = self._thoughts.push(text) + (self._thoughts.flush() if last else [])
        deltas = []
        for part, said in told:
            deltas += [{"reasoning_content": said}] if part == "thinking" else self._of_answer(self._clear(said))
        return deltas + self._of_answer(self._calls.flush() if last and self._calls else [])

    def _clear(self, text: str) -> list[str | Call]:
        return self._calls.push(text) if self._calls else [text]

    def _of_answer(self, parts: list) -> list[dict]:
        deltas = []
        for part in parts:
            if isinstance(part, str):
                deltas.append({"content": part})
                continue
            if self.calls and self._one:
                continue
            whole = answered_call(part) | {"index": self.calls}
            arguments = whole["function"]["arguments"]
            pieces = [arguments[i : i + PIECE_CHARS] for i in range(0, len(arguments), PIECE_CHARS)]
            begun = whole["function"] | {"arguments": ""}
            if self._older:
                deltas += [{"function_call": each} for each in (begun, *({"arguments": piece} for piece in pieces))]
            else:
                deltas.append({"tool_calls": [whole | {"function": begun}]})
                deltas += [
                    {"tool_calls": [{"index": self.calls, "function": {"arguments": piece}}]} for piece in pieces
                ]
            self.calls += 1
        return deltas


async def chat_chunks(writing: RunningRequest, body: ChatRequest, head: dict) -> AsyncIterator[dict]:
    """A chat's answers as chunks."""
    server = writing.server
    head = head | {"object": "chat.completion.chunk"}
    counted = bool(body.stream_options and body.stream_options.include_usage)
    if counted:
        head |= {"usage": None}
    parts = [ChatParts(server.reasoning, body) for _ in writing.answers]

    def chunk(index: int, delta: dict, logprobs: dict | None = None, finish_reason: str | None = None) -> dict:
        choice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish_reason}
        return head | {"choices": [choice]}

    for index in range(len(parts)):
        yield chunk(index, {"role": "assistant", "content": ""})
    async for index, piece in writing.pieces():
        logprobs = chat_logprobs(server, piece.tokens) if body.logprobs and piece.tokens else None
        deltas = parts[index].deltas(piece.text, last=bool(piece.finish_reason))
        for delta in deltas or ([{"content": ""}] if logprobs else []):
            yield chunk(index, delta, logprobs)
            logprobs = None
        if piece.finish_reason:
            yield chunk(index, {}, None, reason_of(piece.finish_reason, parts[index].calls, body))
    if counted:
        yield head | {"choices": [], "usage": usage(writing.answers, [writing.answers[0].request.prompt])}


def reason_of(finish_reason: str, calls: int, body: ChatRequest) -> str:
    """An answer's finish_reason in the form that tool clients expect; a truncated answer still says so."""
    called = "function_call" if body.functions else "tool_calls"
    return called if calls and finish_reason == "stop" else finish_reason


async def whole_chat(writing: RunningRequest, body: ChatRequest, head: dict) -> dict:
    """A chat's whole answers."""
    server, reasons = writing.server, await writing.finish()
    said = []
    for index, (answer, reason) in enumerate(zip(writing.answers, reasons, strict=True)):
        message = {"role": "assistant", "content": answer.text}
        if server.reasoning or opens_thought(body):
            thinking, text = split_reasoning((THOUGHT_BEGUN if opens_thought(body) else "") + answer.text)
            message |= {"content": text, "reasoning_content": thinking}
        calls: list[Call] = []
        if listed_functions(body):
            message["content"], calls = split_calls(message["content"])
            calls = calls[:1] if one_call(body) else calls
        if calls:
            answered = [answered_call(call) for call in calls]
            said_so = {"function_call": answered[0]["function"]} if body.functions else {"tool_calls": answered}
            message |= {"content": message["content"] or None, **said_so}
        reason = reason_of(reason, len(calls), body)
        logprobs = chat_logprobs(server, answer.tokens) if body.logprobs else None
        said.append({"index": index, "message": message, "logprobs": logprobs, "finish_reason": reason})
    counted = usage(writing.answers, [writing.answers[0].request.prompt])
    return head | {"object": "chat.completion", "choices": said, "usage": counted}


class CompletionText:
    """The text and log-probabilities of completions, piece by piece, with echoed prompts."""

    def __init__(self, writing: RunningRequest, body: CompletionRequest, prompts: list[CompletionPrompt]):
        self.writing, self.body = writing, body
        each = len(writing.answers) // len(prompts)
        self.prompts = [prompt for prompt in prompts for _ in range(each)]
        self._offsets = [0] * len(self.prompts)
        self._echoed = [False] * len(self.prompts)

    def add(self, index: int, text: str, tokens: Sequence[Token], last: bool) -> tuple[str, dict | None]:
        """The next text and the log-probabilities of its tokens; with the last text, also that of the end token."""
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
        return text, completion_logprobs(self.writing.server, tokens, offset)


async def completion_chunks(writing, body: CompletionRequest, head: dict, prompts) -> AsyncIterator[dict]:
    """Completions as chunks."""
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
    """Whole completions."""
    reasons = await writing.finish()
    texts, written = CompletionText(writing, body, prompts), []
    for index, (answer, reason) in enumerate(zip(writing.answers, reasons, strict=True)):
        text, logprobs = texts.add(index, answer.text, answer.tokens, last=True)
        written.append({"index": index, "text": text, "logprobs": logprobs, "finish_reason": reason})
    return head | {"choices": written, "usage": usage(writing.answers, [prompt.ids for prompt in prompts])}
