"""The engine in its own thread, for servers and web pages."""

import contextlib
import logging
import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future

from model.inference.answer import Answer
from model.inference.request import Piece, Request
from model.inference.scheduler import Engine
from model.model import MiniMindLM


class EngineThread:
    """An engine running in its own thread; every method may be called from any other thread.

    A failed step (out of memory, say) is logged and ends all its answers with the finish_reason "error"; the engine
    carries on with later requests.

    Attributes:
        broken: a step failed and the device no longer computes anything, as a GPU does after some errors.
    """

    def __init__(self, engine: Engine):
        self.engine = engine
        self.broken = False
        self._calls: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._deliver: dict[Answer, Callable[[Piece], None]] = {}
        self._closing = self._closed = False
        self._thread = threading.Thread(target=self._work, name="engine", daemon=True)
        self._thread.start()

    def submit(self, request: Request, deliver: Callable[[Piece], None]) -> Answer:
        """Queue a request; once the thread is closed it ends immediately as "cancelled".

        Args:
            deliver: called with each piece in the engine's thread, which it blocks: pass the piece on and return.

        Raises:
            ValueError: see `Engine.check`.
        """
        answer = self.engine.prepare(request)

        def begin() -> None:
            self._deliver[answer] = deliver
            if self._closing:
                self._hand_over(answer, answer.end("cancelled"))
            else:
                self.engine.enqueue(answer)

        self._call(begin)
        return answer

    def cancel(self, answer: Answer, reason: str = "cancelled") -> None:
        """End an answer within a step; its last piece has the reason."""
        self._call(lambda: self.engine.cancel(answer, reason))

    def refresh(self, model: MiniMindLM) -> None:
        """`Engine.refresh` between two steps; returns when it is done. Calling it from a `deliver` would deadlock.

        Raises:
            ValueError: see `Decoder.refresh`.
        """
        done: Future[None] = Future()

        def refresh() -> None:
            try:
                done.set_result(self.engine.refresh(model))
            except BaseException as error:  # the caller's to handle
                done.set_exception(error)

        self._call(refresh)
        done.result()

    def close(self) -> None:
        """Cancel what is running, and end the thread."""

        def end() -> None:
            self._closing = True

        self._call(end)
        if threading.current_thread() is not self._thread:  # where a `deliver`, or a finalizer, may run
            self._thread.join()

    def _call(self, call: Callable[[], None]) -> None:
        """Have the engine's thread run a call before its next step."""
        self._calls.put(call)
        if self._closed:
            self._call_the_rest()

    def _call_the_rest(self) -> None:
        """Run the calls that came too late for the thread's loop, in the thread or the caller, whichever is first."""
        with contextlib.suppress(queue.Empty):
            while True:
                self._calls.get_nowait()()

    def _work(self) -> None:
        while not self._closing:
            if self._deliver and self._calls.empty():
                self._step()
            else:
                self._calls.get()()  # blocks while there is nothing to generate
        for answer in self._deliver:
            self.engine.cancel(answer)
        self._step()
        self._closed = True
        self._call_the_rest()

    def _step(self) -> None:
        try:
            outputs = self.engine.step()
        except Exception:  # whatever it is, those waiting must learn of it
            logging.getLogger(__name__).exception("a step of the engine failed")
            self.broken = not self.engine.computes()
            outputs = self.engine.step()  # nothing is left to run; this returns the last pieces
        for answer, piece in outputs:
            self._hand_over(answer, piece)

    def _hand_over(self, answer: Answer, piece: Piece) -> None:
        deliver = self._deliver.pop(answer) if piece.finish_reason else self._deliver[answer]
        try:
            deliver(piece)
        except BaseException:  # one reader's failure is not the others', not even a SystemExit
            logging.getLogger(__name__).exception("delivering an answer failed")
            self.engine.cancel(answer)
