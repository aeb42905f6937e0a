"""Bookkeeping of experts without a tensor: keys, slots, eviction policies and counts of uses.

The policy `layered`, the default, evicts the least recently used expert, counted in passes of its
own layer. `lru` counts all uses. Hit rates in decoding, for a cache that holds 25, 50 and 75% of
the experts, on a trace with experts repeated as in the Mixtral paper, and on a story by the demo
model (tests/benchmarks/cache_policies.py, which has `lfu` and the best possible policy, too):

| trace            | layered          | lru              | lfu              | best possible    |
| ---------------- | ---------------- | ---------------- | ---------------- | ---------------- |
| as in the paper  | 30.3, 53.3, 76.2 | 30.3, 46.4, 73.8 | 23.5, 48.5, 73.9 | 56.6, 78.7, 92.1 |
| a demo's story   | 50.2, 77.2, 94.1 | 50.1, 74.8, 93.6 | 54.1, 80.9, 95.3 | 70.1, 90.2, 98.1 |
"""

from __future__ import annotations

import heapq
from collections import Counter, OrderedDict
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass, field, fields
from typing import NamedTuple, Protocol


class ExpertKey(NamedTuple):
    """Names one expert of one layer."""

    layer: int
    expert: int


class ExpertCache:
    """Maps experts to slots 0 .. slots-1. If all are taken, the policy says which to evict.

    `limit` is the number of slots that are used. `resize` changes it.

    With two slots, the policy LRU, and A = (0, 0), B = (0, 1), C = (1, 0):

        lookup(A) -> None    admit(A) -> 0        order: A
        lookup(B) -> None    admit(B) -> 1        order: A B
        lookup(A) -> 0                            order: B A
        lookup(C) -> None    admit(C) -> 1        order: A C    (B is evicted, its slot reused)
        discard(C)                                order: A      (slot 1 is free again)
    """

    def __init__(self, slots: int, policy: Policy | None = None) -> None:
        assert slots > 0
        self.slots = self.limit = slots
        self._policy = LRU() if policy is None else policy
        self._slots: dict[ExpertKey, int] = {}

    def __contains__(self, key: ExpertKey) -> bool:
        return key in self._slots

    def __len__(self) -> int:
        return len(self._slots)

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

    def admit(
        self, key: ExpertKey, pinned: Collection[ExpertKey] = (), preferred: Collection[int] = ()
    ) -> int | None:
        """Return a slot for an expert that has none, and count a use. Evict if none is free.

        Of free slots, take one of `preferred` if possible. Experts in `pinned` are not evicted.
        Return None if there are no others.
        """
        assert key not in self._slots
        slot = None
        while len(self._slots) >= self.limit:  # more than once if `resize` left pinned ones
            victim = self._victim(pinned)
            if victim is None:
                return None
            slot = self._slots[victim]
            self.discard(victim)
        if slot is None:
            slot = min(self.free_slots(), key=lambda free: (free not in preferred, free))
        self._slots[key] = slot
        self._policy.use(key)
        return slot

    def discard(self, key: ExpertKey) -> None:
        """Free the expert's slot, if it has one."""
        self._slots.pop(key, None)
        self._policy.forget(key)

    def resize(self, limit: int, pinned: Collection[ExpertKey] = ()) -> None:
        """Use `limit` of the slots from now on, at least one, and evict the experts beyond it.

        Experts in `pinned` stay, even if they are more than `limit`.
        """
        self.limit = max(1, min(limit, self.slots))
        while len(self._slots) > self.limit:
            victim = self._victim(pinned)
            if victim is None:
                return
            self.discard(victim)

    def free_slots(self) -> set[int]:
        """Return the slots without an expert, including those beyond the limit."""
        return set(range(self.slots)) - set(self._slots.values())

    def _victim(self, pinned: Collection[ExpertKey]) -> ExpertKey | None:
        return next((key for key in self._policy.victims() if key not in pinned), None)


class Policy(Protocol):
    """Orders the experts of a cache for eviction."""

    def use(self, key: ExpertKey) -> None:
        """Note a use of the expert, which may be new in the cache."""

    def forget(self, key: ExpertKey) -> None:
        """Drop the expert, if it is in the cache."""

    def victims(self) -> Iterable[ExpertKey]:
        """Return all experts in the order of eviction."""


class LRU:
    """Least recently used first: after uses of A B C A the order is B C A."""

    def __init__(self) -> None:
        self._order: OrderedDict[ExpertKey, None] = OrderedDict()

    def use(self, key: ExpertKey) -> None:
        self._order[key] = None
        self._order.move_to_end(key)

    def forget(self, key: ExpertKey) -> None:
        self._order.pop(key, None)

    def victims(self) -> Iterator[ExpertKey]:
        return iter(self._order)


class LayeredLRU:
    """Least recently used first, counted in passes of an expert's own layer. Among equals, the one
    whose layer comes last is evicted first.

    A model visits its layers in a cycle, so that the expert used longest ago belongs to the layer
    that comes next. LRU evicts it just before it may be needed. Take three layers with one expert
    each, A, B and C, used in this order, and the model in the first layer again, with another
    expert. The order is A C B, because A was not needed in this pass, and C's layer comes after
    B's. The order of LRU is A B C.
    """

    def __init__(self, passes: Passes) -> None:
        self._passes = passes
        # By layer: the pass in which an expert was used, the most recently used one at the end.
        self._used: dict[int, OrderedDict[ExpertKey, int]] = {}

    def use(self, key: ExpertKey) -> None:
        layer = self._used.setdefault(key.layer, OrderedDict())
        layer[key] = self._passes.count(key.layer)
        layer.move_to_end(key)

    def forget(self, key: ExpertKey) -> None:
        if key.layer in self._used:
            self._used[key.layer].pop(key, None)

    def victims(self) -> Iterator[ExpertKey]:
        return heapq.merge(*self._used.values(), key=self._rank, reverse=True)

    def _rank(self, key: ExpertKey) -> tuple[int, int]:
        age = self._passes.count(key.layer) - self._used[key.layer][key]
        return age, self._passes.until(key.layer)


class Passes:
    """Counts how often a model has reached each of its layers, and in which one it is."""

    def __init__(self, layers: int) -> None:
        self._counts = [0] * layers
        self._at = 0

    def enter(self, layer: int) -> None:
        """Note that the model has reached a layer."""
        self._counts[layer] += 1
        self._at = layer

    def count(self, layer: int) -> int:
        """Return how often the model has reached the layer."""
        return self._counts[layer]

    def until(self, layer: int) -> int:
        """Return how many other layers come before the model is in this one again."""
        return (layer - self._at - 1) % len(self._counts)


POLICIES: dict[str, Callable[[Passes], Policy]] = {
    "layered": LayeredLRU,
    "lru": lambda passes: LRU(),
}


@dataclass
class ExpertStats:
    """Cumulative counts.

    hits, misses: uses of an expert found in fast memory or not, by expert. What a worker computes
    is a hit. bytes_moved: bytes brought into fast memory. stalled_seconds: time spent waiting for
    them. bytes_read: bytes of experts read from disk, in read_seconds, summed over GPUs that read
    at once. predictions: experts that were prefetched. right_predictions: those that a router then
    selected. late_predictions: the right ones that had not arrived by then. They are misses, too.
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
    def needed(self) -> int:
        """Return the uses of experts that fast memory did not hold before they were requested."""
        return self.misses.total() + self.right_predictions - self.late_predictions

    @property
    def hit_rate(self) -> float:
        """Return the hits among all uses, 0 to 1, and 0 before the first use."""
        hits = self.hits.total()
        uses = hits + self.misses.total()
        return hits / uses if uses else 0.0

    def copy(self) -> ExpertStats:
        """Return the counts as they are now."""
        return self.since(ExpertStats())

    def since(self, before: ExpertStats) -> ExpertStats:
        """Return the counts between an earlier time and this one."""
        return ExpertStats(
            **{f.name: getattr(self, f.name) - getattr(before, f.name) for f in fields(self)}
        )
