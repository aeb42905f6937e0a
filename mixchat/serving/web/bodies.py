"""The memory of requests: their bodies, what is parsed of them, and answers that wait to be taken.

All share one budget, so that clients cannot take the memory that the model's plan leaves free.
"""

from __future__ import annotations

import asyncio
import heapq
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import ExitStack, asynccontextmanager, contextmanager, suppress
from typing import Any, TypeVar

from anyio import to_thread
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Receive, Scope, Send

from mixchat.base.machine import free_memory
from mixchat.base.quantities import format_size
from mixchat.face.request import QueueFullError
from mixchat.serving.requests.errors import RequestError
from mixchat.serving.requests.fields import read_object

_T = TypeVar("_T")
_FREE_PART = 4  # of the free memory, one part is for requests
_MIN_BUDGET, _MAX_BUDGET = 64_000_000, 512_000_000  # bytes
_SMALL_SHARE = 65_536  # bytes; only such a small share gets some of the budget's last quarter
# An upper bound of the bytes that a body takes while it is parsed and checked. A text is held as
# bytes, as text and as parts of it. An object, with its fields' model, takes 500 bytes.
_PER_BYTE, _PER_OBJECT, _PER_ITEM = 6, 500, 70
_LIGHT = 1_000_000  # bytes; a lighter body is parsed at once
_PATIENCE_PER_BYTE = 2e-7  # seconds; a body of 50 MB lets those pass that come 10 s later


def body_budget() -> int:
    """Return the bytes that requests may hold together on this machine."""
    return min(max(free_memory() // _FREE_PART, _MIN_BUDGET), _MAX_BUDGET)


class MemoryBudget:
    """Bounds the bytes of all requests together. Only the event loop may use it."""

    def __init__(self, limit: int) -> None:
        self.limit, self.held = limit, 0
        self.answers = set[Share]()  # those that can be given up

    @property
    def most(self) -> int:
        """Return the bytes that one body may take."""
        return self.limit - self.limit // 4

    @contextmanager
    def share(self) -> Iterator[Share]:
        """Yield a share, which is empty at first."""
        share = Share(self)
        try:
            yield share
        finally:
            self.answers.discard(share)
            share.shrink(share.size)


class Share:
    """The bytes that one request holds."""

    def __init__(self, budget: MemoryBudget) -> None:
        self.budget, self.size = budget, 0
        self._give_up: Callable[[], object] = lambda: None

    def can_give_up(self, give_up: Callable[[], object]) -> None:
        """Call `give_up` if this share is the largest one and another answer needs its memory."""
        self._give_up = give_up
        self.budget.answers.add(self)

    def grow(self, count: int) -> None:
        """Hold more. Raises `QueueFullError` if there is no room."""
        budget, is_answer = self.budget, self in self.budget.answers
        is_small = self.size + count <= _SMALL_SHARE
        while budget.held + count > (budget.limit if is_answer or is_small else budget.most):
            largest = max(budget.answers, key=lambda share: share.size, default=self)
            if not is_answer or largest is self:
                limit = format_size(budget.limit)
                raise QueueFullError(f"requests hold the {limit} of memory that they may have")
            budget.answers.remove(largest)
            largest._give_up()
        budget.held += count
        self.size += count

    def shrink(self, count: int) -> None:
        self.size -= count
        self.budget.held -= count


def with_share(app: ASGIApp, budget: MemoryBudget) -> ASGIApp:
    """Return `app`, which gives each request a share until its response is sent."""

    async def shared(scope: Scope, receive: Receive, send: Send) -> None:
        with budget.share() as share:
            scope.setdefault("state", {})["share"] = share
            await app(scope, receive, send)

    return shared


class Turns:
    """Lets one of many run at a time. A light one passes heavy ones, which have more patience."""

    def __init__(self) -> None:
        self._is_taken, self._count = False, 0
        self._waiting: list[tuple[float, int, asyncio.Future[None]]] = []

    @asynccontextmanager
    async def turn(self, weight: int) -> AsyncIterator[None]:
        if self._is_taken:
            loop = asyncio.get_running_loop()
            turn, due = loop.create_future(), loop.time() + weight * _PATIENCE_PER_BYTE
            self._count += 1
            heapq.heappush(self._waiting, (due, self._count, turn))
            try:
                await turn
            except asyncio.CancelledError:
                if not turn.cancelled():  # it came just before
                    self._pass_on()
                raise
        self._is_taken = True
        try:
            yield
        finally:
            self._pass_on()

    def _pass_on(self) -> None:
        while self._waiting:
            *_, turn = heapq.heappop(self._waiting)
            if not turn.done():
                turn.set_result(None)
                return
        self._is_taken = False


class Body:
    """The bytes of a request's body. What is parsed of them lives only while it is read."""

    def __init__(
        self, data: bytes, share: Share, turns: Turns, model_name: Callable[[str], str] = str
    ) -> None:
        """Take the bytes, which the share holds already. `model_name` resolves aliases.

        Raises `RequestError` if they are too many values for the budget.
        """
        self._data, self._share, self._turns = data, share, turns
        self._model_name = model_name
        self.has_form = False  # with schemas or a grammar
        objects, items = data.count(b"{") + data.count(b"["), data.count(b",")
        self.weight = len(data) * _PER_BYTE + objects * _PER_OBJECT + items * _PER_ITEM
        if len(data) + self.weight > share.budget.most:
            message = "the body has more values than this server has memory for"
            raise RequestError(message, status=413, code="request_too_large")

    async def read(
        self, read: Callable[[dict[str, Any]], _T], at_end: ExitStack | None = None
    ) -> _T:
        """Return what `read` makes of the parsed body, in a thread, as a large one takes seconds.

        If nobody waits any longer, `read` does not begin, and `at_end` is closed, which may end it.
        Raises `RequestError` for a body that is no JSON object, and `QueueFullError`.
        """
        is_over = threading.Event()
        at_end = at_end or ExitStack()
        at_end.callback(is_over.set)

        def work() -> _T:
            parsed = {} if is_over.is_set() else read_object(self._data)
            if is_over.is_set():
                raise ClientDisconnect
            if isinstance(parsed.get("model"), str):
                parsed["model"] = self._model_name(parsed["model"])
            return read(parsed)

        if self.weight <= _LIGHT:
            return await in_thread(work, at_end)
        async with self._turns.turn(self.weight):
            self._share.grow(self.weight)
            try:
                return await in_thread(work, at_end)
            finally:
                self._share.shrink(self.weight)

    def drop(self) -> None:
        """Forget the bytes."""
        self._share.shrink(len(self._data))
        self._data = b""


async def in_thread(work: Callable[[], _T], at_end: ExitStack) -> _T:
    """Return the result of work in a thread, and wait for its end even if this is cancelled.

    `at_end` is closed then, which may end it.
    """
    running = asyncio.ensure_future(to_thread.run_sync(work))
    try:
        return await asyncio.shield(running)
    finally:
        if not running.done():
            at_end.close()
        while not running.done():  # however often this is cancelled
            with suppress(asyncio.CancelledError):
                await asyncio.wait([running])
        if not running.cancelled():
            running.exception()  # which counts as seen then
