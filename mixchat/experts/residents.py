"""Chooses the experts that a GPU holds, by their recent uses. No tensors of torch.

A GPU that brought each missing expert in would wait for the bus. It brings one at a time, while the
CPU computes what is missing. Hit rates in decoding, in percent, for a GPU that holds 25, 50 and 75%
of the experts, with the moves of experts a token (tests/benchmarks/cache_policies.py):

| trace                         | residents        | moves         | lru              | moves      |
| ----------------------------- | ---------------- | ------------- | ---------------- | ---------- |
| repeats as in Mixtral's paper | 25.0, 49.9, 74.9 | .10, .13, .11 | 30.3, 46.4, 73.8 | 45, 34, 17 |

A lead of two uses instead took .1 to .8 moves for the same rates. With half-lives of 64 to 512
tokens the rates differ by 1% at most.

L = layers of the GPU, E = num_local_experts, K = num_experts_per_tok.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence, Set
from typing import NamedTuple

import numpy as np

from mixchat.experts.cache import ExpertKey

HALF_LIFE_TOKENS = 256  # after which a use counts half
_MISSING, _ARRIVING, _RESIDENT = range(3)


class Exchange(NamedTuple):
    """An expert on its way into a slot, from which `evicted` has to go."""

    key: ExpertKey
    slot: int
    evicted: ExpertKey | None


class Move(NamedTuple):
    """The slots of an expert before and after."""

    before: int
    after: int


class Residents:
    """Maps experts to slots, and exchanges the least used one for one that is used more.

    first: the first of the layers. layers: the bytes of each layer's experts. slots: the bytes of
    each slot. An expert only takes slots of its size.

    With uses of 9, 4 and 1 in one slot each, and 5 of an expert without one, that expert takes the
    place of the last. With uses of 9, 4 and 2 nothing changes.
    """

    def __init__(
        self, first: int, layers: Sequence[int], experts: int, slots: Sequence[int]
    ) -> None:
        self._first = first
        self._sizes = layers
        # Without uses, each layer gets the same number of experts.
        order = np.arange(experts, 0, -1, dtype=np.float32)
        self._uses = np.tile(1e-6 * order, (len(layers), 1))
        self._states = np.full((len(layers), experts), _MISSING, np.int8)
        self._slots: dict[ExpertKey, int] = {}
        self._arriving: set[ExpertKey] = set()
        self._free: dict[int, list[int]] = {}
        for slot, size in reversed([*enumerate(slots)]):
            self.add_slot(slot, size)

    @property
    def keys(self) -> Set[ExpertKey]:
        """Return the experts with slots, of which some may still be on their way."""
        return self._slots.keys()

    @property
    def is_complete(self) -> bool:
        """Return whether all experts have arrived."""
        return len(self._slots) - len(self._arriving) == self._states.size

    def slot_of(self, key: ExpertKey) -> int | None:
        """Return the slot of an expert that has arrived."""
        return None if key in self._arriving else self._slots.get(key)

    def expect(self, uses: Mapping[ExpertKey, int]) -> None:
        """Begin with the uses of earlier runs, as if layers had `HALF_LIFE_TOKENS` on average."""
        own = {key: count for key, count in uses.items() if self._is_own(key)}
        each = HALF_LIFE_TOKENS * len(self._uses) / (sum(own.values()) or 1)
        for key, count in own.items():
            self._uses[self._index(key)] += each * count

    def exclude(self, keys: Iterable[ExpertKey]) -> None:
        """Give these experts no slots."""
        for key in keys:
            if self._is_own(key):
                self._uses[self._index(key)] = -np.inf

    def note_token(self, selected: np.ndarray) -> np.ndarray:
        """Count a token's experts [L, K]. Return which of them have arrived [L, K]."""
        self._uses *= 0.5 ** (1 / HALF_LIFE_TOKENS)
        layers = np.arange(len(selected))[:, None]
        self._uses[layers, selected] += 1
        return np.asarray(self._states[layers, selected] == _RESIDENT)

    def note_rows(self, key: ExpertKey, share: float) -> None:
        """Count an expert that a share of a prompt's tokens have selected, like one token's."""
        self._uses[self._index(key)] += share

    def next_exchange(self) -> Exchange | None:
        """Return the exchange that gains most, or None if none is worth it."""
        best = None
        gain = 0.0
        for size in sorted({*self._sizes}):
            of_size = np.equal(self._sizes, size)[:, None]
            missing = np.where(of_size & (self._states == _MISSING), self._uses, -np.inf)
            candidate = int(missing.argmax())
            more = float(missing.flat[candidate])
            if more < 0:
                continue
            if free := self._free.get(size):
                return Exchange(self._key(candidate), free[-1], None)
            resident = np.where(of_size & (self._states == _RESIDENT), self._uses, np.inf)
            victim = int(resident.argmin())
            less = float(resident.flat[victim])
            # Each exchange takes a share of the bus and of RAM. Counts of experts that are used
            # alike differ by about the root of their sum, and should not make them take turns.
            lead = more - less - 1 - math.sqrt(more + less)
            if lead > gain:
                best = (candidate, victim)
                gain = lead
        if best is None:
            return None
        key, evicted = map(self._key, best)
        return Exchange(key, self._slots[evicted], evicted)

    def begin(self, exchange: Exchange) -> None:
        """Take the slot for an expert that is not there yet."""
        key, slot, evicted = exchange
        if evicted is None:
            given = self._free[self._size(key)].pop()
            assert given == slot
        else:
            del self._slots[evicted]
            self._states[self._index(evicted)] = _MISSING
        self._slots[key] = slot
        self._arriving.add(key)
        self._states[self._index(key)] = _ARRIVING

    def end(self, key: ExpertKey, *, arrived: bool) -> int:
        """Note that an expert has arrived, or that nobody can bring it. Return the slot."""
        self._arriving.remove(key)
        self._states[self._index(key)] = _RESIDENT if arrived else _MISSING
        if arrived:
            return self._slots[key]
        slot = self._slots.pop(key)
        self.add_slot(slot, self._size(key))
        # It would be read again and again.
        self.exclude([key])
        return slot

    def give_up(self, slots: Collection[int]) -> tuple[list[ExpertKey], dict[ExpertKey, Move]]:
        """Use these slots no more. Return the experts that lose their slots, and those that move.

        With uses of 9 and 1 in these slots, and 4 and 2 in others, the expert of 9 moves into the
        slot of 2. The experts of 1 and 2 lose theirs. No slot is moved into if something may still
        be on its way there.
        """
        for free in self._free.values():
            free[:] = [slot for slot in free if slot not in slots]
        lost = [key for key in self._arriving if self._slots[key] in slots]
        inside = []
        outside = defaultdict[int, list[ExpertKey]](list)
        for key in sorted(self._slots.keys() - self._arriving, key=self._uses_of, reverse=True):
            if self._slots[key] in slots:
                inside.append(key)
            else:
                outside[self._size(key)].append(key)
        moved: dict[ExpertKey, Move] = {}
        for key in inside:
            others = outside[self._size(key)]
            if others and self._uses_of(others[-1]) < self._uses_of(key):
                least = others.pop()
                lost.append(least)
                moved[key] = Move(self._slots[key], self._slots[least])
            else:
                lost.append(key)
        for key in lost:
            del self._slots[key]
            self._arriving.discard(key)
            self._states[self._index(key)] = _MISSING
        for key, move in moved.items():
            self._slots[key] = move.after
        return lost, moved

    def add_slot(self, slot: int, size: int) -> None:
        """Use a slot, which may have been given up."""
        self._free.setdefault(size, []).append(slot)

    def _is_own(self, key: ExpertKey) -> bool:
        return 0 <= key.layer - self._first < len(self._uses)

    def _index(self, key: ExpertKey) -> tuple[int, int]:
        return key.layer - self._first, key.expert

    def _size(self, key: ExpertKey) -> int:
        return self._sizes[key.layer - self._first]

    def _uses_of(self, key: ExpertKey) -> float:
        return float(self._uses[self._index(key)])

    def _key(self, index: int) -> ExpertKey:
        layer, expert = divmod(index, self._uses.shape[1])
        return ExpertKey(self._first + layer, expert)
