"""A tiny MCP server over standard input and output, or over HTTP if a port is given."""

import sys

from mcp.server import MCPServer

server = MCPServer("double")


@server.tool()
def reverse(text: str, times: int = 1) -> str:
    """Turn a text around."""
    return text[::-1] if times % 2 else text


@server.tool()
def fail() -> str:
    """Always fails."""
    raise ValueError("it broke")


@server.tool()
def pair(a: int) -> dict[str, int]:
    """Two numbers."""
    return {"a": a, "b": 2 * a}


if __name__ == "__main__":
    server.run("stdio") if len(sys.argv) == 1 else server.run("streamable-http", port=int(sys.argv[1]))
