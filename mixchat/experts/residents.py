"""Chooses the experts that a GPU holds, by their recent uses. No tensors of torch.

L = layers of the GPU, E = num_local_experts, K = num_experts_per_tok.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from mixchat.experts.cache import ExpertKey

HALF_LIFE_TOKENS = 256  # after which a use counts half
# Uses by which an expert has to lead. Each exchange takes a share of the bus and of RAM, so experts
# that are used alike should not take turns.
MARGIN = 2.0
_NOWHERE = -1


class Exchange(NamedTuple):
    """An expert on its way into a slot, from which `evicted` has to go."""

    key: ExpertKey
    slot: int
    evicted: ExpertKey | None


class Residents:
    """Maps experts to slots, and exchanges the least used one for one that is used more.

    first: the first of the layers. layers: the bytes of each layer's experts. slots: the bytes of
    each slot. An expert only takes slots of its size.

    With uses of 9, 4 and 1 in one slot each, and 5 of an expert without one, that expert takes the
    place of the last. With uses of 9, 4 and 3.5 nothing changes.
    """

    def __init__(
        self, first: int, layers: Sequence[int], experts: int, slots: Sequence[int]
    ) -> None:
        self._first, self._sizes = first, np.array(layers)
        # Without uses, each layer gets the same number of experts.
        order = np.arange(experts, 0, -1, dtype=np.float32)
        self._uses = np.tile(1e-6 * order, (len(layers), 1))
        self._slots = np.full((len(layers), experts), _NOWHERE)
        self._arriving: dict[ExpertKey, int] = {}
        self._is_arriving = np.zeros((len(layers), experts), bool)
        self._free: dict[int, list[int]] = {}
        for slot, size in reversed([*enumerate(slots)]):
            self._free.setdefault(size, []).append(slot)
        self.tokens = 0

    def __iter__(self) -> Iterator[ExpertKey]:
        return (self._key(index) for index in np.flatnonzero(self._slots >= 0))

    def __len__(self) -> int:
        return int((self._slots >= 0).sum())

    def slot_of(self, key: ExpertKey) -> int | None:
        """Return the slot of an expert that has arrived."""
        slot = int(self._slots[key.layer - self._first, key.expert])
        return None if slot == _NOWHERE else slot

    def is_arriving(self, key: ExpertKey) -> bool:
        return key in self._arriving

    def expect(self, uses: Mapping[ExpertKey, int]) -> None:
        """Begin with the uses of earlier runs, as if they were of one half-life."""
        total = sum(uses.values()) or 1
        for key, count in uses.items():
            if 0 <= (layer := key.layer - self._first) < len(self._uses):
                self._uses[layer, key.expert] = HALF_LIFE_TOKENS * count * len(self._uses) / total

    def note_token(self, selected: np.ndarray) -> np.ndarray:
        """Count a token's experts [L, K]. Return which of them have slots [L, K]."""
        self.tokens += 1
        self._uses *= 0.5 ** (1 / HALF_LIFE_TOKENS)
        layers = np.arange(len(selected))[:, None]
        self._uses[layers, selected] += 1
        return np.asarray(self._slots[layers, selected] != _NOWHERE)

    def note_rows(self, key: ExpertKey, share: float) -> None:
        """Count an expert's part of a prompt's rows, at most like one token's use."""
        self._uses[key.layer - self._first, key.expert] += min(share, 1.0)

    def next_exchange(self) -> Exchange | None:
        """Return the exchange that gains most, or None if none is worth it."""
        best, gain = None, 0.0
        for size in np.unique(self._sizes):
            of_size = (self._sizes == size)[:, None] & ~self._is_arriving
            missing = np.where(of_size & (self._slots == _NOWHERE), self._uses, -1)
            candidate = int(missing.argmax())
            if missing.flat[candidate] < 0:
                continue
            resident = np.where(of_size & (self._slots != _NOWHERE), self._uses, np.inf)
            victim = int(resident.argmin())
            free = self._free.get(int(size))
            if free:
                return Exchange(self._key(candidate), free[-1], None)
            lead = float(missing.flat[candidate] - resident.flat[victim])
            if lead >= MARGIN + gain:
                best, gain = (candidate, victim), lead - MARGIN
        if best is None:
            return None
        candidate, victim = best
        return Exchange(self._key(candidate), int(self._slots.flat[victim]), self._key(victim))

    def begin(self, exchange: Exchange) -> None:
        """Take the slot for an expert that is not there yet."""
        key, slot, evicted = exchange
        if evicted is None:
            self._free[int(self._sizes[key.layer - self._first])].remove(slot)
        else:
            self._slots[evicted.layer - self._first, evicted.expert] = _NOWHERE
        self._arriving[key] = slot
        self._is_arriving[key.layer - self._first, key.expert] = True

    def end(self, key: ExpertKey, *, arrived: bool) -> int:
        """Note that an expert has arrived, or that its slot is free. Return the slot."""
        slot = self._arriving.pop(key)
        layer = key.layer - self._first
        self._is_arriving[layer, key.expert] = False
        if arrived:
            self._slots[layer, key.expert] = slot
        else:
            self._free.setdefault(int(self._sizes[layer]), []).append(slot)
        return slot

    def give_up(self) -> tuple[ExpertKey, int] | None:
        """Take the slot from the least used expert for good. Return both, or None without one."""
        resident = np.where(self._slots != _NOWHERE, self._uses, np.inf)
        victim = int(resident.argmin())
        if not np.isfinite(resident.flat[victim]):
            return None
        slot, self._slots.flat[victim] = int(self._slots.flat[victim]), _NOWHERE
        return self._key(victim), slot

    def add_slot(self, slot: int, size: int) -> None:
        """Use a slot again that was given up."""
        self._free.setdefault(size, []).append(slot)

    def _key(self, index: int) -> ExpertKey:
        layer, expert = divmod(int(index), self._uses.shape[1])
        return ExpertKey(self._first + layer, expert)
