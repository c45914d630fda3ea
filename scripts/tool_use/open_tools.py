"""The tools that a command's flags name, and the confirmation before a third-party tool runs."""

import contextlib
import json
import sys
from collections.abc import Iterator
from typing import Any

from scripts.tool_use.builtin import built_in_tools
from scripts.tool_use.mcp_tools import mcp_tools
from scripts.tool_use.registry import Registry
from scripts.tool_use.tool_flags import wants_tools
from trainer.errors import UserError, print_notice
from trainer.talk import read_line


@contextlib.contextmanager
def open_tools(args) -> Iterator[Registry | None]:
    """The tools that the flags name, or None. At the end the MCP servers that were started are stopped.

    Raises:
        UserError: a name is not a tool's, or belongs to two tools; an MCP server does not answer.
    """
    if not wants_tools(args):
        yield None
        return
    names = [name.strip() for name in args.tools.split(",")] if args.tools else []
    try:
        ours = built_in_tools(names)
    except ValueError as error:
        raise UserError(f"--tools: {error}") from None
    with mcp_tools(args.mcp or (), args.mcp_http or ()) as theirs:
        try:
            registry = Registry([*ours, *theirs], (lambda name, arguments: True) if args.yes else ask_person)
        except ValueError as error:
            raise UserError(f"{error}: leave one of them out") from None
        yield registry


def ask_person(name: str, arguments: dict[str, Any]) -> bool:
    """Whether the user allows an MCP tool to run; without a terminal to ask on, it does not run."""
    if not sys.stdin.isatty():
        print_notice(f"{name} was not run, as there is no terminal to ask on: --yes allows it")
        return False
    shown = "".join(
        char if char.isprintable() else "?" for char in f"{name}({json.dumps(arguments, ensure_ascii=False)})"
    )
    return read_line(f"[run {shown}? y/N] ").lower() in ("y", "yes", "是", "好")
