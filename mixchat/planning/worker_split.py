"""Predicts how fast a model is once workers on other machines hold experts, too."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain

import torch

from mixchat.experts.cache import ExpertKey
from mixchat.experts.placement import Placement
from mixchat.experts.sharing import divide
from mixchat.planning.expectation import (
    Expectation,
    ModelSize,
    TokenCost,
    held_together,
    moving_cost,
    size_of,
    speed_range,
)
from mixchat.planning.machine_speeds import MachineSpeeds, Measurement
from mixchat.planning.routing import Loads, expected_hit_rate, layer_loads
from mixchat.weights.format.blueprint import Blueprint


@dataclass(frozen=True)
class WorkerOffer:
    """A worker's room for experts, and its speed."""

    address: str
    slots: int
    expert_seconds: float  # for an expert with one row
    round_trip: float  # seconds for a row to get there and an output to come back


@dataclass(frozen=True)
class WorkerSplit:
    """A model's experts on this machine and on workers, and its speed."""

    offers: tuple[WorkerOffer, ...]
    held: tuple[int, ...]  # experts on each worker
    on_workers: int  # different experts on all workers
    here: int  # experts on this machine
    copies: int  # of `here`, experts that a worker holds, too
    expected: Expectation  # whose `held` counts all machines


def spread_model(
    blueprint: Blueprint,
    device: torch.device,
    measurement: Measurement,
    placement: Placement,
    offers: Sequence[WorkerOffer],
    uses: Mapping[ExpertKey, int] | None = None,
) -> WorkerSplit:
    """Return the split of experts and the speed of decoding, with at least one worker.

    The placement is of this machine alone, whose GPUs count as one. `uses` counts uses of experts.
    """
    config = blueprint.config
    slots = [sum(placement.by_device), *(offer.slots for offer in offers)]
    parts = divide(config.num_moe_layers, config.num_local_experts, slots, uses)
    here, *there = (frozenset(part) for part in parts)
    on_workers = frozenset(chain(*there))
    held_here = min(held_together(blueprint, device, placement), len(here))
    loads = layer_loads(config, [here, *there])
    hit_rate = expected_hit_rate(config, sum(placement.by_device), len(here))
    host_hit_rate = expected_hit_rate(config, held_here, len(here))
    size, name = size_of(blueprint), str(device)
    costs = [
        spread_cost(size, speeds, name, loads, offers, hit_rate, host_hit_rate)
        for speeds in measurement.in_use
    ]
    computed_here = _uses_here(loads) / (config.num_moe_layers * config.num_experts_per_tok)
    copies = len(here & on_workers)
    expected = Expectation(
        held_here - copies + len(on_workers),
        1 - computed_here * (1 - hit_rate),
        1 - computed_here * (1 - host_hit_rate),
        costs[0],
        speed_range(costs, measurement.measured_at),
    )
    held = tuple(map(len, there))
    return WorkerSplit(tuple(offers), held, len(on_workers), held_here, copies, expected)


def spread_cost(
    size: ModelSize,
    speeds: MachineSpeeds,
    device: str,
    loads: Loads,
    offers: Sequence[WorkerOffer],
    hit_rate: float,
    host_hit_rate: float,
) -> TokenCost | None:
    """Return the cost of a decoded token, most of which runs on `device`.

    Rows go out first. This machine computes, then waits for the slowest worker. The hit rates are
    of this machine.
    """
    one = speeds.expert_time(device, 1)
    here = _uses_here(loads)
    waiting = sum(
        layers * max(_slowest(counts[1:], offers) - counts[0] * one, 0.0)
        for counts, layers in loads.items()
    )
    dense = (size.head + size.first_layers) / size.expert
    computing = size.layers * speeds.layer_seconds + (here + dense) * one
    missing, read = here * (1 - hit_rate), here * (1 - host_hit_rate)
    cost = moving_cost(size, speeds, computing, missing=missing, read=read)
    return cost and replace(cost, waiting=waiting)


def _slowest(counts: Sequence[int], offers: Sequence[WorkerOffer]) -> float:
    """Return the seconds until the last worker has sent what it computes."""
    pairs = zip(counts, offers, strict=True)
    times = [offer.round_trip + n * offer.expert_seconds for n, offer in pairs if n]
    return max(times, default=0.0)


def _uses_here(loads: Loads) -> float:
    """Return how many experts this machine computes for a token."""
    return sum(layers * counts[0] for counts, layers in loads.items())
