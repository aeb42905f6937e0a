"""The memory of requests, and the turns of all work on their texts.

Bodies, what is parsed of them, and answers that wait to be taken share one budget, so that clients
cannot take the memory that the model's plan leaves free. Parsing, making prompts and counting
tokens go through `Body`, few at a time. None of it begins for a client that has left.
"""

from __future__ import annotations

import asyncio
import heapq
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AsyncExitStack, ExitStack, asynccontextmanager, contextmanager, suppress
from typing import TypeVar

from anyio import to_thread
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Receive, Scope, Send

from mixchat.base.machine import free_memory
from mixchat.base.quantities import format_size
from mixchat.face.request import QueueFullError
from mixchat.serving.requests.errors import RequestError
from mixchat.serving.requests.fields import JSON, read_object

_T = TypeVar("_T")
_FREE_PART = 4  # of the free memory, one part is for requests
_MIN_BUDGET, _MAX_BUDGET = 64_000_000, 512_000_000  # bytes
_SMALL_SHARE = 400_000  # bytes; only such a small share gets some of the budget's last quarter
# An upper bound of the bytes that a body takes while it is parsed and checked. A text is held as
# bytes, as text and as parts of it. An object, with its fields' model, takes 500 bytes.
_PER_BYTE = 6
_PER_OBJECT = 500
_PER_ITEM = 70
_LIGHT = 1_000_000  # bytes; a lighter body waits for no heavy one
_LIGHT_AT_ONCE = 2  # each takes up to 0.2 s
_FORM_CHECKS = 2  # at once, each with up to a core and 1 GB
_WAITING_CHECKS = 16
# The fields with schemas or grammars, which are checked in processes.
_FORM_FIELDS = ("response_format", "grammar", "tools", "format", "text", "output_config")
_PATIENCE_PER_BYTE = 2e-7  # seconds; a body of 50 MB lets those pass that come 10 s later


def body_budget() -> int:
    """Return the bytes that requests may hold together on this machine."""
    return min(max(free_memory() // _FREE_PART, _MIN_BUDGET), _MAX_BUDGET)


class RequestMemory:
    """Bounds the bytes of all requests together. Only the event loop may use it."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.held = 0
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

    def __init__(self, budget: RequestMemory) -> None:
        self.budget = budget
        self.size = 0
        self._give_up: Callable[[], object] = lambda: None

    def can_give_up(self, give_up: Callable[[], object]) -> None:
        """Call `give_up` if this share is the largest one and another answer needs its memory."""
        self._give_up = give_up
        self.budget.answers.add(self)

    def grow(self, count: int) -> None:
        """Hold more. Raises `QueueFullError` if there is no room."""
        budget = self.budget
        is_answer = self in self.budget.answers
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


def with_share(app: ASGIApp, budget: RequestMemory) -> ASGIApp:
    """Return `app`, which gives each request a share until its response is sent."""

    async def shared(scope: Scope, receive: Receive, send: Send) -> None:
        with budget.share() as share:
            scope.setdefault("state", {})["share"] = share
            await app(scope, receive, send)

    return shared


class Turns:
    """Lets `most` of many run at a time, the first of them the one that is due first."""

    def __init__(self, most: int = 1) -> None:
        self._free = most
        self._count = 0
        self.waiting: list[tuple[float, int, asyncio.Future[None]]] = []

    @asynccontextmanager
    async def turn(self, due: float) -> AsyncIterator[None]:
        if self._free:
            self._free -= 1
        else:
            await self._wait(due)
        try:
            yield
        finally:
            self._pass_on()

    async def _wait(self, due: float) -> None:
        turn = asyncio.get_running_loop().create_future()
        self._count += 1
        waiting = due, self._count, turn
        heapq.heappush(self.waiting, waiting)
        try:
            await turn
        except asyncio.CancelledError:
            if not turn.cancelled():  # it came just before
                self._pass_on()
            elif waiting in self.waiting:
                self.waiting.remove(waiting)
                heapq.heapify(self.waiting)
            raise

    def _pass_on(self) -> None:
        while self.waiting:
            *_, turn = heapq.heappop(self.waiting)
            if not turn.done():
                turn.set_result(None)
                return
        self._free += 1


class WorkTurns:
    """The turns of all work on the texts of requests."""

    def __init__(self) -> None:
        self._heavy = Turns()
        self._light = Turns(_LIGHT_AT_ONCE)
        self._forms = Turns(_FORM_CHECKS)

    @asynccontextmanager
    async def turn(self, weight: int, due: float, *, has_form: bool = False) -> AsyncIterator[None]:
        """Wait for a turn. A form's check takes seconds, so nothing light waits for one.

        Raises `QueueFullError` if too many forms wait.
        """
        is_heavy = weight > _LIGHT
        if has_form and len(self._forms.waiting) >= _WAITING_CHECKS:
            message = f"{_WAITING_CHECKS} requests wait for their schemas to be checked"
            raise QueueFullError(message)
        async with AsyncExitStack() as turns:
            if has_form:
                await turns.enter_async_context(self._forms.turn(due))
            if is_heavy or not has_form:
                lane = self._heavy if is_heavy else self._light
                await turns.enter_async_context(lane.turn(due))
            yield


class Body:
    """A request's body: its bytes, then its parsed fields, until it is dropped."""

    def __init__(
        self, data: bytes, share: Share, turns: WorkTurns, model_name: Callable[[str], str] = str
    ) -> None:
        """Take the bytes, which the share holds already. `model_name` resolves aliases.

        Raises `RequestError` if they are too many values for the budget.
        """
        self._data = data
        self._fields = JSON()
        self._share = share
        self._turns = turns
        self._model_name = model_name
        self.has_form = False  # with schemas or a grammar
        objects = data.count(b"{") + data.count(b"[")
        items = data.count(b",")
        self.weight = len(data) * _PER_BYTE + objects * _PER_OBJECT + items * _PER_ITEM
        # A light body passes heavy ones. One that was parsed passes those that were not yet.
        self._due = time.monotonic() + self.weight * _PATIENCE_PER_BYTE
        if len(data) + self.weight > share.budget.most:
            message = "the body has more values than this server has memory for"
            raise RequestError(message, status=413, code="request_too_large")

    async def parse(self) -> JSON:
        """Return the fields, which are parsed once, and forget the bytes.

        Raises `RequestError` for a body that is no JSON object, and `QueueFullError`.
        """
        async with self._turns.turn(self.weight, self._due):
            self._share.grow(self.weight)
            self._fields = await in_thread(lambda: read_object(self._data))
        self._share.shrink(len(self._data))
        self._data = b""
        if isinstance(name := self._fields.get("model"), str):
            self._fields["model"] = self._model_name(name)
        self.has_form = any(self._fields.get(name) for name in _FORM_FIELDS)
        return self._fields

    async def read(self, read: Callable[[JSON], _T], at_end: ExitStack | None = None) -> _T:
        """Return what `read` makes of the fields, in a thread, as a large body takes seconds.

        If nobody waits any longer, `read` does not begin, and `at_end` is closed, which may end it.
        """
        fields = self._fields
        async with self._turns.turn(self.weight, self._due, has_form=self.has_form):
            return await in_thread(lambda: read(fields), at_end)

    def drop(self) -> None:
        """Forget the fields."""
        self._share.shrink(self.weight)
        self._fields = {}


async def in_thread(work: Callable[[], _T], at_end: ExitStack | None = None) -> _T:
    """Return the result of work in a thread, and wait for its end even if this is cancelled.

    Then work that waits for a thread does not begin, and `at_end` is closed, which may end it.
    """
    at_end = at_end or ExitStack()
    is_over = threading.Event()
    at_end.callback(is_over.set)

    def begun() -> _T:
        if is_over.is_set():
            raise ClientDisconnect
        return work()

    running = asyncio.ensure_future(to_thread.run_sync(begun))
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
