"""Predicts how fast a model is once workers on other machines hold experts, too."""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, replace
from itertools import chain, combinations

import torch

from mixchat.experts.keys import ExpertKey
from mixchat.experts.placement import Placement
from mixchat.experts.sharing import divide, share
from mixchat.model_config import ModelConfig
from mixchat.planning.calibration import Calibration, Measurement
from mixchat.planning.expectation import (
    Expectation,
    Shape,
    TokenCost,
    held_together,
    moving_cost,
    shape_of,
    speed_range,
)
from mixchat.planning.simulate import expected_hit_rate
from mixchat.weights.format.blueprint import Blueprint

_MOST_CHOICES = 1000  # of a router for a token that are gone through one by one

# How many experts of a layer each holder computes for a token, this machine first; and in how many
# layers that is so, on average.
Loads = Mapping[tuple[int, ...], float]


@dataclass(frozen=True)
class WorkerOffer:
    """A worker's room for experts, and its speed.

    expert_seconds: for an expert with one row; round_trip: seconds for a row to get there and for
    an output to come back, with no time to compute it.
    """

    address: str
    slots: int
    expert_seconds: float
    round_trip: float


@dataclass(frozen=True)
class Spread:
    """A model's experts on this machine and on workers, and the speed of the model then.

    held: how many experts each worker holds, on_workers: how many different ones; here: how many
    this machine holds, `copies` of them beside a worker. `expected.held` are all that are held.
    """

    offers: tuple[WorkerOffer, ...]
    held: tuple[int, ...]
    on_workers: int
    here: int
    copies: int
    expected: Expectation


def spread_model(
    blueprint: Blueprint,
    device: torch.device,
    measurement: Measurement,
    placement: Placement,
    offers: Sequence[WorkerOffer],
    uses: Mapping[ExpertKey, int] | None = None,
) -> Spread:
    """Return where experts go and how fast decoding is, with at least one worker.

    placement: of this machine alone; uses: how often each expert was used, if that is known.
    """
    config = blueprint.config
    slots = [placement.slots, *(offer.slots for offer in offers)]
    parts = divide(config.num_hidden_layers, config.num_local_experts, slots, uses)
    here, *there = (frozenset(part) for part in parts)
    on_workers = frozenset(chain(*there))
    held_here = min(held_together(blueprint, device, placement), len(here))
    loads = layer_loads(config, [here, *there])
    hit_rate = expected_hit_rate(config, placement.slots, here)
    host_hit_rate = expected_hit_rate(config, held_here, here)
    costs = [
        spread_cost(
            shape_of(blueprint), speeds, str(device), loads, offers, hit_rate, host_hit_rate
        )
        for speeds in (measurement.typical, *measurement.samples)
    ]
    at_home = _uses_here(loads) / (config.num_hidden_layers * config.num_experts_per_tok)
    copies = len(here & on_workers)
    expected = Expectation(
        held_here - copies + len(on_workers),
        1 - at_home * (1 - hit_rate),
        1 - at_home * (1 - host_hit_rate),
        costs[0],
        speed_range(costs, measurement.measured_at),
    )
    held = tuple(map(len, there))
    return Spread(tuple(offers), held, len(on_workers), held_here, copies, expected)


def spread_cost(
    shape: Shape,
    speeds: Calibration,
    device: str,
    loads: Loads,
    offers: Sequence[WorkerOffer],
    hit_rate: float,
    host_hit_rate: float,
) -> TokenCost | None:
    """Return the cost of a decoded token, most of which runs on `device`.

    Rows go out first, this machine computes meanwhile, and then waits for the slowest worker.
    Hit rates are those of the experts that this machine computes, as in `token_cost`.
    """
    one = speeds.expert_time(device, 1)
    here = _uses_here(loads)
    waiting = sum(
        layers * max(_slowest(counts[1:], offers) - counts[0] * one, 0.0)
        for counts, layers in loads.items()
    )
    cost = moving_cost(
        shape,
        speeds,
        shape.layers * speeds.layer_seconds + (here + shape.head / shape.expert) * one,
        missing=here * (1 - hit_rate),
        read=here * (1 - host_hit_rate),
    )
    return cost and replace(cost, waiting=waiting)


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


def _slowest(counts: Sequence[int], offers: Sequence[WorkerOffer]) -> float:
    """Return the seconds until the last worker has sent what it computes; 0 where none does."""
    return max(
        (
            offer.round_trip + count * offer.expert_seconds
            for count, offer in zip(counts, offers, strict=True)
            if count
        ),
        default=0.0,
    )


def _uses_here(loads: Loads) -> float:
    """Return how many experts this machine computes for a token."""
    return sum(layers * counts[0] for counts, layers in loads.items())
