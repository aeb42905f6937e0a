"""Predicts how fast a model decodes and reads prompts, by what was measured and memory holds.

Costs and speeds are None if the disk is needed and was not measured.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from mixchat.base.model_config import ModelConfig
from mixchat.engine.chunk_sizer import PREFILL_CHUNK
from mixchat.experts.placement import Placement
from mixchat.planning.machine_speeds import MachineSpeeds, Measurement
from mixchat.planning.routing import expected_hit_rate
from mixchat.weights.format.blueprint import Blueprint

# The part that is read of what could be read while the cores compute, by
# `tests/benchmarks/beyond_memory.py`. Prefetching starts too late for all.
OVERLAP = 0.5
# Tokens a second. People read 238 words a minute (Brysbaert 2019, doi 10.1016/j.jml.2019.104047)
# of some 1.3 tokens each. With the other figure, 200 words take four minutes.
READING = 5.0
SLOWEST = 1.0
PROMPT = 20  # tokens of a short prompt
LONG_PROMPT = 512  # tokens of a long prompt


@dataclass(frozen=True)
class ModelSize:
    """The parts of a model that cost time."""

    layers: int  # with experts
    experts_per_token: int
    expert: int  # bytes of one, the mean of all layers
    head: int  # bytes
    first_layers: int = 0  # bytes of the first layers, which have no experts


@dataclass(frozen=True)
class TokenCost:
    """The seconds of one decoded token, or of a prompt."""

    computing: float  # seconds for layers, chosen experts and head
    copying: float  # seconds for `copied` experts from RAM to a GPU
    reading: float  # seconds for `read` experts from an idle disk
    copied: float
    read: float
    slowed: float = 1.0  # the part of its speed that the disk has while the cores compute

    @property
    def hidden(self) -> float:
        """Return the seconds saved because moving and computing overlap."""
        return OVERLAP * min(self.computing * self.slowed, self.copying + self.reading)

    @property
    def seconds(self) -> float:
        return self.computing + self.copying + self.reading - self.hidden


@dataclass(frozen=True)
class SpeedRange:
    """Tokens a second of one answer, by the slowest and the fastest sample."""

    low: float
    high: float
    measured_at: float  # seconds since 1970

    @property
    def in_words(self) -> str:
        """Return what this speed means for a reader."""
        if self.low >= READING:
            return "faster than you read"
        if self.high >= READING:
            return "about as fast as you read"
        if self.high >= SLOWEST:
            return "slower than you read"
        return "much slower than you read"


@dataclass(frozen=True)
class Expectation:
    """The speed of a model in decoding, with a placement of its experts."""

    held: int  # different experts in the slots and in RAM
    hit_rate: float  # of the slots, 0 to 1
    host_hit_rate: float  # of slots and RAM together
    cost: TokenCost | None  # by the typical figures of all samples
    speed: SpeedRange | None  # of each answer
    answers: int = 1  # generated at once

    @property
    def tokens_per_second(self) -> float | None:
        """Return the typical speed of each answer."""
        return None if self.cost is None else 1 / self.cost.seconds

    @property
    def together(self) -> SpeedRange | None:
        speed, answers = self.speed, self.answers
        return speed and replace(speed, low=answers * speed.low, high=answers * speed.high)


def expect(
    blueprint: Blueprint,
    device: torch.device,
    measurement: Measurement,
    placement: Placement,
    answers: int = 1,
) -> Expectation:
    """Return the speed of the model in decoding on `device`, and on the other GPUs of a placement.

    Each of `answers` gets a token in each pass. All GPUs count as fast as `device`, and share the
    disk. The busiest one decides. Sending rows counts as no time.
    """
    held = held_together(placement)
    hit_rate = expected_hit_rate(blueprint.config, sum(placement.by_device))
    busiest = 1.0
    host_hit_rate = expected_hit_rate(blueprint.config, held)
    uses = expected_distinct(blueprint.config, answers)
    costs = [
        token_cost(
            size_of(blueprint),
            speeds,
            str(device),
            hit_rate,
            host_hit_rate,
            busiest,
            answers=answers,
            uses=uses,
        )
        for speeds in measurement.in_use
    ]
    speed = speed_range(costs, measurement.measured_at)
    return Expectation(held, hit_rate, host_hit_rate, costs[0], speed, answers)


def speed_range(
    costs: Sequence[TokenCost | None], measured_at: float, tokens: int = 1
) -> SpeedRange | None:
    """Return the range of speeds, from costs that are each of `tokens` tokens."""
    seconds = [cost.seconds for cost in costs if cost is not None]
    if not seconds:
        return None
    return SpeedRange(tokens / max(seconds), tokens / min(seconds), measured_at)


def token_cost(
    size: ModelSize,
    speeds: MachineSpeeds,
    device: str,
    hit_rate: float,
    host_hit_rate: float,
    busiest: float = 1.0,
    *,
    answers: int = 1,
    uses: float | None = None,
) -> TokenCost | None:
    """Return the cost of a decoded token of each of several answers on `device`.

    The slots hold the part `hit_rate` of the experts used, together with RAM `host_hit_rate`. The
    busiest GPU has the part `busiest` of a layer's chosen experts. All answers use `uses` experts
    of a layer together, None for one answer.
    """
    row_s = speeds.expert_time(device, 1)
    # More rows slow all matrices alike.
    slowdown = speeds.expert_time(device, answers) / row_s
    uses = uses or float(size.experts_per_token)
    expert_s = speeds.expert_time(device, answers * size.experts_per_token / uses)
    uses *= size.layers
    computing = (
        slowdown * size.layers * speeds.layer_seconds
        + uses * busiest * expert_s
        + slowdown * (size.head + size.first_layers) / size.expert * row_s
    )
    missing, read = uses * (1 - hit_rate), uses * (1 - host_hit_rate)
    return moving_cost(size, speeds, computing, missing=missing, read=read, busiest=busiest)


def moving_cost(
    size: ModelSize,
    speeds: MachineSpeeds,
    computing: float,
    *,
    missing: float,
    read: float,
    busiest: float = 1.0,
) -> TokenCost | None:
    """Return the cost of `computing` seconds and of `missing` experts that are in no slot.

    `read` of the missing ones come from disk. The busiest GPU brings up the part `busiest`.
    """
    if read and speeds.disk_bandwidth is None:
        return None
    # A CPU computes experts where they are. Only a GPU has them copied.
    copied = missing if speeds.copy_bandwidth else 0.0
    busy = speeds.disk_bandwidth or 1.0
    alone = max(speeds.disk_bandwidth_idle or busy, busy)
    return TokenCost(
        computing=computing,
        copying=copied * busiest * size.expert / (speeds.copy_bandwidth or 1.0),
        reading=read * size.expert / alone,
        copied=copied,
        read=read,
        slowed=busy / alone if read else 1.0,
    )


def held_together(placement: Placement) -> int:
    """Return how many different experts the slots and RAM can hold together."""
    return min(sum(placement.by_device) + placement.host_slots, placement.experts)


def size_of(blueprint: Blueprint) -> ModelSize:
    """Return the parts of a model that cost time."""
    config, head = blueprint.config, blueprint.head
    tensors = [blueprint.embedding] if head is None else head.tensors
    first = range(config.first_k_dense_replace)
    matrices = [matrix for layer in first for matrix in blueprint.dense_matrices(layer)]
    return ModelSize(
        layers=config.num_moe_layers,
        experts_per_token=config.num_experts_per_tok,
        expert=blueprint.mean_expert,
        head=sum(tensor.nbytes for tensor in tensors),
        first_layers=sum(tensor.nbytes for matrix in matrices for tensor in matrix.tensors),
    )


def expected_distinct(config: ModelConfig, tokens: int) -> float:
    """Return how many experts of a layer `tokens` tokens use together, chosen by chance.

    Of 8 experts with 2 a token, two tokens use 3.5.
    """
    experts = config.num_local_experts
    return experts * (1 - (1 - config.num_experts_per_tok / experts) ** tokens)


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
        read = 1 - held_together(placement) / placement.experts
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
