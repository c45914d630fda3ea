"""The flags that give a model tools."""

import argparse

from trainer.argument_types import BooleanFlag, positive_int, text


def add_tool_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--tools",
        type=text,
        default=None,
        metavar="NAMES",
        help="let the model call these, comma-separated: calculator, calendar, convert_units, look_up, or all",
    )
    parser.add_argument("--max_calls", type=positive_int, default=8, help="calls per question that are carried out")
    parser.add_argument(
        "--mcp",
        type=text,
        action="append",
        metavar="COMMAND",
        help="also the tools of the MCP server that this command starts (may be repeated)",
    )
    parser.add_argument(
        "--mcp_http", type=text, action="append", metavar="URL", help="also those of the MCP server at this address"
    )
    parser.add_argument("--yes", action=BooleanFlag, help="let MCP tools act without asking")
