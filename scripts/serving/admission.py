"""Admission of a request to the OpenAI API: reading and parsing its body, and reserving places for its answers.

Everything is checked before it costs anything: the key and a shut-down before the body is read, the body's size while
it arrives, its form in a thread beside the event loop, and a place in the queue before anything is computed.
"""

import asyncio
import contextlib
import json
import time
from collections import deque
from collections.abc import Iterator
from typing import TypeVar

from fastapi import Request
from pydantic import ValidationError
from starlette.requests import ClientDisconnect

from scripts.serving.forms import Form
from scripts.serving.schema import ApiError, invalid
from scripts.serving.unsupported import refuse_undone

LARGEST_BODY = 32 * 2**20  # bytes; room for a few photographs
MOST_VALUES = 2**20  # in a body; each takes 64 bytes once it is parsed, which nothing can interrupt

Body = TypeVar("Body", bound=Form)


class Places:
    """The places for answers. Use it only in the event loop's thread.

    Args:
        capacity: the maximum number of running and queued answers.

    Attributes:
        taken: places of answers that are running, queued or being prepared.
        draining: admitted answers are finished, new ones are refused.
        closed: no answer is finished any more.
    """

    def __init__(self, capacity: int):
        self.capacity = capacity
        self.taken = 0
        self.draining = False
        self.closed = False
        self._ends: deque[float] = deque(maxlen=64)  # when answers ended lately

    def check_open(self) -> None:
        """Refuse new requests while the server shuts down.

        Raises:
            ApiError: it is shutting down.
        """
        if self.draining:
            raise ApiError(503, "the server is shutting down", code="shutting_down", headers={"Retry-After": "5"})

    @contextlib.contextmanager
    def taking(self, count: int) -> Iterator[None]:
        """Take places for this many answers; they are freed at once if the block fails, else when each answer ends.

        Raises:
            ApiError: there are not enough places.
        """
        self.check_open()
        if count > self.capacity:
            raise ApiError(400, f"{count} answers at once: this server can take {self.capacity}", "n")
        if self.taken + count > self.capacity:
            raise ApiError(
                429,
                f"the server is full, {self.taken} of {self.capacity} answers running or queued: try again later",
                code="queue_full",
                headers={"Retry-After": self._retry_after()},
            )
        self.taken += count
        try:
            yield
        except BaseException:
            self.taken -= count
            raise

    def end(self) -> None:
        """Free the place of an answer that has ended."""
        self.taken -= 1
        self._ends.append(time.monotonic())

    def _retry_after(self) -> str:
        """Whole seconds until a place in the queue is likely to be free, by the rate at which answers ended lately."""
        each = (time.monotonic() - self._ends[0]) / len(self._ends) if self._ends else 1
        return str(min(60, max(1, round(each))))


async def read_request(http: Request, kind: type[Body]) -> Body:
    """A request's parsed body.

    Raises:
        ApiError: it is too large, not JSON, not of this kind, or asks for something unsupported.
    """
    media_type = http.headers.get("content-type", "").partition(";")[0].strip().lower()
    if media_type.rpartition("/")[2].rpartition("+")[2] != "json":  # a web page may send others without being asked
        raise ApiError(400, "the body must be a JSON object, with Content-Type: application/json")
    return await asyncio.to_thread(parse, kind, await read_body(http))


async def read_body(http: Request) -> bytearray:
    """A body's bytes.

    Raises:
        ApiError: it is too large, as soon as that is known; or the client disconnected.
    """
    too_large = ApiError(413, f"the body is larger than {LARGEST_BODY >> 20} MiB")
    declared = http.headers.get("content-length", "")
    if declared.isdecimal() and int(declared) > LARGEST_BODY:
        raise too_large
    data = bytearray()
    try:
        async for piece in http.stream():
            data += piece
            if len(data) > LARGEST_BODY:
                raise too_large
    except ClientDisconnect:
        raise ApiError(400, "the client disconnected before sending the whole body") from None
    return data


def parse(kind: type[Body], data: bytes | bytearray) -> Body:
    """Parse a body.

    Raises:
        ApiError: it is not JSON, not of this kind, or asks for something unsupported.
    """
    if sum(map(data.count, (b",", b"[", b"{"))) > MOST_VALUES:
        raise ApiError(413, f"the body holds more than {MOST_VALUES} values")
    try:
        content = json.loads(data)
    except json.JSONDecodeError as error:
        raise ApiError(400, f"the body is not JSON: {error.msg} at character {error.pos}") from None
    except RecursionError:
        raise ApiError(400, "the body is not valid JSON: nested too deeply") from None
    except ValueError as error:  # not UTF-8; a number of thousands of digits
        raise ApiError(400, f"the body is not JSON: {error!s:.200}") from None
    if isinstance(content, dict):
        refuse_undone(content, kind)
    try:
        return kind.model_validate(content)
    except ValidationError as error:
        raise invalid(error) from None
