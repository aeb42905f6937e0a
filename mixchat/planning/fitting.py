"""Fits a model into memory: the same function plans and loads."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch

from mixchat.context import Context
from mixchat.engine.kv_cache import cache_bytes
from mixchat.errors import ResourceError, UsageError
from mixchat.experts.memory import CPU, free_on
from mixchat.experts.placement import MIN_SLOTS, Demand, Placement, place_on_cpu, place_on_gpu
from mixchat.machine import tightest_memory_limit
from mixchat.options import LoadOptions
from mixchat.quantities import MemoryBudget
from mixchat.weights.format.blueprint import Blueprint

Tier = Literal["host", "device"]


@dataclass(frozen=True)
class FreeMemory:
    """Bytes that can be taken: in RAM, and on the GPU that computes; None where the CPU does.

    limit: the limit that allows less RAM than is free, as `machine.tightest_memory_limit` names it.
    """

    host: int
    device: int | None = None
    limit: str | None = None

    @classmethod
    def now(cls, device: torch.device) -> FreeMemory:
        """Return the free memory of this machine, where `device` computes."""
        on_device = None if device == CPU else free_on(device)
        return cls(free_on(CPU), on_device, tightest_memory_limit())


@dataclass(frozen=True)
class Fit:
    """The places of a model in the free memory, with the requested options.

    context: its tokens; largest_context: the tokens with which the least of experts still fits.
    """

    blueprint: Blueprint
    free: FreeMemory
    options: LoadOptions
    context: int
    largest_context: int
    demand: Demand
    placement: Placement

    def with_more(self, tier: Tier, size: int) -> Fit:
        """Return the fit with `size` bytes more in a tier; a budget for it grows as much."""
        options, demand = self.options, self.demand
        if tier == "host":
            free = replace(self.free, host=self.free.host + size)
            budget = _raised(options.host_memory, demand.experts * demand.expert, size)
            return fit_model(self.blueprint, free, replace(options, host_memory=budget))
        assert self.free.device is not None
        free = replace(self.free, device=self.free.device + size)
        budget = _raised(options.device_memory, self.free.device, size)
        return fit_model(self.blueprint, free, replace(options, device_memory=budget))


def fit_model(blueprint: Blueprint, free: FreeMemory, options: LoadOptions) -> Fit:
    """Return where the model goes. Raises `UsageError` and `ResourceError` where it cannot."""
    context = Context.of(blueprint.config, options.context_size).tokens
    token = cache_bytes(blueprint.config, 1, blueprint.quantization.dtype, options.kv_bits)
    demand = Demand(
        shared=blueprint.shared_size,
        context=context * token,
        expert=blueprint.expert.stride,
        experts=blueprint.expert_count,
    )
    placement = _place(demand, free, options)
    room = _room_for_context(demand, free, options, placement)
    largest = min(room // token, blueprint.config.max_position_embeddings)
    return Fit(blueprint, free, options, context, largest, demand, placement)


def fit_experts(blueprint: Blueprint, free: FreeMemory, options: LoadOptions) -> Placement:
    """Return where experts go that a worker holds, without the rest of the model.

    Raises as `fit_model` does.
    """
    expert = blueprint.expert.stride
    demand = Demand(shared=0, context=0, expert=expert, experts=blueprint.expert_count)
    return _place(demand, free, options)


def _place(demand: Demand, free: FreeMemory, options: LoadOptions) -> Placement:
    if free.device is not None:
        return place_on_gpu(
            demand, free.device, free.host, options.device_memory, options.host_memory
        )
    if options.device_memory is not None:
        raise UsageError("--device-memory is for a GPU; --host-memory sets what the CPU uses")
    try:
        return place_on_cpu(demand, free.host, options.host_memory)
    except ResourceError as error:
        if free.limit is None:
            raise
        hint = (
            f"A limit on this process allows no more ({free.limit}): raise it. {error.hint or ''}"
        )
        raise ResourceError(str(error), hint=hint.strip()) from None


def _room_for_context(
    demand: Demand, free: FreeMemory, options: LoadOptions, placement: Placement
) -> int:
    """Return the bytes for the context beside the fewest experts that the options allow."""
    budget, least = options.device_memory, MIN_SLOTS
    if free.device is not None:
        room = free.device if budget is None else budget.of(free.device)
    else:
        room = free.host
        if options.host_memory is not None:
            least = placement.slots
    return room - demand.shared - least * demand.expert


def _raised(budget: MemoryBudget | None, whole: int, size: int) -> MemoryBudget | None:
    return None if budget is None else MemoryBudget(size=budget.of(whole) + size)
