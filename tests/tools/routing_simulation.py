"""A router's choices as a trace, made or recorded, and what a cache of experts does in it."""

from __future__ import annotations

import random
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

from mixchat.experts.cache import ExpertCache, ExpertKey, LayeredLRU, Passes, Policy

# The chance that two tokens in a row share an expert, in three of 32 layers, by table 5 of the
# Mixtral paper (arXiv 2401.04088). By chance it is 13/28.
_SHARING = ((0, 0.48), (15, 0.645), (31, 0.50))


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
    "layered": LayeredLRU,  # which mixchat has
    "lru": lambda passes: LRU(),
}


@dataclass(frozen=True)
class Trace:
    """The routing of a run: `forwards[i][layer]` has the selected experts of that pass's tokens."""

    model: str
    layers: int
    experts: int
    experts_per_token: int
    forwards: list[list[list[int]]]

    def tokens(self, forward: list[list[int]]) -> int:
        """Return the number of tokens. One is decode, more are prefill."""
        return len(forward[0]) // self.experts_per_token


def sharing(layer: int, layers: int) -> float:
    """Return the chance that two tokens in a row share an expert, from 0 to 1."""
    depth = layer * 31 / max(layers - 1, 1)
    (low, first), (high, last) = _SHARING[:2] if depth <= _SHARING[1][0] else _SHARING[1:]
    return first + (last - first) * (depth - low) / (high - low)


def synthetic_trace(
    layers: int = 32,
    experts: int = 8,
    experts_per_token: int = 2,
    *,
    tokens: int,
    seed: int = 0,
) -> Trace:
    """Return a trace of `tokens` decode steps that repeat experts as often as Mixtral does.

    Two tokens in a row share one or more with the probability `sharing`.
    """
    assert 2 * experts_per_token <= experts, "any two tokens share experts"
    generator = random.Random(seed)
    columns = [
        _chain(generator, sharing(layer, layers), experts, experts_per_token, tokens)
        for layer in range(layers)
    ]
    forwards = [list(forward) for forward in zip(*columns, strict=True)]
    return Trace("synthetic", layers, experts, experts_per_token, forwards)


def _chain(
    generator: random.Random, share: float, experts: int, choices: int, tokens: int
) -> list[list[int]]:
    """Return sets of experts, each sharing with the one before with the probability `share`.

    The experts stay uniformly distributed.
    """
    chain = [generator.sample(range(experts), choices)]
    while len(chain) < tokens:
        shares = generator.random() < share
        chosen = generator.sample(range(experts), choices)
        while shares == set(chosen).isdisjoint(chain[-1]):
            chosen = generator.sample(range(experts), choices)
        chain.append(chosen)
    return chain[:tokens]


@dataclass
class Counts:
    """Uses of experts that were in the cache, and of others."""

    hits: int = 0
    misses: int = 0

    @property
    def hit_rate(self) -> float | None:
        """Return the hits among all uses, 0 to 1, or None without uses."""
        uses = self.hits + self.misses
        return self.hits / uses if uses else None


@dataclass(frozen=True)
class Replay:
    """The uses in forward passes of several tokens, and in passes of one."""

    prefill: Counts = field(default_factory=Counts)
    decode: Counts = field(default_factory=Counts)


@dataclass(frozen=True)
class Visit:
    """The different experts that a layer asks for in a forward pass."""

    experts: list[ExpertKey]
    prefill: bool


def visits(trace: Trace) -> list[Visit]:
    """Return the visits of a trace, in order."""
    return [
        Visit([ExpertKey(layer, expert) for expert in dict.fromkeys(selected)], tokens > 1)
        for forward in trace.forwards
        for tokens in [trace.tokens(forward)]
        for layer, selected in enumerate(forward)
        if selected
    ]


def replay(trace: Trace, slots: int, policy: str) -> Replay:
    """Return what a cache does in a trace, by this name of `POLICIES`."""
    passes = Passes(trace.layers)
    return replay_visits(visits(trace), slots, POLICIES[policy](passes), passes)


def replay_visits(trace: Iterable[Visit], slots: int, policy: Policy, passes: Passes) -> Replay:
    """Return what a cache does with these visits, each with the experts in the cache first."""
    cache, result = ExpertCache([0] * slots, policy), Replay()
    for visit in trace:
        passes.enter(visit.experts[0].layer)
        counts = result.prefill if visit.prefill else result.decode
        for key in sorted(visit.experts, key=lambda key: key not in cache):
            if cache.lookup(key) is not None:
                counts.hits += 1
            else:
                counts.misses += 1
                cache.admit(key)
    return result
