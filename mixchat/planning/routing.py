"""Follows a router's choices, for hit rates of caches and loads of several holders."""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, field, replace
from functools import lru_cache
from itertools import combinations

from mixchat.base.model_config import ModelConfig
from mixchat.base.options import DEFAULT_POLICY
from mixchat.experts.cache import POLICIES, ExpertCache, ExpertKey, Passes, Policy
from mixchat.experts.sharing import share
from mixchat.experts.trace import Trace

# Tokens of the trace. The first ones fill the cache and do not count.
_TOKENS, _COLD = 300, 100
_MIXTRAL = (8, 2)  # experts, and how many of them a token uses
# The chance that two tokens in a row share an expert, in three of 32 layers, by table 5 of the
# Mixtral paper (arXiv 2401.04088). By chance it is 13/28.
_SHARING = ((0, 0.48), (15, 0.645), (31, 0.50))


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
    cache, result = ExpertCache(slots, policy), Replay()
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


@lru_cache
def expected_hit_rate(
    config: ModelConfig, slots: int, among: frozenset[ExpertKey] | None = None
) -> float:
    """Return the hit rate, 0 to 1, of so many slots.

    Experts repeat as in the Mixtral paper, or by chance in models of another shape. Only the
    experts `among` use the slots, or all for None.
    """
    layers, experts = config.num_hidden_layers, config.num_local_experts
    total = layers * experts if among is None else len(among)
    if slots >= total:
        return 1.0
    if not repeats_as_mixtral(config):
        return slots / total
    trace = _paper_trace(layers)
    if among is not None:
        trace = _only(among, trace)
    cold = replace(trace, forwards=trace.forwards[:_COLD])
    # The rest of the trace is the difference.
    whole, filling = (replay(part, slots, DEFAULT_POLICY).decode for part in (trace, cold))
    hits, misses = whole.hits - filling.hits, whole.misses - filling.misses
    return hits / (hits + misses)


def repeats_as_mixtral(config: ModelConfig) -> bool:
    """Return whether a router chooses as many of as many experts as Mixtral's.

    No counts of repeated experts are published for other shapes.
    """
    return (config.num_local_experts, config.num_experts_per_tok) == _MIXTRAL


def _only(among: frozenset[ExpertKey], trace: Trace) -> Trace:
    forwards = [
        [
            [expert for expert in selected if ExpertKey(layer, expert) in among]
            for layer, selected in enumerate(forward)
        ]
        for forward in trace.forwards
    ]
    return replace(trace, forwards=forwards)


@lru_cache(maxsize=1)
def _paper_trace(layers: int) -> Trace:
    return synthetic_trace(layers, *_MIXTRAL, tokens=_TOKENS)


_MAX_CHOICES = 1000  # that are gone through one by one

# The average count of layers, by the experts that each holder computes there for a token. This
# machine comes first.
Loads = Mapping[tuple[int, ...], float]


def layer_loads(
    config: ModelConfig, held: Sequence[Set[ExpertKey]]
) -> dict[tuple[int, ...], float]:
    """Return how many experts each holder computes in a layer, if every choice is as likely.

    Each expert has a holder. With two holders of four of eight experts each, one layer and 2
    experts a token, the result is {(2, 0): 6/28, (1, 1): 16/28, (0, 2): 6/28}.
    """
    choices = _choices(config.num_local_experts, config.num_experts_per_tok)
    times: Counter[tuple[int, ...]] = Counter()
    for layer in range(config.num_hidden_layers):
        keys = [ExpertKey(layer, expert) for expert in range(config.num_local_experts)]
        holders = {key: [n for n, part in enumerate(held) if key in part] for key in keys}
        for choice in choices:
            shares = share({keys[expert]: 1 for expert in choice}, holders)
            times[tuple(len(shares.get(holder, ())) for holder in range(len(held)))] += 1
    return {counts: number / len(choices) for counts, number in times.items()}


def _choices(experts: int, chosen: int) -> list[tuple[int, ...]]:
    """Return all choices of a router, or some of too many."""
    if math.comb(experts, chosen) <= _MAX_CHOICES:
        return list(combinations(range(experts), chosen))
    generator = random.Random(0)
    return [tuple(generator.sample(range(experts), chosen)) for _ in range(_MAX_CHOICES)]
