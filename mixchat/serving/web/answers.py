"""The answers to one request while they are computed, whole or as a stream.

What a client has not taken yet is held here, within the budget of all requests, so that the model
is free as soon as an answer is computed. Comments in a stream keep proxies from cutting a silent
connection.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine
from contextlib import aclosing, suppress
from functools import partial
from typing import Any, TypeVar

from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from mixchat.base.errors import ResourceError
from mixchat.face.events import End, Event, Failed, Piece, Reading
from mixchat.face.model import Model
from mixchat.face.request import QueueFullError, ShuttingDownError
from mixchat.face.running_answer import RunningAnswer
from mixchat.serving.requests.errors import RequestError
from mixchat.serving.requests.shared import APIRequest
from mixchat.serving.web.bodies import Share
from mixchat.serving.web.responses import ResponseBuilder

_T = TypeVar("_T")
PING_S = 3.0  # without an event, until a ping is sent
_NO_BUFFER = (b"x-accel-buffering", b"no")  # nginx would hold pieces back
_PIECE = 65_536  # bytes that are sent at once, so that a slow client's wait in the budget
# Bytes of an event, of a token with its log probability, and of one of its likeliest tokens.
_PER_EVENT = 300
_PER_TOKEN = 200
_PER_CHOICE = 130


class PendingAnswers:
    """The answers to one request, each with a number, and a response of ASGI that streams them.

    Events wait here, so a slow client holds nobody up. They are a part of the request's share. If
    another request needs its memory, the answers are given up. They end if the client leaves.
    """

    def __init__(
        self,
        model: Model,
        request: APIRequest,
        share: Share,
        responses: ResponseBuilder,
        explain: Callable[[Exception], RequestError],
    ) -> None:
        """Submit nothing yet. This, `next` and `collect` need the event loop."""
        self._model = model
        self._request = request
        self._share = share
        self._responses = responses
        self._explain = explain
        self._loop = asyncio.get_running_loop()
        self._arrived = asyncio.Event()
        self._events = deque[tuple[int, Event, int]]()  # with their bytes
        self._error: Exception | None = None  # of the first answer that failed
        self._answers: list[RunningAnswer] = []
        self._is_over = False  # nobody takes events any longer
        self._running = len(request.requests)  # whose last event has not arrived
        self._computed: Callable[[], object] = lambda: None
        share.can_give_up(self._give_up)

    @property
    def finished(self) -> bool:
        """Return whether `next` has returned the end of every answer."""
        return not (self._running or self._events or self._error)

    def count_tokens(self) -> tuple[int, int]:
        """Return the tokens of the prompts and those generated so far, of all answers together."""
        stats = [answer.stats for answer in self._answers]
        return sum(s.prompt_tokens for s in stats), sum(s.generated_tokens for s in stats)

    def when_computed(self, call: Callable[[], object]) -> None:
        """Call this as soon as there is no more to compute."""
        self._computed = call
        if not self._running:
            call()

    def submit(self) -> None:
        """Queue all answers or none, which may block. Raises as `Model.submit` does."""
        requests = self._request.requests
        prompts = self._request.prompts
        sinks = [partial(self._hear, number) for number in range(len(requests))]
        self._answers = self._model.submit(*zip(requests, prompts, sinks, strict=True))

    def end(self) -> None:
        """Compute no more, and forget the events that nobody has taken."""
        self._is_over = True
        self._cancel()
        self._share.shrink(sum(size for *_, size in self._events))
        self._events.clear()

    async def next(self, timeout: float) -> list[tuple[int, Event]]:
        """Wait for events, and return some of them with their answers' numbers.

        Returns none after `timeout` seconds. Raises the error of a failed answer after the events
        before it, and `ShuttingDownError` if the model ended an answer.
        """
        if self._error is None and not self._events:
            # Not `asyncio.wait_for`, which may lose a cancellation that comes with an event.
            timer = self._loop.call_later(timeout, self._arrived.set)
            try:
                await self._arrived.wait()
            finally:
                timer.cancel()
        self._arrived.clear()
        if not self._events and self._error is not None:
            raise self._error
        events = list[tuple[int, Event]]()
        size = 0
        while self._events and size < _PIECE:
            number, event, taken = self._events.popleft()
            events.append((number, event))
            size += taken
        self._share.shrink(size)
        return events

    async def collect(self) -> list[tuple[Piece, End]]:
        """Return all answers, whole, which stay in the share. Raises what `next` does."""
        while self._running and self._error is None:
            await self._arrived.wait()
            self._arrived.clear()
        if self._error is not None:
            raise self._error
        pieces: list[list[Piece]] = [[] for _ in self._request.requests]
        ends: dict[int, End] = {}
        for number, event, _ in self._events:
            if isinstance(event, Piece):
                pieces[number].append(event)
            elif isinstance(event, End):
                ends[number] = event
        return [
            (
                Piece(
                    "".join(piece.text for piece in parts),
                    "".join(piece.thinking for piece in parts),
                    tuple(call for piece in parts for call in piece.calls),
                    tuple(token for piece in parts for token in piece.tokens),
                ),
                ends[number],
            )
            for number, parts in enumerate(pieces)
        ]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            with suppress(ClientDisconnect):
                await while_connected(receive, self._send(send))
        finally:
            self.end()

    async def _send(self, send: Send) -> None:
        headers = [(b"content-type", self._responses.content_type.encode()), _NO_BUFFER]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        async with aclosing(self._pieces()) as pieces:
            async for piece in pieces:
                await send({"type": "http.response.body", "body": piece, "more_body": True})
                await asyncio.sleep(0)  # sending alone lets no other task run
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _pieces(self) -> AsyncGenerator[bytes, None]:
        """Yield the bytes of events. An error is one, too, since the status is sent."""
        try:
            yield self._responses.beginning()
            async for piece in self._events_sent():
                yield piece
        except Exception as error:
            yield self._responses.failure(self._explain(error))
        yield self._responses.close()

    async def _events_sent(self) -> AsyncIterator[bytes]:
        ends: dict[int, End] = {}
        while not self.finished:
            # Events that came together are sent together, for slow clients.
            sent = bytearray()
            for number, event in await self.next(PING_S):
                if isinstance(event, Reading):
                    sent += self._responses.comment(f"read {event.done} of {event.total} tokens")
                elif isinstance(event, Piece):
                    sent += self._responses.piece(number, event)
                elif isinstance(event, End):
                    ends[number] = event
                    sent += self._responses.ending(number, event)
            yield bytes(sent) or self._responses.comment("waiting")
        yield self._responses.finish([ends[number] for number in sorted(ends)])

    def _hear(self, number: int, event: Event | Failed) -> None:
        """Take an event, in the model's thread."""
        if isinstance(event, Piece) and event.is_empty:
            return  # it counts a token of thinking
        with suppress(RuntimeError):  # the loop has ended
            self._loop.call_soon_threadsafe(self._take, number, event)

    def _take(self, number: int, event: Event | Failed) -> None:
        self._running -= isinstance(event, End | Failed)
        if self._error is None and not self._is_over:
            if isinstance(event, Failed):
                self._error = event.error
                self._cancel()
            elif isinstance(event, End) and event.reason == "interrupted":
                message = "the server is shutting down: the answer is cut off"
                self._error = ShuttingDownError(message)
            else:
                size = _size(event)
                try:
                    self._share.grow(size)
                    self._events.append((number, event, size))
                except QueueFullError:
                    self._give_up()
        if not self._running:
            self._computed()
        self._arrived.set()

    def _cancel(self) -> None:
        for answer in self._answers:
            answer.cancel()

    def _give_up(self) -> None:
        """End the answers, and forget what the client has not taken."""
        self._error = ResourceError(
            "the answer is cut off: other requests need the memory of what is not taken yet",
            hint="Read it faster, or ask for less at once.",
        )
        self.end()
        self._arrived.set()


def _size(event: Event) -> int:
    """Return about how many bytes an event takes."""
    if not isinstance(event, Piece):
        return _PER_EVENT
    texts = (event.text, event.thinking, *(call.arguments for call in event.calls))
    tokens = sum(_PER_TOKEN + _PER_CHOICE * len(token.top) for token in event.tokens)
    return _PER_EVENT + sum(map(len, texts)) + tokens


async def while_connected(receive: Receive, work: Coroutine[Any, Any, _T]) -> _T:
    """Return the result of `work`, or end it with `ClientDisconnect` if the client leaves.

    The request's body has to be read before.
    """

    async def left() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    working = asyncio.ensure_future(work)
    leaving = asyncio.ensure_future(left())
    try:
        await asyncio.wait((working, leaving), return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientDisconnect
        return working.result()
    finally:
        working.cancel()
        leaving.cancel()
        await asyncio.gather(working, leaving, return_exceptions=True)


class WholeAnswer(Response):
    """A response in JSON, which is in the request's share until a client has taken it."""

    def __init__(self, body: bytes, share: Share) -> None:
        super().__init__(body, media_type="application/json")
        self._share = share
        self._left = b""
        share.can_give_up(self._give_up)
        share.grow(len(body))
        self._left = body

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.body = b""
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        sent = 0
        size = len(self._left)
        while sent < size:
            piece = self._left[sent : sent + _PIECE]
            if not piece:
                return  # it was given up, so the connection is closed
            sent += len(piece)
            await send({"type": "http.response.body", "body": piece, "more_body": sent < size})
            await asyncio.sleep(0)  # sending alone lets no other task run

    def _give_up(self) -> None:
        self._share.shrink(len(self._left))
        self._left = b""
