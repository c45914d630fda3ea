"""The bytes of a chat's images, from the URLs in its image parts: every form of base64 that clients send."""

import base64
import binascii
import re
from collections.abc import Callable, Sequence
from urllib.parse import unquote

from model.tool_calls import in_call_order, parse_arguments
from scripts.serving.schema import MOST_IMAGES, ApiError, Message

SHORTEST = 32  # characters; a shorter text may be a path or a name, but not an image
TODAYS_ROLES = {"developer": "system", "function": "tool"}
URL_SAFE = str.maketrans("-_", "+/")
Fetch = Callable[[Sequence[str]], list[bytes]]


def read_turns(messages: Sequence[Message], sees: bool, fetch: Fetch | None) -> list[dict]:
    """A chat's messages as turns whose content is a text or, with images, a list of texts and image bytes.

    Tool results are sorted in the order of the calls.

    Args:
        sees: whether the model takes images.
        fetch: fetches the content of http(s) URLs; None if fetching is off.

    Raises:
        ApiError: a missing image, too many, or a model that takes none; a result without a call.
    """
    urls = [part.image_url.url for message in messages for part in _parts(message) if part.type == "image_url"]
    if urls and not sees:
        raise ApiError(400, "this model reads text only: image parts need a vision-language model", "messages")
    if len(urls) > MOST_IMAGES:
        raise ApiError(400, f"{len(urls)} images: this server takes {MOST_IMAGES} per request", "messages")
    images = iter(read_images(urls, fetch))
    turns = [
        {
            "role": TODAYS_ROLES.get(message.role, message.role),
            "content": _content([part.text if part.type == "text" else next(images) for part in _parts(message)])
            if isinstance(message.content, list)
            else message.content or "",
        }
        | _calls(message)
        for message in messages
    ]
    try:
        return in_call_order(turns)
    except ValueError as error:
        number, why = str(error).split(": ", 1)
        raise ApiError(400, f"messages[{int(number) - 1}]: {why}", f"messages[{int(number) - 1}]") from None


def _calls(message: Message) -> dict:
    """A message's calls, or the id of the call whose result it is, as entries of its turn."""
    found: dict = {} if message.tool_call_id is None else {"tool_call_id": message.tool_call_id}
    calls = [(call.id, call.function) for call in message.tool_calls or ()]
    calls += [(None, message.function_call)] if message.function_call else []
    for call_id, function in calls:
        arguments = parse_arguments(function.arguments)
        if arguments is None:  # as the model wrote it, perhaps: it is text like any other
            arguments = function.arguments
        found.setdefault("tool_calls", []).append({"id": call_id, "name": function.name, "arguments": arguments})
    return found


def _parts(message: Message) -> list:
    return message.content if isinstance(message.content, list) else []


def _content(parts: list[str | bytes]) -> str | list[str | bytes]:
    return "".join(parts) if all(isinstance(part, str) for part in parts) else parts


def read_images(urls: Sequence[str], fetch: Fetch | None) -> list[bytes]:
    """The bytes of images, in the order of their URLs. Nothing is fetched unless all others can be decoded.

    Raises:
        ApiError: one of them is not an image's URL, or cannot be fetched.
    """
    images = {place: read_base64(url) for place, url in enumerate(urls) if not _is_remote(url)}
    remote = [place for place in range(len(urls)) if place not in images]
    if remote and fetch is None:
        raise ApiError(400, "this server does not fetch URLs: send the image as a data: URL", "messages")
    if remote:
        images |= zip(remote, fetch([urls[place].strip() for place in remote]), strict=True)
    return [images[place] for place in range(len(urls))]


def _is_remote(url: str) -> bool:
    return url.lstrip()[:8].lower().startswith(("http:", "https:"))


def read_base64(url: str) -> bytes:
    """The bytes of a data: URL, or of bare base64.

    Both base64 alphabets are accepted, with or without padding, with white space, and percent-encoded.

    Raises:
        ApiError: it is neither, or damaged.
    """
    given = url.strip()
    if given[:5].lower() == "data:":
        header, comma, data = given.partition(",")
        if not comma or "base64" not in [word.strip().lower() for word in header.split(";")[1:]]:
            raise ApiError(400, "an image's data: URL must have the form data:image/png;base64,…", "messages")
    elif re.fullmatch(r"[\w+/%=\s-]*", given[: 2 * SHORTEST], re.ASCII) and len(given) >= SHORTEST:
        data = given
    else:
        raise ApiError(400, "an image_url must be a data: URL", "messages")
    data = "".join(unquote(data).split()).rstrip("=").translate(URL_SAFE)
    try:
        return base64.b64decode(data + "=" * (-len(data) % 4), validate=True)
    except (binascii.Error, ValueError):
        raise ApiError(400, "an image's base64 data is invalid", "messages") from None
