"""The models of a server, of which at most one is loaded.

A request uses a model until its answers are computed. A request for another model waits until
nobody uses the loaded one. Requests for the loaded model pass it for some seconds, then they wait,
too, so that both models get their turns. A model that nobody uses for long is unloaded, and the
next request loads it again.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from contextlib import ExitStack, asynccontextmanager
from dataclasses import dataclass, replace
from threading import Lock
from types import MappingProxyType
from typing import cast

from anyio import to_thread

from mixchat.base.context import Context
from mixchat.base.errors import CheckpointError, UsageError
from mixchat.face.model import Model
from mixchat.face.model_thread import ModelStats
from mixchat.face.request import QueueFullError, ShuttingDownError
from mixchat.serving.requests.shared import LATEST
from mixchat.serving.web.bodies import in_thread

_TURN_S = 5.0  # in which requests for the loaded model pass those for another one
_IDLE_S = 0.25  # without a request, until the model is changed before that time


@dataclass(eq=False)
class _Waiting:
    """A request that waits for a model, any if `name` is None."""

    name: str | None
    since: float
    model: asyncio.Future[Model]


@dataclass(frozen=True)
class ModelFacts:
    """An installed model's size in bytes, its number of weights, and their usual type.

    `digest` is the SHA-256 of its manifest, which has those of all weights. `modified` is in
    seconds since 1970. `family` is its model_type.
    """

    size: int
    parameters: int
    quantization: str
    digest: str
    modified: float
    family: str

    @property
    def bits(self) -> float:
        """Return the bits of a weight, the mean of all."""
        return 8 * self.size / self.parameters


class ServedModels:
    """The loaded model, and what loads it again or another one.

    `load` raises `MixchatError`, and so does `check`, which is asked about a model before the
    loaded one is unloaded for it. `others` has further models that it can load, by name. `aliases`
    are more names of models. `facts` returns what is known of a model. It may read the disk, as
    `others` may. `queue` requests may wait for a model. After `sleep_after` seconds without a
    request, the model is unloaded. Only `close` and `stats` may be called outside of the event
    loop.
    """

    def __init__(
        self,
        first: Model,
        load: Callable[[str], Model],
        *,
        check: Callable[[str], object] = lambda name: None,
        others: Callable[[], Mapping[str, Context]] = dict,
        aliases: Mapping[str, str] = MappingProxyType({}),
        facts: Callable[[str], ModelFacts | None] = lambda name: None,
        sleep_after: float | None = None,
        queue: int = 64,
    ) -> None:
        self.name = first.name
        self.context = first.context
        self._first = {self.name: self.context}
        self._model = cast("Model | None", first)
        self._load = load
        self._check = check
        self._others = others
        self._sleep_after = sleep_after
        self._aliases = aliases
        self._facts = facts
        self._queue = max(queue, 1)  # one lets the model be loaded
        self._waiting: list[_Waiting] = []
        self._users = 0
        self._unused = asyncio.Event()
        self._unused.set()
        self._loaded_at = self._used_at = 0.0
        self._timer: asyncio.TimerHandle | None = None  # until the model sleeps
        self._next_look: asyncio.TimerHandle | None = None  # at those who wait
        self._change: asyncio.Task[None] | None = None  # which loads or unloads a model
        self._lock, self._closing = Lock(), False  # guard `_model` and `_earlier`
        self._earlier = ModelStats()  # of models that were unloaded

    @property
    def is_loaded(self) -> bool:
        return self._model is not None

    @property
    def idle_s(self) -> float | None:
        """Return the seconds without a request until the model is unloaded, None for never."""
        if self._timer is None or self._users:
            return self._sleep_after
        return max(self._timer.when() - asyncio.get_running_loop().time(), 0.0)

    def resolve(self, name: str) -> str:
        """Return a model's own name for an alias, and other names without Ollama's tag."""
        name = name.removesuffix(LATEST)
        return self._aliases.get(name, name)

    def thinks(self, name: str) -> bool:
        """Return whether this model is loaded and thinks."""
        model = self._model
        is_loaded = self.resolve(name) == self.name
        return model is not None and is_loaded and bool(model.template.thinking)

    async def contexts(self) -> dict[str, Context]:
        """Return the contexts by the names that requests may use, the last used model first."""
        known = await self._known()
        aliases = self._aliases.items()
        return known | {alias: known[name] for alias, name in aliases if name in known}

    async def facts(self, names: Iterable[str]) -> dict[str, ModelFacts | None]:
        """Return what is known of models, by the names that requests may use."""
        return await in_thread(lambda: {name: self._facts(self.resolve(name)) for name in names})

    async def _known(self) -> dict[str, Context]:
        others = await in_thread(self._others)
        return {self.name: self.context} | self._first | dict(others)

    @asynccontextmanager
    async def use(self, name: object = None) -> AsyncIterator[Model]:
        """Yield a model, as `take` returns it."""
        with ExitStack() as at_end:
            yield await self.take(name, at_end)

    async def take(self, name: object, at_end: ExitStack) -> Model:
        """Return the model `name`, or the last used one if there is no such model.

        It stays loaded until `at_end` is closed. Raises `MixchatError` if it cannot be loaded, and
        `QueueFullError` if too many wait.
        """
        wanted = self.resolve(name) if isinstance(name, str) else self.name
        is_known = wanted == self.name or wanted in await self._known()
        model = self._model
        if model is None or self._holds_back() or (is_known and wanted != self.name):
            model = await self._wait(wanted if is_known and isinstance(name, str) else None)
        else:
            self._begin_use()
        at_end.callback(self._release)
        return model

    async def unload(self, name: str) -> None:
        """Unload the model `name`, if it is loaded, as soon as nobody uses it."""
        while self.is_loaded and self.resolve(name) == self.name:
            if self._change is None and not self._users:
                self._begin_sleep()
            await (self._unused.wait() if self._change is None else asyncio.shield(self._change))

    def await_sleep(self) -> None:
        """Unload the model after a time, unless a request comes before."""
        if self._timer is not None:
            self._timer.cancel()
        if self._sleep_after is not None:
            loop = asyncio.get_running_loop()
            self._timer = loop.call_later(self._sleep_after, self._begin_sleep)

    def stats(self) -> ModelStats:
        """Return the counts of all models since the start."""
        with self._lock:
            now = ModelStats() if self._model is None else self._model.stats
            stats = self._earlier.plus(now)
        return replace(stats, waiting=stats.waiting + len(self._waiting))

    def close(self) -> None:
        """Close the model, as `Model.close` does, and load no more."""
        with self._lock:
            self._closing = True
            model = self._model
        if model is not None:
            model.close()

    async def _wait(self, name: str | None) -> Model:
        """Return a model when its turn has come. The request counts as its user then."""
        if len(self._waiting) >= self._queue:
            raise QueueFullError(f"{len(self._waiting)} requests wait for a model already")
        loop = asyncio.get_running_loop()
        waiting = _Waiting(name, loop.time(), loop.create_future())
        self._waiting.append(waiting)
        self._look()
        try:
            return await waiting.model
        except asyncio.CancelledError:
            if waiting in self._waiting:
                self._waiting.remove(waiting)
                self._look()
            elif not waiting.model.cancelled() and waiting.model.exception() is None:
                self._release()  # it was given just before
            raise

    def _begin_use(self) -> None:
        self._users += 1
        self._unused.clear()

    def _release(self) -> None:
        self._users -= 1
        if not self._users:
            self._used_at = asyncio.get_running_loop().time()
            self._unused.set()
            self.await_sleep()
            self._look()

    def _others_waiting(self) -> list[_Waiting]:
        """Return those who wait for a model to be loaded, the first of them first."""
        loaded = () if self._model is None else (None, self.name)
        return [each for each in self._waiting if not each.model.done() and each.name not in loaded]

    def _turn_ends(self, waiting: _Waiting) -> float:
        """Return the time at which requests for the loaded model no longer pass another one."""
        return max(self._loaded_at, waiting.since) + _TURN_S

    def _holds_back(self) -> bool:
        """Return whether a request for the loaded model has to wait."""
        waiting = self._others_waiting()
        now = asyncio.get_running_loop().time()
        return self._change is not None or (bool(waiting) and now >= self._turn_ends(waiting[0]))

    def _look(self) -> None:
        """Give the loaded model to those who wait for it, or load another one if it is time."""
        if self._next_look is not None:
            self._next_look.cancel()
        if self._change is not None or not self._waiting:
            return
        if not self._holds_back():
            self._let_pass()
        waiting = self._others_waiting()
        if self._users or not waiting:
            return
        loop = asyncio.get_running_loop()
        due = min(self._turn_ends(waiting[0]), self._used_at + _IDLE_S)
        if self._model is None or self._closing or loop.time() >= due:
            name = waiting[0].name or self.name
            self._change = asyncio.ensure_future(self._run(self._replace, name))
        else:
            self._next_look = loop.call_at(due, self._look)

    def _let_pass(self) -> None:
        """Give the loaded model to those who wait for it."""
        for_others = self._others_waiting()
        model = self._model
        for waiting in [*self._waiting]:
            if waiting not in for_others and not waiting.model.done():
                self._waiting.remove(waiting)
                self._begin_use()
                waiting.model.set_result(cast("Model", model))

    async def _run(self, change: Callable[..., None], *name: str) -> None:
        """Load or unload a model. No request ends it, so that no two models are ever loaded."""
        try:
            await to_thread.run_sync(change, *name)
        except Exception as error:
            if not name:
                raise
            for waiting in [each for each in self._waiting if (each.name or self.name) in name]:
                self._waiting.remove(waiting)
                if not waiting.model.done():
                    waiting.model.set_exception(error)
        finally:
            self._change = None
            self._loaded_at = asyncio.get_running_loop().time()
            if name:
                self.await_sleep()
                self._let_pass()
            self._look()

    def _begin_sleep(self) -> None:
        if not self._users and self._change is None:
            self._change = asyncio.ensure_future(self._run(self._unload))

    def _replace(self, name: str) -> None:
        if self._closing:
            raise ShuttingDownError("the server is shutting down")
        try:
            if self._model is not None:
                self._check(name)
            self._unload()
            model = self._load(name)
        except UsageError as error:  # about the server's options, and not about the request
            raise CheckpointError(str(error), hint=error.hint) from None
        with self._lock:
            if not self._closing:
                self._model = model
                self.name = model.name
                self.context = model.context
                return
        model.close()
        raise ShuttingDownError("the server is shutting down")

    def _unload(self) -> None:
        model = self._model
        if model is None:
            return
        model.close()  # `close` waits for it meanwhile
        with self._lock:
            self._model = None
            self._earlier = self._earlier.plus(model.stats)
