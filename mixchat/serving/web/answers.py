"""The jobs of one request while they run, and their events as they are sent."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine, Sequence
from contextlib import aclosing, suppress
from functools import partial
from typing import Any, TypeVar

from starlette.requests import ClientDisconnect
from starlette.types import Receive, Scope, Send

from mixchat.serving.requests.errors import RequestError, as_request_error, to_json
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
from mixchat.serving.web.responses import FinishedAnswer, ResponseBuilder

_T = TypeVar("_T")
_WHOLE = 3600.0  # seconds; a whole answer is waited for as long as it takes


class PendingAnswers:
    """The answers to one request, each with a number.

    A client that is slow to take them holds nobody up: events wait here, and there are no more of
    them than an answer can have tokens.
    """

    def __init__(self, service: Service, jobs: Sequence[Job]) -> None:
        """Submit nothing yet. To be called in the event loop, as `next` and `collect`."""
        self._service, self._jobs = service, jobs
        self._loop = asyncio.get_running_loop()
        self._arrived = asyncio.Event()
        self._events: list[tuple[int, JobEvent]] = []
        self._error: Exception | None = None  # of the first answer that failed
        self._cancels: list[Callable[[], None]] = []
        self._unfinished = len(jobs)

    @property
    def finished(self) -> bool:
        """Return whether every answer has ended, and its end was taken."""
        return self._unfinished == 0

    def submit(self) -> None:
        """Submit all jobs, or none: raises what `Service.submit` does. It may block a moment."""
        try:
            for number, job in enumerate(self._jobs):
                self._cancels.append(self._service.submit(job, partial(self._hear, number)))
        except BaseException:
            self.cancel()
            raise

    def cancel(self) -> None:
        """Cancel what still runs."""
        for cancel in self._cancels:
            cancel()

    async def next(self, patience: float) -> list[tuple[int, JobEvent]]:
        """Return the events that have come, each with its answer's number; wait for one.

        None come where nothing happens for `patience` seconds. Raises the error of an answer that
        failed, and `ShuttingDownError` where the service ended one, behind the events before it.
        """
        if self._error is None:
            # Not `asyncio.wait_for`, which may lose a cancellation that comes with an event.
            timer = self._loop.call_later(patience, self._arrived.set)
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

    async def collect(self) -> list[FinishedAnswer]:
        """Return all answers, whole. Raises what `next` does."""
        wholes = [FinishedAnswer() for _ in self._jobs]
        while not self.finished:
            for number, event in await self.next(_WHOLE):
                if isinstance(event, Delta):
                    wholes[number].text += event.text
                    wholes[number].tokens += event.tokens
                elif isinstance(event, Done):
                    wholes[number].done = event
        return wholes

    def _hear(self, number: int, event: JobEvent) -> None:
        with suppress(RuntimeError):  # the loop has ended
            self._loop.call_soon_threadsafe(self._take, number, event)

    def _take(self, number: int, event: JobEvent) -> None:
        if self._error is None:
            self._error = _error_of(event)
        if self._error is None:
            self._events.append((number, event))
        self._arrived.set()


def _error_of(event: JobEvent) -> Exception | None:
    if isinstance(event, Failed):
        return event.error
    if isinstance(event, Done) and event.reason == "interrupted":
        return ShuttingDownError("the server is shutting down: the answer is cut off")
    return None


async def while_connected(receive: Receive, work: Coroutine[Any, Any, _T]) -> _T:
    """Return the result of `work`; where the client leaves first, end it.

    Raises `ClientDisconnect` then. The request's body has to be read before.
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
        answers: PendingAnswers,
        shape: ResponseBuilder,
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
