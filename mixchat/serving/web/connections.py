"""uvicorn's connection, with an end to its patience.

uvicorn itself waits for ever for the first byte of a request, for the rest of one, and for a client
that takes no more of an answer. Each of these would let anybody use up all connections.
"""

from __future__ import annotations

import asyncio
from typing import Any

from uvicorn.protocols.http.h11_impl import H11Protocol

from mixchat.serving.requests.failures import RequestError, to_json

PATIENCE = 30.0  # seconds for a whole request to come, and for a client to take what is sent
MOST_WAITING = 256  # connections from which a whole request has yet to come
_GRACE = 1.0  # seconds


class Waiting:
    """The connections from which a whole request has yet to come, longest first.

    Beyond `most` of them, those are given up that have waited for `grace` seconds: a request that
    came together with many connections has its turn first.
    """

    def __init__(self, most: int = MOST_WAITING, grace: float = _GRACE) -> None:
        self._most, self._grace = most, grace
        self._since: dict[Connection, float] = {}

    def add(self, connection: Connection) -> None:
        """Add a connection, and give up the oldest ones where there are too many."""
        now = connection.loop.time()
        self._since[connection] = now
        while len(self._since) > self._most:
            oldest, since = next(iter(self._since.items()))
            if now - since < self._grace:
                return
            oldest.give_up()

    def remove(self, connection: Connection) -> None:
        """Remove a connection, if it is here."""
        self._since.pop(connection, None)


class Connection(H11Protocol):
    """One connection of a client, which may carry many requests, one after the other."""

    def __init__(self, *args: Any, waiting: Waiting, patience: float, **options: Any) -> None:
        super().__init__(*args, **options)
        self._waiting, self._patience = waiting, patience
        self._deadline: asyncio.TimerHandle | None = None  # of a request
        self._stalled: asyncio.TimerHandle | None = None  # since the client takes nothing
        self._begun = False  # whether a part of the request has come

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._wait()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_waiting()
        self._stop_stall()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        self._begun = True
        super().data_received(data)
        if self.cycle and not self.cycle.response_complete and not self.cycle.more_body:
            self._stop_waiting()

    def on_response_complete(self) -> None:
        before = self.cycle
        super().on_response_complete()  # which may begin with a request that came meanwhile
        waits = self.cycle is before or self.cycle.more_body
        if waits and not self.transport.is_closing():
            self._wait()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._stalled = self.loop.call_later(self._patience, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        self._stop_stall()

    def send_400_response(self, msg: str) -> None:
        """Refuse what is not HTTP, in JSON as all other refusals."""
        cycle = self.cycle
        if cycle is None or cycle.response_complete or not cycle.response_started:
            self.transport.write(_NOT_HTTP)
        self.transport.close()

    def give_up(self) -> None:
        """Close the connection; say so, if a part of a request has come."""
        self._stop_waiting()
        if self._begun and not (self.cycle and self.cycle.response_started):
            self.transport.write(_TOO_SLOW)
        self.transport.close()

    def _wait(self) -> None:
        self._stop_waiting()  # for the rest of a request that was answered before its end
        self._begun = False
        self._deadline = self.loop.call_later(self._patience, self.give_up)
        self._waiting.add(self)

    def _stop_waiting(self) -> None:
        self._waiting.remove(self)
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def _stop_stall(self) -> None:
        if self._stalled is not None:
            self._stalled.cancel()
            self._stalled = None


def _refusal(status: str, message: str, code: str) -> bytes:
    body = to_json(RequestError(message, code=code).body)
    head = f"HTTP/1.1 {status}\r\nConnection: close\r\nContent-Type: application/json\r\n"
    return f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body


_TOO_SLOW = _refusal(
    "408 Request Timeout", "the request did not come to its end in time", "request_timeout"
)
_NOT_HTTP = _refusal("400 Bad Request", "this is not a valid request of HTTP", "invalid_http")
