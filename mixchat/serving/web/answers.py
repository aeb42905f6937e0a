"""The jobs of one request while they run; their events come from the service's thread."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

from starlette.requests import ClientDisconnect
from starlette.types import Receive

from mixchat.serving.service import (
    Delta,
    Done,
    Failed,
    Job,
    JobEvent,
    Service,
    ShuttingDownError,
    TokenLogprob,
)

_T = TypeVar("_T")
_WHOLE = 3600.0  # seconds; a whole answer is waited for as long as it takes


@dataclass
class Whole:
    """One answer from its beginning to its end."""

    text: str = ""
    tokens: list[TokenLogprob] = field(default_factory=list)
    done: Done | None = None


class Answers:
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

    async def collect(self) -> list[Whole]:
        """Return all answers, whole. Raises what `next` does."""
        wholes = [Whole() for _ in self._jobs]
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
