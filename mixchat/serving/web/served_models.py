"""The models of a server, of which at most one is loaded.

A request uses a model until its answers are sent. A request for another model waits until nobody
uses the loaded one, and later requests wait longer. A model that nobody uses for long is
unloaded, and the next request loads it again.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from threading import Lock
from types import MappingProxyType
from typing import Any, cast

from anyio import to_thread

from mixchat.base.model_config import Context
from mixchat.serving.requests.options import LATEST, LoadedModel
from mixchat.serving.service import ServiceStats, ShuttingDownError


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

    `load` raises `MixchatError`. `others` has further models that it can load, by name. `aliases`
    are more names of models. `facts` returns what is known of a model. It may read the disk, as
    `others` may. After `sleep_after` seconds without a request, the model is unloaded. Only `close`
    and `stats` may be called outside of the event loop.
    """

    def __init__(
        self,
        first: LoadedModel,
        load: Callable[[str], LoadedModel],
        *,
        others: Callable[[], Mapping[str, Context]] = dict,
        aliases: Mapping[str, str] = MappingProxyType({}),
        facts: Callable[[str], ModelFacts | None] = lambda name: None,
        sleep_after: float | None = None,
    ) -> None:
        self.name, self.context = first.service.name, first.service.context
        self._first = {self.name: self.context}
        self._model = cast("LoadedModel | None", first)
        self._load, self._others, self._sleep_after = load, others, sleep_after
        self._aliases, self._facts = aliases, facts
        self._turn = asyncio.Lock()  # first come, first served
        self._users, self._unused = 0, asyncio.Event()
        self._unused.set()
        self._timer: asyncio.TimerHandle | None = None
        self._task: asyncio.Task[None] | None = None  # which unloads the model
        self._lock, self._closing = Lock(), False  # guard `_model` and `_earlier`
        self._earlier = ServiceStats()  # of models that were unloaded

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
        model, is_loaded = self._model, self.resolve(name) == self.name
        return model is not None and is_loaded and bool(model.service.template.thinking)

    async def contexts(self) -> dict[str, Context]:
        """Return the contexts by the names that requests may use, the last used model first."""
        known = await self._known()
        aliases = self._aliases.items()
        return known | {alias: known[name] for alias, name in aliases if name in known}

    async def facts(self, names: Iterable[str]) -> dict[str, ModelFacts | None]:
        """Return what is known of models, by the names that requests may use."""
        return await to_thread.run_sync(
            lambda: {name: self._facts(self.resolve(name)) for name in names}
        )

    async def _known(self) -> dict[str, Context]:
        others = await to_thread.run_sync(self._others)
        return {self.name: self.context} | self._first | dict(others)

    @asynccontextmanager
    async def use(self, name: object = None) -> AsyncIterator[LoadedModel]:
        """Yield the model `name`, or the last used one if there is no such model.

        Raises `MixchatError` if it cannot be loaded.
        """
        async with self._turn:
            wanted = self.resolve(name) if isinstance(name, str) else self.name
            if wanted != self.name and wanted not in await self._known():
                wanted = self.name
            if self._model is None or wanted != self.name:
                await self._unused.wait()
                await self._change(wanted)
            model = cast("LoadedModel", self._model)
            self._users += 1
            self._unused.clear()
        try:
            yield model
        finally:
            self._users -= 1
            if not self._users:
                self._unused.set()
                self.await_sleep()

    async def unload(self, name: str) -> None:
        """Unload the model `name`, if it is loaded, as soon as nobody uses it."""
        while self.is_loaded and self.resolve(name) == self.name:
            await self._unused.wait()
            await _to_end(self._sleep())

    def await_sleep(self) -> None:
        """Unload the model after a time, unless a request comes before."""
        if self._timer is not None:
            self._timer.cancel()
        if self._sleep_after is not None:
            loop = asyncio.get_running_loop()
            self._timer = loop.call_later(self._sleep_after, self._begin_sleep)

    def stats(self) -> ServiceStats:
        """Return the counts of all models since the start."""
        with self._lock:
            now = ServiceStats() if self._model is None else self._model.service.stats()
            return self._earlier.plus(now)

    def close(self) -> None:
        """Close the service, as `Service.close` does, and load no more."""
        with self._lock:
            self._closing, model = True, self._model
        if model is not None:
            model.service.close()

    async def _change(self, name: str) -> None:
        """Load a model, to the end even if its client leaves, so that no two are ever loaded."""
        try:
            await _to_end(to_thread.run_sync(self._replace, name))
        finally:
            self.await_sleep()

    def _begin_sleep(self) -> None:
        if not self._users:
            self._task = asyncio.ensure_future(self._sleep())

    async def _sleep(self) -> None:
        async with self._turn:
            if not self._users:
                await to_thread.run_sync(self._unload)

    def _replace(self, name: str) -> None:
        self._unload()
        model = self._load(name)
        with self._lock:
            if not self._closing:
                self._model = model
                self.name, self.context = model.service.name, model.service.context
                return
        model.service.close()
        raise ShuttingDownError("the server is shutting down")

    def _unload(self) -> None:
        model = self._model
        if model is None:
            return
        model.service.close()  # `close` waits for it meanwhile
        with self._lock:
            self._model = None
            self._earlier = self._earlier.plus(model.service.stats())


async def _to_end(work: Coroutine[Any, Any, None]) -> None:
    """Await work that goes on to its end even if nobody waits any longer."""
    task = asyncio.ensure_future(work)
    try:
        await asyncio.shield(task)
    finally:
        await asyncio.gather(task, return_exceptions=True)
