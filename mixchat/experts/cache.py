"""Keys, slots, eviction policies and counts of uses of experts, without a tensor.

Hit rates in decoding, in percent, for a cache that holds 25, 50 and 75% of the experts
(tests/benchmarks/cache_policies.py):

| trace                          | layered (default) | lru              | best possible    |
| ------------------------------ | ----------------- | ---------------- | ---------------- |
| repeats as in Mixtral's paper  | 30.3, 53.3, 76.2  | 30.3, 46.4, 73.8 | 56.6, 78.7, 92.1 |
"""

from __future__ import annotations

import heapq
from collections import Counter, OrderedDict
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence, Set
from dataclasses import dataclass, field, fields
from typing import NamedTuple, Protocol


class ExpertKey(NamedTuple):
    """Names one expert of one layer."""

    layer: int
    expert: int


class ExpertCache:
    """Maps experts to slots by their numbers. If all are taken, the policy says which to evict.

    `limit` of the slots are used. sizes: the bytes of each slot. size_of: the bytes of an expert of
    a layer. An expert only takes slots of its size.
    """

    def __init__(
        self,
        sizes: Sequence[int],
        policy: Policy,
        size_of: Callable[[int], int] = lambda layer: 0,
    ) -> None:
        self._sizes = sizes
        self.limit = 0
        self.slots = 0
        self.changes = 0  # of the experts in it
        self._size_of = size_of
        self._policy = policy
        self._slots: dict[ExpertKey, int] = {}
        self._free: dict[int, set[int]] = {}  # by their size
        self._counts = Counter[int]()
        self.add(range(len(sizes)))

    def add(self, slots: Collection[int]) -> None:
        """Use these slots, too, which may have been removed."""
        for slot in slots:
            self._free.setdefault(self._sizes[slot], set()).add(slot)
            self._counts[self._sizes[slot]] += 1
        self.slots += len(slots)
        self.limit += len(slots)

    def remove(self, slots: Collection[int]) -> None:
        """Use these slots no more, which are free."""
        for slot in slots:
            self._free[self._sizes[slot]].remove(slot)
            self._counts[self._sizes[slot]] -= 1
        self.slots -= len(slots)
        self.limit -= len(slots)

    def __contains__(self, key: ExpertKey) -> bool:
        return key in self._slots

    def __len__(self) -> int:
        return len(self._slots)

    @property
    def keys(self) -> Set[ExpertKey]:
        return self._slots.keys()

    def __iter__(self) -> Iterator[ExpertKey]:
        return iter(list(self._slots))

    def lookup(self, key: ExpertKey) -> int | None:
        """Return the expert's slot and count a use, or return None."""
        slot = self._slots.get(key)
        if slot is not None:
            self._policy.use(key)
        return slot

    def slot_of(self, key: ExpertKey) -> int | None:
        """Return the expert's slot, without counting a use."""
        return self._slots.get(key)

    def slots_for(self, key: ExpertKey) -> int:
        """Return how many slots the expert may take."""
        return min(self._counts[self._size_of(key.layer)], self.limit)

    def admit(
        self, key: ExpertKey, pinned: Collection[ExpertKey] = (), preferred: Collection[int] = ()
    ) -> int | None:
        """Return a slot for an expert that has none, and count a use.

        Free slots come first, and of these `preferred` ones. Experts in `pinned` are not evicted.
        Return None if there are no others.
        """
        assert key not in self._slots
        size = self._size_of(key.layer)
        free = self._free[size]
        slot = None
        # More than one expert is evicted if `resize` had to leave pinned ones.
        while not free or len(self._slots) >= self.limit:
            victim = self._victim(pinned, None if free else size)
            if victim is None:
                return None
            slot = self._slots[victim]
            self.discard(victim)
        if slot not in free:
            slot = next(iter(free.intersection(preferred) or free))
        self._slots[key] = slot
        self.changes += 1
        free.discard(slot)
        self._policy.use(key)
        return slot

    def discard(self, key: ExpertKey) -> None:
        """Free the expert's slot, if it has one."""
        if key in self._slots:
            self.changes += 1
            self._free[self._size_of(key.layer)].add(self._slots.pop(key))
        self._policy.forget(key)

    def resize(self, limit: int, pinned: Collection[ExpertKey] = ()) -> None:
        """Use `limit` of the slots, at least one. Evict the others, but none in `pinned`."""
        self.limit = max(1, min(limit, self.slots))
        while len(self._slots) > self.limit:
            victim = self._victim(pinned)
            if victim is None:
                return
            self.discard(victim)

    def move(self, key: ExpertKey, slot: int) -> None:
        """Give an expert another slot, which is free and of its size."""
        free = self._free[self._sizes[slot]]
        free.remove(slot)
        free.add(self._slots[key])
        self._slots[key] = slot

    @property
    def free_sizes(self) -> list[int]:
        """Return the sizes of free slots."""
        return [size for size, free in self._free.items() if free]

    def free_slots(self) -> set[int]:
        """Return the slots without an expert, also beyond the limit."""
        return set().union(*self._free.values())

    def _victim(self, pinned: Collection[ExpertKey], size: int | None = None) -> ExpertKey | None:
        """Return the first expert to evict, of this size or of any."""
        victims = (key for key in self._policy.victims() if key not in pinned)
        return next((key for key in victims if size in (None, self._size_of(key.layer))), None)


class Policy(Protocol):
    """Orders the experts of a cache for eviction."""

    def use(self, key: ExpertKey) -> None:
        """Note a use of the expert, which has a slot, perhaps since now."""

    def forget(self, key: ExpertKey) -> None:
        """Drop the expert, if it is there."""

    def victims(self) -> Iterable[ExpertKey]:
        """Return all experts in the order of eviction."""


class LayeredLRU:
    """Least recently used first, counted in passes of an expert's own layer.

    Among equals, the one whose layer comes last is evicted first. Plain LRU evicts experts of the
    next layer just before they may be needed.
    """

    def __init__(self, passes: Passes) -> None:
        self._passes = passes
        # By layer: the pass in which an expert was used, the most recent one at the end.
        self._used: dict[int, OrderedDict[ExpertKey, int]] = {}

    def use(self, key: ExpertKey) -> None:
        layer = self._used.setdefault(key.layer, OrderedDict())
        layer[key] = self._passes.count(key.layer)
        layer.move_to_end(key)

    def forget(self, key: ExpertKey) -> None:
        if key.layer in self._used:
            self._used[key.layer].pop(key, None)

    def victims(self) -> Iterator[ExpertKey]:
        def rank(key: ExpertKey) -> tuple[int, int]:
            age = self._passes.count(key.layer) - self._used[key.layer][key]
            return age, self._passes.until(key.layer)

        # Each layer is in this order already, and most calls look at the first victims only.
        return heapq.merge(*self._used.values(), key=rank, reverse=True)


class Passes:
    """Counts how often a model has reached each of its layers."""

    def __init__(self, layers: int) -> None:
        self._counts = [0] * layers
        self._at = 0

    def enter(self, layer: int) -> None:
        self._counts[layer] += 1
        self._at = layer

    def count(self, layer: int) -> int:
        return self._counts[layer]

    def until(self, layer: int) -> int:
        """Return how many other layers come before the model is in this one again."""
        return (layer - self._at - 1) % len(self._counts)


@dataclass
class ExpertStats:
    """Cumulative counts.

    hits, misses: uses of an expert found in fast memory or not. A worker's are hits. bytes_moved:
    into fast memory. stalled_seconds: waiting for these. bytes_read: from disk. read_seconds: with
    at least one read in flight. predictions: prefetched experts. right_predictions: prefetched
    experts that a router then selected. late_predictions: right predictions that had not arrived by
    then, which are misses, too.
    """

    hits: Counter[ExpertKey] = field(default_factory=Counter)
    misses: Counter[ExpertKey] = field(default_factory=Counter)
    bytes_moved: int = 0
    stalled_seconds: float = 0.0
    bytes_read: int = 0
    read_seconds: float = 0.0
    predictions: int = 0
    right_predictions: int = 0
    late_predictions: int = 0

    @property
    def hit_rate(self) -> float:
        """Return the share of hits, 0 to 1, and 0 before the first use."""
        hits = self.hits.total()
        uses = hits + self.misses.total()
        return hits / uses if uses else 0.0

    def count_read(self, seconds: float, size: int) -> None:
        """Count bytes that came from the disk, and the time in which nothing else did."""
        self.read_seconds += seconds
        self.bytes_read += size

    def copy(self) -> ExpertStats:
        return self.since(ExpertStats())

    def since(self, start: ExpertStats) -> ExpertStats:
        """Return the counts since an earlier time."""
        return ExpertStats(
            **{f.name: getattr(self, f.name) - getattr(start, f.name) for f in fields(self)}
        )
