"""Maps experts to slots: bookkeeping over an eviction policy, without a tensor."""

from __future__ import annotations

from collections.abc import Collection, Iterator

from mixchat.experts.keys import ExpertKey
from mixchat.experts.policies import LRU, Policy


class ExpertCache:
    """Maps experts to slots 0 .. slots-1; when all are taken, the policy says which to evict.

    `limit` is the count of slots that are used; `resize` changes it.

    With two slots, the policy LRU, and A = (0, 0), B = (0, 1), C = (1, 0):

        lookup(A) -> None    admit(A) -> 0        order: A
        lookup(B) -> None    admit(B) -> 1        order: A B
        lookup(A) -> 0                            order: B A
        lookup(C) -> None    admit(C) -> 1        order: A C    (B is evicted, its slot reused)
        discard(C)                                order: A      (slot 1 is free again)
    """

    def __init__(self, slots: int, policy: Policy | None = None) -> None:
        assert slots > 0
        self.slots = self.limit = slots
        self._policy = LRU() if policy is None else policy
        self._slots: dict[ExpertKey, int] = {}

    def __contains__(self, key: ExpertKey) -> bool:
        return key in self._slots

    def __len__(self) -> int:
        return len(self._slots)

    def __iter__(self) -> Iterator[ExpertKey]:
        return iter(list(self._slots))

    def lookup(self, key: ExpertKey) -> int | None:
        """Return the expert's slot, which counts as a use; None where it has none."""
        slot = self._slots.get(key)
        if slot is not None:
            self._policy.use(key)
        return slot

    def slot_of(self, key: ExpertKey) -> int | None:
        """Return the expert's slot, without counting a use."""
        return self._slots.get(key)

    def admit(
        self, key: ExpertKey, pinned: Collection[ExpertKey] = (), preferred: Collection[int] = ()
    ) -> int | None:
        """Return a slot for an expert that has none, and count a use; evict where none is free.

        Of free slots one of `preferred` is taken, if there is one. Experts in `pinned` are not
        evicted; returns None where there are no others.
        """
        assert key not in self._slots
        slot = None
        while len(self._slots) >= self.limit:  # more than once where `resize` left pinned ones
            victim = self._victim(pinned)
            if victim is None:
                return None
            slot = self._slots[victim]
            self.discard(victim)
        if slot is None:
            slot = min(self.free_slots(), key=lambda free: (free not in preferred, free))
        self._slots[key] = slot
        self._policy.use(key)
        return slot

    def discard(self, key: ExpertKey) -> None:
        """Free the expert's slot, if it has one, to evict it or because its load failed."""
        self._slots.pop(key, None)
        self._policy.forget(key)

    def resize(self, limit: int, pinned: Collection[ExpertKey] = ()) -> None:
        """Use `limit` of the slots from now on, at least one; evict the experts beyond it.

        Experts in `pinned` stay, even if that is more than `limit`.
        """
        self.limit = max(1, min(limit, self.slots))
        while len(self._slots) > self.limit:
            victim = self._victim(pinned)
            if victim is None:
                return
            self.discard(victim)

    def free_slots(self) -> set[int]:
        """Return the slots without an expert, including those beyond the limit."""
        return set(range(self.slots)) - set(self._slots.values())

    def _victim(self, pinned: Collection[ExpertKey]) -> ExpertKey | None:
        return next((key for key in self._policy.victims() if key not in pinned), None)
