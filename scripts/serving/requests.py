"""The answers to one request to the OpenAI API while the engine generates them."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property, partial

from fastapi import Request
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from model.inference import scheduler as engine
from model.inference.answer import Answer
from model.inference.request import Piece
from model.inference.thread import EngineThread
from scripts.serving.admission import Places
from scripts.serving.image_parts import Fetch
from scripts.serving.schema import ApiError

FAILURES = {  # status, message, param, code of answers that did not come to their end
    "error": (500, "the engine failed on this answer; see the server's log", None, "failed"),
    "cancelled": (503, "the server shut down before the answer was complete", None, "shutting_down"),
}


@dataclass
class ServerState:
    """The model that is served, and its load.

    Args:
        place_images: from turns whose content is a text, or a list of texts and image bytes, to token ids and the
            prompt's embeddings; None if the model takes no images.
        fetch: fetches the content of http(s) URLs; None if fetching is off.
        reasoning: whether the model separates thinking from answer.
        capacity: the maximum number of running and queued answers.

    Attributes:
        places: their places.
        looking: the thread that reads and encodes images, one request at a time, because each takes memory.
    """

    thread: EngineThread
    tokenizer: PreTrainedTokenizerFast
    place_images: Callable[[list[dict]], tuple[list[int], Tensor | None]] | None = None
    fetch: Fetch | None = None
    reasoning: bool = False
    capacity: int = 80
    places: Places = field(init=False)
    looking: ThreadPoolExecutor = field(init=False, default_factory=lambda: ThreadPoolExecutor(1, "images"))
    unfinished: set[Answer] = field(init=False, default_factory=set)
    created: int = field(init=False, default_factory=lambda: int(time.time()))

    def __post_init__(self):
        self.places = Places(self.capacity)

    @cached_property
    def grammars(self):
        """Makes the constraints for answers of a given form; see `scripts.serving.grammars`."""
        from scripts.serving.grammars import Grammars  # here, as few requests ask for it

        return Grammars(self.tokenizer)

    @property
    def context(self) -> int:
        """The maximum length of a prompt and its answer together."""
        return self.thread.engine.decoder.slot_len

    def end(self, answer: Answer) -> None:
        self.unfinished.discard(answer)
        self.places.end()

    def close(self) -> None:
        """End all unfinished answers."""
        self.places.closed = True
        for answer in self.unfinished:
            self.thread.cancel(answer)

    def spelling(self, token: int) -> tuple[str, list[int]]:
        """A token as text and as bytes; part of a character is written as 'bytes:\\xe4', as by OpenAI."""
        raw = self.thread.engine.token_bytes[token]
        if not raw:
            return self.tokenizer.convert_ids_to_tokens(token), []
        try:
            return raw.decode(), list(raw)
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw), list(raw)


class RunningRequest:
    """The answers to one HTTP request while they are generated. They end if the client disconnects, or if one of them
    fails.

    Args:
        requests: one for each place that was taken; from here on each place is freed when its answer ends.
        param: the request's field that the prompts came from.

    Raises (on construction):
        ApiError: one of the requests is invalid.
    """

    def __init__(self, server: ServerState, requests: Sequence[engine.Request], http: Request, param: str):
        self.server = server
        self._check(requests, param)
        self._arrived: asyncio.Queue[tuple[int, Piece]] = asyncio.Queue()
        self._loop = asyncio.get_running_loop()
        self.answers: list[Answer] = []
        self._given_up = False
        try:
            for index, request in enumerate(requests):
                self.answers.append(server.thread.submit(request, partial(self._deliver, index)))
        except BaseException:
            self._given_up = True
            self.cancel()
            raise
        self._unfinished = len(self.answers)
        server.unfinished |= set(self.answers)
        self._watcher = asyncio.create_task(self._watch(http))

    def _check(self, requests: Sequence[engine.Request], param: str) -> None:
        server = self.server
        if server.places.closed:
            raise ApiError(*FAILURES["cancelled"])
        for request in requests:
            if len(request.prompt) + (request.max_new_tokens != 0) > server.context:
                raise ApiError(
                    400,
                    f"the prompt has {len(request.prompt)} tokens, and the model's context of {server.context} "
                    "must hold it and an answer: shorten it",
                    param,
                    "context_length_exceeded",
                )
            try:
                server.thread.engine.check(request)
            except ValueError as error:
                raise ApiError(400, str(error), param) from error  # the schema has looked at the settings

    def _deliver(self, index: int, piece: Piece) -> None:
        """Pass a piece from the engine's thread, which calls this, to the event loop."""
        self._loop.call_soon_threadsafe(self._arrive, index, piece)

    def _arrive(self, index: int, piece: Piece) -> None:
        if self._given_up:
            return
        self._arrived.put_nowait((index, piece))
        if piece.finish_reason:
            self.server.end(self.answers[index])
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
                self.server.thread.cancel(answer)

    async def pieces(self) -> AsyncIterator[tuple[int, Piece]]:
        """Pieces as they arrive, until all answers have ended: (index, piece). Pieces that arrive together are joined.

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
                if failure:
                    self.cancel()  # the others, which will not be read
                left -= piece.finish_reason is not None
                yield index, piece._replace(finish_reason=None) if failure else piece
                if failure:
                    raise ApiError(*failure)

    async def finish(self) -> list[str]:
        """Wait for all answers; returns their finish_reasons.

        Raises:
            ApiError: an answer did not come to its end.
        """
        reasons = [""] * len(self.answers)
        try:
            async for index, piece in self.pieces():
                reasons[index] = piece.finish_reason or ""
        finally:
            self.cancel()  # whatever ended the waiting
        return reasons
