"""Predicts how fast a model will be, out of what was measured and what fits where."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import product

import torch

from mixchat.base.model_config import ModelConfig
from mixchat.experts.cache import ExpertKey
from mixchat.experts.placement import Placement
from mixchat.experts.sharing import assign_owners
from mixchat.planning.calibration import MachineSpeeds, Measurement
from mixchat.planning.hit_rate import expected_hit_rate
from mixchat.planning.loads import layer_loads
from mixchat.weights.format.blueprint import Blueprint

# Of what could be read while the cores compute, the part that is. Measured with
# `tests/benchmarks/beyond_memory.py`: prefetching does not start early enough for all of it.
OVERLAP = 0.5
# Tokens a second. 238 words a minute are read (Brysbaert 2019, doi 10.1016/j.jml.2019.104047), of
# some 1.3 tokens each; with less than the other figure, 200 words take four minutes.
READING = 5.0
SLOWEST = 1.0


@dataclass(frozen=True)
class Shape:
    """The parts of a model that cost time; `expert` and `head` in bytes, of one expert."""

    layers: int
    experts_per_token: int
    expert: int
    head: int


@dataclass(frozen=True)
class TokenCost:
    """The seconds of one decoded token, or of a prompt, and their parts.

    computing: the layers, the chosen experts, the head; copying: of `copied` experts from RAM to a
    GPU; reading: of `read` experts from disk, with nothing beside it; slowed: the part of its speed
    that the disk has while the cores compute; waiting: for workers, beyond what is computed here.
    """

    computing: float
    copying: float
    reading: float
    copied: float
    read: float
    slowed: float = 1.0
    waiting: float = 0.0

    @property
    def hidden(self) -> float:
        """Return the seconds saved because moving and computing run side by side."""
        beside = self.computing * self.slowed + self.waiting
        return OVERLAP * min(beside, self.copying + self.reading)

    @property
    def seconds(self) -> float:
        """Return all of them."""
        return self.computing + self.waiting + self.copying + self.reading - self.hidden


@dataclass(frozen=True)
class SpeedRange:
    """Tokens a second by the slowest sample of a measurement, and by the fastest; of one answer."""

    low: float
    high: float
    measured_at: float  # seconds since 1970

    @property
    def in_words(self) -> str:
        """Return what this speed of decoding means for a person who reads along."""
        if self.low >= READING:
            return "faster than you read"
        if self.high >= READING:
            return "about as fast as you read"
        if self.high >= SLOWEST:
            return "slower than you read"
        return "much slower than you read"


@dataclass(frozen=True)
class Expectation:
    """The speed of a model in decoding, with a placement of its experts.

    Hit rates, 0 to 1, are those of the slots, and of the slots with RAM behind them; together they
    hold `held` different experts. cost: by the typical figures of all samples; speed: of each
    answer, by each sample. Both are None where the disk is needed and was not measured. answers:
    how many are generated at once.
    """

    held: int
    hit_rate: float
    host_hit_rate: float
    cost: TokenCost | None
    speed: SpeedRange | None
    answers: int = 1

    @property
    def tokens_per_second(self) -> float | None:
        """Return the typical speed of each answer."""
        return None if self.cost is None else 1 / self.cost.seconds

    @property
    def together(self) -> SpeedRange | None:
        """Return the speed of all answers together."""
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

    answers: those that are generated at once, each of which gets a token in each pass. The GPUs are
    taken to be as fast as `device`, and as near to RAM. All compute side by side, and bring experts
    up side by side, so that the one with the most of a token's experts counts. They share the disk.
    Rows are taken to travel in no time.
    """
    held = held_together(blueprint, device, placement)
    hit_rate = expected_hit_rate(blueprint.config, sum(placement.by_device))
    busiest = busiest_share(blueprint.config, placement.by_device)
    host_hit_rate = expected_hit_rate(blueprint.config, held)
    uses = expected_distinct(blueprint.config, answers)
    costs = [
        token_cost(
            shape_of(blueprint),
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


def speed_range(costs: Sequence[TokenCost | None], measured_at: float) -> SpeedRange | None:
    """Return the range of speeds with these costs of a token; None where none is known."""
    seconds = [cost.seconds for cost in costs if cost is not None]
    return SpeedRange(1 / max(seconds), 1 / min(seconds), measured_at) if seconds else None


def token_cost(
    shape: Shape,
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

    hit_rate: uses of experts that the slots hold; host_hit_rate: uses of those that the slots or
    RAM behind them hold; busiest: of a layer's chosen experts, those of the GPU that has the most.
    All 0 to 1. uses: the experts of a layer that the answers use together, None for one answer.
    None where the disk is needed and was not measured.
    """
    one = speeds.expert_time(device, 1)
    # More rows slow the other matrices as much as those of experts.
    slower = speeds.expert_time(device, answers) / one
    uses = uses or float(shape.experts_per_token)
    expert = speeds.expert_time(device, answers * shape.experts_per_token / uses)
    uses *= shape.layers
    computing = (
        slower * shape.layers * speeds.layer_seconds
        + uses * busiest * expert
        + slower * shape.head / shape.expert * one
    )
    return moving_cost(
        shape,
        speeds,
        computing,
        missing=uses * (1 - hit_rate),
        read=uses * (1 - host_hit_rate),
        busiest=busiest,
    )


def moving_cost(
    shape: Shape,
    speeds: MachineSpeeds,
    computing: float,
    *,
    missing: float,
    read: float,
    busiest: float = 1.0,
) -> TokenCost | None:
    """Return the cost of computing for so long, with so many experts missing in the slots.

    read: of these, the experts to read; busiest: the part of the missing ones that the GPU with the
    most brings up, 0 to 1. None where the disk is needed and was not measured.
    """
    if read and speeds.disk_bandwidth is None:
        return None
    copied = missing if speeds.copy_bandwidth else 0.0
    busy = speeds.disk_bandwidth or 1.0
    alone = max(speeds.disk_bandwidth_idle or busy, busy)
    return TokenCost(
        computing=computing,
        copying=copied * busiest * shape.expert / (speeds.copy_bandwidth or 1.0),
        reading=read * shape.expert / alone,
        copied=copied,
        read=read,
        slowed=busy / alone if read else 1.0,
    )


def held_together(blueprint: Blueprint, device: torch.device, placement: Placement) -> int:
    """Return how many different experts the slots and RAM behind them can hold."""
    slots, behind = sum(placement.by_device), placement.host_slots
    # An expert whose layout on the GPU is not that of the file cannot come down into RAM: the
    # experts on the GPU are in RAM, too.
    apart = blueprint.expert == blueprint.computed_on(device).expert
    return min(slots + behind if apart else max(slots, behind), placement.experts)


def busiest_share(config: ModelConfig, slots: Sequence[int]) -> float:
    """Return the part of a token's experts of a layer, 0 to 1, that the busiest GPU has on average.

    slots: those of each GPU. With 4 of 8 experts on each of two, both of a token's are on the same
    one 3 times in 7, so that the busiest has 1.43 of 2.
    """
    if len(slots) == 1:
        return 1.0
    layers, experts = range(config.num_hidden_layers), range(config.num_local_experts)
    home = assign_owners((ExpertKey(*key) for key in product(layers, experts)), slots)
    held = [{key for key in home if home[key] == number} for number in range(len(slots))]
    most = sum(times * max(counts) for counts, times in layer_loads(config, held).items())
    return most / (len(layers) * config.num_experts_per_tok)


def shape_of(blueprint: Blueprint) -> Shape:
    """Return the parts of a model that cost time."""
    config, head = blueprint.config, blueprint.head
    tensors = [blueprint.embedding] if head is None else head.tensors
    return Shape(
        layers=config.num_hidden_layers,
        experts_per_token=config.num_experts_per_tok,
        expert=blueprint.expert.stride,
        head=sum(tensor.nbytes for tensor in tensors),
    )


def expected_distinct(config: ModelConfig, tokens: int) -> float:
    """Return the experts of a layer that so many tokens use together, each choosing by chance.

    Of 8 experts, 2 a token: 2 for one token, 3.5 for two, 7.97 for 20.
    """
    experts = config.num_local_experts
    return experts * (1 - (1 - config.num_experts_per_tok / experts) ** tokens)
