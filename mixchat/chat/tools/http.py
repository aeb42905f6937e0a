"""The HTTP client of MCP servers, whose answers are bounded while they come."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import httpx2
from mcp.shared._httpx_utils import create_mcp_http_client

_MAX_BYTES = 2**22


def http_client(
    headers: dict[str, str] | None = None,
    timeout: httpx2.Timeout | None = None,
    auth: httpx2.Auth | None = None,
) -> httpx2.AsyncClient:
    """Return a client that has the timeouts of MCP, and reads no more than it needs."""
    client = create_mcp_http_client(headers, timeout, auth)
    client.headers["Accept-Encoding"] = "identity"
    client.event_hooks = {"response": [_bound]}
    return client


async def _bound(response: httpx2.Response) -> None:
    """Bound the body of an answer. Raises `ReadError` for a compressed one, which may be a bomb."""
    if response.headers.get("Content-Encoding", "identity") != "identity":
        raise httpx2.ReadError("the server compresses its answer without being asked")
    # The package bounds each event of a stream, which may last as long as the chat.
    if not response.headers.get("Content-Type", "").startswith("text/event-stream"):
        response.stream = _BoundedBody(response.stream)


class _BoundedBody(httpx2.AsyncByteStream):
    def __init__(self, body: Any) -> None:
        self._body = body

    async def __aiter__(self) -> AsyncIterator[bytes]:
        size = 0
        async for piece in self._body:
            size += len(piece)
            if size > _MAX_BYTES:
                raise httpx2.ReadError(f"the answer is larger than {_MAX_BYTES // 2**20} MiB")
            yield piece

    async def aclose(self) -> None:
        await self._body.aclose()
