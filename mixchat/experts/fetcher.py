"""Brings experts into their slots: those requested, and those predicted to be needed."""

from __future__ import annotations

import time
from collections.abc import Collection, Sequence, Set

from mixchat.experts.cache import ExpertCache
from mixchat.experts.keys import ExpertKey
from mixchat.experts.memory import MemoryWatch
from mixchat.experts.mover import Mover, Transfer
from mixchat.experts.placement import MIN_SLOTS, Placement
from mixchat.experts.policies import Passes
from mixchat.experts.stats import ExpertStats
from mixchat.experts.store import ExpertStore
from mixchat.weights.format.blueprint import Expert

RESIDENT, COMING, MISSING = range(3)
PREFETCHES_AT_ONCE = 4


class Fetcher:
    """Experts of a store: a cache decides in which slots, a mover brings them.

    An expert can be in the cache while its bytes are still on their way; `_coming` has these.
    `stats` may be shared with other fetchers.
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
        self._mover = Mover(store.stream)
        self._coming: dict[ExpertKey, Transfer] = {}
        self._counted = 0  # bytes that the store has moved, as far as `stats` has them

    @property
    def slots(self) -> int:
        """Return how many experts may be held."""
        return self._cache.limit

    @property
    def slots_by_tier(self) -> dict[str, int]:
        """Return how many experts may be held in each of the faster tiers."""
        behind = {"host": self._placement.host_slots} if self._placement.host_slots else {}
        return {self._store.name: self.slots, **behind}

    @property
    def bytes_held(self) -> int:
        """Return the bytes of memory that experts take where they are computed."""
        return self._store.nbytes

    def holds_all(self, but: Set[ExpertKey] = frozenset()) -> bool:
        """Return whether there is nothing left to fetch of all experts `but` these."""
        needed = self._placement.experts - len(but)
        if self._coming or len(self._cache) < needed:
            return False
        return not but or sum(key not in but for key in self._cache) == needed

    def tier(self, key: ExpertKey) -> str:
        """Return the tier of the expert's fastest copy: `device`, `host` or `disk`."""
        return self._store.tier(key, resident=self.holds(key))

    def holds(self, key: ExpertKey) -> bool:
        """Return whether the expert is whole in its slot."""
        return self.state(key) == RESIDENT

    def state(self, key: ExpertKey) -> int:
        """Return `RESIDENT`, `COMING` or `MISSING`."""
        if key not in self._cache:
            return MISSING
        return COMING if key in self._coming else RESIDENT

    def settle(self, layer: int, chosen: Collection[ExpertKey]) -> None:
        """Note the router's choice for a layer: cancel prefetches of its other experts."""
        self._passes.enter(layer)
        self.follow_memory()
        for key, transfer in list(self._coming.items()):
            if not transfer.is_prefetch or key.layer != layer:
                continue
            ended = transfer.ended
            if key in chosen:
                self.stats.right_predictions += 1
                self._mover.promote(transfer)
                if not ended:
                    self.stats.late_predictions += 1
                    self.stats.misses[key] += 1
            elif not ended:
                transfer.cancelled = True
            if transfer.cancelled or transfer.failed:
                self._give_up(key)
            elif ended:
                del self._coming[key]

    def follow_memory(self) -> None:
        """Hold fewer experts where other programs need the memory, or more again."""
        if self._watch is not None:
            # A prefetch that was given up has left the cache, and its memory to the next one.
            self.resize(self._watch.limit(len(self._store.blocks)))

    def request(self, window: Sequence[ExpertKey], beside: Collection[ExpertKey] = ()) -> None:
        """Start loading those that are missing, until only slots of others in `window` are left.

        Those in `beside` are not evicted either.
        """
        for key in window:
            if key not in self._cache or self._failed(key):
                if not self._send(Transfer(key), {*window, *beside}):
                    return
                self.stats.misses[key] += 1

    def prefetch(self, keys: Sequence[ExpertKey], pinned: Collection[ExpertKey]) -> None:
        """Start loading missing experts that are predicted; evict no pinned or prefetched ones."""
        on_their_way = sum(transfer.is_prefetch for transfer in self._coming.values())
        room = min(PREFETCHES_AT_ONCE, self.slots // 4) - on_their_way
        for key in keys:
            if key in self._cache:
                continue
            if room <= 0 or not self._send(Transfer(key, is_prefetch=True), pinned):
                return
            self.stats.predictions += 1
            room -= 1

    @property
    def has_room_for_all(self) -> bool:
        """Return whether no expert is evicted to make room for another one."""
        return self._cache.limit >= self._placement.experts

    def expert(self, key: ExpertKey) -> Expert:
        """Return an expert that is in its slot, without counting a use."""
        slot = self._cache.slot_of(key)
        assert slot is not None, key
        return self._store.expert(slot)

    def count_hits(self, layer: int, keys: Collection[ExpertKey]) -> None:
        """Count uses of a layer's experts out of their slots; they may have lost these since."""
        self._passes.enter(layer)
        for key in keys:
            self.stats.hits[key] += 1
            self._cache.lookup(key)

    def ready(self, key: ExpertKey) -> Expert:
        """Return the expert once it is in its slot. Raises what bringing it raised."""
        transfer = self._coming.get(key)
        if transfer is not None:
            self._await(key, transfer)
        else:
            self.stats.hits[key] += 1
        slot = self._cache.lookup(key)
        assert slot is not None, key
        return self._store.expert(slot)

    def resize(self, limit: int) -> None:
        """Hold no more than `limit` experts, and give the memory of the others back."""
        if limit == self._cache.limit:
            return
        self._cache.resize(limit, pinned=self._coming)
        self._release_surplus()

    def _release_surplus(self) -> None:
        """Give back the memory of free slots beyond what may be held."""
        surplus = len(self._store.blocks) - self._cache.limit
        if surplus > 0:
            free = self._cache.free_slots() & set(self._store.blocks)
            for slot in sorted(free)[:surplus]:
                self._store.release(slot)

    def halve(self) -> bool:
        """Hold half as many experts from now on; return False where that would be too few."""
        limit = self._cache.limit // 2
        if limit < MIN_SLOTS:
            return False
        self.resize(limit)
        return True

    def close(self) -> None:
        """Give the memory of all slots back at once; nothing can be fetched any more."""
        for transfer in self._coming.values():
            transfer.cancelled = True
        self._coming.clear()
        for slot in list(self._store.blocks):
            self._store.release(slot)

    def _await(self, key: ExpertKey, transfer: Transfer) -> None:
        start = time.perf_counter()
        try:
            transfer.wait()
        except BaseException:
            if transfer.ended:  # it failed; after a signal it would still be on its way
                self._give_up(key)
            raise
        self.stats.stalled_seconds += time.perf_counter() - start
        self.stats.bytes_moved += self._store.bytes_moved - self._counted
        self._counted = self._store.bytes_moved
        del self._coming[key]

    def _failed(self, key: ExpertKey) -> bool:
        """Return whether the expert failed to arrive after an earlier call had stopped waiting."""
        if key in self._coming and self._coming[key].failed:
            self._give_up(key)
            return True
        return False

    def _send(self, transfer: Transfer, pinned: Collection[ExpertKey]) -> bool:
        """Start a transfer; return False where there is no slot for it."""
        key = transfer.key
        prefetches = [other for other, its in self._coming.items() if its.is_prefetch]
        held = self._store.blocks
        slot = self._cache.admit(key, {*pinned, *prefetches}, held)
        if slot is None and not transfer.is_prefetch:
            slot = self._cache.admit(key, pinned, held)
        for other in [other for other in self._coming if other not in self._cache]:
            self._coming[other].cancelled = True
            del self._coming[other]
        if slot is None:
            return False
        self._release_surplus()
        try:
            self._mover.begin(transfer, self._store.load(key, slot))
        except BaseException:  # no memory, or no thread: nobody brings it
            self._cache.discard(key)
            raise
        self._coming[key] = transfer
        return True

    def _give_up(self, key: ExpertKey) -> None:
        self._cache.discard(key)
        del self._coming[key]
