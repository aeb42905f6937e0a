"""How fast a model will be: what was measured and what fits, through the model of costs."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

import torch

from mixchat.experts.placement import Placement
from mixchat.experts.trace import Trace
from mixchat.model_config import ModelConfig
from mixchat.options import DEFAULT_POLICY
from mixchat.planning.calibration import Calibration, Measurement
from mixchat.planning.cost import Shape, TokenCost, moving_cost, token_cost
from mixchat.planning.simulate import replay, synthetic_trace
from mixchat.planning.speeds import known_speeds
from mixchat.weights.format.blueprint import Blueprint

PROMPT = 20  # tokens of a short prompt
# Tokens of a synthetic trace, and the first of them, which fill the cache and do not count.
_TOKENS, _COLD = 300, 100


@dataclass(frozen=True)
class SpeedRange:
    """Tokens a second in decoding: of the slowest sample of a measurement, and of the fastest."""

    low: float
    high: float
    measured_at: float  # seconds since 1970


@dataclass(frozen=True)
class FirstToken:
    """Seconds until the first token of a prompt of `PROMPT` tokens, all of the model on disk.

    starting: to read what is shared, before the prompt; prompt: what its tokens cost together.
    """

    starting: float
    prompt: TokenCost

    @property
    def seconds(self) -> float:
        """All of it."""
        return self.starting + self.prompt.seconds


def decode_cost(
    blueprint: Blueprint, device: torch.device, speeds: Calibration, placement: Placement
) -> TokenCost | None:
    """What a decoded token will cost; None where that hangs on a disk that was not measured."""
    hit_rate, host_hit_rate = hit_rates(blueprint, device, placement)
    return token_cost(
        _shape(blueprint),
        speeds,
        str(device),
        hit_rate=hit_rate,
        host_hit_rate=host_hit_rate,
    )


def speed_range(
    blueprint: Blueprint, device: torch.device, measured: Measurement, placement: Placement
) -> SpeedRange | None:
    """The speed in decoding by each sample; None as `decode_cost`."""
    speeds = (*measured.samples, measured.typical)
    costs = [decode_cost(blueprint, device, sample, placement) for sample in speeds]
    seconds = [cost.seconds for cost in costs if cost is not None]
    if not seconds:
        return None
    return SpeedRange(1 / max(seconds), 1 / min(seconds), measured.measured_at)


def predicted(
    blueprint: Blueprint, directory: Path, device: torch.device, placement: Placement
) -> SpeedRange | None:
    """The speed of a model that is loaded; None where the machine was never measured for its like
    (`mixchat plan` does it)."""
    measured = known_speeds(blueprint, directory, device)
    return None if measured is None else speed_range(blueprint, device, measured, placement)


def first_token(
    blueprint: Blueprint, device: torch.device, speeds: Calibration, prompt: int = PROMPT
) -> FirstToken | None:
    """What a prompt of so many tokens costs while nothing is in memory."""
    config, name = blueprint.config, str(device)
    distinct = expected_distinct(config, prompt)
    layers = config.num_hidden_layers
    rows = math.ceil(prompt * config.num_experts_per_tok / distinct)
    one, shape = speeds.expert_time(name, 1), _shape(blueprint)
    # More rows slow the other matrices as much as those of experts.
    slower = speeds.expert_time(name, prompt) / one
    layer = slower * speeds.layer_seconds + distinct * speeds.expert_time(name, rows)
    computing = layers * layer + shape.head / shape.expert * one
    every = layers * distinct
    cost = moving_cost(shape, speeds, computing, missing=every, read=every)
    if cost is None or speeds.disk_bandwidth is None:
        return None
    return FirstToken(blueprint.shared_size / speeds.disk_bandwidth, cost)


def hit_rates(
    blueprint: Blueprint, device: torch.device, placement: Placement
) -> tuple[float, float]:
    """The expected hit rates of the slots, and of slots and RAM behind them; without a model."""
    held = held_together(blueprint, device, placement)
    return _hit_rate(blueprint.config, placement.slots), _hit_rate(blueprint.config, held)


def held_together(blueprint: Blueprint, device: torch.device, placement: Placement) -> int:
    """How many different experts the slots and RAM behind them can hold."""
    slots, behind = placement.slots, placement.host_slots
    # An expert that lies otherwise on the GPU than in the file cannot come down into RAM: what is
    # on the GPU is in RAM, too.
    apart = blueprint.expert == blueprint.computed_on(device).expert
    return min(slots + behind if apart else max(slots, behind), placement.experts)


def expected_distinct(config: ModelConfig, tokens: int) -> float:
    """Experts of a layer that so many tokens use together, each token choosing by chance.

    Of 8 experts, 2 a token: 2 for one token, 3.5 for two, 7.97 for 20.
    """
    experts = config.num_local_experts
    return experts * (1 - (1 - config.num_experts_per_tok / experts) ** tokens)


def _shape(blueprint: Blueprint) -> Shape:
    config, head = blueprint.config, blueprint.head
    tensors = [blueprint.embedding] if head is None else head.tensors
    return Shape(
        layers=config.num_hidden_layers,
        experts_per_token=config.num_experts_per_tok,
        expert=blueprint.expert.stride,
        head=sum(tensor.nbytes for tensor in tensors),
    )


@lru_cache
def _hit_rate(config: ModelConfig, slots: int) -> float:
    """How often so many slots have an expert of a text like those of the Mixtral paper."""
    layers, experts = config.num_hidden_layers, config.num_local_experts
    if slots >= layers * experts:
        return 1.0
    if 2 * config.num_experts_per_tok > experts:  # which no synthetic trace can do
        return slots / (layers * experts)
    trace = _trace(layers, experts, config.num_experts_per_tok)
    cold = replace(trace, forwards=trace.forwards[:_COLD])
    # The cache does the same in both, so that the difference is what the rest of the trace gives.
    whole, begun = (replay(part, slots, DEFAULT_POLICY).decode for part in (trace, cold))
    hits, misses = whole.hits - begun.hits, whole.misses - begun.misses
    return hits / (hits + misses)


@lru_cache(maxsize=1)
def _trace(layers: int, experts: int, experts_per_token: int) -> Trace:
    return synthetic_trace(layers, experts, experts_per_token, tokens=_TOKENS)
