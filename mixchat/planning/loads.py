"""Counts what each of several holders of experts computes, on average over a router's choices."""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Mapping, Sequence, Set
from itertools import combinations

from mixchat.base.model_config import ModelConfig
from mixchat.experts.cache import ExpertKey
from mixchat.experts.sharing import share

_MOST_CHOICES = 1000  # of a router for a token that are gone through one by one

# The counts of a layer's experts that each holder computes for a token, this machine first; and in
# how many layers they are these, on average.
Loads = Mapping[tuple[int, ...], float]


def layer_loads(
    config: ModelConfig, held: Sequence[Set[ExpertKey]]
) -> dict[tuple[int, ...], float]:
    """Return how many experts each holder computes in a layer, where every choice is as likely.

    held: the experts of each holder, at least one for each expert. For two holders of four of eight
    experts each, in one layer, 2 experts a token: {(2, 0): 6/28, (1, 1): 16/28, (0, 2): 6/28}.
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
    """Return all choices of a router, or some of them where there are too many."""
    if math.comb(experts, chosen) <= _MOST_CHOICES:
        return list(combinations(range(experts), chosen))
    generator = random.Random(0)
    return [tuple(generator.sample(range(experts), chosen)) for _ in range(_MOST_CHOICES)]
