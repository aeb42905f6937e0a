"""Predicts how long prompts take, in a cold start and later.

Costs and speeds are None if the disk is needed and was not measured.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from mixchat.engine.chunk_sizer import PREFILL_CHUNK
from mixchat.experts.placement import Placement
from mixchat.planning.expectation import (
    SpeedRange,
    TokenCost,
    expected_distinct,
    held_together,
    moving_cost,
    size_of,
    speed_range,
)
from mixchat.planning.machine_speeds import MachineSpeeds, Measurement
from mixchat.weights.format.blueprint import Blueprint

PROMPT = 20  # tokens of a short prompt
LONG_PROMPT = 512  # tokens of a long prompt


@dataclass(frozen=True)
class FirstToken:
    """The seconds until the first token of a prompt of `PROMPT` tokens, all on disk."""

    starting: float  # to read what all tokens share, before the prompt
    prompt: TokenCost
    low: float  # all of it by the fastest sample of a measurement
    high: float  # and by the slowest

    @property
    def seconds(self) -> float:
        return self.starting + self.prompt.seconds


def first_token(
    blueprint: Blueprint, device: torch.device, measurement: Measurement, prompt: int = PROMPT
) -> FirstToken | None:
    """Return the cost of a prompt of `prompt` tokens while nothing is in memory, on one GPU."""
    costs = [
        (blueprint.shared_size / speeds.disk_bandwidth_fresh, cost)
        for speeds in (measurement.typical, *measurement.samples)
        if (cost := prompt_cost(blueprint, device, speeds.cold, prompt, missing=1.0, read=1.0))
        and speeds.disk_bandwidth_fresh
    ]
    if not costs:
        return None
    seconds = [starting + cost.seconds for starting, cost in costs]
    return FirstToken(*costs[0], min(seconds), max(seconds))


def prompt_speed(
    blueprint: Blueprint,
    device: torch.device,
    measurement: Measurement,
    placement: Placement | None,
    prompt: int = LONG_PROMPT,
) -> SpeedRange | None:
    """Return the tokens a second of a prompt of `prompt` tokens, with empty slots for None."""
    missing = read = 1.0
    if placement is not None:
        missing = 1 - sum(placement.by_device) / placement.experts
        read = 1 - held_together(blueprint, device, placement) / placement.experts
    costs = [
        prompt_cost(blueprint, device, speeds, prompt, missing=missing, read=read)
        for sample in measurement.samples
        for speeds in (sample.cold if placement is None else sample.in_use,)
    ]
    return speed_range(costs, measurement.measured_at, prompt)


def prompt_cost(
    blueprint: Blueprint,
    device: torch.device,
    speeds: MachineSpeeds,
    prompt: int,
    *,
    missing: float,
    read: float,
) -> TokenCost | None:
    """Return the cost of a prompt of `prompt` tokens, computed in chunks.

    In each chunk no slot holds the part `missing` of the experts used, 0 to 1, and the part `read`
    comes from disk.
    """
    config, name = blueprint.config, str(device)
    row_s, size = speeds.expert_time(name, 1), size_of(blueprint)
    computing, uses = size.head / size.expert * row_s, 0.0
    for start in range(0, prompt, PREFILL_CHUNK):
        tokens = min(PREFILL_CHUNK, prompt - start)
        distinct = expected_distinct(config, tokens)
        rows = math.ceil(tokens * config.num_experts_per_tok / distinct)
        # More rows slow all matrices alike.
        slowdown = speeds.expert_time(name, tokens) / row_s
        layer_s = slowdown * speeds.layer_seconds + distinct * speeds.expert_time(name, rows)
        first_layers_s = slowdown * size.first_layers / size.expert * row_s
        computing += first_layers_s + config.num_moe_layers * layer_s
        uses += config.num_moe_layers * distinct
    return moving_cost(size, speeds, computing, missing=uses * missing, read=uses * read)
