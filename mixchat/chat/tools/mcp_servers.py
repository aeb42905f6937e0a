"""MCP servers in one thread with one event loop, their tools, and calls of them."""

from __future__ import annotations

import asyncio
import json
import logging
import re
import signal
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

from mixchat.base import interrupts
from mixchat.base.errors import MissingDependencyError, short_message
from mixchat.base.progress import Note
from mixchat.base.sanitize import sanitize
from mixchat.chat.tools.server_file import ServerEntry
from mixchat.chat.tools.stdio import ServerProcess, start_process
from mixchat.face.tool_results import ToolError
from mixchat.text.tool_call import TOOL_NAME, Tool

START_TIMEOUT_S = 30.0
_CALL_TIMEOUT_S = 120.0
_END_TIMEOUT_S = 3.0
_MAX_TOOLS = 64  # of a server, because each takes room in the context
_MAX_DESCRIPTION = 1000  # characters
_MAX_SCHEMA = 10_000  # characters


@dataclass(frozen=True)
class _OfferedTool:
    """A tool under the name that the model sees, its name on the server, and its session."""

    tool: Tool
    name: str
    session: Any


class MCPServers:
    """The servers of a file. They start at once, and `close` ends them.

    `note` gets a line for each server that cannot be used in full. Raises `MissingDependencyError`
    without the package of MCP.
    """

    def __init__(self, entries: Sequence[ServerEntry], note: Note) -> None:
        try:
            import mcp  # noqa: F401
        except ImportError:
            hint = "Install it: pip install 'mixchat[mcp]'"
            raise MissingDependencyError("--mcp needs the package mcp", hint=hint) from None
        for name in ("mcp", "client", "httpx2"):  # else their tracebacks reach the terminal
            logging.getLogger(name).addHandler(logging.NullHandler())
            logging.getLogger(name).propagate = False
        self._entries = entries
        self._note = note
        self._listed: dict[str, list[_OfferedTool]] = {}  # by the name of the server
        self._started: list[list[ServerProcess]] = []  # of each server
        self._told: set[str] = set()
        self._loop = asyncio.new_event_loop()
        self._closing = asyncio.Event()
        self._ready: list[Future[str]] = [Future() for _ in entries]  # each with a fault, or ""
        self._thread = threading.Thread(target=self._run, name="mcp", daemon=True)
        self._thread.start()

    @property
    def tools(self) -> tuple[Tool, ...]:
        """Return the tools of all servers, after these have started."""
        for entry, ready in zip(self._entries, self._ready, strict=True):
            fault = ready.result(START_TIMEOUT_S + _END_TIMEOUT_S)
            if fault and entry.name not in self._told:
                self._told.add(entry.name)
                self._note(f"MCP server {entry.name}: {fault}")
        return tuple(each.tool for each in self._by_name().values())

    @property
    def processes(self) -> tuple[ServerProcess, ...]:
        """Return the processes of the servers that are commands."""
        return tuple(process for started in self._started for process in started)

    def _by_name(self) -> dict[str, _OfferedTool]:
        """Return the tools by names of their own, in the order of the file.

        By the order in which servers answer, a tool had another name in another run.
        """
        offered: dict[str, _OfferedTool] = {}
        for entry in self._entries:
            for each in self._listed.get(entry.name, ()):
                name = each.tool.name
                if name in offered:
                    name = re.sub(r"[^a-zA-Z0-9_.-]", "_", f"{entry.name}_{name}")[:128]
                offered[name] = replace(each, tool=replace(each.tool, name=name))
        return offered

    def call(self, name: str, arguments: Mapping[str, Any]) -> str:
        """Return the text of a tool's result. Ctrl-C ends the wait. Raises `ToolError`."""
        running = asyncio.run_coroutine_threadsafe(
            self._call(self._by_name()[name], arguments), self._loop
        )
        try:
            return running.result(_CALL_TIMEOUT_S + _END_TIMEOUT_S)
        except FutureTimeoutError:
            raise ToolError(f"no result within {_CALL_TIMEOUT_S:.0f} s") from None
        finally:
            running.cancel()

    def close(self) -> None:
        """End all servers and the thread."""
        with interrupts.deferred(), interrupts.saving():
            with suppress(RuntimeError):  # the loop has ended
                self._loop.call_soon_threadsafe(self._closing.set)
            self._thread.join(_END_TIMEOUT_S)
            if self._thread.is_alive():  # a task hangs
                for process in self.processes:
                    process.kill(signal.SIGKILL)

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        try:
            self._loop.run_until_complete(self._serve_all())
        finally:
            self._loop.close()

    async def _serve_all(self) -> None:
        pairs = zip(self._entries, self._ready, strict=True)
        tasks = [asyncio.create_task(self._serve(entry, ready)) for entry, ready in pairs]
        await self._closing.wait()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _serve(self, entry: ServerEntry, ready: Future[str]) -> None:
        """Connect to a server, offer its tools, and hold the connection until the end."""
        from mcp import Client

        started: list[ServerProcess] = []
        self._started.append(started)
        fault = ""
        try:
            client = Client(_transport(entry, started), cache=None)
            task = asyncio.ensure_future(self._offer(client, entry, ready, started))
            try:
                # `wait_for` loses a cancellation that comes together with the result.
                await asyncio.wait([asyncio.wrap_future(ready)], timeout=START_TIMEOUT_S)
                if ready.done():
                    await task
                fault = f"does not answer within {START_TIMEOUT_S:.0f} s"
            finally:
                task.cancel()
                await asyncio.gather(task, return_exceptions=True)
        except Exception as error:
            fault = _fault_of(error)
        finally:
            if not ready.done():
                ready.set_result(_with_last_words(fault or "ended", started))

    async def _offer(
        self, client: Any, entry: ServerEntry, ready: Future[str], started: list[ServerProcess]
    ) -> None:
        try:
            async with client:
                fault = await self._list(client, entry)
                ready.set_result(fault)
                await asyncio.Event().wait()  # until this task is cancelled
        except Exception as error:
            if not ready.done():
                ready.set_result(_with_last_words(_fault_of(error), started))

    async def _list(self, client: Any, entry: ServerEntry) -> str:
        """Offer the tools of a server. Return why some of them are not offered, or nothing."""
        listed = self._listed.setdefault(entry.name, [])
        cursor = None
        left_out = 0
        count = 0
        while True:
            page = await client.list_tools(cursor=cursor)
            for raw in page.tools:
                count += 1
                tool = _tool_of(raw)
                if tool is None or count - left_out > _MAX_TOOLS:
                    left_out += 1
                    continue
                listed.append(_OfferedTool(tool, raw.name, client.session))
            cursor = page.next_cursor
            if cursor is None or count > 10 * _MAX_TOOLS:
                break
        if not left_out:
            return ""
        return (
            f"{left_out} of its {count} tools are left out; "
            f"a chat takes {_MAX_TOOLS} of a server, with a usable name and schema"
        )

    async def _call(self, offered: _OfferedTool, arguments: Mapping[str, Any]) -> str:
        import mcp_types

        parameters = mcp_types.CallToolRequestParams(name=offered.name, arguments=dict(arguments))
        try:
            # `call_tool` also checks the result by a schema of the server's, which may be endless.
            result = await offered.session.send_request(
                mcp_types.CallToolRequest(params=parameters),
                mcp_types.CallToolResult,
                request_read_timeout_seconds=_CALL_TIMEOUT_S,
            )
        except Exception as error:
            raise ToolError(_fault_of(error)) from None
        text = "\n".join(map(_text_of, result.content))
        if not text and result.structured_content is not None:
            text = json.dumps(result.structured_content, ensure_ascii=False)
        if result.is_error:
            raise ToolError(text or "the tool failed, without a reason")
        return text


def _transport(entry: ServerEntry, started: list[ServerProcess]) -> Any:
    if not entry.url:
        return start_process(entry, started)
    from mixchat.chat.tools.http import http_client

    headers = dict(entry.headers)
    if entry.is_sse:
        from mcp.client.sse import sse_client

        return sse_client(entry.url, headers=headers, httpx_client_factory=http_client)
    from mcp.client.streamable_http import streamable_http_client

    return streamable_http_client(entry.url, http_client=http_client(headers))


def _tool_of(raw: Any) -> Tool | None:
    """Return a tool of a server, None if its name or schema cannot be used."""
    schema = raw.input_schema
    is_object = isinstance(schema, dict) and schema.get("type", "object") == "object"
    if not TOOL_NAME.fullmatch(raw.name) or not is_object:
        return None
    if not isinstance(schema.get("properties", {}), dict) or len(json.dumps(schema)) > _MAX_SCHEMA:
        return None
    description = sanitize(raw.description or "")[:_MAX_DESCRIPTION]
    return Tool(raw.name, description or None, schema)


def _text_of(content: Any) -> str:
    if isinstance(text := getattr(content, "text", None), str):
        return text
    resource = getattr(content, "resource", None)
    if isinstance(text := getattr(resource, "text", None), str):
        return text
    return f"({content.type}, which this chat cannot show)"


def _fault_of(error: BaseException) -> str:
    """Return the reason of a failure on one line. A group of errors has it inside."""
    while (inner := getattr(error, "exceptions", None)) and inner:
        error = inner[0]
    return sanitize(short_message(error)) or type(error).__name__


def _with_last_words(fault: str, started: list[ServerProcess]) -> str:
    words = started[0].last_words if started else ""
    return f"{fault}; it says: {words}" if words else fault
