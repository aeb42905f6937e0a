"""Servers of tools run in one thread, and no server can stop the chat."""

import json
import os
import sys
import threading
from contextlib import closing
from pathlib import Path

import pytest

from mixchat.base.errors import UsageError
from mixchat.chat.tools.mcp_servers import MCPServers
from mixchat.chat.tools.server_file import ServerEntry, read_servers
from mixchat.chat.tools.toolbox import Toolbox
from mixchat.face.tool_results import ToolError
from mixchat.text.tool_call import ToolCall

SERVER = str(Path(__file__).parents[2] / "tools" / "mcp_server.py")
pytest.importorskip("mcp")


def entry(*arguments, name="hand"):
    return ServerEntry(name, sys.executable, (SERVER, *arguments))


def fault_of(mode):
    notes = []
    with closing(MCPServers([entry(mode), entry(name="other")], notes.append)) as servers:
        assert "echo" in {tool.name.removeprefix("other_") for tool in servers.tools}
        assert len(servers.tools) <= 64 + 5
    (note,) = notes
    return note


def test_a_tool_is_listed_and_called():
    with closing(MCPServers([entry()], pytest.fail)) as servers:
        assert [tool.name for tool in servers.tools] == ["echo", "flood", "die", "sleep", "fail"]
        assert servers.tools[0].description == "Say it"
        assert servers.call("echo", {"text": "Hi"}) == "Hi"
        with pytest.raises(ToolError, match="broken"):
            servers.call("fail", {"text": "broken"})


def test_a_server_that_dies_in_a_call_gives_an_error_and_the_others_go_on():
    servers = MCPServers([entry(), entry(name="other")], pytest.fail)
    with closing(servers):
        dead = servers.tools[2].name
        with pytest.raises(ToolError):
            servers.call(dead, {"text": ""})
        with pytest.raises(ToolError):
            servers.call("echo", {"text": ""})
        assert servers.call("other_echo", {"text": "Hi"}) == "Hi"


@pytest.mark.parametrize(
    ("mode", "fault"),
    [
        ("dies", "no key given"),
        ("floods", "hand: "),
        ("lies", "1 of its 6 tools are left out"),
        ("nonsense", "validation error"),
        ("thousand", "of its 1000 tools are left out"),
    ],
)
def test_a_bad_server_gets_one_line_and_the_others_work(mode, fault):
    assert fault in fault_of(mode)


def test_a_server_that_hangs_at_its_start_gets_one_line(monkeypatch):
    monkeypatch.setattr("mixchat.chat.tools.mcp_servers.START_TIMEOUT_S", 0.5)
    notes = []
    with closing(MCPServers([entry("hangs")], notes.append)) as servers:
        assert servers.tools == servers.tools == ()
    assert notes == ["MCP server hand: does not answer within 0 s"]


def test_a_command_that_is_not_there_gets_one_line():
    notes = []
    with closing(MCPServers([ServerEntry("x", "/nowhere/x")], notes.append)) as servers:
        assert servers.tools == ()
    assert len(notes) == 1
    assert "No such file" in notes[0]


def test_closing_ends_every_process_and_the_thread():
    threads = set(threading.enumerate())
    servers = MCPServers([entry(), entry(name="other")], print)
    assert len(servers.tools) == 10
    running = servers.processes
    servers.close()
    assert len(running) == 2
    for process in running:
        with pytest.raises(ProcessLookupError):
            os.kill(process.process.pid, 0)
    assert not [thread for thread in set(threading.enumerate()) - threads if thread.name == "mcp"]


def test_a_tool_runs_only_if_it_is_allowed_and_its_result_is_bounded():
    with closing(MCPServers([entry()], pytest.fail)) as servers:
        box, asked = Toolbox(servers, ["flood"]), []
        call = ToolCall("1", "echo", '{"text": "a\\u001b[31mb"}')
        assert "does not allow" in box.run(call)
        box.confirm = lambda name: asked.append(name) or "once"
        assert box.run(call) == box.run(call) == "a[31mb"
        box.confirm = lambda name: asked.append(name) or "always"
        box.run(call), box.run(call)
        assert asked == ["echo"] * 3
        assert box.run(ToolCall("2", "flood", "{}"), 50).splitlines() == [
            "x" * 50,
            "(cut off: 999,950 more characters)",
        ]
        assert "no tool" in box.run(ToolCall("3", "nothing", "{}"))
        assert "no JSON object" in box.run(ToolCall("4", "echo", '{"text": "a'))


@pytest.mark.parametrize(
    ("servers", "fault"),
    [
        ({}, "no object mcpServers"),
        ({"a": {}}, "either a command or a url"),
        ({"a": {"command": "x", "url": "http://y"}}, "either a command or a url"),
        ({"a": {"command": "x", "args": "y"}}, "args has to be a list"),
        ({"a": {"command": "x", "env": {"A": 1}}}, "env has to be an object of texts"),
        ({"a": {"url": "ftp://y"}}, "begin with http"),
        ({"a": []}, "has to be an object"),
        ({str(i): {"command": "x"} for i in range(100)}, "names 100 servers"),
    ],
)
def test_a_wrong_file_gets_one_line(tmp_path, servers, fault):
    path = tmp_path / "mcp.json"
    path.write_text(json.dumps({"mcpServers": servers}))
    with pytest.raises(UsageError, match=fault):
        read_servers(path)


def test_a_file_is_read_as_other_programs_write_it(tmp_path):
    path = tmp_path / "mcp.json"
    time = {"command": "uvx", "args": ["mcp-server-time"], "env": {"TZ": "UTC"}, "cwd": "/"}
    web = {"type": "sse", "url": "https://x/sse", "headers": {"A": "b"}}
    off = {"command": "y", "disabled": True}
    path.write_text(json.dumps({"mcpServers": {"time": time, "web": web, "off": off}}))
    assert read_servers(path) == [
        ServerEntry("time", "uvx", ("mcp-server-time",), {"TZ": "UTC"}, "/"),
        ServerEntry("web", url="https://x/sse", headers={"A": "b"}, is_sse=True),
    ]
