"""Predicts hit rates of caches, and the loads of several holders of experts."""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Mapping, Sequence, Set
from itertools import combinations

import numpy as np

from mixchat.base.model_config import ModelConfig
from mixchat.experts.cache import ExpertKey
from mixchat.experts.sharing import share

_MAX_CHOICES = 1000  # that are gone through one by one
_MIXTRAL = (8, 2)  # experts, and how many of them a token uses
# The hit rates of the default policy with slots for 0, 1/4, 2/4 ... of such a model's experts. They
# come from `tests/routing_simulation.py`, which repeats experts as often as table 5 of the Mixtral
# paper (arXiv 2401.04088) says. Between these points the rates lie on lines, within 0.01.
_HIT_RATES = (0.0, 0.303, 0.533, 0.762, 1.0)


def expected_hit_rate(config: ModelConfig, slots: int, experts: int | None = None) -> float:
    """Return the hit rate, 0 to 1, of a cache with `slots` for `experts`, None for all experts.

    Experts repeat as in the Mixtral paper, or by chance in models of another shape.
    """
    if experts is None:
        experts = config.num_moe_layers * config.num_local_experts
    if slots >= experts:
        return 1.0
    if not repeats_as_mixtral(config):
        return slots / experts
    return float(np.interp(slots / experts, np.linspace(0, 1, len(_HIT_RATES)), _HIT_RATES))


def repeats_as_mixtral(config: ModelConfig) -> bool:
    """Return whether a router chooses as many of as many experts as Mixtral's.

    No counts of repeated experts are published for other shapes.
    """
    return (config.num_local_experts, config.num_experts_per_tok) == _MIXTRAL


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
    for layer in range(config.num_moe_layers):
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
