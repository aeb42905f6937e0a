"""What a model will do on this machine, before it is loaded: what fits where, and how fast."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import torch

from mixchat import machine
from mixchat.engine.kv_cache import cache_bytes
from mixchat.experts.placement import MIN_SLOTS, Demand, Placement
from mixchat.options import LoadOptions
from mixchat.planning.calibration import Calibration, Measurement
from mixchat.planning.cost import TokenCost
from mixchat.planning.expectation import (
    FirstToken,
    SpeedRange,
    decode_cost,
    first_token,
    held_together,
    hit_rates,
    speed_range,
)
from mixchat.planning.fitting import FreeMemory, context_size, demand_of, place
from mixchat.quantities import MemoryBudget
from mixchat.weights.format.blueprint import Blueprint

STEPS = (8 * 10**9, 16 * 10**9)  # bytes of RAM that one might add; of a GPU's memory, the first


@dataclass(frozen=True)
class Machine:
    """What there is, in bytes; what is of a GPU is None where the CPU computes."""

    cpu: str
    cores: int
    memory: int
    free: FreeMemory
    disk_free: int
    gpu: str | None = None
    gpu_memory: int | None = None


@dataclass(frozen=True)
class Fit:
    """What goes where. `largest_context`: the tokens with which the least of experts still fits."""

    context: int
    largest_context: int
    demand: Demand
    placement: Placement


@dataclass(frozen=True)
class More:
    """What `bytes` more of a `tier` ("host" or "device") would give, in tokens a second."""

    tier: str
    bytes: int
    placement: Placement
    tokens_per_second: float
    speed: SpeedRange


@dataclass(frozen=True)
class MachinePlan:
    """What a model will do on a machine.

    Hit rates, 0 to 1, are those expected in decoding: of the slots, and of these with RAM behind
    them; together they have room for `held` experts. `cost` and `first_token` are None where they
    hang on a disk that could not be measured. Both are by the typical figures of all samples,
    which are `speeds`; `speed` is by all samples.
    """

    machine: Machine
    device: str
    speeds: Calibration
    fit: Fit
    held: int
    hit_rate: float
    host_hit_rate: float
    cost: TokenCost | None
    speed: SpeedRange | None
    measured_at: float
    samples: int
    first_token: FirstToken | None
    what_more_buys: tuple[More, ...]

    @property
    def tokens_per_second(self) -> float | None:
        """How fast it decodes."""
        return None if self.cost is None else 1 / self.cost.seconds


def look(directory: Path, device: torch.device) -> Machine:
    """This machine, with the disk of `directory`, which need not be there yet."""
    cuda = torch.cuda.get_device_properties(device) if device.type == "cuda" else None
    return Machine(
        cpu=machine.cpu_name(),
        cores=machine.usable_cores(),
        memory=machine.total_memory(),
        free=FreeMemory.now(device),
        disk_free=machine.free_disk(directory),
        gpu=None if cuda is None else cuda.name,
        gpu_memory=None if cuda is None else cuda.total_memory,
    )


def fit(blueprint: Blueprint, free: FreeMemory, options: LoadOptions) -> Fit:
    """Where the model goes, as loading it now would have it; raises the same."""
    context = context_size(blueprint.config, options.context_size)
    demand = demand_of(blueprint, context, options.kv_bits)
    placement = place(demand, free, options.host_memory, options.device_memory)
    return Fit(context, _largest_context(blueprint, free, options, placement), demand, placement)


def plan_model(
    blueprint: Blueprint,
    device: torch.device,
    there: Machine,
    measured: Measurement,
    options: LoadOptions,
) -> MachinePlan:
    """What the model will do on a machine that was looked at and measured. Raises as `fit`."""
    fitted, speeds = fit(blueprint, there.free, options), measured.typical
    rates = hit_rates(blueprint, device, fitted.placement)
    return MachinePlan(
        machine=there,
        device=str(device),
        speeds=speeds,
        fit=fitted,
        held=held_together(blueprint, device, fitted.placement),
        hit_rate=rates[0],
        host_hit_rate=rates[1],
        cost=decode_cost(blueprint, device, speeds, fitted.placement),
        speed=speed_range(blueprint, device, measured, fitted.placement),
        measured_at=measured.measured_at,
        samples=len(measured.samples),
        first_token=first_token(blueprint, device, speeds),
        what_more_buys=_what_more_buys(blueprint, device, there.free, measured, options),
    )


def _largest_context(
    blueprint: Blueprint, free: FreeMemory, options: LoadOptions, placement: Placement
) -> int:
    config, least = blueprint.config, MIN_SLOTS
    if free.device is None:
        room = free.host
        if options.host_memory is not None:  # what was asked for, it gets
            least = placement.slots
    else:
        room = options.device_memory.of(free.device) if options.device_memory else free.device
    room -= blueprint.shared_size + least * blueprint.expert.stride
    token = cache_bytes(config, 1, blueprint.quantization.dtype, options.kv_bits)
    return min(room // token, config.max_position_embeddings)


def _what_more_buys(
    blueprint: Blueprint,
    device: torch.device,
    free: FreeMemory,
    measured: Measurement,
    options: LoadOptions,
) -> tuple[More, ...]:
    ways = [("host", step) for step in STEPS]
    if free.device is not None:
        ways.append(("device", STEPS[0]))
    found: list[More] = []
    seen = {_counts(fit(blueprint, free, options).placement)}
    for tier, step in ways:
        placement = fit(blueprint, *_with_more(blueprint, free, options, tier, step)).placement
        cost = decode_cost(blueprint, device, measured.typical, placement)
        speed = speed_range(blueprint, device, measured, placement)
        if cost is not None and speed is not None and _counts(placement) not in seen:
            found.append(More(tier, step, placement, 1 / cost.seconds, speed))
            seen.add(_counts(placement))
    return tuple(found)


def _counts(placement: Placement) -> tuple[int, int]:
    return placement.slots, placement.host_slots


def _with_more(
    blueprint: Blueprint, free: FreeMemory, options: LoadOptions, tier: str, step: int
) -> tuple[FreeMemory, LoadOptions]:
    """The same with `step` bytes more, of which all go to the model where it has a budget."""
    if tier == "host":
        whole = blueprint.expert_count * blueprint.expert.stride
        budget = _raised(options.host_memory, whole, step)
        return replace(free, host=free.host + step), replace(options, host_memory=budget)
    assert free.device is not None
    budget = _raised(options.device_memory, free.device, step)
    return replace(free, device=free.device + step), replace(options, device_memory=budget)


def _raised(budget: MemoryBudget | None, whole: int, step: int) -> MemoryBudget | None:
    return None if budget is None else MemoryBudget(size=budget.of(whole) + step)
