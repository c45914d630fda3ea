"""The types of flags, for `add_argument`. Imports nothing heavy."""

import argparse
import math
import re


class BooleanFlag(argparse.Action):
    """A switch: `--x`, `--x 1|0|true|False|yes|no`, or `--no-x`, each parsed as it is meant."""

    WORDS = {"1": True, "true": True, "yes": True, "on": True, "0": False, "false": False, "no": False, "off": False}  # noqa: RUF012

    def __init__(self, option_strings, dest, default=False, help=None):
        names = [*option_strings, *(f"--no-{name[2:]}" for name in option_strings)]
        super().__init__(names, dest, nargs="?", default=default, metavar="0|1", help=help)

    def __call__(self, parser, namespace, value, option_string=None):
        on = True if value is None else self.WORDS.get(value.lower())
        if on is None:
            parser.error(
                f"{option_string} takes 1 or 0, true or false, not {value!r}; put positional arguments before it"
            )
        setattr(namespace, self.dest, on != option_string.startswith("--no-"))


def text(value: str) -> str:
    """Text for a model or a server, which must be valid UTF-8; only a path may be any bytes."""
    try:
        value.encode()
    except UnicodeEncodeError:
        raise argparse.ArgumentTypeError("not valid UTF-8") from None
    return value


def positive_int(text: str) -> int:
    """An integer of at least 1."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be 1 or more, not {number}")
    return number


def non_negative_int(text: str) -> int:
    """An integer of at least 0."""
    number = int(text)
    if number < 0:
        raise argparse.ArgumentTypeError(f"must be 0 or more, not {number}")
    return number


def seed(text: str) -> int:
    """A seed that every random generator accepts: an integer from 0 to 2^63 - 1."""
    number = int(text)
    if not 0 <= number < 1 << 63:
        raise argparse.ArgumentTypeError(f"must be 0 to 2^63 - 1, not {text}")
    return number


def positive_float(text: str) -> float:
    """A finite number above 0."""
    number = float(text)
    if not 0 < number < math.inf:
        raise argparse.ArgumentTypeError(f"must be a number above 0, not {text}")
    return number


def non_negative_float(text: str) -> float:
    """A finite number of at least 0."""
    number = float(text)
    if not 0 <= number < math.inf:
        raise argparse.ArgumentTypeError(f"must be a number of 0 or more, not {text}")
    return number


def probability(text: str) -> float:
    """A number above 0, at most 1."""
    number = float(text)
    if not 0 < number <= 1:
        raise argparse.ArgumentTypeError(f"must be above 0 and at most 1, not {text}")
    return number


def byte_size(text: str) -> int:
    """The number of bytes in a size such as "50GB", "1.5 TB", "512MiB", "0"."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmgt]?)(i?)b?", text.strip().lower())
    if not found:
        raise argparse.ArgumentTypeError(f"must be a size such as 50GB or 500MB, not {text}")
    number, prefix, binary = found.groups()
    return int(float(number) * (1024 if binary else 1000) ** " kmgt".index(prefix or " "))


def mix_part(text: str) -> tuple[str, float]:
    """A data file and its share, from "FILE:SHARE"."""
    file, _, share = text.rpartition(":")
    try:
        if not file:
            raise ValueError
        return file, positive_float(share)
    except (ValueError, argparse.ArgumentTypeError):
        raise argparse.ArgumentTypeError(
            f"must be FILE:SHARE with a share above 0, such as a.jsonl:0.7, not {text}"
        ) from None


def rope_scaling(text: str) -> dict:
    """How positions are stretched, of "TYPE:FACTOR" or "TYPE:FACTOR:TRAINED", as a dict with transformers' names."""
    kind, _, rest = text.partition(":")
    factor, _, trained = rest.partition(":")
    try:
        if kind not in ("yarn", "ntk", "linear"):
            raise ValueError
        scaling = {"rope_type": kind, "factor": positive_float(factor)}
        return scaling | ({"original_max_position_embeddings": positive_int(trained)} if trained else {})
    except (ValueError, argparse.ArgumentTypeError):
        raise argparse.ArgumentTypeError(
            f"must be yarn, ntk or linear, a factor and, if no json gives it, the trained length, such as yarn:4 or "
            f"yarn:4:512, not {text}"
        ) from None
