"""Structured output: how many answers of random weights are valid, and what the constraint costs in tokens per second.

    python -m benchmarks.constrained                  1,000 answers to fifty schemas, then sixteen at once, 26M, fp32
    python -m benchmarks.constrained --answers 0 --dim 768 --n_layers 16      only the speed, of another size

The schemas are typical ones, all bounded, so that even random tokens come to an end. An answer counts as valid if it is
JSON that jsonschema accepts. For the speed, the same engine generates free text, JSON, and JSON so near its end that
every token is watched, in turn, round after round; each figure is the median of the rounds.
"""

import json
import statistics
import time
from typing import Any

import trainer.start  # noqa: F401  (first of all: what to do where PyTorch, or a home folder, is missing)
import jsonschema
import torch

from model import LMConfig, MiniMindLM
from model.inference.constraint import Constraint
from model.inference.request import Request
from model.inference.scheduler import Engine
from scripts.serving.grammars import Grammars, schema_form
from trainer.argument_types import non_negative_int, positive_int
from trainer.arguments import Parser, add_device_argument
from trainer.device import pick_device
from trainer.errors import run_main
from trainer.weights import load_tokenizer

STREAMS, PROMPT = 16, 32

WORD: dict[str, Any] = {"type": "string", "maxLength": 12}
COUNT: dict[str, Any] = {"type": "integer", "minimum": 0, "maximum": 999}
SIGNED: dict[str, Any] = {"type": "integer", "minimum": -50, "maximum": 50}
SHARE: dict[str, Any] = {"type": "number", "minimum": 0, "maximum": 1}
YES: dict[str, Any] = {"type": "boolean"}
DATE: dict[str, Any] = {"type": "string", "format": "date"}


def thing(required: list[str] | None = None, **properties: Any) -> dict[str, Any]:
    """The schema of an object with only these properties; by default all of them are required."""
    return {
        "type": "object",
        "properties": properties,
        "required": list(properties) if required is None else required,
        "additionalProperties": False,
    }


def listed(item: dict[str, Any] | bool, most: int = 3, least: int = 0) -> dict[str, Any]:
    return {"type": "array", "items": item, "minItems": least, "maxItems": most}


def one_of(*values: Any) -> dict[str, Any]:
    return {"enum": list(values)}


PLACE = thing(city=WORD, country=one_of("FR", "CN", "为"))
TREE = {"$defs": {"leaf": thing(value=COUNT)}, **thing(left={"$ref": "#/$defs/leaf"}, right={"$ref": "#/$defs/leaf"})}
SCHEMAS: tuple[dict[str, Any], ...] = (
    WORD,
    COUNT,
    SIGNED,
    SHARE,
    YES,
    DATE,
    {"type": "null"},
    one_of("red", "green", "blue"),
    one_of(1, 2.5, None, True, "two"),
    {"const": {"a": [1, 2]}},
    {"type": "string", "minLength": 3, "maxLength": 5},
    {"type": "string", "pattern": "^[A-Z]{2}[0-9]{3}$"},
    {"type": "string", "pattern": "^(yes|no)(, sir)?$"},
    {"type": "string", "format": "time"},
    {"type": "string", "format": "uuid"},
    {"type": "string", "format": "ipv4"},
    {"type": ["integer", "null"], "minimum": 0, "maximum": 9},
    {"anyOf": [WORD, COUNT]},
    {"anyOf": [thing(kind={"const": "a"}, x=COUNT), thing(kind={"const": "b"}, y=WORD)]},
    {"oneOf": [{"type": "string", "maxLength": 4}, {"type": "boolean"}]},
    {"allOf": [thing(a=COUNT, b=WORD), {"type": "object", "required": ["a"]}]},
    {"type": "integer", "exclusiveMinimum": 10, "exclusiveMaximum": 20},
    {"type": "integer", "multipleOf": 5, "minimum": 0, "maximum": 100},
    listed(COUNT),
    listed(WORD, most=4, least=2),
    listed(YES, most=8, least=8),
    listed(listed(SIGNED)),
    listed(one_of("a", "b")),
    listed({"type": "null"}, most=0),
    {"type": "array", "prefixItems": [WORD, COUNT], "items": False, "minItems": 2},
    {"type": "array", "prefixItems": [YES], "items": COUNT, "minItems": 1, "maxItems": 3},
    thing(),
    thing(name=WORD),
    thing(name=WORD, age=COUNT),
    thing(required=["name"], name=WORD, age=COUNT, mail=WORD),
    thing(required=[], a=YES, b=YES, c=YES),
    thing(name=WORD, place=PLACE),
    thing(people=listed(thing(name=WORD, age=COUNT))),
    thing(when=DATE, what=WORD, where=PLACE, whole_day=YES),
    thing(label=one_of("positive", "neutral", "negative"), confidence=SHARE),
    thing(steps=listed(WORD, least=1), answer={"type": ["number", "null"], "minimum": -9, "maximum": 9}),
    thing(姓名=WORD, 年龄=COUNT),
    thing(**{"a key with spaces": COUNT, 'quoted "so"': WORD, "back\\slash": YES}),
    thing(a=thing(b=thing(c=thing(d=COUNT)))),
    TREE,
    {"$defs": {"node": thing(required=[], next={"$ref": "#/$defs/end"}), "end": YES}, "$ref": "#/$defs/node"},
    {"type": "object", "properties": {"id": COUNT}, "required": ["id", "tag"], "additionalProperties": WORD}
    | {"maxProperties": 3},
    {"type": "object", "patternProperties": {"^x[0-9]$": COUNT}, "additionalProperties": False, "maxProperties": 2},
    thing(title=WORD, tags=listed(WORD), rating={"type": "integer", "minimum": 1, "maximum": 5}, price=SHARE),
    thing(tool=one_of("search", "stop"), arguments=thing(required=["query"], query=WORD, limit=COUNT)),
)


def valid_answers(engine: Engine, grammars: Grammars, count: int) -> int:
    """How many of `count` answers at temperature 2 are valid under their schemas."""
    schemas = [SCHEMAS[number % len(SCHEMAS)] for number in range(count)]
    settings = {"prompt": [1, 5, 9], "max_new_tokens": 400, "temperature": 2.0}
    constraints = [grammars.make(schema_form(schema)) for schema in schemas]
    answers = engine.run(Request(seed=n, constraint=one, **settings) for n, one in enumerate(constraints))
    return sum(is_valid(answer.text, schema) for answer, schema in zip(answers, schemas, strict=True))


def is_valid(text: str, schema: dict[str, Any]) -> bool:
    try:
        jsonschema.validate(json.loads(text), schema)
    except (ValueError, jsonschema.ValidationError):
        return False
    return True


def tokens_per_second(engine: Engine, constraint: Constraint | None, tokens: int, most: int | None) -> float:
    """The speed of STREAMS concurrent answers, measured until one of them has `tokens` tokens."""
    vocabulary = engine.decoder.config.vocab_size
    prompts = torch.randint(3, vocabulary, (STREAMS, PROMPT), generator=torch.Generator().manual_seed(0)).tolist()
    settings = {"max_new_tokens": most, "temperature": 1.0, "constraint": constraint, "eos_token_id": ()}
    answers = [engine.submit(Request(prompt=ids, seed=n, **settings)) for n, ids in enumerate(prompts)]
    engine.step()
    while not all(answer.count for answer in answers):  # the prompts are read
        engine.step()
    before, started = sum(answer.count for answer in answers), time.perf_counter()
    while max(answer.count for answer in answers) < tokens:
        engine.step()
    seconds, written = time.perf_counter() - started, sum(answer.count for answer in answers) - before
    for answer in answers:
        engine.cancel(answer)
    engine.step()
    return written / seconds


def main():
    parser = Parser(__doc__)
    parser.add_argument("--answers", type=non_negative_int, default=1000, help="answers to validate; 0: none")
    parser.add_argument("--dim", type=positive_int, default=512)
    parser.add_argument("--n_layers", type=positive_int, default=8)
    parser.add_argument("--tokens", type=positive_int, default=100, help="tokens per answer in the speed test")
    parser.add_argument("--rounds", type=positive_int, default=5)
    add_device_argument(parser)
    args = parser.parse_args()
    tokenizer = load_tokenizer(None)
    torch.manual_seed(0)
    config = LMConfig(dim=args.dim, n_layers=args.n_layers, vocab_size=len(tokenizer))
    model = MiniMindLM(config).to(pick_device(args.device)).eval()
    engine = Engine(model, tokenizer, slots=STREAMS, slot_len=4096)
    grammars = Grammars(tokenizer)
    if args.answers:
        print(f"{valid_answers(engine, grammars, args.answers)} of {args.answers} answers are valid", flush=True)
    words = {"type": "array", "items": WORD, "minItems": 2 * args.tokens}  # too many to come to an end
    long = grammars.make(schema_form(words))
    near = grammars.make(schema_form({"type": "array", "items": WORD, "minItems": args.tokens // 8}))
    kinds = {
        "free text": (None, None),
        "JSON": (long, long.watched + args.tokens + 1),
        "JSON near its end": (near, args.tokens + args.tokens // 4),
    }
    speeds: dict[str, list[float]] = {name: [] for name in kinds}
    for _ in range(args.rounds):
        for name, (constraint, most) in kinds.items():
            speeds[name].append(tokens_per_second(engine, constraint, args.tokens, most))
    free = statistics.median(speeds["free text"])
    for name, found in speeds.items():
        speed = statistics.median(found)
        print(f"{name:<18} {speed:8.1f} tokens/s ({min(found):.1f} to {max(found):.1f}), {speed / free - 1:+.1%}")


if __name__ == "__main__":
    run_main(main)
