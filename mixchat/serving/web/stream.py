"""An answer piece by piece, as server-sent events.

A comment that starts with a colon is no event: it keeps proxies from cutting a silent connection
while a prompt is read, or while the job waits for its turn.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import aclosing, suppress

from starlette.requests import ClientDisconnect
from starlette.types import Receive, Scope, Send

from mixchat.serving.requests.failures import RequestError, as_request_error, to_json
from mixchat.serving.service import Delta, Done, JobEvent, Reading
from mixchat.serving.web.answers import Answers, while_connected
from mixchat.serving.web.shapes import Shape

PING_SECONDS = 3.0  # without an event, until a ping is sent
_DONE = b"data: [DONE]\n\n"
_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"x-accel-buffering", b"no"),  # nginx would hold pieces back
]
Explain = Callable[[Exception], RequestError]


class AnswerStream:
    """A response of ASGI that sends answers as they come, and ends them if the client leaves."""

    def __init__(
        self,
        answers: Answers,
        shape: Shape,
        *,
        include_usage: bool,
        explain: Explain = as_request_error,
    ) -> None:
        self._answers, self._shape = answers, shape
        self._include_usage, self._explain = include_usage, explain

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send all, or until the client leaves."""
        try:
            with suppress(ClientDisconnect):
                await while_connected(receive, self._send(send))
        finally:
            self._answers.cancel()

    async def _send(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": _HEADERS})
        async with aclosing(self._pieces()) as pieces:
            async for piece in pieces:
                await send({"type": "http.response.body", "body": piece, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _pieces(self) -> AsyncGenerator[bytes, None]:
        """Yield the bytes of each event; an error is one, too, since the status is sent."""
        try:
            yield b"".join(map(_event, self._shape.openings()))
            async for piece in self._answered():
                yield piece
        except Exception as error:
            yield _event(self._explain(error).body)
        yield _DONE

    async def _answered(self) -> AsyncIterator[bytes]:
        done: dict[int, Done] = {}
        while not self._answers.finished:
            events = await self._answers.next(PING_SECONDS)
            done |= {number: event for number, event in events if isinstance(event, Done)}
            # Events that came together are sent together: a slow client has less to take so.
            pieces = [self._piece(number, event) for number, event in events]
            yield b"".join(pieces) or b": waiting\n\n"
        if self._include_usage:
            yield _event(self._shape.usage([done[number] for number in sorted(done)]))

    def _piece(self, number: int, event: JobEvent) -> bytes:
        if isinstance(event, Reading):
            return f": read {event.done} of {event.total} tokens\n\n".encode()
        if isinstance(event, Done):
            return _event(self._shape.ending(number, event))
        assert isinstance(event, Delta)
        return _event(self._shape.piece(number, event))


def _event(value: object) -> bytes:
    return b"data: " + to_json(value) + b"\n\n"
