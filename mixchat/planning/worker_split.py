"""Predicts how fast a model is once workers on other machines hold experts, too."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain

import torch

from mixchat.experts.cache import ExpertKey
from mixchat.experts.placement import Placement
from mixchat.experts.sharing import divide
from mixchat.planning.calibration import MachineSpeeds, Measurement
from mixchat.planning.expectation import (
    Expectation,
    Shape,
    TokenCost,
    held_together,
    moving_cost,
    shape_of,
    speed_range,
)
from mixchat.planning.hit_rate import expected_hit_rate
from mixchat.planning.loads import Loads, layer_loads
from mixchat.weights.format.blueprint import Blueprint


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
class WorkerSplit:
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
) -> WorkerSplit:
    """Return where experts go and how fast decoding is, with at least one worker.

    placement: of this machine alone, whose GPUs are taken for one; uses: how often each expert was
    used, if that is known.
    """
    config = blueprint.config
    slots = [sum(placement.by_device), *(offer.slots for offer in offers)]
    parts = divide(config.num_hidden_layers, config.num_local_experts, slots, uses)
    here, *there = (frozenset(part) for part in parts)
    on_workers = frozenset(chain(*there))
    held_here = min(held_together(blueprint, device, placement), len(here))
    loads = layer_loads(config, [here, *there])
    hit_rate = expected_hit_rate(config, sum(placement.by_device), here)
    host_hit_rate = expected_hit_rate(config, held_here, here)
    costs = [
        spread_cost(
            shape_of(blueprint), speeds, str(device), loads, offers, hit_rate, host_hit_rate
        )
        for speeds in measurement.in_use
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
    return WorkerSplit(tuple(offers), held, len(on_workers), held_here, copies, expected)


def spread_cost(
    shape: Shape,
    speeds: MachineSpeeds,
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
