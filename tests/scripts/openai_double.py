"""A small OpenAI-compatible server for testing clients: it gives a test's replies and records the requests."""

import contextlib
import json
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Double:
    """A server on a free port of this machine.

    Attributes:
        address: for --base_url.
        requests: the bodies of all chat requests, in order.
        reply: from a request's body to the pieces of the answer: a pair ("thinking", text) is reasoning_content, a
            dict is a whole delta, a number a pause in seconds, an Exception an error in the middle of the stream.
        abandoned: set once a client has disconnected before the end of a stream.
    """

    def __init__(self):
        self.requests: list[dict] = []
        self.reply: Callable[[dict], Iterator] = lambda body: ["You said: ", body["messages"][-1]["content"]]
        self.abandoned = threading.Event()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self._server.daemon_threads = True
        self.address = f"http://127.0.0.1:{self._server.server_port}/v1"
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def _handler(double):
        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *args):
                """Say nothing."""

            def do_GET(self):
                self._answer(200, {"object": "list", "data": [{"id": "double", "object": "model"}]})

            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                double.requests.append(body)
                pieces = double.reply(body)
                if isinstance(pieces, dict):
                    self._answer(400, {"error": pieces})
                elif body.get("stream"):
                    self._stream(pieces)
                else:
                    text = "".join(piece for piece in pieces if isinstance(piece, str))
                    message = {"role": "assistant", "content": text}
                    self._answer(200, {"id": "x", "object": "chat.completion", "choices": [{"message": message}]})

            def _answer(self, status: int, content: dict):
                data = json.dumps(content).encode()
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def _stream(self, pieces):
                self.send_response(200)
                self.send_header("Content-Type", "text/event-stream")
                self.end_headers()
                try:
                    for piece in pieces:
                        if isinstance(piece, int | float):
                            time.sleep(piece)
                            continue
                        delta = {"reasoning_content": piece[1]} if isinstance(piece, tuple) else {"content": piece}
                        delta = piece if isinstance(piece, dict) else delta
                        chunk = {
                            "id": "x",
                            "object": "chat.completion.chunk",
                            "choices": [{"index": 0, "delta": delta}],
                        }
                        self.wfile.write(b"data: " + json.dumps(chunk).encode() + b"\n\n")
                    self.wfile.write(b"data: [DONE]\n\n")
                except OSError:
                    double.abandoned.set()

        return Handler


@contextlib.contextmanager
def openai_double() -> Iterator[Double]:
    double = Double()
    try:
        yield double
    finally:
        double.close()


@contextlib.contextmanager
def http_server(body: bytes, kind: str) -> Iterator[str]:
    """The address of a server that gives every request the same response."""

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *args):
            """Say nothing."""

        def do_GET(self):
            self.rfile.read(int(self.headers["Content-Length"] or 0))
            self.send_response(200)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        do_POST = do_GET

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
