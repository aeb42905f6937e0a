"""An MCP server as a process that talks in lines. The lines and the end are bounded."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import Any

from mixchat.base.sanitize import sanitize
from mixchat.chat.tools.server_file import ServerEntry

_MAX_LINE = 2**22  # bytes, because the package of MCP collects a line of any length
_MAX_BAD_LINES = 100  # that are no messages, such as a log on the wrong stream
_MAX_LAST_WORDS = 200  # characters of the server's errors
_PATIENCE_S = 0.3  # until a process that was told to end is ended by force


class ServerProcess:
    """A process in a group of its own. Ctrl-C in the terminal does not reach it."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self.process = process
        self.last_words = ""  # the end of what it wrote to standard error

    async def listen(self, messages: Any) -> None:
        """Send each message of the process to a stream, which closes at the end of its output."""
        from mcp.shared.message import SessionMessage
        from mcp_types import jsonrpc_message_adapter

        assert self.process.stdout is not None
        bad_lines = 0
        with suppress(Exception):  # the session has ended, or the line is too long
            while bad_lines < _MAX_BAD_LINES and (line := await self.process.stdout.readline()):
                try:
                    message = jsonrpc_message_adapter.validate_json(line, by_name=False)
                except ValueError:
                    bad_lines += 1
                    continue
                await messages.send(SessionMessage(message))
        await messages.aclose()
        self.kill(signal.SIGTERM)

    async def talk(self, messages: Any) -> None:
        """Write each message of a stream to the process."""
        assert self.process.stdin is not None
        with suppress(OSError):
            async for message in messages:
                text = message.message.model_dump_json(by_alias=True, exclude_unset=True)
                self.process.stdin.write(f"{text}\n".encode())
                await self.process.stdin.drain()

    async def listen_to_errors(self) -> None:
        """Note the end of what the process writes to standard error."""
        assert self.process.stderr is not None
        while piece := await self.process.stderr.read(65536):
            text = self.last_words + piece.decode("utf-8", "replace")
            self.last_words = " ".join(sanitize(text[-2000:]).split())[-_MAX_LAST_WORDS:]

    async def end(self) -> None:
        """Close its input, then end the process and its children."""
        if self.process.stdin is not None:
            self.process.stdin.close()
        for number in (signal.SIGTERM, signal.SIGKILL):
            with suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self.process.wait(), _PATIENCE_S)
            self.kill(number)
        self.process._transport.close()  # type: ignore[attr-defined]  # else it warns later

    def kill(self, number: signal.Signals) -> None:
        """Send a signal to the process and its children. Any thread may do it."""
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, number)


@asynccontextmanager
async def start_process(entry: ServerEntry, started: list[ServerProcess]) -> AsyncIterator[Any]:
    """Start a server, and give the streams of its messages. Adds it to `started`.

    Raises `OSError` if it cannot be started.
    """
    import anyio
    from mcp.client.stdio import get_default_environment

    process = ServerProcess(
        await asyncio.create_subprocess_exec(
            entry.command,
            *entry.args,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            env={**get_default_environment(), **entry.env},
            cwd=entry.cwd,
            limit=_MAX_LINE,
            start_new_session=True,
        )
    )
    started.append(process)
    to_session, from_server = anyio.create_memory_object_stream[Any](0)
    to_server, from_session = anyio.create_memory_object_stream[Any](0)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(process.listen, to_session)
        tasks.start_soon(process.talk, from_session)
        tasks.start_soon(process.listen_to_errors)
        try:
            yield from_server, to_server
        finally:
            with anyio.CancelScope(shield=True):
                await process.end()
            tasks.cancel_scope.cancel()
            for stream in (to_session, from_server, to_server, from_session):
                stream.close()
