"""Many clients on one server: are all answers complete and correct, how long do they wait, does memory grow.

    python -m benchmarks.serve_load                                         64 clients for 5 minutes, full_sft_512
    python -m benchmarks.serve_load --seconds 30 --out_dir out/demo --dim 256
    python -m benchmarks.serve_load --random_weights                        without any trained model

Starts scripts/serve_openai_api.py on a free port. First every question is asked alone; under load each client asks one
after another, streamed, greedy, and what it gets must be the same to the last token: nothing lost, nothing mixed up.
Memory is the server's resident set after the first minute (or a fifth of the time, if shorter) and at the end.
"""

import asyncio
import json
import random
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import trainer.start  # noqa: F401  (first of all: what to do where PyTorch, or a home folder, is missing)
import httpx
import torch

from model import LMConfig, MiniMindLM
from trainer.argument_types import BooleanFlag, positive_int
from trainer.arguments import ROOT, Parser, add_model_arguments
from trainer.errors import UserError, run_main
from trainer.weights import load_tokenizer

TOPICS = (
    "中国 法国 水 金 铁 月亮 太阳 星期一 一年 苹果 France Japan gold iron water the_moon the_sun Monday a_year an_apple"
)
FORMS = ("{}是什么？", "请告诉我关于{}的一件事。", "What is {}?", "Tell me three things about {} and why they matter.")


@dataclass
class Outcome:
    """The clients' measurements."""

    answers: int = 0
    tokens: int = 0
    errors: Counter = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    first: list[float] = field(default_factory=list)  # seconds to the first text
    pace: list[float] = field(default_factory=list)  # tokens per second after it, of one answer


def questions() -> list[dict]:
    """Chat requests with questions and answers of many lengths."""
    asked = [form.format(topic) for topic in TOPICS.split() for form in FORMS]
    return [
        {
            "messages": [{"role": "user", "content": " ".join([text] * (1 + i % 7))}],
            "max_tokens": 16 + 23 * i % 180,
            "temperature": 0,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        for i, text in enumerate(asked)
    ]


async def ask(client: httpx.AsyncClient, body: dict) -> tuple[str, int, float, float]:
    """An answer's text and number of tokens, the seconds to its first text, and from there to its end.

    Raises:
        RuntimeError: it ended early.
    """
    started, first, text, ended, tokens = time.perf_counter(), None, "", False, 0
    async with client.stream("POST", "/v1/chat/completions", json=body) as reply:
        if reply.status_code != 200:
            raise RuntimeError(f"status {reply.status_code}")
        async for line in reply.aiter_lines():
            if line == "data: [DONE]":
                ended = True
            elif line:
                chunk = json.loads(line.removeprefix("data: "))
                if "error" in chunk:
                    raise RuntimeError(chunk["error"]["message"])
                if chunk["usage"]:
                    tokens = chunk["usage"]["completion_tokens"]
                for choice in chunk["choices"]:
                    piece = choice["delta"].get("content", "")
                    if piece and first is None:
                        first = time.perf_counter()
                    text += piece
    if not ended:
        raise RuntimeError("the stream broke off")
    now = time.perf_counter()
    return text, tokens, (first or now) - started, now - (first or now)


async def client_loop(client, bodies: list[dict], right: list[str], end: float, seed: int, outcome: Outcome) -> None:
    """Send requests until the time is over."""
    order = random.Random(seed)
    while time.perf_counter() < end:
        number = order.randrange(len(bodies))
        try:
            text, tokens, first, rest = await ask(client, bodies[number])
        except (RuntimeError, httpx.HTTPError) as error:
            outcome.errors[f"{type(error).__name__}: {error}"] += 1
            await asyncio.sleep(1)
            continue
        outcome.answers += 1
        outcome.tokens += tokens
        outcome.first.append(first)
        if tokens > 1 and rest > 0:
            outcome.pace.append((tokens - 1) / rest)
        if text != right[number]:
            outcome.wrong.append(f"{text!r} in place of {right[number]!r}")


def resident(pid: int) -> int:
    """A process's resident memory in bytes."""
    status = Path(f"/proc/{pid}/status").read_text(encoding="utf-8")
    line = next(line for line in status.splitlines() if line.startswith("VmRSS"))
    return int(line.split()[1]) * 1024


async def load(address: str, pid: int, args) -> None:
    """Run the whole benchmark, and print its report."""
    bodies = questions()
    limits = httpx.Limits(max_connections=args.clients, max_keepalive_connections=args.clients)
    async with httpx.AsyncClient(base_url=address, timeout=600, limits=limits, trust_env=False) as client:
        alone = [await ask(client, body) for body in bodies]
        right = [text for text, *_ in alone]
        pace = statistics.median((tokens - 1) / rest for _, tokens, _, rest in alone if tokens > 1)
        print(f"alone: {len(bodies)} questions, {pace:.1f} tokens/s, {len(set(right))} different answers", flush=True)
        outcome, started = Outcome(), time.perf_counter()
        end = started + args.seconds
        clients = [
            asyncio.create_task(client_loop(client, bodies, right, end, seed, outcome)) for seed in range(args.clients)
        ]
        await asyncio.sleep(min(60, args.seconds / 5))
        early = resident(pid)
        await asyncio.sleep(max(0, end - time.perf_counter()))
        late, seconds, tokens = resident(pid), time.perf_counter() - started, outcome.tokens
        await asyncio.gather(*clients)

    def spread(values: list[float]) -> str:
        p50, p95 = statistics.median(values), statistics.quantiles(values, n=20)[-1]
        slow = statistics.quantiles(values, n=20)[0]
        return f"p5 {slow:.3f}  p50 {p50:.3f}  p95 {p95:.3f}"

    print(
        f"{args.clients} clients, {seconds:.0f} s: {outcome.answers} answers, {tokens / seconds:.0f} tokens/s together"
    )
    print(f"errors: {sum(outcome.errors.values())} {dict(outcome.errors) if outcome.errors else ''}")
    print(f"answers that differ from those alone: {len(outcome.wrong)}")
    for difference in outcome.wrong[:5]:
        print(f"  {difference}")
    print(f"first text, s:            {spread(outcome.first)}")
    print(f"tokens/s of an answer:    {spread(outcome.pace)}")
    print(f"memory: {early >> 20} MiB early, {late >> 20} MiB at the end, {late / early - 1:+.1%}")
    if outcome.errors or outcome.wrong:
        raise UserError("the server lost or mixed up answers")


def write_random_weights(args, folder: Path) -> None:
    """Save an untrained model where the server looks for full_sft."""
    torch.manual_seed(0)
    sizes = {"dim": args.dim, "n_layers": args.n_layers, "use_moe": args.use_moe}
    model = MiniMindLM(LMConfig(**sizes, vocab_size=len(load_tokenizer(args.tokenizer))))
    name = f"full_sft_{args.dim}{'_moe' if args.use_moe else ''}.pth"
    torch.save(model.state_dict(), folder / name)


def main():
    parser = Parser(__doc__)
    add_model_arguments(parser)
    parser.add_argument("--clients", type=positive_int, default=64)
    parser.add_argument("--seconds", type=positive_int, default=300)
    parser.add_argument("--max_concurrency", type=positive_int, default=16, help="the server's slots")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--random_weights", action=BooleanFlag, help="an untrained model of the given size")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        if args.random_weights:
            write_random_weights(args, Path(folder))
            args.out_dir = folder
        command = [sys.executable, str(ROOT / "scripts/serve_openai_api.py"), "--port", "0", "--dtype", args.dtype]
        for name in ("out_dir", "dim", "n_layers", "use_moe", "max_concurrency"):
            command += [f"--{name}", str(getattr(args, name))]
        command += ["--tokenizer", args.tokenizer] if args.tokenizer else []
        server = subprocess.Popen(command, stdout=subprocess.PIPE, encoding="utf-8")
        try:
            found = re.search(r"serving at (\S+)/v1", server.stdout.readline())
            if found is None:
                raise UserError(f"the server did not start (exit code {server.wait()})")
            asyncio.run(load(found[1], server.pid, args))
        finally:
            server.send_signal(signal.SIGTERM)
            server.wait()


if __name__ == "__main__":
    run_main(main)
