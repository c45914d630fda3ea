"""The flags that give a model tools."""

import argparse

from trainer.argument_types import positive_int, text


def add_tool_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--tools",
        type=text,
        default=None,
        metavar="NAMES",
        help="let the model call these, comma-separated: calculator, calendar, convert_units, look_up, or all",
    )
    parser.add_argument("--max_calls", type=positive_int, default=8, help="calls per question that are carried out")
