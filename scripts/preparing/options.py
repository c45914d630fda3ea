"""The flags of prepare_data.py, and their defaults for each stage."""

import argparse
from dataclasses import dataclass, fields
from pathlib import Path

from scripts.preparing.field_map import parse_map
from scripts.preparing.stage_records import STAGES
from trainer.argument_types import BooleanFlag, mix_part, non_negative_float, non_negative_int, positive_int, seed
from trainer.arguments import add_device_argument, check_mix
from trainer.errors import UserError

LANGUAGES = ("zh", "en", "other")
WHAT_TO_DO = ("keep", "mask", "drop")
PERSONAL = ("urls", "emails", "phones", "ids")
# What a filter does where nothing is said; 0 and False are off. Stages in the order of `STAGES`.
DEFAULTS = {
    "min_chars": (10, 2, 2, 2, 1),
    "max_chars": (0, 0, 0, 0, 0),
    "min_tokens": (0, 0, 0, 0, 0),
    "max_tokens": (0, 0, 0, 0, 0),
    "language_share": (0.5, 0.5, 0.5, 0.5, 0.0),
    "max_repeated": (0.5, 0.6, 0.0, 0.6, 0.5),
    "max_runs": (0.4, 0.4, 0.0, 0.4, 0.4),
    "max_symbols": (0.4, 0.5, 0.0, 0.0, 0.5),
    "max_digits": (0.7, 0.0, 0.0, 0.0, 0.7),
    "max_broken": (0.001, 0.001, 0.001, 0.001, 0.001),
    "boilerplate": (50, 0, 0, 0, 0),
    "drop_refusals": (True, True, False, True, False),
    "drop_cut_off": (False, True, False, True, False),
    "check_turns": (False, True, True, True, False),
    "check_thoughts": (False, True, False, True, False),
    "normalise": (True, True, True, True, True),
    "urls": ("keep", "keep", "keep", "keep", "keep"),
    "emails": ("mask", "mask", "mask", "mask", "keep"),
    "phones": ("mask", "mask", "mask", "mask", "keep"),
    "ids": ("mask", "mask", "mask", "mask", "keep"),
    "near_dup": (0.8, 0.8, 0.8, 0.8, 0.0),
    "near_dup_questions": (0.0, 0.95, 0.0, 0.95, 0.0),
}


@dataclass(frozen=True)
class Settings:
    """The settings that determine the result, and only those: not the number of processes, nor any paths."""

    stage: str
    seed: int
    text_unit: str
    map: dict[str, tuple[str, ...]] | None
    tokenizer: str | None
    count_tokens: bool
    languages: tuple[str, ...]
    against: tuple[str, ...]
    exact_dup: bool
    ppl_model: str | None
    drop_worst: float
    mix: tuple[tuple[str, float], ...]
    max_lines: int
    shuffle: bool
    val_share: float
    val_lines: int
    shard_lines: int
    min_chars: int
    max_chars: int
    min_tokens: int
    max_tokens: int
    language_share: float
    max_repeated: float
    max_runs: float
    max_symbols: float
    max_digits: float
    max_broken: float
    boilerplate: int
    drop_refusals: bool
    drop_cut_off: bool
    check_turns: bool
    check_thoughts: bool
    normalise: bool
    urls: str
    emails: str
    phones: str
    ids: str
    near_dup: float
    near_dup_questions: float

    @property
    def needs_tokens(self) -> bool:
        return bool(self.count_tokens or self.min_tokens or self.max_tokens)


def share(text: str) -> float:
    """A number from 0 to 1."""
    number = non_negative_float(text)
    if number > 1:
        raise argparse.ArgumentTypeError(f"must be 0 to 1, not {text}")
    return number


def percentage(text: str) -> float:
    """A share such as "10%" or "0.1"; less than 1."""
    try:
        number = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        number = -1.0
    if not 0 <= number < 1:
        raise argparse.ArgumentTypeError(f"must be a share such as 10% or 0.1, not {text}")
    return number


def language_list(text: str) -> tuple[str, ...]:
    """A comma-separated list of languages."""
    found = tuple(text.split(","))
    if unknown := [name for name in found if name not in LANGUAGES]:
        raise argparse.ArgumentTypeError(f"languages are {', '.join(LANGUAGES)}, not {', '.join(unknown)}")
    return found


def add_arguments(parser: argparse.ArgumentParser, cores: int) -> None:
    """Add all flags. A filter's default is None, which stands for the stage's own."""
    parser.add_argument("inputs", nargs="*", metavar="IN", help="files, folders or patterns to read")
    parser.add_argument("--stage", choices=STAGES, required=True, help="stage that will train on it")
    parser.add_argument("--out", type=Path, required=True, metavar="OUT.jsonl", help="the file to write")
    parser.add_argument("--overwrite", action=BooleanFlag, help="replace existing files")
    parser.add_argument("--workers", type=positive_int, default=cores, help="processes (default: one per core)")
    parser.add_argument("--seed", type=seed, default=42, help="seed of the order, the held-out lines and the sampling")

    reading = parser.add_argument_group("reading")
    reading.add_argument("--map", metavar='"user=q assistant=a"', help="which keys hold what, if detection fails")
    reading.add_argument(
        "--text_unit",
        choices=("document", "paragraph", "line"),
        default="document",
        help="unit of text in a txt or md file",
    )
    reading.add_argument(
        "--source", action="append", default=[], metavar="NAME:LICENCE", help="a licence, for the report; repeatable"
    )

    filters = parser.add_argument_group("filters (0 is off; the default is the stage's, see docs/data.md)")
    filters.add_argument("--min_chars", type=non_negative_int, help="minimum characters of a line")
    filters.add_argument("--max_chars", type=non_negative_int, help="maximum characters of a line")
    filters.add_argument("--min_tokens", type=non_negative_int, help="minimum tokens of a line")
    filters.add_argument("--max_tokens", type=non_negative_int, help="maximum tokens of a line")
    filters.add_argument(
        "--languages", type=language_list, default=("zh", "en"), metavar="zh,en,other", help="languages to keep"
    )
    filters.add_argument("--language_share", type=share, help="minimum share of a line's letters in these")
    filters.add_argument(
        "--max_repeated", type=share, help="maximum share of n-grams that occurred earlier in the line"
    )
    filters.add_argument("--max_runs", type=share, help="maximum share of characters in runs of one character")
    filters.add_argument("--max_symbols", type=share, help="maximum share of symbols")
    filters.add_argument("--max_digits", type=share, help="maximum share of digits")
    filters.add_argument("--max_broken", type=share, help="maximum share of wrongly decoded characters")
    filters.add_argument(
        "--boilerplate", type=non_negative_int, metavar="N", help="remove lines that occur in N documents or more"
    )
    filters.add_argument("--drop_refusals", action=BooleanFlag, default=None, help='"As an AI…", 很抱歉…')
    filters.add_argument("--drop_cut_off", action=BooleanFlag, default=None, help="answers that were cut off")
    filters.add_argument("--check_turns", action=BooleanFlag, default=None, help="chats whose turns do not alternate")
    filters.add_argument("--check_thoughts", action=BooleanFlag, default=None, help="malformed <think> or <answer>")
    for name, what in zip(PERSONAL, ("URLs", "e-mail addresses", "phone numbers", "ID and card numbers"), strict=True):
        filters.add_argument(f"--{name}", choices=WHAT_TO_DO, help=f"what to do with {what}")
    filters.add_argument("--normalise", action=BooleanFlag, default=None, help="NFC, plain letters, digits and spaces")

    same = parser.add_argument_group("duplicates")
    same.add_argument("--exact_dup", action=BooleanFlag, default=True, help="drop exact duplicates")
    same.add_argument("--near_dup", type=share, help="drop lines this similar to another (0.8: a fifth differs)")
    same.add_argument("--near_dup_questions", type=share, help="the same for questions alone")
    same.add_argument(
        "--against",
        nargs="+",
        default=[],
        metavar="FILE",
        help="drop lines that contain a question of these evaluations",
    )

    quality = parser.add_argument_group("quality, by a model")
    quality.add_argument("--ppl_model", metavar="WEIGHTS", help="small model that scores every line")
    quality.add_argument(
        "--drop_worst", type=percentage, default=0.1, help="share of lines with the highest perplexity, to drop"
    )
    add_device_argument(quality)

    out = parser.add_argument_group("output")
    out.add_argument("--mix", type=mix_part, nargs="+", default=[], metavar="IN:SHARE", help="inputs with their shares")
    out.add_argument("--max_lines", type=non_negative_int, default=0, help="maximum lines; 0: all")
    out.add_argument("--shuffle", action=BooleanFlag, default=True, help="shuffle the lines by the seed")
    out.add_argument("--val_share", type=share, default=0.01, help="share of lines held out")
    out.add_argument("--val_lines", type=non_negative_int, default=2000, help="maximum lines held out")
    out.add_argument(
        "--shard_lines", type=non_negative_int, default=0, help="split into files of this many lines; 0: one"
    )
    out.add_argument("--tokenizer", default=None, metavar="DIR", help="tokenizer folder (default: the shipped one)")
    out.add_argument("--count_tokens", action=BooleanFlag, help="count all tokens, not those of 20,000 lines")


def check(args: argparse.Namespace) -> Settings:
    """The settings that the arguments result in.

    Raises:
        UserError: a flag is wrong; the message says which, and what it takes.
    """
    if bool(args.inputs) == bool(args.mix):
        raise UserError(
            "name what to read: IN…, or --mix IN:SHARE…, not both" if args.mix else "name what to read: IN…"
        )
    check_mix(args.mix)
    if args.out.suffix != ".jsonl":
        raise UserError(f"--out {args.out}: its name must end with .jsonl")
    for one in args.source:
        name, _, licence = one.rpartition(":")
        if not name or not licence:
            raise UserError(f"--source {one}: must be NAME:LICENCE, such as wiki.jsonl:CC-BY-SA-4.0")
    if args.ppl_model and not Path(args.ppl_model).exists():
        raise UserError(f"--ppl_model {args.ppl_model} does not exist: name a file or folder of weights")
    place = STAGES.index(args.stage)
    values = {name: values[place] for name, values in DEFAULTS.items()}
    values |= {name: value for name in values if (value := getattr(args, name)) is not None}
    if args.stage in ("pretrain", "tokenizer") and args.near_dup_questions:
        raise UserError(f"--near_dup_questions compares the questions of chats, and --stage {args.stage} writes texts")
    for name in ("near_dup", "near_dup_questions"):
        if 0 < values[name] < 0.5:
            raise UserError(f"--{name} must be 0.5 to 1, or 0 for none, not {values[name]}")
    own = {
        "map": parse_map(args.map) if args.map else None,
        "against": tuple(args.against),
        "mix": tuple((name, float(share)) for name, share in args.mix),
    }
    taken = {field.name: getattr(args, field.name) for field in fields(Settings) if hasattr(args, field.name)}
    return Settings(**taken | values | own)
