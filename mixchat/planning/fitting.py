"""Fits a model into memory. The same function plans and loads."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import repeat

import torch

from mixchat.base.context import Context
from mixchat.base.errors import ResourceError, UsageError
from mixchat.base.machine import tightest_memory_limit
from mixchat.base.options import ExpertSize, LoadOptions
from mixchat.base.quantities import MemoryBudget
from mixchat.engine.caches.checkpoints import checkpoint_counts
from mixchat.engine.caches.sequence_cache import bytes_of_states, cache_bytes, scratch_bytes
from mixchat.experts.memory import CPU, free_on
from mixchat.experts.placement import (
    MIN_SLOTS,
    Demand,
    DeviceRoom,
    Placement,
    SlotSizes,
    place_on_cpu,
    place_on_gpus,
    reserve_of,
)
from mixchat.install.make.mix import budget_of, choose_mix, equal_sensitivities, mixed, usual_type
from mixchat.weights.format.blueprint import Blueprint

_MIX_TOLERANCE = 0.02  # of the experts' bytes, since a mix chooses whole layers


@dataclass(frozen=True)
class FreeMemory:
    """Bytes that can be taken."""

    host: int
    device: int | None = None  # on the GPU that computes; None if the CPU does
    limit: str | None = None  # of RAM, by `tightest_memory_limit`
    other_gpus: Mapping[str, int] = field(default_factory=dict)  # on other GPUs, by their names

    @classmethod
    def now(cls, devices: Sequence[torch.device]) -> FreeMemory:
        """Return the free memory of this machine if these devices compute."""
        first, *more = devices
        on_first = None if first == CPU else free_on(first)
        on_more = {str(device): free_on(device) for device in more}
        return cls(free_on(CPU), on_first, tightest_memory_limit(), on_more)

    def without_gpus(self) -> FreeMemory:
        """Return the memory if only the CPU computes."""
        return replace(self, device=None, other_gpus={})

    def rooms(self, budgets: Sequence[MemoryBudget]) -> list[DeviceRoom]:
        """Return the GPUs, with the budget for each or for all. Raises `UsageError`."""
        assert self.device is not None
        first = "the first GPU" if self.other_gpus else "the device"
        free = {first: self.device, **self.other_gpus}
        if len(budgets) > 1 and len(budgets) != len(free):
            gpus = "is 1 GPU" if len(free) == 1 else f"are {len(free)} GPUs"
            raise UsageError(
                f"--device-memory has {len(budgets)} values, and there {gpus}",
                hint="Give one value for all, or one for each.",
            )
        each = budgets if len(budgets) > 1 else repeat(budgets[0] if budgets else None, len(free))
        return [DeviceRoom(*item, budget) for item, budget in zip(free.items(), each, strict=True)]


@dataclass(frozen=True)
class MemoryPlan:
    """The placement of a model in the free memory, with the requested options."""

    blueprint: Blueprint
    free: FreeMemory
    options: LoadOptions
    context: int  # tokens
    checkpoints: int  # of the states of each answer, 0 for a model without states
    largest_context: int  # tokens with which the fewest experts still fit
    demand: Demand
    placement: Placement


def fit_model(blueprint: Blueprint, free: FreeMemory, options: LoadOptions) -> MemoryPlan:
    """Return the placement of the model. Raises `UsageError` and `ResourceError`."""
    demand = _demand(blueprint, options)
    if blueprint.layers and not options.workers:
        demand = replace(demand, sizes=slot_sizes(blueprint))
    if free.device is not None:
        demand = replace(demand, scratch=scratch_bytes(blueprint.config))
    spare = _SpareMemory(demand, free, options)
    context = Context.of(blueprint.config, options.context_size).tokens
    if options.context_size is None:
        context = _default_context(blueprint, spare, options)
    checkpoints = _checkpoints(blueprint, spare, options, context)
    context_bytes = _context_bytes(blueprint, options, context, checkpoints)
    demand = replace(demand, context=context_bytes)
    placement = _place(demand, free, options)
    # The largest context leaves the fewest experts. A budget of RAM keeps its slots.
    least_slots = MIN_SLOTS
    room = free.host
    if free.device is not None:
        first = free.rooms(options.device_memory)[0]
        room = first.free if first.budget is None else first.budget.of(first.free)
    elif options.host_memory is not None:
        least_slots = placement.slots
    room -= demand.shared + demand.scratch + demand.taken(least_slots)
    counts = range(1, blueprint.config.largest_context + 1)
    largest = bisect_right(counts, room, key=partial(_context_bytes, blueprint, options))
    return MemoryPlan(blueprint, free, options, context, checkpoints, largest, demand, placement)


class _SpareMemory:
    """The bytes that a context can take without a slot fewer for experts."""

    def __init__(self, demand: Demand, free: FreeMemory, options: LoadOptions) -> None:
        self._demand = demand
        self._free = free
        self._options = options

    def place_beside(self, context: int) -> Placement | None:
        """Return the placement of the experts beside a context, None if they do not fit."""
        demand = replace(self._demand, shared=self._demand.shared + context, context=0)
        with suppress(ResourceError, UsageError):
            return _place(demand, self._free, self._options)
        return None

    def holds(self, context: int, smallest: int) -> bool:
        """Return whether as many experts fit beside this context as beside the smallest one."""
        usual = self.place_beside(smallest)
        # The memory is full if a CPU cannot leave the reserve free, or if only the fewest experts
        # fit.
        if usual is None or usual.slots <= MIN_SLOTS:
            return False
        if self._free.device is None and usual.reserve < reserve_of(self._free.host):
            return False
        return self.place_beside(context) == usual


def _default_context(blueprint: Blueprint, spare: _SpareMemory, options: LoadOptions) -> int:
    """Return the largest default context, in tokens, beside which no expert loses its slot.

    On a CPU, experts use the memory of a context until it fills. With 32 GB free and a model of 26
    GB, the context is 32,768 tokens, which take 4 GB in Mixtral. With 24 GB free, it is 8,192
    tokens. A saved conversation of `least_context` tokens gets room if the model still fits.
    """
    smallest, *larger = sizes = blueprint.config.default_contexts
    needed = min((size for size in sizes if size >= options.least_context), default=sizes[-1])
    least = _context_bytes(blueprint, options, smallest)
    for tokens in reversed(larger):
        context = _context_bytes(blueprint, options, tokens)
        if spare.holds(context, least) or (tokens <= needed and spare.place_beside(context)):
            return tokens
    return smallest


def _checkpoints(
    blueprint: Blueprint, spare: _SpareMemory, options: LoadOptions, tokens: int
) -> int:
    """Return the most checkpoints of an answer beside which no expert loses its slot.

    Qwen3.6 takes 21 GB, and a context of 32,768 tokens .8 GB without them. With 28 GB free, it has
    64 checkpoints, which take 4.2 GB. With 22 GB free, it has 8.
    """
    usual, *more = checkpoint_counts(bytes_of_states(blueprint.config), options.parallel)
    least = _context_bytes(blueprint, options, tokens, usual)
    for count in reversed(more):
        if spare.holds(_context_bytes(blueprint, options, tokens, count), least):
            return count
    return usual


def expected_mix(blueprint: Blueprint, bits: ExpertSize) -> Blueprint:
    """Return the model with experts in other bits, as far as it is known without measuring.

    Sensitivities have to be measured before it is known which layers get more bits. Raises
    `UsageError`.
    """
    stored = blueprint.quantization
    # Rounding 4 bits again would add the losses of both. In a test Q4_K_M doubled the loss.
    if stored.scales == "given" and stored.quant_type != "none":
        raise UsageError(
            f"--expert-bits: the checkpoint has the experts in 4 bits ({stored.quant_type}), which "
            "stay as they are"
        )
    if (quant_type := usual_type(bits)) is not None:
        return mixed(blueprint, [(quant_type, None)] * blueprint.config.num_moe_layers)
    budget = expert_budget(blueprint, bits)
    return choose_mix(blueprint, equal_sensitivities(blueprint), budget)


def has_bits(blueprint: Blueprint, bits: ExpertSize) -> bool:
    """Return whether a model's experts have about the size that `expected_mix` gives them."""
    size = expected_mix(blueprint, bits).experts_size
    return abs(blueprint.experts_size - size) < _MIX_TOLERANCE * size


def expert_budget(blueprint: Blueprint, bits: ExpertSize) -> int:
    """Return the bytes that all experts may take.

    The rest of the memory is for shared weights, keys and values, and the reserve that stays free.
    """
    if bits.memory is None:
        return budget_of(blueprint, bits.bits or 0.0)
    demand = _demand(blueprint, LoadOptions(context_size=bits.context_size))
    return bits.memory - demand.shared - demand.context - reserve_of(bits.memory)


def _demand(blueprint: Blueprint, options: LoadOptions) -> Demand:
    context = Context.of(blueprint.config, options.context_size).tokens
    return Demand(
        shared=blueprint.shared_size,
        context=_context_bytes(blueprint, options, context),
        expert=blueprint.expert.stride,
        experts=blueprint.expert_count,
        whole=blueprint.experts_size,
        layers=_layers(blueprint),
    )


def _layers(blueprint: Blueprint) -> tuple[int, ...]:
    return (0,) * blueprint.config.first_k_dense_replace + slot_sizes(blueprint).layers


def slot_sizes(blueprint: Blueprint) -> SlotSizes:
    """Return the sizes of slots in RAM, without workers."""
    layers = range(blueprint.config.num_moe_layers)
    return SlotSizes(tuple(blueprint.expert_of(layer).stride for layer in layers))


def _context_bytes(
    blueprint: Blueprint, options: LoadOptions, tokens: int, checkpoints: int | None = None
) -> int:
    """Return the bytes of the caches of `tokens` tokens, for all answers at once.

    checkpoints: of each answer, None for the usual ones.
    """
    config = blueprint.config
    dtype = blueprint.quantization.dtype
    return cache_bytes(config, tokens, dtype, options.kv_bits, options.parallel, checkpoints)


def fit_experts(blueprint: Blueprint, free: FreeMemory, options: LoadOptions) -> Placement:
    """Return the placement of a worker's experts. Raises as `fit_model`."""
    expert = blueprint.expert.stride
    whole = blueprint.experts_size
    demand = Demand(0, 0, expert, blueprint.expert_count, whole, layers=_layers(blueprint))
    return _place(demand, free, options)


def _place(demand: Demand, free: FreeMemory, options: LoadOptions) -> Placement:
    if free.device is not None:
        rooms = free.rooms(options.device_memory)
        return place_on_gpus(demand, rooms, free.host, options.host_memory)
    if options.device_memory:
        raise UsageError("--device-memory is for a GPU; --host-memory sets what the CPU uses")
    try:
        return place_on_cpu(demand, free.host, options.host_memory)
    except ResourceError as error:
        # In a container the machine has memory that the process may not take.
        if free.limit is None:
            raise
        hint = (
            f"A limit on this process allows no more ({free.limit}): raise it. {error.hint or ''}"
        )
        raise ResourceError(str(error), hint=hint.strip()) from None
