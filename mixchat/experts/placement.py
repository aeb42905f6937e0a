"""Counts the experts that fit in memory: pure functions from free bytes to slots, or an error."""

from __future__ import annotations

from dataclasses import dataclass

from mixchat.errors import ResourceError, UsageError
from mixchat.quantities import MemoryBudget, format_least, format_size

MIN_SLOTS = 2
# Fewer in RAM behind a GPU would not help, and loads that were put off need slots, too.
MIN_HOST_SLOTS = 4
# For the rest of the machine and temporary tensors, where no budget is given. When other programs
# need more, experts are given up (see memory.py).
RESERVE_FRACTION = 0.04
RESERVE_BYTES = 10**9


@dataclass(frozen=True)
class Demand:
    """The memory that a model needs, in bytes: `shared` for every token, `context` for the full KV
    cache, `expert` for each of its `experts`.
    """

    shared: int
    context: int
    expert: int
    experts: int

    @property
    def least(self) -> int:
        """Return the least memory that the device that computes has to have."""
        return self.shared + self.context + MIN_SLOTS * self.expert


@dataclass(frozen=True)
class Placement:
    """The counts of experts that fit: `slots` in the memory of the device that computes,
    `host_slots` in RAM behind a GPU (0 where the CPU computes, or RAM holds none). `reserve`: bytes
    of RAM left beside them.
    """

    slots: int
    host_slots: int
    experts: int
    reserve: int = RESERVE_BYTES


def place_on_cpu(demand: Demand, free: int, budget: MemoryBudget | None) -> Placement:
    """Place experts in RAM, of which `free` bytes are free; a budget of `50%` means half of all.

    Without a budget, experts also take the room of the context as long as it is empty, and give it
    back as the conversation grows (see memory.py). Raises `UsageError` where the budget is below
    two experts, `ResourceError` where the budget or the least that is needed does not fit.
    """
    _check(demand, free)
    room = free - demand.shared
    if budget is None:
        count = max((room - _reserve(free)) // demand.expert, MIN_SLOTS)
    else:
        count = _budgeted(demand, budget, MIN_SLOTS, "two experts")
        _check_budget(demand, min(count, demand.experts), room - demand.context)
    slots = min(count, demand.experts)
    left = min(room - slots * demand.expert, _reserve(free))
    return Placement(slots, 0, demand.experts, max(left, RESERVE_BYTES // 4))


def place_on_gpu(
    demand: Demand,
    free: int,
    free_host: int,
    budget: MemoryBudget | None,
    host_budget: MemoryBudget | None,
) -> Placement:
    """Place experts in a GPU's memory, of which `free` bytes are free, and in RAM (`free_host`).

    `budget` is for all that is on the GPU, and a fraction is of the free memory; `host_budget` is
    as in `place_on_cpu`, and 0 for none. Raises the same errors.
    """
    if budget is not None:
        allowed = budget.of(free)
        if allowed < demand.least:
            raise UsageError(
                f"--device-memory {format_size(allowed)} is too small: the model needs at least "
                f"{format_least(demand.least)} (a full context of {format_size(demand.context)} "
                "in it)",
                hint="A smaller --ctx-size needs less.",
            )
        if allowed > free:
            raise ResourceError(
                f"not enough memory: --device-memory asks for {format_size(allowed)}, "
                f"{format_size(free)} are free on the device"
            )
        free = allowed
    _check(demand, free)
    room = free - demand.shared - demand.context
    # A budget is for weights and context; whoever gives one leaves room beside it.
    spare = _reserve(free) if budget is None else 0
    slots = min(max((room - spare) // demand.expert, MIN_SLOTS), demand.experts)
    behind = 0 if slots == demand.experts else _host_slots(demand, free_host, host_budget)
    return Placement(slots, behind, demand.experts)


def _host_slots(demand: Demand, free: int, budget: MemoryBudget | None) -> int:
    if budget is None:
        count = (free - _reserve(free)) // demand.expert
    elif budget.of(demand.experts * demand.expert) == 0:
        return 0
    else:
        count = _budgeted(demand, budget, MIN_HOST_SLOTS, "four experts")
        _check_budget(demand, min(count, demand.experts), free)
    slots = min(count, demand.experts)
    return slots if slots >= MIN_HOST_SLOTS else 0


def _reserve(free: int) -> int:
    return max(RESERVE_BYTES, int(RESERVE_FRACTION * free))


def _check(demand: Demand, free: int) -> None:
    if free < demand.least:
        raise ResourceError(
            f"not enough memory: the model needs at least {format_least(demand.least)} "
            f"(a full context of {format_size(demand.context)} in it), {format_size(free)} are "
            "free",
            hint="A smaller --ctx-size needs less; on a GPU, --device cpu takes the RAM instead.",
        )


def _budgeted(demand: Demand, budget: MemoryBudget, least: int, what: str) -> int:
    size = budget.of(demand.experts * demand.expert)
    if size < least * demand.expert:
        raise UsageError(
            f"--host-memory {format_size(size)} is too small: {what} take "
            f"{format_least(least * demand.expert)}"
        )
    return size // demand.expert


def _check_budget(demand: Demand, count: int, room: int) -> None:
    if count * demand.expert > room:
        raise ResourceError(
            f"not enough memory: --host-memory asks for {format_size(count * demand.expert)}, "
            f"{format_size(max(room, 0))} are free for experts"
        )
