"""The flags that give a model tools."""

import argparse

from trainer.argument_types import BooleanFlag, positive_int, text


def add_tool_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--tools",
        type=text,
        default=None,
        metavar="NAMES",
        help="tools the model may call, comma-separated: calculator, calendar, convert_units, look_up, or all",
    )
    parser.add_argument("--max_calls", type=positive_int, default=8, help="maximum number of calls per question")
    parser.add_argument(
        "--mcp",
        type=text,
        action="append",
        metavar="COMMAND",
        help="add the tools of the MCP server that this command starts (may be repeated)",
    )
    parser.add_argument(
        "--mcp_http", type=text, action="append", metavar="URL", help="add the tools of the MCP server at this address"
    )
    parser.add_argument("--yes", action=BooleanFlag, help="run MCP tools without asking")


def wants_tools(args) -> bool:
    """Whether --tools, --mcp or --mcp_http is given."""
    return bool(args.tools or args.mcp or args.mcp_http)
