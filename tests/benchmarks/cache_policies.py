"""Hit rates of expert caches by size and policy: a routing trace replayed, without a model.

    python tests/benchmarks/cache_policies.py

The trace is synthetic, with the repetitions that the Mixtral paper measured. The policies are
mixchat's (`layered`), `lru` over all layers, `lfu` (least frequently used), and Belady's, which
knows the future: no policy can do better. They bring each missing expert in. `gpu` is what a GPU
holds, which brings one expert a token at most. Hit rates are those of decode, with the experts that
a token brings in.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter, OrderedDict
from collections.abc import Iterable, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tools"))

import numpy as np
from routing_simulation import (
    POLICIES,
    Counts,
    Replay,
    Trace,
    Visit,
    replay_visits,
    synthetic_trace,
    visits,
)

from mixchat.experts.cache import ExpertCache, ExpertKey, Passes, Policy
from mixchat.experts.most_used import MostUsed

NAMES = [*POLICIES, "lfu", "belady"]
FRACTIONS = (0.25, 0.5, 0.75)
TOKENS = 2000


class LFU:
    """Least frequently used first, where older uses count less; among equals the oldest use first.

    Each use weighs more than the one before, which has the same effect as all earlier ones fading.
    Uses of evicted experts are remembered. `half_life` is the count of uses, of any expert, after
    which one counts half.
    """

    def __init__(self, half_life: int = 2000) -> None:
        self._growth = 2.0 ** (1 / half_life)
        self._weight = 1.0
        self._scores: dict[ExpertKey, float] = {}
        self._present: OrderedDict[ExpertKey, None] = OrderedDict()

    def use(self, key: ExpertKey) -> None:
        self._weight *= self._growth
        self._scores[key] = self._scores.get(key, 0.0) + self._weight
        self._present[key] = None
        self._present.move_to_end(key)
        if self._weight > 1e200:  # before a float overflows
            self._scores = {key: score / self._weight for key, score in self._scores.items()}
            self._weight = 1.0

    def forget(self, key: ExpertKey) -> None:
        self._present.pop(key, None)

    def victims(self) -> list[ExpertKey]:
        return sorted(self._present, key=self._scores.__getitem__)


class Belady:
    """The optimum: it knows all future uses, and evicts the expert whose next use is the latest.

    It works in a replay only, for comparison: no policy can do better. `uses` are all uses in
    order; a call of `use` is the next one of its expert.
    """

    def __init__(self, uses: Iterable[ExpertKey]) -> None:
        self._uses: dict[ExpertKey, list[int]] = {}
        for time, key in enumerate(uses):
            self._uses.setdefault(key, []).append(time)
        for times in self._uses.values():
            times.reverse()  # the next use is the last of the list
        self._next: dict[ExpertKey, float] = {}  # of the experts that are there

    def use(self, key: ExpertKey) -> None:
        times = self._uses[key]
        times.pop()
        self._next[key] = times[-1] if times else float("inf")

    def forget(self, key: ExpertKey) -> None:
        self._next.pop(key, None)

    def victims(self) -> list[ExpertKey]:
        return sorted(self._next, key=self._next.__getitem__, reverse=True)


def farthest_first(trace: Sequence[Visit]) -> list[Visit]:
    """Return each layer's experts in the order of their next use, the farthest first.

    Belady needs the uses in one order, but hits go first, so that the order depends on the cache.
    Only two things hang on it, and this order is best for both. The last miss of a visit always
    stays: let that be the one that is used again first. And of two experts that the same visit uses
    next, one is to go: the one that is used again sooner after that, for as a miss it then stays.
    """
    ordered, position = [], 0
    next_use: dict[ExpertKey, int] = {}  # counted from the end: the nearer, the larger
    for visit in reversed(trace):
        experts = sorted(visit.experts, key=lambda key: next_use.get(key, 0))
        for key in reversed(experts):
            position += 1
            next_use[key] = position
        ordered.append(Visit(experts, visit.prefill))
    return ordered[::-1]


def replay(trace: Trace, slots: int, name: str) -> Replay:
    """Return what a cache does in a trace with a policy of `NAMES`."""
    passes, order = Passes(trace.layers), visits(trace)
    if name == "belady":
        order = farthest_first(order)
        policy: Policy = Belady(key for visit in order for key in visit.experts)
    else:
        policy = LFU() if name == "lfu" else POLICIES[name](passes)
    return replay_visits(order, slots, policy, passes)


def replay_on_gpu(trace: Trace, slots: int) -> tuple[Counts, int]:
    """Return the hits of the experts that a GPU holds, in decoding, and the exchanges."""
    policy = MostUsed(0, [0] * trace.layers, trace.experts)
    cache = ExpertCache([0] * slots, policy)
    counts, exchanges = Counts(), 0

    def exchange() -> bool:
        exchange = policy.next_exchange(cache.free_sizes)
        if exchange is not None:
            if exchange.evicted is not None:
                cache.discard(exchange.evicted)
            cache.admit(exchange.key)
        return exchange is not None

    for _ in range(slots):
        exchange()
    for forward in trace.forwards:
        if (tokens := trace.tokens(forward)) > 1:
            for layer, selected in enumerate(forward):
                for expert, rows in Counter(selected).items():
                    policy.note_rows(ExpertKey(layer, expert), rows / tokens)
            continue
        policy.note_token(np.array(forward))
        for layer, selected in enumerate(forward):
            hits = sum(ExpertKey(layer, expert) in cache for expert in selected)
            counts.hits += hits
            counts.misses += len(selected) - hits
        exchanges += exchange()
    return counts, exchanges


def main() -> None:
    argparse.ArgumentParser(description="Compare the policies of expert caches.").parse_args()
    trace = synthetic_trace(tokens=TOKENS)
    tokens = sum(trace.tokens(forward) == 1 for forward in trace.forwards) or 1
    print(f"{trace.model}: {trace.layers} layers of {trace.experts} experts, {tokens} tokens")
    print("capacity", *(f"{name:>14}" for name in [*NAMES, "gpu"]), "(and experts a token)")
    for fraction in FRACTIONS:
        slots = max(1, int(fraction * trace.layers * trace.experts))
        found = [replay(trace, slots, name).decode for name in NAMES]
        moves = [(counts, counts.misses) for counts in found] + [replay_on_gpu(trace, slots)]
        rates = (f"{counts.hit_rate or 0:8.1%} {moved / tokens:5.2f}" for counts, moved in moves)
        print(f"{fraction:8.0%}", *rates)


if __name__ == "__main__":
    main()
