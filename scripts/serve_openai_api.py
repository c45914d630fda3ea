"""Serve a model over the OpenAI API: chats and completions, streamed or not, for any client that speaks it.

python scripts/serve_openai_api.py                                      full_sft_512, at http://127.0.0.1:8998/v1
python scripts/serve_openai_api.py --dim 256 --out_dir out/demo --lora_name identity
python scripts/serve_openai_api.py --vlm --vision_model out/demo/clip --out_dir out/demo       also images in chats
MINIMIND_API_KEY=secret python scripts/serve_openai_api.py --host 0.0.0.0            callers need the key

A client needs that address, the model name minimind, and the key (any text if the server has none). SIGTERM and Ctrl-C
finish the running answers and refuse new requests; a second one ends at once.
"""

import os
import signal
import socket
import sys
import time

import _repo  # noqa: F401  (lets `python scripts/serve_openai_api.py` find the packages)

from scripts.serving.client import check_key
from trainer.argument_types import BooleanFlag, non_negative_float, non_negative_int, positive_int
from trainer.arguments import (
    Parser,
    add_device_argument,
    add_model_arguments,
    add_tower_argument,
    add_untold_arguments,
)
from trainer.errors import UserError, print_notice, run_main
from trainer.inference_arguments import (
    VLM_STAGES,
    add_adapter_argument,
    add_engine_arguments,
    add_stage_arguments,
    number_stages,
)

API_KEY = "MINIMIND_API_KEY"
LAST_WORDS = 5  # seconds for telling clients that their answers were cut off
THREAD_SWITCH = 0.001  # seconds; with Python's 0.005 the engine's thread waits too long for the one that sends


def get_args():
    parser = Parser(__doc__)
    add_stage_arguments(parser, more=f"; with --vlm: {number_stages(VLM_STAGES)}")
    add_model_arguments(parser)
    add_untold_arguments(parser)
    add_adapter_argument(parser)
    parser.add_argument("--vlm", action=BooleanFlag, help="serve a vision-language model: image parts in chats")
    add_tower_argument(parser)
    parser.add_argument(
        "--fetch_images",
        action=BooleanFlag,
        help="also fetch http(s) images: clients then choose which URLs this machine requests",
    )
    parser.add_argument(
        "--fetch_private",
        action=BooleanFlag,
        help="with --fetch_images: also from this machine and its private network",
    )
    group = parser.add_argument_group("machine")
    add_device_argument(group)
    add_engine_arguments(group, dtype="float32")
    group.add_argument("--max_concurrency", type=positive_int, default=16, help="maximum concurrent answers")
    group.add_argument(
        "--max_queue", type=non_negative_int, default=112, help="maximum queued answers; beyond it clients get 429"
    )
    group = parser.add_argument_group("network")
    group.add_argument("--host", default="127.0.0.1", help="0.0.0.0: reachable from the whole network")
    group.add_argument("--port", type=non_negative_int, default=8998, help="0: any free port")
    group.add_argument(
        "--api_key", default=None, help=f"key that clients must send; prefer setting {API_KEY}, which ps does not show"
    )
    group.add_argument("--cors", action="append", metavar="ORIGIN", help="CORS origin to allow; '*': all")
    group.add_argument(
        "--keep_alive",
        type=positive_int,
        default=75,
        help="seconds to keep idle connections open",
    )
    group.add_argument(
        "--drain_seconds", type=non_negative_float, default=30, help="how long SIGTERM waits for running answers"
    )
    return parser.parse_args()


def load(args):
    """Load what the flags name: model, tokenizer, and the function that places images in a prompt, or None."""
    if args.fetch_private and not args.fetch_images:
        raise UserError("--fetch_private needs --fetch_images")
    if args.fetch_images and not args.vlm:
        raise UserError("--fetch_images needs --vlm")
    if args.vlm and (args.lora_name or args.model_mode > 2):
        raise UserError("--vlm takes no --lora_name, and --model_mode 0, 1 or 2")
    from model.images import prepare_chat, prompt_embeddings
    from trainer.device import pick_device
    from trainer.loading import load_by_flags, load_vlm_by_flags

    device = pick_device(args.device)
    if not args.vlm:
        model, tokenizer = load_by_flags(args)
        return model.to(device), tokenizer, None
    model, tokenizer, processor = load_vlm_by_flags(args)
    model.to(device)
    image_tokens, room = model.config.image_tokens, model.config.max_seq_len

    def place_images(turns):
        parts = [part for turn in turns if not isinstance(turn["content"], str) for part in turn["content"]]
        images = sum(not isinstance(part, str) for part in parts)
        if images * image_tokens > room:  # need not be read
            raise ValueError(f"{images} images of {image_tokens} tokens are too many for the model's context of {room}")
        prompt = prepare_chat(tokenizer, turns, model.config, processor, room=sys.maxsize)  # all of it; checked later
        ids = prompt.input_ids[0].tolist()
        if len(ids) >= room:  # is refused; the tower need not look at it
            return ids, None
        return ids, prompt_embeddings(model, prompt)

    return model, tokenizer, place_images


def listen(host: str, port: int) -> socket.socket:
    """The socket to serve on.

    Raises:
        UserError: the address is in use, or not this machine's.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        sock = socket.create_server((host, port), family=family, backlog=2048)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # or tokens wait 40 ms for receipts
        return sock
    except (OSError, OverflowError) as error:
        raise UserError(f"--host {host} --port {port}: {error}; choose another --port (0: any free port)") from None


def telling_keep_alive(app, seconds: int):
    """The app, with responses that say how long their connection stays open, so that clients stop using it in time."""

    async def telling(scope, receive, send):
        async def told(message):
            if message["type"] == "http.response.start":
                kept = [(b"connection", b"keep-alive"), (b"keep-alive", b"timeout=%d" % seconds)]
                message = message | {"headers": [*message.get("headers", ()), *kept]}
            await send(message)

        wishes = dict(scope.get("headers", ())).get(b"connection", b"").lower()
        kept = scope["type"] == "http" and scope["http_version"] == "1.1" and b"close" not in wishes
        await app(scope, receive, told if kept else send)

    return telling


def serve(app, served, sock: socket.socket, drain_seconds: float, keep_alive: int) -> None:
    """Serve until a signal; then finish running answers, for at most `drain_seconds`.

    Args:
        keep_alive: seconds that a connection may be idle between two requests.
    """
    import uvicorn

    class Server(uvicorn.Server):
        deadline = float("inf")

        async def startup(self, sockets=None):
            await super().startup(sockets)
            host, port = sock.getsockname()[:2]
            print(f"serving at http://{f'[{host}]' if ':' in host else host}:{port}/v1", flush=True)

        def handle_exit(self, number, frame):
            places = served.places
            if places.draining:
                self.should_exit = self.force_exit = True
            places.draining = True
            self.deadline = time.monotonic() + drain_seconds
            print_notice(f"{signal.Signals(number).name}: finishing {places.taken} answers (again: end at once)")

        async def on_tick(self, counter):
            if served.places.draining and (not served.places.taken or time.monotonic() > self.deadline):
                served.close()
                self.should_exit = True
            return await super().on_tick(counter)

    config = uvicorn.Config(
        telling_keep_alive(app, keep_alive),
        log_level="warning",
        timeout_keep_alive=keep_alive,
        timeout_graceful_shutdown=LAST_WORDS,
    )
    Server(config).run(sockets=[sock])


def main():
    args = get_args()
    api_key = args.api_key or os.environ.get(API_KEY) or None
    check_key(api_key or "", "--api_key" if args.api_key else API_KEY)
    sock = listen(args.host, args.port)
    from model.inference.thread import EngineThread
    from scripts.serving.app import make_app
    from scripts.serving.fetch_images import ImageFetcher
    from scripts.serving.requests import ServerState
    from trainer.loading import open_engine

    model, tokenizer, place_images = load(args)
    engine = open_engine(model, tokenizer, args, slots=args.max_concurrency, compile_large=True)
    del model  # the engine has its own copy of the weights
    if args.host not in ("127.0.0.1", "localhost", "::1") and not api_key:
        print_notice(
            f"--host {args.host} without a key: anyone who can reach this machine may use it (--api_key, or {API_KEY})"
        )
    thread = EngineThread(engine)
    served = ServerState(
        thread,
        tokenizer,
        place_images,
        ImageFetcher(args.fetch_private) if args.fetch_images else None,
        reasoning=args.model_mode >= 3 and not args.vlm,
        capacity=args.max_concurrency + args.max_queue,
    )
    sys.setswitchinterval(THREAD_SWITCH)
    serve(make_app(served, api_key, args.cors or ()), served, sock, args.drain_seconds, args.keep_alive)
    thread.close()


if __name__ == "__main__":
    run_main(main)
