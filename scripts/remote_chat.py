"""Asking an OpenAI-compatible server: what its clients here have in common."""

import contextlib
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlsplit

from trainer.errors import UserError


def check_address(base_url: str, api_key: str) -> None:
    """Refuse what no client could send.

    Raises:
        UserError: no http(s) address, or a key that no header can hold.
    """
    try:
        parts = urlsplit(base_url)
        right = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        right = False
    if not right:
        raise UserError(f"{base_url!r} is no address of an API, such as http://127.0.0.1:8998/v1")
    if not api_key.isascii():
        raise UserError("the API key has other characters than ASCII, which no key has")


def models_at(client) -> list[str]:
    """The names of the models that an `openai.OpenAI` finds at its address.

    Raises:
        UserError: nothing answers there, it refuses, or it is no such API.
    """
    import openai

    address = str(client.base_url).rstrip("/")
    try:
        return [model.id for model in client.models.list()]
    except openai.APIConnectionError as error:
        why = f" ({error.__cause__})" if error.__cause__ else ""
        raise UserError(
            f"nothing answers at {address}{why}: start scripts/serve_openai_api.py, or name another address"
        ) from None
    except openai.APIStatusError as error:
        raise UserError(f"{address} says {error.status_code}: {error.message}") from None
    except (openai.APIError, AttributeError, TypeError, ValueError):  # it reads whatever came as if it were a list
        raise UserError(f"{address} answers, but not as an OpenAI API: does it end in /v1?") from None


def answer_parts(client, model: str, messages: list[dict], stream: bool = True, **wishes) -> Iterator[tuple[str, str]]:
    """Yield ("thinking" | "answer", text) as the server sends it; closing the iterator tells the server to stop.

    Args:
        client: an `openai.OpenAI`.
        messages: the talk so far, a question last.
        wishes: `temperature`, `max_tokens` and the like; those that are None are left to the server.

    Raises:
        openai.APIError: whatever the server says, or that it does not answer.
        UserError: what it says is no answer.
    """
    wishes = {name: value for name, value in wishes.items() if value is not None}
    reply: Any = client.chat.completions.create(model=model, messages=messages, stream=stream, **wishes)
    nothing = True
    with reply if stream else contextlib.nullcontext():
        for chunk in reply if stream else [reply]:
            for choice in getattr(chunk, "choices", None) or ():
                nothing = False
                said = choice.delta if stream else choice.message
                if thinking := getattr(said, "reasoning_content", None):
                    yield "thinking", thinking
                if said.content:
                    yield "answer", said.content
    if nothing:
        raise UserError("the server sent no answer: does its address end in /v1?")
