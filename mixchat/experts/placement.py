"""Counts the experts that fit in memory."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, replace

from mixchat.base.errors import ResourceError, UsageError
from mixchat.base.quantities import MemoryBudget, format_least, format_size
from mixchat.experts.sharing import in_proportion, owner_counts

MIN_SLOTS = 2
# Of slots of different sizes. One for the expert that is computed, the others for loads.
_MIN_SLOTS_PER_LAYER = 3
# Fewer would not help a GPU, and loads that were put off need slots, too.
MIN_HOST_SLOTS = 4
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
    some are smaller. sizes: of slots, None if each has room for the largest expert.
    """

    shared: int
    context: int
    expert: int
    experts: int
    whole: int
    sizes: SlotSizes | None = None

    def taken(self, slots: int) -> int:
        """Return the bytes of RAM that slots take."""
        if self.sizes is not None:
            return self.sizes.for_slots(slots, self.experts).total(slots)
        return self.whole if slots >= self.experts else slots * self.expert

    def fitting(self, room: int) -> int:
        """Return how many slots fit into RAM."""
        if room >= self.whole:
            return self.experts
        if self.sizes is not None:
            slots = bisect_right(range(self.experts), room, key=self.sizes.total) - 1
            if self.taken(slots) <= room:
                return slots
        return min(room // self.expert, self.experts - 1)

    @property
    def least(self) -> int:
        return self.shared + self.context + MIN_SLOTS * self.expert


@dataclass(frozen=True)
class Placement:
    """The numbers of experts that fit, out of `experts`.

    slots: on the first device. other_slots: on each other GPU, 0 if it is not used. host_slots: in
    RAM for GPUs, 0 if the CPU computes. reserve: the bytes of RAM that are left free.
    """

    slots: int
    host_slots: int
    experts: int
    reserve: int = RESERVE_BYTES
    other_slots: tuple[int, ...] = ()

    @property
    def by_device(self) -> tuple[int, ...]:
        return self.slots, *self.other_slots

    def at_most(self, experts: int) -> Placement:
        """Return the placement of `experts` experts, or fewer."""
        first, *later = map(min, self.by_device, owner_counts(experts, self.by_device))
        return replace(self, slots=first, other_slots=tuple(later))

    def parts(self, owned: Sequence[int]) -> list[Placement]:
        """Return the placement of the experts that each device owns. `owned` has their numbers.

        A device's slots in RAM are in proportion to the experts that it does not hold.
        """
        lacking = [count - own for count, own in zip(owned, self.by_device, strict=True)]
        host_slots = [0] * len(owned)
        while any(lacking):
            share = owned
            if self.host_slots < sum(owned):
                share = in_proportion(self.host_slots, lacking)
            counts = list(map(min, share, owned))
            # A device with too few slots to be of use leaves them to the others.
            few = [n for n, count in enumerate(counts) if lacking[n] and count < MIN_HOST_SLOTS]
            if not few:
                host_slots = [count if lacking[n] else 0 for n, count in enumerate(counts)]
                break
            lacking[min(few, key=counts.__getitem__)] = 0
        return [
            Placement(slots, host, count, self.reserve)
            for slots, host, count in zip(self.by_device, host_slots, owned, strict=True)
        ]


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
    """Place experts on GPUs, and in RAM, of which `free_host` bytes are free.

    The first GPU also has the shared weights and the context. Others without room for two experts
    are not used. A fraction as a budget is of a GPU's free memory. `host_budget` and the errors
    are as in `place_on_cpu`.
    """
    first, *later = rooms
    slots = [_first_slots(demand, first), *(_other_slots(demand, room) for room in later)]
    host_slots = 0
    # Each slot in RAM is locked, with room for the largest expert.
    locked = replace(demand, whole=demand.experts * demand.expert, sizes=None)
    if sum(slots) < demand.experts and (host_budget is None or host_budget.of(locked.whole)):
        if host_budget is None:
            count = (free_host - reserve_of(free_host)) // locked.expert
        else:
            count = _budgeted(locked, host_budget, MIN_HOST_SLOTS, "four experts")
            _check_budget(locked, min(count, locked.experts), free_host)
        count = min(count, locked.experts)
        host_slots = count if count >= MIN_HOST_SLOTS else 0
    placement = Placement(slots[0], host_slots, demand.experts, other_slots=tuple(slots[1:]))
    return placement.at_most(demand.experts)


def _first_slots(demand: Demand, room: DeviceRoom) -> int:
    if room.budget is not None and (allowed := room.budget.of(room.free)) < demand.least:
        raise UsageError(
            f"--device-memory {format_size(allowed)} is too small for {room.name}: the model needs "
            f"at least {format_least(demand.least)} (a full context of "
            f"{format_size(demand.context)} in it)",
            hint="A smaller --ctx-size needs less.",
        )
    free = _allowed(room)
    _check(demand, free, room.name)
    free -= demand.shared + demand.context + _spare(room)
    slots = free // demand.expert if demand.sizes is None else demand.fitting(free)
    return min(max(slots, MIN_SLOTS), demand.experts)


def _other_slots(demand: Demand, room: DeviceRoom) -> int:
    least = MIN_SLOTS * demand.expert
    if room.budget is not None and (allowed := room.budget.of(room.free)) < least:
        raise UsageError(
            f"--device-memory {format_size(allowed)} is too small for {room.name}: two experts "
            f"take {format_least(least)}"
        )
    count = (_allowed(room) - _spare(room)) // demand.expert
    return min(count, demand.experts) if count >= MIN_SLOTS else 0


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
        raise ResourceError(
            f"not enough memory: the model needs at least {format_least(demand.least)} "
            f"(a full context of {format_size(demand.context)} in it), {format_size(free)} are "
            f"free{'' if name is None else f' on {name}'}",
            hint="A smaller --ctx-size needs less; on a GPU, --device cpu takes the RAM instead.",
        )


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
