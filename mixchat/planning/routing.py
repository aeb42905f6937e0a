"""Predicts hit rates of caches from a router's choices."""

from __future__ import annotations

import numpy as np

from mixchat.base.model_config import ModelConfig

_MIXTRAL = (8, 2)  # experts of a layer, and experts of a token
# The hit rates of the cache with slots for 0, 1/4, 2/4 ... of such a model's experts. They come
# from `tests/tools/routing_simulation.py`, in which experts repeat as often as table 5 of the
# Mixtral paper (arXiv 2401.04088) says. Between these points the rates lie on lines, within 0.01.
_HIT_RATES = (0.0, 0.303, 0.533, 0.762, 1.0)


def expected_hit_rate(config: ModelConfig, slots: int) -> float:
    """Return the hit rate, 0 to 1, of a cache with `slots`.

    Experts repeat as in the Mixtral paper, or by chance in models of another shape.
    """
    experts = config.num_moe_layers * config.num_local_experts
    if slots >= experts:
        return 1.0
    if not repeats_as_mixtral(config):
        return slots / experts
    return float(np.interp(slots / experts, np.linspace(0, 1, len(_HIT_RATES)), _HIT_RATES))


def repeats_as_mixtral(config: ModelConfig) -> bool:
    """Return whether a router has Mixtral's shape.

    No counts of repeated experts are published for other shapes.
    """
    return (config.num_local_experts, config.num_experts_per_tok) == _MIXTRAL
