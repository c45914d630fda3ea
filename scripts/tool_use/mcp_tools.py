"""The tools of MCP servers (Model Context Protocol): programs started here, or servers at an address.

They are third-party code and may do anything: unless --yes is given, the user is asked before one runs.
"""

import contextlib
import json
import shlex
import sys
from collections.abc import Iterator, Sequence
from typing import Any

from scripts.tool_use.registry import Tool
from trainer.errors import UserError, print_notice

SECONDS = 60.0  # for a server to answer
MOST_PAGES = 100  # of a server's list of tools


@contextlib.contextmanager
def mcp_tools(commands: Sequence[str], addresses: Sequence[str]) -> Iterator[list[Tool]]:
    """The tools of these servers; at the end the programs are stopped.

    Args:
        commands: the commands of programs that speak MCP over standard input and output.
        addresses: the addresses of servers that speak MCP over HTTP, such as http://127.0.0.1:8000/mcp.

    Raises:
        UserError: the package mcp is missing, a command is invalid, or a server does not start or answer.
    """
    if not commands and not addresses:
        yield []
        return
    try:
        from anyio.from_thread import start_blocking_portal
        from mcp import Client, StdioServerParameters
    except ImportError:
        raise UserError("--mcp and --mcp_http need the package mcp: pip install 'mcp>=2,<3'") from None
    tools: list[Tool] = []
    failed: BaseException | None = None
    with start_blocking_portal() as portal, contextlib.ExitStack() as opened:
        try:
            for command in commands:
                program, *arguments = _words(command)
                server = StdioServerParameters(command=program, args=arguments)
                tools += _opened(portal, opened, Client(server, read_timeout_seconds=SECONDS), f"--mcp {command!r}")
            for address in addresses:
                client = Client(address, read_timeout_seconds=SECONDS)
                tools += _opened(portal, opened, client, f"--mcp_http {address!r}")
            print_notice(f"MCP tools: {', '.join(tool.schema['name'] for tool in tools) or 'none'}")
            yield tools
        except BaseException as error:  # the client would wrap it in groups of its own
            failed = error
    if failed is not None:
        raise failed


def _opened(portal, opened: contextlib.ExitStack, client, given: str) -> list[Tool]:
    """Connect to a server until `opened` is closed; returns its tools."""
    try:
        opened.enter_context(portal.wrap_async_context_manager(client))
        return _tools_of(portal, client)
    except Exception as error:  # of any kind: the program is not there, ends, or says something else
        raise UserError(f"{given}: {_first(error)}") from None


def _words(command: str) -> list[str]:
    try:
        words = shlex.split(command, posix=sys.platform != "win32")
    except ValueError as error:
        raise UserError(f"--mcp {command!r}: {error}") from None
    if not words:
        raise UserError("--mcp: the command is empty")
    return [word.strip('"') for word in words] if sys.platform == "win32" else words


def _tools_of(portal, client) -> list[Tool]:
    tools, cursor = [], None
    for _ in range(MOST_PAGES):
        page = portal.call(lambda cursor=cursor: client.list_tools(cursor=cursor))
        tools += [_tool(portal, client, found) for found in page.tools]
        cursor = page.next_cursor
        if not cursor:
            break
    return tools


def _tool(portal, client, found) -> Tool:
    def call(**arguments: Any) -> str:
        result = portal.call(client.call_tool, found.name, arguments)
        texts = [_text(part) for part in result.content]
        if not texts and result.structured_content is not None:
            texts = [json.dumps(result.structured_content, ensure_ascii=False)]
        if result.is_error:
            raise RuntimeError("\n".join(texts) or "the tool failed")
        return "\n".join(texts)

    schema = {"name": found.name, "description": found.description or "", "parameters": found.input_schema}
    return Tool(call, schema, foreign=True)


def _text(part) -> str:
    """A part of a result as text; of other media only the type is named."""
    return part.text if part.type == "text" else f"[{part.type}]"


def _first(error: BaseException) -> str:
    """The message of an error, or of the first in a group, in one line."""
    while isinstance(getattr(error, "exceptions", None), tuple | list) and error.exceptions:
        error = error.exceptions[0]
    return " ".join(str(error).split())[:200] or type(error).__name__
