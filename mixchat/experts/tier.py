"""Holds experts in one kind of memory: on request, by prediction or to fill it."""

from __future__ import annotations

import time
from collections import OrderedDict, deque
from collections.abc import Collection, Iterable, Iterator, MutableMapping, Sequence, Set
from contextlib import suppress
from itertools import repeat
from typing import Protocol

import torch

from mixchat.base.errors import ResourceError
from mixchat.experts.cache import ExpertCache, ExpertKey, ExpertStats, Passes
from mixchat.experts.holder import LayerExperts
from mixchat.experts.load_queue import FILL, PREDICTED, REQUESTED, ExpertLoad, Job, LoadQueue
from mixchat.experts.memory import MemoryWatch
from mixchat.experts.placement import MIN_SLOTS
from mixchat.experts.store import READS
from mixchat.weights.format.expert import Expert

RESIDENT, LOADING, MISSING = range(3)
# Prefetches at once, and slots for each of them. A prefetch takes the slot of an expert that may be
# needed: with 8 of 34 slots, Mixtral's tokens missed 8 to 9 experts instead of 7.
_MAX_PREFETCHES = 16
_SLOTS_PER_PREFETCH = 16
# Pieces in flight from which on no predicted one begins. If a third of the predictions are wrong,
# tokens came at 5.0 and 4.9 a second with four, 4.2 and 4.6 with eight, which keep the next layer
# waiting, and 5.0 without predictions. With two, a disk that was needed most of the time gave less.
_PREDICTED_LIMIT = 4
_SLOTS_PER_CERTAIN_PREFETCH = 4
_MAX_UNCOUNTED = 64  # tokens


class SlotMemory(Protocol):
    """The memory of slots, by their numbers, and the way to fill one from the tier behind it."""

    @property
    def blocks(self) -> Collection[int]:
        """Return the slots that have memory, or get it as their load begins."""

    @property
    def nbytes(self) -> int:
        """Return the bytes of memory that slots take."""

    def job(self, load: ExpertLoad, slot: int) -> Job:
        """Return the work of bringing the load's expert into a slot."""

    def expert(self, slot: int) -> Expert:
        """Return the expert that was brought into a slot."""

    def block(self, slot: int) -> torch.Tensor:
        """Return the bytes of a slot that has memory."""

    def release(self, slot: int) -> None:
        """Free a slot's memory. A load that waits for its turn fails."""


class Tier:
    """Experts in one kind of memory: RAM, filled from the disk, or a GPU's, filled from RAM.

    cache: which experts have slots, by its policy. memory: fills the slots by loads of `queue`.
    experts: of all that it may be asked for. watch: limits the slots as memory gets short.

    An expert in the cache may still be on its way, in `_loads`, or in `_fills` if nobody has needed
    it yet. Workers and GPUs compute the experts in `elsewhere`.
    """

    def __init__(
        self,
        cache: ExpertCache,
        memory: SlotMemory,
        queue: LoadQueue,
        passes: Passes,
        stats: ExpertStats,
        *,
        experts: int,
        watch: MemoryWatch | None = None,
    ) -> None:
        self._cache = cache
        self._memory = memory
        self._queue = queue
        self._passes = passes
        self.stats = stats
        self._experts = experts
        self._watch = watch
        self.elsewhere: Set[ExpertKey] = frozenset()
        # Loads of the tier in front that read blocks of this one. Nobody else may get their slots.
        self._readers: list[ExpertLoad] = []
        # For `holds_all`: what it depends on, and what it was.
        self._whole: tuple[tuple[int, Set[ExpertKey]], bool] = (-1, frozenset()), False
        self._loads: dict[ExpertKey, ExpertLoad] = {}
        self._fills: OrderedDict[ExpertKey, ExpertLoad] = OrderedDict()
        # The experts of layers of which all are held. They stay there while all experts fit.
        self._held_layers: dict[int, LayerExperts] = {}
        self._uncounted: deque[tuple[int, Sequence[Sequence[int]]]] = deque()

    @property
    def slots(self) -> int:
        return self._cache.limit

    @property
    def nbytes(self) -> int:
        return self._memory.nbytes

    @property
    def holds_all(self) -> bool:
        """Return whether RAM holds all experts that are not elsewhere."""
        needed = self._experts - len(self.elsewhere)
        if self._loads or self.is_filling or len(self._cache) < needed:
            return False
        # To look at thousands of experts takes longer than some layers.
        if self.elsewhere and self._whole[0] != (now := (self._cache.changes, self.elsewhere)):
            own = sum(1 for key in self._cache if key not in self.elsewhere)
            self._whole = now, own == needed
        return not self.elsewhere or self._whole[1]

    @property
    def is_filling(self) -> bool:
        """Return whether experts that nobody needs yet are on their way."""
        while self._fills and (load := next(iter(self._fills.values()))).ended:
            if not self._has_failed(load.key):
                del self._fills[load.key]
        return bool(self._fills)

    def fill(self, keys: Sequence[ExpertKey]) -> None:
        """Load experts in this order while nothing else is to be loaded, if there is room for all.

        One that fails, or whose turn comes while memory is short, stays missing.
        """
        missing = [key for key in keys if key not in self._cache and key not in self.elsewhere]
        if len(self._cache) + len(missing) <= self.slots:
            self.count_hits()
            with suppress(ResourceError):  # no thread
                for key in missing:
                    slot = self._cache.admit(key)
                    assert slot is not None
                    self._begin(ExpertLoad(key, FILL), slot, self._fills)

    def _end_fills(self) -> None:
        for key, load in self._fills.items():
            if load.failed or not load.ended:
                load.cancelled = True
                self._cache.discard(key)
        self._fills.clear()

    def _reprioritize(self, key: ExpertKey, priority: int) -> bool:
        """Carry out the expert's fill with this priority. Return False if there is none."""
        load = self._fills.get(key)
        if load is None or not self._queue.reorder(load, priority):
            return False
        self._loads[key] = self._fills.pop(key)
        return True

    def holds(self, key: ExpertKey) -> bool:
        return self.state(key) == RESIDENT

    def state(self, key: ExpertKey) -> int:
        """Return `RESIDENT`, `LOADING` or `MISSING`."""
        if key not in self._cache:
            return MISSING
        fill = self._fills.get(key)
        has_come = key not in self._loads and (fill is None or (fill.ended and not fill.failed))
        return RESIDENT if has_come else LOADING

    def resident(self, layers: Sequence[Sequence[ExpertKey]]) -> Sequence[LayerExperts]:
        self.follow_memory()
        if self._cache.limit < self._experts:
            return ()
        resident = list[LayerExperts]()
        held = self._held_layers
        for keys in layers:
            layer = keys[0].layer
            # To ask for each of thousands of experts takes milliseconds.
            if layer not in held:
                if not all(map(self.holds, keys)):
                    break
                held[layer] = LayerExperts(self._expert(self._cache.slot_of(key)) for key in keys)
            resident.append(held[layer])
        return resident

    def note_hits(self, layer: int, selected: Sequence[Sequence[int]]) -> None:
        self._uncounted.append((layer, selected))
        if len(self._uncounted) >= _MAX_UNCOUNTED:
            self.count_hits()

    def count_hits(self) -> None:
        """Count the noted hits, before the cache changes or somebody reads the counts."""
        # Counting after each token would take several times as long, because the weights of a token
        # push everything else out of the processor's caches.
        while self._uncounted:
            first, selected = self._uncounted.popleft()
            for layer, experts in enumerate(selected, first):
                self._passes.enter(layer)
                for key in map(ExpertKey, repeat(layer), experts):
                    self.stats.hits[key] += 1
                    self._cache.lookup(key)  # it may have left its slot since

    def settle(self, layer: int, chosen: Collection[ExpertKey]) -> None:
        """Note a router's choice, and cancel the other prefetches of its layer."""
        self.count_hits()
        self._passes.enter(layer)
        self.follow_memory()
        for key in [key for key in self._loads if key.layer == layer]:
            # Read once: a thread of the queue may end the load meanwhile.
            load = self._loads[key]
            ended = load.ended
            if load.priority == REQUESTED:
                pass  # by a pass that was interrupted
            elif key in chosen:
                self.stats.right_predictions += 1
                self._queue.reorder(load, REQUESTED)
                if not ended:
                    self.stats.late_predictions += 1
                    self.stats.misses[key] += 1
            elif not ended and self.slots >= self._experts:
                # All experts fit, so a wrong prediction takes no other expert's slot.
                self._fills[key] = self._loads.pop(key)
                self._queue.reorder(load, FILL)
            elif not ended:
                self._give_up(key)
            if load.failed:
                self._fail(key)
            elif ended:
                del self._loads[key]

    def request(self, keys: Sequence[ExpertKey], pinned: Collection[ExpertKey] = ()) -> int:
        """Start loading missing experts, until only slots of `keys` and `pinned` are left.

        Return how many of `keys` are held or on their way now, the first ones.
        """
        kept = {*keys, *pinned}
        for number, key in enumerate(keys):
            if self._reprioritize(key, REQUESTED):
                self.stats.misses[key] += 1
            elif key not in self._cache or self._has_failed(key):
                if not self._start(ExpertLoad(key), kept):
                    return number
                self.stats.misses[key] += 1
        return len(keys)

    def prefetch(
        self, keys: Iterable[ExpertKey], pinned: Collection[ExpertKey], *, certain: bool = False
    ) -> None:
        """Start loading predicted experts. Evict no pinned or prefetched ones.

        certain: nearly all will be needed, and soon, as those of a prompt.
        """
        self._queue.predicted_limit = READS if certain else _PREDICTED_LIMIT
        most = min(_MAX_PREFETCHES, self.slots // _SLOTS_PER_PREFETCH)
        if certain:
            most = self.slots // _SLOTS_PER_CERTAIN_PREFETCH
        room = max(most, 1) - len(self._prefetches)
        for key in keys:
            is_new = key not in self._cache
            if key in self.elsewhere or not (is_new or key in self._fills):
                continue
            if room <= 0 or (is_new and not self._start(ExpertLoad(key, PREDICTED), pinned)):
                return
            if is_new or self._reprioritize(key, PREDICTED):
                self.stats.predictions += 1
                room -= 1

    def has_ended(self, key: ExpertKey) -> bool:
        """Return whether nobody has to wait for a requested expert."""
        load = self._loads.get(key)
        return load is None or load.ended

    def wait(self, key: ExpertKey) -> None:
        """Wait for a requested expert. Raise the error of its load."""
        load = self._loads.get(key)
        if load is None:
            return
        start = time.perf_counter()
        try:
            load.wait()
        except BaseException:
            # A load that failed has ended. After a signal it is still on its way.
            if load.ended:
                self._fail(key)
            raise
        self.stats.stalled_seconds += time.perf_counter() - start

    def ready(self, key: ExpertKey) -> Expert:
        """Wait for a requested expert, and return it. Raise the error of its load."""
        self.wait(key)
        if self._loads.pop(key, None) is None:
            self.stats.hits[key] += 1
        return self._expert(self._cache.lookup(key))

    def cancel(self) -> None:
        """Give up all loads of experts that were requested or predicted."""
        for key in list(self._loads):
            self._give_up(key)

    def in_turn(self, keys: Sequence[ExpertKey]) -> Iterator[tuple[ExpertKey, Expert]]:
        """Bring experts one after the other. Yield each, to be used until the next one."""
        for number, key in enumerate(keys):
            self.request(keys[number : number + self.slots])
            yield key, self.ready(key)

    def load(self, key: ExpertKey, pinned: Collection[ExpertKey]) -> None:
        self.request([key], pinned)
        self.ready(key)

    def follow_memory(self) -> None:
        """Hold fewer experts if other programs need the memory, or more again."""
        if self._watch is not None:
            # The memory of a prefetch that was given up counts, since the next expert gets it.
            # Of fills, only the first ones may have some.
            without = max(len(self._fills) - READS, 0) if self.is_filling else 0
            self.resize(self._watch.limit(len(self._memory.blocks) - without))

    def borrow(self, load: ExpertLoad) -> torch.Tensor | None:
        """Return the block of a load's expert, which stays until the load has ended.

        Return None without the expert, or if too few slots of its size would be left.
        """
        key = load.key
        left = self._cache.slots_for(key) - len(self._lent) - 1
        if left < MIN_SLOTS or not self.holds(key):
            return None
        self._readers.append(load)
        slot = self._cache.slot_of(key)
        assert slot is not None
        return self._memory.block(slot)

    def resize(self, limit: int) -> None:
        """Hold no more than `limit` experts, and free the memory of the others.

        Lent experts stay, beside the slots that computing needs.
        """
        if self._readers:
            limit = max(limit, len(self._lent) + MIN_SLOTS)
        if limit != self._cache.limit:
            self.count_hits()
            self._held_layers.clear()
            self._end_fills()
            self._cache.resize(limit, pinned={*self._loads, *self._lent})
            self._release_surplus(self._cache.limit)  # all that are free

    def close(self) -> None:
        """Free the memory of all slots. Nothing can be fetched after that."""
        self._held_layers.clear()
        self._end_fills()
        self.cancel()
        self._queue.close()
        for slot in list(self._memory.blocks):
            self._memory.release(slot)

    @property
    def _lent(self) -> set[ExpertKey]:
        """Return the experts that the tier in front reads."""
        self._readers = [load for load in self._readers if not (load.ended or load.cancelled)]
        return {load.key for load in self._readers}

    def _expert(self, slot: int | None) -> Expert:
        assert slot is not None
        return self._memory.expert(slot)

    def _release_surplus(self, coming: int) -> None:
        """Free blocks beyond the limit, with room for `coming` new ones."""
        surplus = len(self._memory.blocks) + coming - self._cache.limit
        if surplus > 0:
            free = self._cache.free_slots() & set(self._memory.blocks)
            for slot in sorted(free)[:surplus]:
                self._memory.release(slot)

    def _has_failed(self, key: ExpertKey) -> bool:
        """Return whether the expert's load has failed since somebody stopped waiting for it."""
        load = self._loads.get(key) or self._fills.get(key)
        if load is None or not load.failed:
            return False
        self._fail(key)
        return True

    @property
    def _prefetches(self) -> list[ExpertKey]:
        return [key for key, load in self._loads.items() if load.priority == PREDICTED]

    def _start(self, load: ExpertLoad, pinned: Collection[ExpertKey]) -> bool:
        """Begin a load in a slot that is free, or whose expert is not in `pinned`, if there is one.

        A prefetched expert stays, unless a requested one finds no other slot.
        """
        self.count_hits()
        kept = {*pinned, *self._lent} if self._readers else {*pinned}
        held = self._memory.blocks
        slot = self._cache.admit(load.key, {*kept, *self._prefetches}, held)
        if slot is None and load.priority == REQUESTED:
            slot = self._cache.admit(load.key, kept, held)
        # Loads whose slot was taken are useless. If all experts fit, none has lost its slot, and
        # looking through thousands of fills takes long.
        if self.slots < self._experts:
            for loads in (self._loads, self._fills):
                for evicted in [expert for expert in loads if expert not in self._cache]:
                    loads.pop(evicted).cancelled = True
        if slot is None:
            return False
        self._begin(load, slot, self._loads)
        return True

    def _begin(
        self, load: ExpertLoad, slot: int, loads: MutableMapping[ExpertKey, ExpertLoad]
    ) -> None:
        """Begin a load that has a slot, and note it among `loads`."""
        self._release_surplus(slot not in self._memory.blocks)
        try:
            self._queue.begin(load, self._memory.job(load, slot))
        except BaseException:
            # Without a thread nobody brings it.
            load.cancelled = True
            self._cache.discard(load.key)
            raise
        loads[load.key] = load

    def _fail(self, key: ExpertKey) -> None:
        """Note that an expert's load has failed."""
        self._give_up(key)

    def _give_up(self, key: ExpertKey) -> None:
        """Evict an expert. If it is on its way, nobody waits for it any more."""
        self._cache.discard(key)
        for loads in (self._loads, self._fills):
            if (load := loads.pop(key, None)) is not None:
                load.cancelled = True
