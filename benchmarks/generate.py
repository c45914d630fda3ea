"""Generation speed, side by side with `transformers`: tokens/s for one stream and sixteen, and time to first token.

    python -m benchmarks.generate                             26M, fp32 and bf16, on this machine's cores or its GPU
    python -m benchmarks.generate --dtype int8 int4           beside llama.cpp's q8_0 and q4_0
    python -m benchmarks.generate --use_moe --dtype float32
    python -m benchmarks.generate --dim 768 --n_layers 16 --rounds 3

The peer is transformers' own class for the same network with the same weights (Llama; Qwen2-MoE for a mixture of
experts), its `generate`, greedy, in a batch without padding, fp32 where we use 8 or 4 bits. On a CPU llama.cpp's server
runs too, where xllamacpp is installed, from the same weights as GGUF: one stream and a batch of sixteen sequences. All
take turns, round after round, so that a noisy machine disturbs them alike; a figure is the median of the rounds. In
fp32 the texts must be the same, except where two tokens are equally likely to within 1e-4.
"""

import importlib.util
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import trainer.start  # noqa: F401  (first of all: what to do where PyTorch, or a home folder, is missing)
import torch
import torch.nn.functional as F
from transformers import AutoConfig, AutoModelForCausalLM

from benchmarks.comparison.llama_server import LlamaServer, instruction_sets
from model import LMConfig, MiniMindLM
from model.inference.decoder import Span
from model.inference.matrices import Precision
from model.inference.request import Request
from model.inference.scheduler import Engine
from scripts.formats.transformers_folder import to_their_config, to_their_state
from trainer.argument_types import BooleanFlag, positive_int
from trainer.arguments import Parser, add_device_argument
from trainer.device import DTYPES, pick_device
from trainer.errors import run_main
from trainer.inference_arguments import PRECISIONS
from trainer.weights import load_tokenizer

PROMPT, BATCH, LONG_PROMPT = 32, 16, 512
TIE = 1e-4
GGUF_DTYPES = {"float32": "f32", "bfloat16": "bf16", "int8": "q8_0", "int4": "q4_0"}
LENGTHS = (128, 1024, 4096)  # at which a single token is timed

Measured = Callable[[], list[list[int]] | None]  # writes, and returns the tokens


def build_peer(model: MiniMindLM, dtype: torch.dtype, device: torch.device):
    """transformers' class with the weights of `model`."""
    theirs = to_their_config(model.config)
    peer = AutoModelForCausalLM.from_config(AutoConfig.for_model(**theirs), dtype=dtype, attn_implementation="sdpa")
    peer.load_state_dict(to_their_state(model.state_dict(), model.config), strict=False)  # all but lm_head
    peer.tie_weights()  # which is the embedding
    peer.generation_config.eos_token_id = None
    return peer.to(device).eval()


def random_prompts(model: MiniMindLM) -> torch.Tensor:
    """(BATCH, PROMPT) int64."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(3, model.config.vocab_size, (BATCH, PROMPT), generator=generator)


def contenders(model: MiniMindLM, tokenizer, precision: Precision, args) -> dict[str, Measured]:
    """The contenders by name."""
    device, n = args.device, args.tokens
    dtype = torch.float32 if isinstance(precision, str) else precision
    peer = build_peer(model, dtype, device)
    own = MiniMindLM(model.config).to(device, dtype).eval()
    own.load_state_dict(model.state_dict())
    settings = {"slot_len": 2048, "token_budget": LONG_PROMPT, "dtype": precision, "deterministic": args.deterministic}
    alone = Engine(own, tokenizer, slots=1, compile=args.compile, **settings)
    together = Engine(own, tokenizer, slots=BATCH, **settings)
    generator = torch.Generator().manual_seed(1)
    prompts = random_prompts(model)
    long = torch.randint(3, model.config.vocab_size, (args.rounds + 2, 1, LONG_PROMPT), generator=generator)
    unread = iter(long)  # a new one each time: the engine would know an old one

    def theirs(prompts: torch.Tensor, n: int) -> list[list[int]]:
        ids = prompts.to(device)
        with torch.inference_mode():
            out = peer.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=n, do_sample=False)
        return out[:, ids.size(1) :].tolist()

    def ours(engine: Engine, prompts: torch.Tensor, n: int) -> list[list[int]]:
        requests = [Request(prompt=ids, max_new_tokens=n, eos_token_id=()) for ids in prompts.tolist()]
        return [answer.ids[len(answer.request.prompt) :] for answer in engine.run(requests)]

    def forward(network) -> None:
        with torch.inference_mode():
            network(long[0].to(device), logits_to_keep=1)
        synchronize(device)

    return {
        "transformers, one": lambda: theirs(prompts[:1], n),
        "engine, one": lambda: ours(alone, prompts[:1], n),
        "transformers, batch of 16": lambda: theirs(prompts, n),
        "engine, 16 at once": lambda: ours(together, prompts, n),
        "engine, 16 one by one": lambda: [ours(alone, prompts[i : i + 1], n)[0] for i in range(BATCH)],
        "transformers, forward of 512": lambda: forward(peer),
        "MiniMindLM, forward of 512": lambda: forward(own),
        "transformers, first token of 512": lambda: theirs(long[1], 1),
        "engine, first token of 512": lambda: ours(alone, next(unread), 1),
    }


def synchronize(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize()


def llama_cpp(model: MiniMindLM, tokenizer, name: str, args) -> dict[str, Measured]:
    """llama.cpp with the same weights in the same precision, if it is installed."""
    if importlib.util.find_spec("xllamacpp") is None or model.config.use_moe or args.device.type != "cpu":
        return {}
    from scripts.formats.gguf_file import write_gguf

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.gguf"
        write_gguf(model, tokenizer, path, GGUF_DTYPES[name], "minimind")
        alone, together = (LlamaServer(path, 2048, slots, torch.get_num_threads()) for slots in (1, BATCH))
    prompts = random_prompts(model).tolist()

    def write(server: LlamaServer, prompts: list[list[int]]) -> list[list[int]]:
        replies = server.complete(prompts, args.tokens, ignore_eos=True, cache_prompt=False)
        return [reply["tokens"] for reply in replies]

    return {
        "llama.cpp, one": lambda: write(alone, prompts[:1]),
        "llama.cpp, 16 at once": lambda: write(together, prompts),
    }


@torch.inference_mode()
def same_but_for_ties(model: MiniMindLM, ours: list[list[int]], theirs: list[list[int]]) -> bool:
    """Whether texts are equal, or first differ where their two tokens' logits are within 1e-4."""
    for prompt, a, b in zip(random_prompts(model).tolist(), ours, theirs, strict=True):
        place = next((i for i, (x, y) in enumerate(zip(a, b, strict=True)) if x != y), None)
        if place is not None:
            logits = model(torch.tensor([prompt + a[:place]], device=model.device), logits_to_keep=1).logits[0, -1]
            if abs(logits[a[place]] - logits[b[place]]) > TIE:
                return False
    return True


def take_turns(measured: dict[str, Measured], rounds: int, device: torch.device) -> tuple[dict[str, float], dict]:
    """Each contender's median seconds, and its texts."""
    seconds: dict[str, list[float]] = {name: [] for name in measured}
    written = {name: write() for name, write in measured.items()}  # also the warm-up
    for _ in range(rounds):
        for name, write in measured.items():
            synchronize(device)
            started = time.perf_counter()
            write()
            synchronize(device)
            seconds[name].append(time.perf_counter() - started)
    return {name: statistics.median(times) for name, times in seconds.items()}, written


def growth(model: MiniMindLM, tokenizer, precision: Precision, args) -> list[tuple[int, float, float]]:
    """Milliseconds of a step for one answer, and of its attention alone, at several lengths."""
    config = model.config
    lengths = [length for length in LENGTHS if length <= config.max_seq_len]
    settings = {"dtype": precision, "deterministic": args.deterministic, "compile": args.compile}
    decoder = Engine(model, tokenizer, slots=1, slot_len=lengths[-1], **settings).decoder
    shape = (1, config.n_kv_heads, config.n_heads // config.n_kv_heads, config.head_dim)
    q = torch.randn(shape, dtype=decoder._kv.dtype, device=args.device)
    rows = []
    for length in lengths:
        kv = decoder._kv[:, 0, :length].permute(2, 0, 3, 1, 4)[:, :, None]

        def attend(kv=kv) -> None:
            for k, v in zip(*kv, strict=True):
                F.scaled_dot_product_attention(q, k, v)

        def step(length=length) -> None:
            decoder.predict([Span(0, length - 1, [5])], [0])

        times = {step: [], attend: []}
        with torch.inference_mode():
            for _ in range(args.rounds * 20):
                for each, seconds in times.items():
                    synchronize(args.device)
                    started = time.perf_counter()
                    each()
                    synchronize(args.device)
                    seconds.append(time.perf_counter() - started)
        rows.append((length, *(1000 * statistics.median(seconds) for seconds in times.values())))
    return rows


def report(seconds: dict[str, float], n: int) -> None:
    """The table of one dtype, with the important ratios."""
    for name, time_taken in seconds.items():
        count = BATCH * n if "16" in name else n
        if "512" in name:
            print(f"  {name:<36}{1000 * time_taken:>9.1f} ms")
        else:
            print(f"  {name:<36}{count / time_taken:>9.1f} tokens/s")
    of = seconds.__getitem__
    print(f"  one stream        {of('transformers, one') / of('engine, one'):.2f} x transformers")
    print(f"  16 at once        {of('transformers, batch of 16') / of('engine, 16 at once'):.2f} x transformers")
    print(f"  16 at once        {of('engine, 16 one by one') / of('engine, 16 at once'):.2f} x one by one")
    first = of("engine, first token of 512")
    print(f"  first token       {first / of('MiniMindLM, forward of 512'):.2f} of a forward pass of MiniMindLM")
    print(f"  first token       {first / of('transformers, forward of 512'):.2f} of one of transformers")
    if "llama.cpp, one" in seconds:
        print(f"  one stream        {of('llama.cpp, one') / of('engine, one'):.2f} x llama.cpp")
        print(f"  16 at once        {of('llama.cpp, 16 at once') / of('engine, 16 at once'):.2f} x llama.cpp")
        print(f"  llama.cpp uses    {' '.join(instruction_sets())}")


def main():
    parser = Parser(__doc__)
    parser.add_argument("--dim", type=positive_int, default=512)
    parser.add_argument("--n_layers", type=positive_int, default=8)
    parser.add_argument("--use_moe", action=BooleanFlag)
    parser.add_argument("--dtype", nargs="+", choices=PRECISIONS, default=["float32", "bfloat16"])
    parser.add_argument("--deterministic", action=BooleanFlag, help="one kernel for any number of streams")
    parser.add_argument(
        "--compile", action=BooleanFlag, default=True, help="a compiled step for one stream (default: on)"
    )
    parser.add_argument("--tokens", type=positive_int, default=128, help="tokens to generate per answer")
    parser.add_argument("--rounds", type=positive_int, default=5)
    add_device_argument(parser)
    args = parser.parse_args()
    args.device = pick_device(args.device)

    tokenizer = load_tokenizer()
    torch.manual_seed(0)
    sizes = {"dim": args.dim, "n_layers": args.n_layers, "use_moe": args.use_moe, "vocab_size": len(tokenizer)}
    model = MiniMindLM(LMConfig(**sizes)).to(args.device).eval()
    size = sum(parameter.numel() for parameter in model.parameters()) / 1e6
    where = f"{torch.get_num_threads()} threads" if args.device.type == "cpu" else str(args.device)
    where = torch.cuda.get_device_name() if args.device.type == "cuda" else where
    print(f"{size:.1f} M parameters on {where}, prompts of {PROMPT}, answers of {args.tokens}, {args.rounds} rounds")
    for name in args.dtype:
        precision = DTYPES.get(name, name)
        measured = contenders(model, tokenizer, precision, args) | llama_cpp(model, tokenizer, name, args)
        seconds, written = take_turns(measured, args.rounds, args.device)
        print(name)
        report(seconds, args.tokens)
        if name == "float32":
            theirs = written["transformers, batch of 16"]
            together, alone = written["engine, 16 at once"], written["engine, 16 one by one"]
            same = same_but_for_ties(model, together, theirs) and same_but_for_ties(model, alone, theirs)
            print(f"  the same text as transformers, alone and in a batch: {'yes' if same else 'NO'}")
        print("  length   a step    attention alone   the rest")
        for length, step, attention in growth(model, tokenizer, precision, args):
            print(f"  {length:>6}{step:>9.2f} ms{attention:>14.2f} ms{step - attention:>12.2f} ms")


if __name__ == "__main__":
    run_main(main)
