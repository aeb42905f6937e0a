"""Brings the experts of one device into their slots, on request or by prediction."""

from __future__ import annotations

import time
from collections.abc import Collection, Iterable, Sequence, Set
from itertools import takewhile

from mixchat.experts.cache import ExpertCache, ExpertKey, ExpertStats, Passes
from mixchat.experts.holder import ExpertLists
from mixchat.experts.memory import MemoryWatch
from mixchat.experts.mover import ExpertLoad, Mover
from mixchat.experts.placement import MIN_SLOTS, Placement
from mixchat.experts.store import ExpertStore
from mixchat.weights.format.expert import Expert

RESIDENT, LOADING, MISSING = range(3)
_MAX_PREFETCHES = 4  # at once


class Fetcher:
    """Holds the experts of one device. A cache assigns their slots, a mover fills them.

    An expert in the cache may still be on its way, in `_loads`. Workers compute those in
    `on_workers` as long as they can. Several fetchers may share `stats`.
    """

    def __init__(
        self,
        cache: ExpertCache,
        store: ExpertStore,
        placement: Placement,
        passes: Passes,
        stats: ExpertStats,
        watch: MemoryWatch | None = None,
    ) -> None:
        self._cache, self._store, self._placement = cache, store, placement
        self._passes, self.stats, self._watch = passes, stats, watch
        self.on_workers: Set[ExpertKey] = frozenset()
        self._mover = Mover(store.stream)
        self._loads: dict[ExpertKey, ExpertLoad] = {}
        self._counted = 0  # bytes moved that `stats` has
        # The last result of `resident` if all experts are held, and its first key.
        self._all: tuple[ExpertKey, ExpertLists] | None = None

    @property
    def slots(self) -> int:
        return self._cache.limit

    @property
    def slots_by_tier(self) -> dict[str, int]:
        host = {"host": self._placement.host_slots} if self._placement.host_slots else {}
        return {self._store.name: self.slots, **host}

    @property
    def bytes_held(self) -> int:
        return self._store.nbytes

    @property
    def holds_all(self) -> bool:
        """Return whether the device holds all experts that no worker computes."""
        needed = self._placement.experts - len(self.on_workers)
        if self._loads or len(self._cache) < needed:
            return False
        own = (key for key in self._cache if key not in self.on_workers)
        return not self.on_workers or sum(1 for _ in own) == needed

    def tier(self, key: ExpertKey) -> str:
        """Return the expert's fastest tier: `device`, `host` or `disk`."""
        return self._store.tier(key, resident=self.holds(key))

    def holds(self, key: ExpertKey) -> bool:
        return self.state(key) == RESIDENT

    def state(self, key: ExpertKey) -> int:
        """Return `RESIDENT`, `LOADING` or `MISSING`."""
        if key not in self._cache:
            return MISSING
        return LOADING if key in self._loads else RESIDENT

    def resident(self, layers: Sequence[Sequence[ExpertKey]]) -> Sequence[Sequence[Expert]]:
        self.follow_memory()
        if self._cache.limit < self._placement.experts:
            return ()
        if not self.holds_all:
            return self._experts_of(takewhile(lambda keys: all(map(self.holds, keys)), layers))
        # To ask for each of thousands of experts takes milliseconds.
        first = layers[0][0]
        if self._all is None or self._all[0] != first or len(self._all[1]) != len(layers):
            self._all = first, self._experts_of(layers)
        return self._all[1]

    def _experts_of(self, layers: Iterable[Sequence[ExpertKey]]) -> ExpertLists:
        return ExpertLists(
            [self._expert(self._cache.slot_of(key)) for key in keys] for keys in layers
        )

    def note_hits(self, keys: Sequence[ExpertKey]) -> None:
        """Count uses of experts from `resident`, which may have left their slots since."""
        self._passes.enter(keys[0].layer)
        for key in keys:
            self.stats.hits[key] += 1
            self._cache.lookup(key)

    def settle(self, layer: int, chosen: Collection[ExpertKey]) -> None:
        """Note a router's choice, and cancel the other prefetches of its layer."""
        self._passes.enter(layer)
        self.follow_memory()
        for key, load in list(self._loads.items()):
            if load.is_prefetch and key.layer == layer:
                self._settle(key, load, is_right=key in chosen)

    def _settle(self, key: ExpertKey, load: ExpertLoad, *, is_right: bool) -> None:
        ended = load.ended
        if is_right:
            self.stats.right_predictions += 1
            self._mover.promote(load)
            if not ended:
                self.stats.late_predictions += 1
                self.stats.misses[key] += 1
        elif not ended:
            load.cancelled = True
        if load.cancelled or load.failed:
            self._give_up(key)
        elif ended:
            del self._loads[key]

    def request(self, window: Sequence[ExpertKey], pinned: Collection[ExpertKey] = ()) -> None:
        """Start loading missing experts, until only slots of `window` and `pinned` are left."""
        for key in window:
            if key not in self._cache or self._has_failed(key):
                if not self._start(ExpertLoad(key), {*window, *pinned}):
                    return
                self.stats.misses[key] += 1

    def prefetch(self, keys: Iterable[ExpertKey], pinned: Collection[ExpertKey]) -> None:
        """Start loading predicted experts. Evict no pinned or prefetched ones."""
        started = sum(load.is_prefetch for load in self._loads.values())
        room = min(_MAX_PREFETCHES, self.slots // 4) - started
        for key in keys:
            if key in self._cache or key in self.on_workers:
                continue
            if room <= 0 or not self._start(ExpertLoad(key, is_prefetch=True), pinned):
                return
            self.stats.predictions += 1
            room -= 1

    def ready(self, key: ExpertKey) -> Expert:
        """Wait for an expert, and return it. Raise the error of its load."""
        load = self._loads.get(key)
        if load is not None:
            self._wait(load)
        else:
            self.stats.hits[key] += 1
        return self._expert(self._cache.lookup(key))

    def load(self, key: ExpertKey, pinned: Collection[ExpertKey]) -> None:
        self.request([key], pinned)
        self.ready(key)

    def follow_memory(self) -> None:
        """Hold fewer experts if other programs need the memory, or more again."""
        if self._watch is not None:
            # The memory of a prefetch that was given up counts, since the next expert gets it.
            self.resize(self._watch.limit(len(self._store.blocks)))

    def halve(self) -> bool:
        limit = self._cache.limit // 2
        if limit < MIN_SLOTS:
            return False
        self.resize(limit)
        return True

    def resize(self, limit: int) -> None:
        """Hold no more than `limit` experts, and free the memory of the others."""
        if limit != self._cache.limit:
            self._all = None
            self._cache.resize(limit, pinned=self._loads)
            self._release_surplus()

    def close(self) -> None:
        """Free the memory of all slots. Nothing can be fetched after that."""
        self._all = None
        for load in self._loads.values():
            load.cancelled = True
        self._loads.clear()
        for slot in list(self._store.blocks):
            self._store.release(slot)

    def _expert(self, slot: int | None) -> Expert:
        assert slot is not None
        return self._store.expert(slot)

    def _release_surplus(self, coming: int = 0) -> None:
        """Free blocks beyond the limit, of which so many are about to be made."""
        surplus = len(self._store.blocks) + coming - self._cache.limit
        if surplus > 0:
            free = self._cache.free_slots() & set(self._store.blocks)
            for slot in sorted(free)[:surplus]:
                self._store.release(slot)

    def _wait(self, load: ExpertLoad) -> None:
        start = time.perf_counter()
        try:
            load.wait()
        except BaseException:
            if load.ended:  # it failed. After a signal it would still be on its way
                self._give_up(load.key)
            raise
        self.stats.stalled_seconds += time.perf_counter() - start
        self.stats.bytes_moved += self._store.bytes_moved - self._counted
        self._counted = self._store.bytes_moved
        del self._loads[load.key]

    def _has_failed(self, key: ExpertKey) -> bool:
        """Return whether the expert's load has failed since somebody stopped waiting for it."""
        if key in self._loads and self._loads[key].failed:
            self._give_up(key)
            return True
        return False

    def _start(self, load: ExpertLoad, pinned: Collection[ExpertKey]) -> bool:
        self._all = None
        key, held = load.key, self._store.blocks
        prefetches = [other for other, queued in self._loads.items() if queued.is_prefetch]
        slot = self._cache.admit(key, {*pinned, *prefetches}, held)
        if slot is None and not load.is_prefetch:
            slot = self._cache.admit(key, pinned, held)
        for other in [other for other in self._loads if other not in self._cache]:
            self._loads.pop(other).cancelled = True
        if slot is None:
            return False
        self._release_surplus(slot not in held)
        try:
            self._mover.begin(load, self._store.load(key, slot))
        except BaseException:  # without memory or a thread nobody brings it
            self._cache.discard(key)
            raise
        self._loads[key] = load
        return True

    def _give_up(self, key: ExpertKey) -> None:
        self._cache.discard(key)
        del self._loads[key]
