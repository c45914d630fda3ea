"""Generation speed with and without drafts, on text that repeats its prompt and on text that does not.

    python -m benchmarks.drafts                          26M, fp32, one answer at a time
    python -m benchmarks.drafts --dtype bfloat16 --speculate 8
    python -m benchmarks.drafts --dim 768 --n_layers 16 --compile 0

The weights are random, so the logits are biased to produce a given text; everything else is computed as usual. One
answer repeats its prompt with every twentieth token changed; one is a page of documentation unrelated to the prompt.
The draft model has dim 128 and two layers, and agrees with the text at a share `--agreement` of the tokens. All take
turns; a figure is the median of the rounds.
"""

import statistics
import time
from collections.abc import Sequence

import trainer.start  # noqa: F401  (first of all: what to do where PyTorch, or a home folder, is missing)
import torch

from model import LMConfig, MiniMindLM
from model.inference.decoder import Decoder, Span
from model.inference.request import Request
from model.inference.scheduler import Engine
from trainer.argument_types import BooleanFlag, positive_int
from trainer.arguments import ROOT, Parser, add_device_argument
from trainer.device import DTYPES, pick_device
from trainer.errors import run_main
from trainer.inference_arguments import PRECISIONS
from trainer.weights import load_tokenizer

PROMPT = 512
EDITED = 20  # every so many tokens of the prompt the answer has another
RAISED = 1e4  # more than any logit


def follow(decoder: Decoder, text: list[int], agreement: float = 1.0) -> None:
    """Make a decoder predict `text` after each of its tokens, or in some places other tokens; nothing else changes.

    A pass computes everything as usual, and then the logits of the desired tokens are raised.
    """
    predict = decoder.predict
    generator = torch.Generator().manual_seed(0)
    wrong = (torch.rand(len(text) + 1, generator=generator) >= agreement).tolist()
    vocabulary = decoder.config.vocab_size
    wanted = [(token + wrong[i]) % vocabulary for i, token in enumerate([*text, text[-1]])]

    @torch.inference_mode()
    def follow_text(spans: Sequence[Span], rows: Sequence[int]) -> torch.Tensor:
        logits = predict(spans, rows)
        places = [span.start + i for span in spans for i in range(len(span.tokens))]
        for row, logit in zip(rows, logits, strict=True):
            logit[wanted[min(places[row] + 1, len(text))]] = RAISED
        return logits

    decoder.predict = follow_text


def texts(tokenizer, tokens: int) -> dict[str, tuple[list[int], list[int]]]:
    """Prompts with their answers, by name, made from the documentation's pages."""
    pages = {name: (ROOT / "docs" / f"{name}.md").read_text(encoding="utf-8") for name in ("serving", "vision")}
    ids = {name: tokenizer(page, add_special_tokens=False).input_ids for name, page in pages.items()}
    prompt = ids["serving"][: max(PROMPT, tokens)]
    edited = [5 + token % 1000 if i % EDITED == EDITED - 1 else token for i, token in enumerate(prompt[:tokens])]
    return {"repeats its prompt": (prompt, edited), "does not": (prompt, ids["vision"][:tokens])}


def main():
    parser = Parser(__doc__)
    parser.add_argument("--dim", type=positive_int, default=512)
    parser.add_argument("--n_layers", type=positive_int, default=8)
    parser.add_argument("--dtype", choices=PRECISIONS, default="float32")
    parser.add_argument("--compile", action=BooleanFlag, default=True, help="a compiled step (default: on)")
    parser.add_argument("--speculate", type=positive_int, default=16, help="maximum tokens drafted by look-up")
    parser.add_argument(
        "--agreement", type=float, default=0.8, help="share of tokens on which the draft model agrees with the text"
    )
    parser.add_argument("--tokens", type=positive_int, default=256, help="tokens per answer")
    parser.add_argument("--rounds", type=positive_int, default=5)
    add_device_argument(parser)
    args = parser.parse_args()
    device = pick_device(args.device)

    tokenizer = load_tokenizer()
    torch.manual_seed(0)
    vocabulary = {"vocab_size": len(tokenizer)}
    model = MiniMindLM(LMConfig(dim=args.dim, n_layers=args.n_layers, **vocabulary)).to(device).eval()
    small = MiniMindLM(LMConfig(dim=128, n_layers=2, n_heads=4, **vocabulary)).to(device).eval()
    settings = {"slots": 1, "slot_len": 2048, "token_budget": 512, "dtype": DTYPES.get(args.dtype, args.dtype)}
    settings |= {"deterministic": False, "compile": args.compile}
    ways = {"without": {}, "look-up": {"speculate": args.speculate}, "draft model": {"draft": small}}
    size = sum(parameter.numel() for parameter in model.parameters()) / 1e6
    print(f"{size:.1f} M parameters on {device}, {torch.get_num_threads()} threads, answers of {args.tokens}")
    engines = {way: Engine(model, tokenizer, **settings, **how) for way, how in ways.items()}
    plain = {way: engine.decoder.predict for way, engine in engines.items()}
    drafter = engines["draft model"].speculation.model.decoder
    drafter_predict = drafter.predict
    for name, (prompt, wanted) in texts(tokenizer, args.tokens).items():
        for way, engine in engines.items():
            engine.decoder.predict = plain[way]
            follow(engine.decoder, prompt + wanted)
        drafter.predict = drafter_predict
        follow(drafter, prompt + wanted, args.agreement)
        request = Request(prompt=prompt, max_new_tokens=len(wanted), eos_token_id=())
        seconds: dict[str, list[float]] = {way: [] for way in ways}
        for i in range(args.rounds + 1):  # the first reads the prompt, and warms up
            for way, engine in engines.items():
                started = time.perf_counter()
                (answer,) = engine.run([request])
                seconds[way] += [time.perf_counter() - started] if i else []
                if answer.ids != prompt + wanted:
                    raise RuntimeError(f"{way}: another text")
        print(f"text that {name}")
        for way, times in seconds.items():
            ratio = statistics.median(a / b for a, b in zip(seconds["without"], times, strict=True))
            print(f"  {way:<12}{len(wanted) / statistics.median(times):>9.1f} tokens/s{ratio:>8.2f} x without")


if __name__ == "__main__":
    run_main(main)
