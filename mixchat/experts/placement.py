"""What fits where: pure functions from free bytes to counts of expert slots, or a refusal."""

from __future__ import annotations

from dataclasses import dataclass

from mixchat.errors import ResourceError, UsageError
from mixchat.quantities import MemoryBudget, format_least, format_size

MIN_SLOTS = 2
# Fewer in RAM behind a GPU would help nothing, and loads that were put off need places, too.
MIN_HOST_SLOTS = 4
# Left to the rest of the machine and to temporary tensors when nobody says how much to take. More
# is given back when others want it (see memory.py).
RESERVE_FRACTION = 0.04
RESERVE_BYTES = 10**9


@dataclass(frozen=True)
class Demand:
    """What a model asks of memory, in bytes: `shared` for every token, `context` for the KV cache
    when full, `expert` for each of its `experts`.
    """

    shared: int
    context: int
    expert: int
    experts: int

    @property
    def least(self) -> int:
        """The least that the memory of the device that computes has to have."""
        return self.shared + self.context + MIN_SLOTS * self.expert


@dataclass(frozen=True)
class Placement:
    """How many experts fit: `slots` in the memory of the device that computes, `host_slots` in RAM
    behind a GPU (0 where the CPU computes, or RAM holds none). `reserve`: bytes left beside them in
    RAM.
    """

    slots: int
    host_slots: int
    experts: int
    reserve: int = RESERVE_BYTES


def place_on_cpu(demand: Demand, free: int, budget: MemoryBudget | None) -> Placement:
    """Experts in RAM, where `free` bytes are. With a budget, `50%` means half of all experts.

    Without one, experts begin with the room of the context that is not there yet, and give it back
    as the conversation grows (see memory.py). Raises `UsageError` where the budget is below two
    experts, `ResourceError` where even the least does not fit, or less than the budget.
    """
    _check(demand, free)
    room = free - demand.shared
    if budget is None:
        wanted = max((room - _reserve(free)) // demand.expert, MIN_SLOTS)
    else:
        wanted = _budgeted(demand, budget, MIN_SLOTS, "two experts")
        _check_budget(demand, min(wanted, demand.experts), room - demand.context)
    slots = min(wanted, demand.experts)
    left = min(room - slots * demand.expert, _reserve(free))
    return Placement(slots, 0, demand.experts, max(left, RESERVE_BYTES // 4))


def place_on_gpu(
    demand: Demand,
    free: int,
    free_host: int,
    budget: MemoryBudget | None,
    host_budget: MemoryBudget | None,
) -> Placement:
    """Experts in a GPU's memory, where `free` bytes are, and behind it in RAM (`free_host`).

    `budget` is for all that is on the GPU, a fraction one of what is free; `host_budget` as in
    `place_on_cpu`, and 0 for none. Raises the same.
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
    # A budget is for the weights and the context; it is the person who leaves something beside it.
    spare = _reserve(free) if budget is None else 0
    slots = min(max((room - spare) // demand.expert, MIN_SLOTS), demand.experts)
    behind = 0 if slots == demand.experts else _host_slots(demand, free_host, host_budget)
    return Placement(slots, behind, demand.experts)


def _host_slots(demand: Demand, free: int, budget: MemoryBudget | None) -> int:
    if budget is None:
        wanted = (free - _reserve(free)) // demand.expert
    elif budget.of(demand.experts * demand.expert) == 0:
        return 0
    else:
        wanted = _budgeted(demand, budget, MIN_HOST_SLOTS, "four experts")
        _check_budget(demand, min(wanted, demand.experts), free)
    slots = min(wanted, demand.experts)
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


def _check_budget(demand: Demand, wanted: int, room: int) -> None:
    if wanted * demand.expert > room:
        raise ResourceError(
            f"not enough memory: --host-memory asks for {format_size(wanted * demand.expert)}, "
            f"{format_size(max(room, 0))} are free for experts"
        )
