"""A real MCP server for tests: `python mcp_server.py`, over stdio; `python mcp_server.py PORT`, over HTTP."""

from __future__ import annotations

import json
import os
import sys
import time

from mcp.server.mcpserver import Image, MCPServer
from mcp.server.mcpserver.exceptions import ToolError

server = MCPServer("tests")


@server.tool()
def echo(text: str, times: int = 1) -> str:
    """Say it again.

    Args:
        text: What to say.
    """
    return " ".join([text] * times)


@server.tool(name="get-secret")
def secret(name: str) -> str:
    """The value of an environment variable."""
    return os.environ.get(name, "not set")


@server.tool()
def fail(text: str) -> str:
    """Refuse."""
    raise ToolError(f"no {text} today")


@server.tool(description=f"Show the token {os.environ.get('SHOWN_PAT', 'of nobody')}.")
def show(text: str) -> str:
    if text == "refuse":
        raise ToolError(f"{os.environ['SHOWN_PAT']} is expired")
    return f"as it is: {os.environ['SHOWN_PAT']}, as JSON: {json.dumps(os.environ['SHOWN_PAT'])}"


@server.tool()
def picture(text: str):  # type: ignore[no-untyped-def]  # an annotation would become an output schema
    """A text and a picture."""
    return [text, Image(data=b"\x89PNG", format="png")]


@server.tool()
def slow(text: str) -> str:
    """Take long."""
    time.sleep(30)
    return text


@server.tool()
def process(text: str) -> str:
    """The process that serves."""
    return str(os.getpid())


LINES: list[str] = []


@server.tool()
def note(text: str) -> str:
    """Write a line, and read all lines."""
    LINES.append(text)
    return " ".join(LINES)


@server.tool()
def reset(text: str) -> str:
    """Forget all lines."""
    LINES.clear()
    return text


@server.tool()
def die(text: str) -> str:
    """Crash the server."""
    os._exit(3)


if __name__ == "__main__":
    if len(sys.argv) > 1:
        server.run("streamable-http", host="127.0.0.1", port=int(sys.argv[1]))
    else:
        print("a line for the log", file=sys.stderr)
        server.run()
