"""Counts the experts that fit in memory."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

from mixchat.base.errors import ResourceError, UsageError
from mixchat.base.quantities import MemoryBudget, format_least, format_size
from mixchat.experts.sharing import in_proportion

MIN_SLOTS = 2
# Of slots of different sizes. One for the expert that is computed, the others for loads.
_MIN_SLOTS_PER_LAYER = 3
# For the rest of the machine and temporary tensors, if no budget is given (see memory.py).
RESERVE_FRACTION = 0.04
RESERVE_BYTES = 10**9


@dataclass(frozen=True)
class SlotSizes:
    """The bytes of a cache's slots: slot n has the size of layer n's experts, and so on in turn.

    If experts have 3, 3 and 4 MB in three layers, slots 0 to 5 have 3, 3, 4, 3, 3 and 4 MB. A
    single size is for all layers.
    """

    # A layer's experts only take slots of their size, so an eviction leaves no room unused.

    layers: tuple[int, ...]

    def of(self, number: int) -> int:
        """Return the bytes of a slot, or of an expert of a layer, by its number."""
        return self.layers[number % len(self.layers)]

    def total(self, slots: int) -> int:
        rounds, remainder = divmod(slots, len(self.layers))
        return rounds * sum(self.layers) + sum(self.layers[:remainder])

    def for_slots(self, slots: int, experts: int) -> SlotSizes:
        """Return these sizes, or the largest one for all slots if few of the experts fit."""
        few = slots < min(_MIN_SLOTS_PER_LAYER * len(self.layers), experts)
        return SlotSizes((max(self.layers),)) if few else self


@dataclass(frozen=True)
class Demand:
    """The bytes that a model needs. `context` is the full KV cache.

    expert: the largest one. experts: their count. whole: all of them together, which is less if
    some are smaller. sizes: of slots in RAM, None if each has room for the largest expert. layers:
    the bytes of an expert of each layer, 0 if a layer has none. scratch: what each GPU takes beside
    its layers.
    """

    shared: int
    context: int
    expert: int
    experts: int
    whole: int
    sizes: SlotSizes | None = None
    layers: tuple[int, ...] = ()
    scratch: int = 0

    def taken(self, slots: int) -> int:
        """Return the bytes of RAM that slots take."""
        if self.sizes is not None:
            return self.sizes.for_slots(slots, self.experts).total(slots)
        return self.whole if slots >= self.experts else slots * self.expert

    def fitting(self, room: int) -> int:
        """Return how many slots fit into `room` bytes of RAM."""
        if room >= self.whole:
            return self.experts
        if self.sizes is not None:
            slots = bisect_right(range(self.experts), room, key=self.sizes.total) - 1
            if self.taken(slots) <= room:
                return slots
        return min(room // self.expert, self.experts - 1)

    def of_layers(self, start: int, end: int) -> Demand:
        """Return the part of these layers, with slots of their sizes."""
        own = self.layers[start:end]
        total = len(self.layers)
        sizes = tuple(size for size in own if size)
        each = self.experts // sum(1 for size in self.layers if size)
        return Demand(
            shared=self.shared * len(own) // total,
            context=self.context * len(own) // total,
            expert=max(sizes, default=0),
            experts=each * len(sizes),
            whole=each * sum(sizes),
            sizes=SlotSizes(sizes),
            layers=own,
            scratch=self.scratch,
        )

    @property
    def beside_experts(self) -> int:
        return self.shared + self.context + self.scratch

    @property
    def least(self) -> int:
        return self.beside_experts + MIN_SLOTS * self.expert


@dataclass(frozen=True)
class Placement:
    """The numbers of experts that fit, out of `experts`.

    slots: on the first device. other_slots: on each other GPU. host_slots: in RAM behind GPUs, 0 if
    the CPU computes alone. layers: the layers of each GPU, 0 if it is not used. reserve: the bytes
    of RAM that are left free.
    """

    slots: int
    host_slots: int
    experts: int
    reserve: int = RESERVE_BYTES
    other_slots: tuple[int, ...] = ()
    layers: tuple[int, ...] = ()

    @property
    def by_device(self) -> tuple[int, ...]:
        return self.slots, *self.other_slots

    @property
    def held(self) -> int:
        """Return how many experts fast memory and RAM can hold."""
        return min(sum(self.by_device) + self.host_slots, self.experts)

    def at_most(self, experts: int) -> Placement:
        """Return the placement of `experts` experts, or fewer."""
        if self.layers:
            return replace(self, host_slots=max(min(self.host_slots, experts), MIN_SLOTS))
        return replace(self, slots=min(self.slots, experts))

    def in_ram(self) -> Placement:
        """Return the part in RAM of a placement with GPUs, for the CPU."""
        return Placement(self.host_slots, 0, self.experts, self.reserve)


@dataclass(frozen=True)
class DeviceRoom:
    """The `free` bytes of a GPU, and its budget."""

    name: str
    free: int
    budget: MemoryBudget | None = None


def place_on_cpu(demand: Demand, free: int, budget: MemoryBudget | None) -> Placement:
    """Place experts in RAM, of which `free` bytes are free. A budget of `50%` is half of all.

    Without a budget, experts also take the room of the context as long as it is empty. Raises
    `UsageError` if the budget is below two experts, and `ResourceError` if the budget or the least
    that is needed does not fit.
    """
    _check(demand, free)
    room = free - demand.shared
    if budget is None:
        count = max(demand.fitting(room - reserve_of(free)), MIN_SLOTS)
    else:
        count = _budgeted(demand, budget, MIN_SLOTS, "two experts")
        _check_budget(demand, count, room - demand.context)
    slots = min(count, demand.experts)
    # Experts may take part of the reserve, but a quarter of the smallest one stays.
    reserve = min(room - demand.taken(slots), reserve_of(free))
    return Placement(slots, 0, demand.experts, max(reserve, RESERVE_BYTES // 4))


def place_on_gpus(
    demand: Demand, rooms: Sequence[DeviceRoom], free_host: int, host_budget: MemoryBudget | None
) -> Placement:
    """Place experts on GPUs, and others in RAM, of which `free_host` bytes are free.

    Each GPU gets whole layers, in proportion to its room, with their weights, their part of the
    context, and experts. A fraction as a budget is of a GPU's free memory. `host_budget` and the
    errors are as in `place_on_cpu`.
    """
    parts = _divide(demand, rooms)
    slots = [
        _slots_on_gpu(*part) if part[0].layers else 0 for part in zip(parts, rooms, strict=True)
    ]
    # The CPU computes what GPUs do not hold, out of two slots if they hold all.
    placed = Placement(MIN_SLOTS, 0, demand.experts)
    if sum(slots) < demand.experts:
        experts = replace(demand, shared=0, context=0, scratch=0)
        placed = place_on_cpu(experts, free_host, host_budget)
    return Placement(
        slots[0],
        placed.slots,
        demand.experts,
        placed.reserve,
        other_slots=tuple(slots[1:]),
        layers=tuple(len(part.layers) for part in parts),
    )


def _divide(demand: Demand, rooms: Sequence[DeviceRoom]) -> list[Demand]:
    """Return each GPU's part, without layers for GPUs that have too little room."""
    weights = [max(_allowed(room) - _spare(room), 0) for room in rooms]
    if not any(weights):  # the error names the largest
        weights[max(range(len(rooms)), key=lambda number: rooms[number].free)] = 1
    while True:
        counts = in_proportion(len(demand.layers), weights)
        ends = accumulate(counts)
        parts = [
            demand.of_layers(end - count, end) for count, end in zip(counts, ends, strict=True)
        ]
        small = [
            number
            for number, (part, room) in enumerate(zip(parts, rooms, strict=True))
            if part.layers and room.budget is None and room.free < part.least
        ]
        if not small or sum(map(bool, counts)) == 1:
            return parts
        weights[min(small, key=weights.__getitem__)] = 0


def _slots_on_gpu(demand: Demand, room: DeviceRoom) -> int:
    if room.budget is not None and (allowed := room.budget.of(room.free)) < demand.least:
        raise UsageError(
            f"--device-memory {format_size(allowed)} is too small for {room.name}: the model needs "
            f"at least {_least(demand)}",
            hint="A smaller --ctx-size needs less.",
        )
    free = _allowed(room)
    _check(demand, free, room.name)
    free -= demand.beside_experts + _spare(room)
    if free >= demand.whole:
        return demand.experts
    # A prompt's experts pass through two more slots, for which there was room in `least`.
    free -= MIN_SLOTS * demand.expert
    assert demand.sizes is not None
    return max(bisect_right(range(demand.experts), free, key=demand.sizes.total) - 1, 0)


def _allowed(room: DeviceRoom) -> int:
    allowed = room.free if room.budget is None else room.budget.of(room.free)
    if allowed > room.free:
        raise ResourceError(
            f"not enough memory: --device-memory asks for {format_size(allowed)}, "
            f"{format_size(room.free)} are free on {room.name}"
        )
    return allowed


def _spare(room: DeviceRoom) -> int:
    # Whoever gives a budget leaves room for the rest.
    return reserve_of(room.free) if room.budget is None else 0


def reserve_of(free: int) -> int:
    """Return the bytes to leave alone if `free` bytes are free."""
    return max(RESERVE_BYTES, int(RESERVE_FRACTION * free))


def _check(demand: Demand, free: int, name: str | None = None) -> None:
    if free < demand.least:
        where = "" if name is None else f" on {name}"
        raise ResourceError(
            f"not enough memory: the model needs at least {_least(demand)}, "
            f"{format_size(free)} are free{where}",
            hint="A smaller --ctx-size needs less; on a GPU, --device cpu takes the RAM instead.",
        )


def _least(demand: Demand) -> str:
    context = f" (a full context of {format_size(demand.context)} in it)" if demand.context else ""
    return format_least(demand.least) + context


def _budgeted(demand: Demand, budget: MemoryBudget, least: int, needed: str) -> int:
    size = budget.of(demand.whole)
    if size < least * demand.expert:
        raise UsageError(
            f"--host-memory {format_size(size)} is too small: {needed} take "
            f"{format_least(least * demand.expert)}"
        )
    return demand.fitting(size)


def _check_budget(demand: Demand, count: int, room: int) -> None:
    if demand.taken(count) > room:
        raise ResourceError(
            f"not enough memory: --host-memory asks for {format_size(demand.taken(count))}, "
            f"{format_size(max(room, 0))} are free for experts"
        )
