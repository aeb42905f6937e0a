"""Predicts how long prompts take: a cold start until the first token, and a long one."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from mixchat.engine.chunk_sizer import PREFILL_CHUNK
from mixchat.experts.placement import Placement
from mixchat.planning.calibration import MachineSpeeds, Measurement
from mixchat.planning.expectation import (
    SpeedRange,
    TokenCost,
    expected_distinct,
    held_together,
    moving_cost,
    shape_of,
)
from mixchat.weights.format.blueprint import Blueprint

PROMPT = 20  # tokens of a short prompt
LONG_PROMPT = 512  # and of a long one


@dataclass(frozen=True)
class FirstToken:
    """The seconds until the first token of a prompt of `PROMPT` tokens, all of the model on disk.

    starting: to read what all tokens share, before the prompt; prompt: the cost of its tokens; low,
    high: all of it by the fastest sample of a measurement, and by the slowest.
    """

    starting: float
    prompt: TokenCost
    low: float
    high: float

    @property
    def seconds(self) -> float:
        """Return all of them, by the typical figures."""
        return self.starting + self.prompt.seconds


def first_token(
    blueprint: Blueprint, device: torch.device, measurement: Measurement, prompt: int = PROMPT
) -> FirstToken | None:
    """Return the cost of a prompt of so many tokens while nothing is in memory.

    It is that of one GPU: with several only the disk counts, which they share. None where the disk
    was not measured.
    """
    parts = [
        (blueprint.shared_size / speeds.disk_bandwidth_fresh, cost)
        for speeds in (measurement.typical, *measurement.samples)
        if (cost := prompt_cost(blueprint, device, speeds.cold, prompt, missing=1.0, read=1.0))
        and speeds.disk_bandwidth_fresh
    ]
    if not parts:
        return None
    every = [starting + cost.seconds for starting, cost in parts]
    return FirstToken(*parts[0], min(every), max(every))


def prompt_speed(
    blueprint: Blueprint,
    device: torch.device,
    measurement: Measurement,
    placement: Placement | None,
    prompt: int = LONG_PROMPT,
) -> SpeedRange | None:
    """Return the tokens a second of a prompt of so many tokens, once the slots hold experts.

    placement: None where nothing holds any yet. None where the disk is needed and was not measured.
    """
    missing = read = 1.0
    cold = placement is None
    if placement is not None:
        missing = 1 - sum(placement.by_device) / placement.experts
        read = 1 - held_together(blueprint, device, placement) / placement.experts
    costs = [
        prompt_cost(blueprint, device, speeds, prompt, missing=missing, read=read)
        for speeds in (one.cold if cold else one.in_use for one in measurement.samples)
    ]
    seconds = [cost.seconds for cost in costs if cost is not None]
    if not seconds:
        return None
    return SpeedRange(prompt / max(seconds), prompt / min(seconds), measurement.measured_at)


def prompt_cost(
    blueprint: Blueprint,
    device: torch.device,
    speeds: MachineSpeeds,
    prompt: int,
    *,
    missing: float,
    read: float,
) -> TokenCost | None:
    """Return the cost of a prompt of so many tokens, computed in chunks.

    missing: of the experts that it uses, those that no slot holds; read: those that come from disk;
    both 0 to 1. Each chunk brings them in again. None where the disk is needed and was not
    measured.
    """
    config, name = blueprint.config, str(device)
    one, shape = speeds.expert_time(name, 1), shape_of(blueprint)
    computing, uses = shape.head / shape.expert * one, 0.0
    for start in range(0, prompt, PREFILL_CHUNK):
        tokens = min(PREFILL_CHUNK, prompt - start)
        distinct = expected_distinct(config, tokens)
        rows = math.ceil(tokens * config.num_experts_per_tok / distinct)
        # More rows slow the other matrices as much as those of experts.
        slower = speeds.expert_time(name, tokens) / one
        layer = slower * speeds.layer_seconds + distinct * speeds.expert_time(name, rows)
        computing += config.num_hidden_layers * layer
        uses += config.num_hidden_layers * distinct
    return moving_cost(shape, speeds, computing, missing=uses * missing, read=uses * read)
