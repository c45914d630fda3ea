"""The engine in a thread of its own, for servers and pages."""

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
    """An engine at work in a thread of its own; everything here may be called from any other.

    A step that fails (no memory, say) ends all answers it was to serve with the finish_reason "error", is logged, and
    the engine goes on with what comes next.

    Attributes:
        broken: a step failed, and since then the device computes nothing any more, as a GPU does after some errors.
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
        """Queue a request; once the thread is closed it ends at once, "cancelled".

        Args:
            deliver: called with each piece, in the engine's thread, which waits for it: hand it on and return.

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
        """End an answer where it is, within a step; its last piece says the reason."""
        self._call(lambda: self.engine.cancel(answer, reason))

    def refresh(self, model: MiniMindLM) -> None:
        """`Engine.refresh` between two steps; returns when it is done. Not from a `deliver`, which would wait for ever.

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
        """Cancel what runs, and end the thread."""

        def end() -> None:
            self._closing = True

        self._call(end)
        if threading.current_thread() is not self._thread:  # which a `deliver`, or a finalizer, may run in
            self._thread.join()

    def _call(self, call: Callable[[], None]) -> None:
        """Let the engine's thread call this before its next step."""
        self._calls.put(call)
        if self._closed:
            self._call_the_rest()

    def _call_the_rest(self) -> None:
        """What was asked too late for the thread's loop; each by whoever comes first, the thread or who asked."""
        with contextlib.suppress(queue.Empty):
            while True:
                self._calls.get_nowait()()

    def _work(self) -> None:
        while not self._closing:
            if self._deliver and self._calls.empty():
                self._step()
            else:
                self._calls.get()()  # waits while there is nothing to write
        for answer in self._deliver:
            self.engine.cancel(answer)
        self._step()
        self._closed = True
        self._call_the_rest()

    def _step(self) -> None:
        try:
            outputs = self.engine.step()
        except Exception:  # whatever it is, those who wait must hear of it
            logging.getLogger(__name__).exception("a step of the engine failed")
            self.broken = not self.engine.computes()
            outputs = self.engine.step()  # nothing is left to be done; this gives the ends
        for answer, piece in outputs:
            self._hand_over(answer, piece)

    def _hand_over(self, answer: Answer, piece: Piece) -> None:
        deliver = self._deliver.pop(answer) if piece.finish_reason else self._deliver[answer]
        try:
            deliver(piece)
        except BaseException:  # one reader's failure is not the others', not even a SystemExit
            logging.getLogger(__name__).exception("nobody takes an answer any more")
            self.engine.cancel(answer)
