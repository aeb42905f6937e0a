"""What fits where: a pure function from free bytes to a count of expert slots, or a refusal."""

from __future__ import annotations

from dataclasses import dataclass

from mixchat.errors import ResourceError, UsageError
from mixchat.settings import MemoryBudget, format_least, format_size

MIN_SLOTS = 2
# Left to the rest of the machine and to temporary tensors when nobody says how much to take.
RESERVE_FRACTION = 0.1
RESERVE_BYTES = 10**9


@dataclass(frozen=True)
class Placement:
    """How many experts fit the fastest memory, and how many there are."""

    slots: int
    experts: int


def place(
    *,
    free: int,
    shared: int,
    context: int,
    expert: int,
    experts: int,
    budget: MemoryBudget | None,
) -> Placement:
    """Choose the count of slots. All sizes are bytes.

    free: memory that may be used; shared: what every token needs; context: the KV cache when full;
    expert: one expert; experts: their count in all layers. With a budget, `50%` means half of all
    experts. Raises `UsageError` where the budget is below two experts, `ResourceError` where even
    the least does not fit.
    """
    least = shared + context + MIN_SLOTS * expert
    if free < least:
        raise ResourceError(
            f"not enough memory: the model needs at least {format_least(least)} "
            f"(a full context of {format_size(context)} in it), {format_size(free)} are free",
            hint="A smaller --ctx-size needs less; on a GPU, --device cpu takes the RAM instead.",
        )
    room = (free - shared - context) // expert
    if budget is None:
        reserve = max(RESERVE_BYTES, int(RESERVE_FRACTION * free))
        wanted = (free - shared - context - reserve) // expert
        return Placement(min(max(wanted, MIN_SLOTS), experts), experts)
    wanted = budget.of(experts * expert) // expert
    if wanted < MIN_SLOTS:
        raise UsageError(
            f"--expert-memory {format_size(budget.of(experts * expert))} is too small: two experts "
            f"take {format_least(MIN_SLOTS * expert)}"
        )
    slots = min(wanted, experts)
    if slots > room:
        raise ResourceError(
            f"not enough memory: --expert-memory asks for {format_size(slots * expert)}, "
            f"{format_size(room * expert)} are free for experts"
        )
    return Placement(slots, experts)
