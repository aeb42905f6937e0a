"""Eviction policies: each orders the experts of a cache for eviction.

`layered`, the default, evicts the least recently used expert, counted in passes of its own layer.
`lru` counts all uses. Hit rates in decoding, for a cache that holds 25, 50 and 75% of the experts,
on a trace with experts repeated as in the Mixtral paper, and on a story by the demo model
(tests/benchmarks/cache_policies.py, which has `lfu` and the best possible policy, too):

| trace            | layered          | lru              | lfu              | best possible    |
| ---------------- | ---------------- | ---------------- | ---------------- | ---------------- |
| as in the paper  | 30.3, 53.3, 76.2 | 30.3, 46.4, 73.8 | 23.5, 48.5, 73.9 | 56.6, 78.7, 92.1 |
| a demo's story   | 50.2, 77.2, 94.1 | 50.1, 74.8, 93.6 | 54.1, 80.9, 95.3 | 70.1, 90.2, 98.1 |
"""

from __future__ import annotations

import heapq
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from typing import Protocol

from mixchat.experts.keys import ExpertKey


class Policy(Protocol):
    """Orders the experts of a cache for eviction."""

    def use(self, key: ExpertKey) -> None:
        """Note a use of the expert, which may be new in the cache."""

    def forget(self, key: ExpertKey) -> None:
        """Drop the expert, if it is in the cache."""

    def victims(self) -> Iterable[ExpertKey]:
        """Return all experts in the order of eviction."""


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


class LayeredLRU:
    """Least recently used first, counted in passes of an expert's own layer; among equals, first
    the one whose layer comes last.

    A model visits its layers in a cycle, so that the expert used longest ago belongs to the layer
    that comes next: LRU evicts it just before it may be needed. Take three layers with one expert
    each, A, B and C, used in this order, and the model in the first layer again, with another
    expert. The order is A C B: A was not needed in this pass, and C's layer comes after B's. LRU's
    order is A B C.
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


POLICIES: dict[str, Callable[[Passes], Policy]] = {
    "layered": LayeredLRU,
    "lru": lambda passes: LRU(),
}
