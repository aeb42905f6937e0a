"""An MCP server over HTTP, written with the package mcp: its transport is the first argument."""

import os
import socket
import sys

import uvicorn
from mcp.server.mcpserver import MCPServer

server = MCPServer("web")


@server.tool()
def echo(text: str) -> str:
    """Say it"""
    return text


@server.tool()
def flood(text: str) -> str:
    """Say too much"""
    return "x" * 10**7


@server.tool()
def die(text: str) -> str:
    """End the server"""
    os._exit(1)


def main():
    app = server.sse_app() if sys.argv[1] == "sse" else None
    app = app or server.streamable_http_app(json_response=sys.argv[1] == "json")
    with socket.create_server(("127.0.0.1", 0)) as listener:
        print(listener.getsockname()[1], flush=True)
        config = uvicorn.Config(app, log_level="critical", lifespan="on")
        uvicorn.Server(config).run([listener])


if __name__ == "__main__":
    main()
