"""The jobs of one request while they run, whole or as a stream.

Comments in a stream keep proxies from cutting a silent connection.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine, Sequence
from contextlib import aclosing, suppress
from functools import partial
from typing import Any, TypeVar

from starlette.requests import ClientDisconnect
from starlette.types import Receive, Scope, Send

from mixchat.serving.requests.errors import RequestError
from mixchat.serving.service import (
    Delta,
    Done,
    Failed,
    Job,
    JobEvent,
    Reading,
    Service,
    ShuttingDownError,
)
from mixchat.serving.web.responses import ResponseBuilder

_T = TypeVar("_T")
_LONG_S = 3600.0  # between looks at an answer that is sent whole
PING_S = 3.0  # without an event, until a ping is sent
_NO_BUFFER = (b"x-accel-buffering", b"no")  # nginx would hold pieces back


class PendingAnswers:
    """The answers to one request, each with a number.

    Events wait here, so a slow client holds nobody up.
    """

    def __init__(self, service: Service, jobs: Sequence[Job]) -> None:
        """Submit nothing yet. This, `next` and `collect` need the event loop."""
        self._service, self._jobs = service, jobs
        self._loop = asyncio.get_running_loop()
        self._arrived = asyncio.Event()
        self._events: list[tuple[int, JobEvent]] = []
        self._error: Exception | None = None  # of the first answer that failed
        self._cancel: Callable[[], None] | None = None
        self._unfinished = len(jobs)

    @property
    def finished(self) -> bool:
        """Return whether `next` has returned the end of every answer."""
        return self._unfinished == 0

    def submit(self) -> None:
        """Submit all jobs or none, which may block. Raises as `Service.submit` does."""
        sinks = [partial(self._hear, number) for number in range(len(self._jobs))]
        self._cancel = self._service.submit(*zip(self._jobs, sinks, strict=True))

    def cancel(self) -> None:
        if self._cancel is not None:
            self._cancel()

    async def next(self, timeout: float) -> list[tuple[int, JobEvent]]:
        """Wait for events, and return them with their answers' numbers.

        Returns none after `timeout` seconds. Raises the error of a failed answer after the events
        before it, and `ShuttingDownError` if the service ended an answer.
        """
        if self._error is None:
            # Not `asyncio.wait_for`, which may lose a cancellation that comes with an event.
            timer = self._loop.call_later(timeout, self._arrived.set)
            try:
                await self._arrived.wait()
            finally:
                timer.cancel()
        self._arrived.clear()
        events, self._events = self._events, []
        if not events and self._error is not None:
            raise self._error
        self._unfinished -= sum(isinstance(event, Done) for _, event in events)
        return events

    async def collect(self) -> list[tuple[Delta, Done]]:
        """Return all answers, whole. Raises what `next` does."""
        deltas: list[list[Delta]] = [[] for _ in self._jobs]
        done: dict[int, Done] = {}
        while not self.finished:
            for number, event in await self.next(_LONG_S):
                if isinstance(event, Delta):
                    deltas[number].append(event)
                elif isinstance(event, Done):
                    done[number] = event
        return [(_joined(parts), done[number]) for number, parts in enumerate(deltas)]

    def _hear(self, number: int, event: JobEvent) -> None:
        """Take an event, in the service's thread."""
        with suppress(RuntimeError):  # the loop has ended
            self._loop.call_soon_threadsafe(self._take, number, event)

    def _take(self, number: int, event: JobEvent) -> None:
        if self._error is None:
            if isinstance(event, Failed):
                self._error = event.error
            elif isinstance(event, Done) and event.reason == "interrupted":
                message = "the server is shutting down: the answer is cut off"
                self._error = ShuttingDownError(message)
            else:
                self._events.append((number, event))
        self._arrived.set()


def _joined(parts: Sequence[Delta]) -> Delta:
    tokens = tuple(token for part in parts for token in part.tokens)
    thinking = "".join(part.thinking for part in parts)
    calls = tuple(call for part in parts for call in part.calls)
    return Delta("".join(part.text for part in parts), tokens, thinking, calls)


async def while_connected(receive: Receive, work: Coroutine[Any, Any, _T]) -> _T:
    """Return the result of `work`, or end it with `ClientDisconnect` if the client leaves.

    The request's body has to be read before.
    """
    working = asyncio.ensure_future(work)
    leaving = asyncio.ensure_future(_leaving(receive))
    try:
        await asyncio.wait((working, leaving), return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientDisconnect
        return working.result()
    finally:
        working.cancel()
        leaving.cancel()
        await asyncio.gather(working, leaving, return_exceptions=True)


async def _leaving(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class AnswerStream:
    """A response of ASGI with answers as they come, which end if the client leaves."""

    def __init__(
        self,
        answers: PendingAnswers,
        responses: ResponseBuilder,
        explain: Callable[[Exception], RequestError],
    ) -> None:
        self._answers, self._responses, self._explain = answers, responses, explain

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            with suppress(ClientDisconnect):
                await while_connected(receive, self._send(send))
        finally:
            self._answers.cancel()

    async def _send(self, send: Send) -> None:
        headers = [(b"content-type", self._responses.content_type.encode()), _NO_BUFFER]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        async with aclosing(self._pieces()) as pieces:
            async for piece in pieces:
                await send({"type": "http.response.body", "body": piece, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _pieces(self) -> AsyncGenerator[bytes, None]:
        """Yield the bytes of events. An error is one, too, since the status is sent."""
        try:
            yield self._responses.beginning()
            async for piece in self._answered():
                yield piece
        except Exception as error:
            yield self._responses.failure(self._explain(error))
        yield self._responses.close()

    async def _answered(self) -> AsyncIterator[bytes]:
        done: dict[int, Done] = {}
        while not self._answers.finished:
            events = await self._answers.next(PING_S)
            done |= {number: event for number, event in events if isinstance(event, Done)}
            # Events that came together are sent together, for slow clients.
            pieces = [self._piece(number, event) for number, event in events]
            yield b"".join(pieces) or self._responses.comment("waiting")
        yield self._responses.finish([done[number] for number in sorted(done)])

    def _piece(self, number: int, event: JobEvent) -> bytes:
        if isinstance(event, Reading):
            return self._responses.comment(f"read {event.done} of {event.total} tokens")
        if isinstance(event, Done):
            return self._responses.ending(number, event)
        assert isinstance(event, Delta)
        return self._responses.piece(number, event)
