"""Asking an OpenAI-compatible server: what the terminal client and the pages have in common."""

import contextlib
from collections.abc import Iterator
from typing import Any


def answer_parts(client, model: str, messages: list[dict], stream: bool = True, **wishes) -> Iterator[tuple[str, str]]:
    """Yield ("thinking" | "answer", text) as the server sends it; closing the iterator tells the server to stop.

    Args:
        client: an `openai.OpenAI`.
        messages: the talk so far, a question last.
        wishes: `temperature`, `max_tokens` and the like; those that are None are left to the server.

    Raises:
        openai.APIError: whatever the server says, or that it does not answer.
    """
    wishes = {name: value for name, value in wishes.items() if value is not None}
    reply: Any = client.chat.completions.create(model=model, messages=messages, stream=stream, **wishes)
    with reply if stream else contextlib.nullcontext():
        for chunk in reply if stream else [reply]:
            for choice in chunk.choices:
                said = choice.delta if stream else choice.message
                if thinking := getattr(said, "reasoning_content", None):
                    yield "thinking", thinking
                if said.content:
                    yield "answer", said.content
