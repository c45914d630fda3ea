"""Shared by the clients of OpenAI-compatible servers."""

import contextlib
import ipaddress
import os
import urllib.request
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlsplit

from trainer.errors import UserError


def check_address(base_url: str, api_key: str) -> None:
    """Refuse an address or key that no client could send.

    Raises:
        UserError: not an http(s) address, or a key that is invalid in a header.
    """
    try:
        parts = urlsplit(base_url)
        right = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        right = False
    if not right:
        raise UserError(f"{base_url!r} is not an API base URL, such as http://127.0.0.1:8998/v1")
    check_key(api_key)


def check_key(api_key: str, what: str = "the API key") -> None:
    """Refuse a key that no header can hold: no client could send it, and no server be asked with it.

    Raises:
        UserError: it is not printable ASCII, or has spaces around it, which a header loses.
    """
    if not (api_key.isascii() and api_key.isprintable()) or api_key != api_key.strip():
        raise UserError(f"{what} must be printable ASCII without spaces around it: an HTTP header holds nothing else")


def is_this_machine(host: str) -> bool:
    """Whether a name or address is this machine's, for which no proxy is used."""
    if host == "localhost" or host.endswith(".localhost"):
        return True
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return False
    return address.is_loopback or address.is_unspecified


def proxy_variable(base_url: str) -> str | None:
    """The environment variable with the proxy for an address; None if it is contacted directly."""
    parts = urlsplit(base_url)
    if is_this_machine(parts.hostname) or urllib.request.proxy_bypass_environment(parts.netloc.rpartition("@")[2]):
        return None
    names = [name for kind in (parts.scheme, "all") for name in (f"{kind}_proxy", f"{kind.upper()}_PROXY")]
    return next((name for name in names if os.environ.get(name)), None)


def of_environment(*names: str) -> str:
    """Those of these environment variables that are set, in words for a message."""
    there = ", ".join(name for name in os.environ if name.lower() in names)
    return f"{there or 'the settings'} in the environment"


def certificates_error(error: OSError) -> UserError:
    """The error to raise if the certificates named by the environment cannot be read."""
    return UserError(f"{of_environment('ssl_cert_file', 'ssl_cert_dir')}: {error}; fix or unset it")


def open_client(base_url: str, api_key: str, asynchronous: bool = False, **settings):
    """An `openai.OpenAI` or `openai.AsyncOpenAI`; it uses the environment's proxies, but not for this machine.

    Args:
        settings: settings of the client, such as `timeout`.

    Raises:
        UserError: an invalid address or key, or the environment names a proxy or certificates that the client cannot
            use.
    """
    import openai

    check_address(base_url, api_key)
    client = openai.AsyncOpenAI if asynchronous else openai.OpenAI
    transport = openai.DefaultAsyncHttpxClient if asynchronous else openai.DefaultHttpxClient
    direct = is_this_machine(urlsplit(base_url).hostname)
    try:
        http_client = transport(trust_env=not direct)
    except OSError as error:
        raise certificates_error(error) from None
    except Exception as error:  # a proxy of a kind that it does not know, or has no package for, or no address at all
        names = of_environment("http_proxy", "https_proxy", "all_proxy")
        raise UserError(f"{names}: {error}; unset it, or give it an http:// address") from None
    return client(base_url=base_url, api_key=api_key, http_client=http_client, **settings)


def explain_failure(error: Exception, base_url: str) -> str:
    """An `openai.APIError` in words: the message, the cause, and the proxy in use."""
    text = f"{error} ({error.__cause__})" if str(error.__cause__ or "") else str(error)
    through = proxy_variable(base_url)
    return f"{text}, through the proxy in {through}" if through else text


def models_at(client) -> list[str]:
    """The names of the models that an `openai.OpenAI` finds at its address.

    Raises:
        UserError: nothing answers there, it refuses the request, or it is not such an API.
    """
    import openai

    address = str(client.base_url).rstrip("/")
    try:
        return [model.id for model in client.models.list()]
    except openai.APIConnectionError as error:
        why = f" ({error.__cause__})" if error.__cause__ else ""
        if through := proxy_variable(address):
            host = urlsplit(address).hostname
            raise UserError(
                f"{address} does not answer through the proxy of {through}{why}: "
                f"fix or unset {through}, or add {host} to NO_PROXY"
            ) from None
        raise UserError(
            f"nothing answers at {address}{why}: start scripts/serve_openai_api.py, or give another address"
        ) from None
    except openai.APIStatusError as error:
        through = f" (through the proxy of {name})" if (name := proxy_variable(address)) else ""
        raise UserError(f"{address} says {error.status_code}{through}: {error.message}") from None
    except (openai.APIError, AttributeError, TypeError, ValueError):  # it reads whatever came as if it were a list
        raise UserError(f"{address} answers, but not as an OpenAI API: does it end in /v1?") from None


def answer_parts(
    client, model: str, messages: list[dict], stream: bool = True, calls: list[dict] | None = None, **sampling
) -> Iterator[tuple[str, str]]:
    """Yield ("thinking" | "answer", text) as the server sends it; closing the iterator makes the server stop.

    Args:
        client: an `openai.OpenAI`.
        messages: the chat so far, ending with a question.
        calls: a list to which the answer's tool calls are added, as in a message.
        sampling: `temperature`, `max_tokens`, `tools` and the like; None leaves a setting to the server.

    Raises:
        openai.APIError: the server's error, or that it does not respond.
        UserError: its response is not an answer.
    """
    sampling = {name: value for name, value in sampling.items() if value is not None}
    reply: Any = client.chat.completions.create(model=model, messages=messages, stream=stream, **sampling)
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
                if calls is not None:
                    _gather(getattr(said, "tool_calls", None) or (), calls)
    if nothing:
        raise UserError("the server sent no answer: does its address end in /v1?")


def _gather(parts, calls: list[dict]) -> None:
    """Add the tool calls of a chunk or message; later parts of a call continue its arguments."""
    for part in parts:
        place = getattr(part, "index", None)
        if place is None or place >= len(calls):
            call = {"id": part.id, "type": "function", "function": {"name": part.function.name, "arguments": ""}}
            calls.append(call)
        else:
            call = calls[place]
        call["function"]["arguments"] += part.function.arguments or ""
