"""Servers of tools over HTTP, one that the package mcp made and some that behave badly."""

import subprocess
import sys
from contextlib import closing, contextmanager
from pathlib import Path

import pytest
from endless_server import endless_server

from mixchat.chat.tools.server_file import ServerEntry
from mixchat.chat.tools.toolbox import ToolError

pytest.importorskip("mcp")
from mixchat.chat.tools.mcp_servers import MCPServers

SERVER = str(Path(__file__).parents[2] / "tools" / "mcp_http_server.py")
JSON = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n\r\n"
EVENTS = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n\r\ndata: "


@contextmanager
def web_server(transport):
    process = subprocess.Popen([sys.executable, SERVER, transport], stdout=subprocess.PIPE)
    try:
        assert process.stdout is not None
        port = int(process.stdout.readline())
        path = "sse" if transport == "sse" else "mcp"
        yield ServerEntry("web", url=f"http://127.0.0.1:{port}/{path}", is_sse=transport == "sse")
    finally:
        process.kill()
        process.communicate()


@pytest.mark.parametrize("transport", ["sse", "json", "events"])
def test_a_server_over_http_may_flood_and_die(transport):
    """The body of an answer over HTTP had no bound."""
    with web_server(transport) as entry, closing(MCPServers([entry], pytest.fail)) as servers:
        assert [tool.name for tool in servers.tools] == ["echo", "flood", "die"]
        assert servers.call("echo", {"text": "Hi"}) == "Hi"
        with pytest.raises(ToolError):
            servers.call("flood", {"text": ""})
    with web_server(transport) as entry, closing(MCPServers([entry], pytest.fail)) as servers:
        assert servers.call("echo" if servers.tools else "", {"text": "x" * 10**5}) == "x" * 10**5
        with pytest.raises(ToolError):
            servers.call("die", {"text": ""})


@pytest.mark.parametrize("is_sse", [True, False])
@pytest.mark.parametrize("head", [JSON, EVENTS, JSON[:-2] + b"Content-Encoding: gzip\r\n\r\n"])
def test_an_endless_answer_gets_one_line(monkeypatch, head, is_sse):
    monkeypatch.setattr("mixchat.chat.tools.mcp_servers.START_TIMEOUT_S", 10)
    notes = []
    with endless_server(head, b"x" * 1000) as host:
        entry = ServerEntry("web", url=f"http://{host}/", is_sse=is_sse)
        with closing(MCPServers([entry], notes.append)) as servers:
            assert servers.tools == ()
    (note,) = notes
    assert note.startswith("MCP server web: ")


def test_an_address_where_nothing_listens_gets_one_line():
    notes = []
    entry = ServerEntry("web", url="http://127.0.0.1:1/mcp")
    with closing(MCPServers([entry], notes.append)) as servers:
        assert servers.tools == ()
    assert len(notes) == 1
