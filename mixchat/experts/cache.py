"""Which expert is in which slot: least-recently-used bookkeeping, without a tensor."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection
from typing import NamedTuple


class ExpertKey(NamedTuple):
    """Names one expert of one layer."""

    layer: int
    expert: int


class LRUCache:
    """Maps experts to slots 0 .. slots-1; when all are taken, the one unused for longest goes.

    With two slots and A = (0, 0), B = (0, 1), C = (1, 0):

        lookup(A) -> None    admit(A) -> 0        order: A
        lookup(B) -> None    admit(B) -> 1        order: A B
        lookup(A) -> 0                            order: B A
        lookup(C) -> None    admit(C) -> 1        order: A C    (B is evicted, its slot reused)
        discard(C)                                order: A      (slot 1 is free again)
    """

    def __init__(self, slots: int) -> None:
        assert slots > 0
        self._count = slots
        self._slots: OrderedDict[ExpertKey, int] = OrderedDict()  # least recently used first

    def __contains__(self, key: ExpertKey) -> bool:
        return key in self._slots

    def __len__(self) -> int:
        return len(self._slots)

    def lookup(self, key: ExpertKey) -> int | None:
        """The expert's slot, which counts as a use; None where it has none."""
        slot = self._slots.get(key)
        if slot is not None:
            self._slots.move_to_end(key)
        return slot

    def admit(self, key: ExpertKey, pinned: Collection[ExpertKey] = ()) -> int | None:
        """A slot for an expert that has none, as its most recent use; evicts where none is free.

        Experts in `pinned` are not evicted; None where no other is there.
        """
        assert key not in self._slots
        # Which slots are free is not kept but derived: Ctrl-C between any two lines then neither
        # loses a slot nor gives it to two experts.
        if len(self._slots) < self._count:
            slot = min(set(range(self._count)) - set(self._slots.values()))
        else:
            victim = next((other for other in self._slots if other not in pinned), None)
            if victim is None:
                return None
            slot = self._slots.pop(victim)
        self._slots[key] = slot
        return slot

    def discard(self, key: ExpertKey) -> None:
        """Free the expert's slot: its bytes did not arrive."""
        del self._slots[key]
