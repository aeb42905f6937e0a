"""Chooses the experts that a GPU holds, by their recent uses. No tensors of torch.

A GPU that brought each missing expert in would wait for the bus. It brings one at a time, while the
CPU computes what is missing. Hit rates in decoding, in percent, for a GPU that holds 25, 50 and 75%
of the experts, with the moves of experts a token (tests/benchmarks/cache_policies.py):

| trace                         | most used        | moves         | lru              | moves      |
| ----------------------------- | ---------------- | ------------- | ---------------- | ---------- |
| repeats as in Mixtral's paper | 25.0, 49.9, 74.9 | .10, .13, .11 | 30.3, 46.4, 73.8 | 45, 34, 17 |

A lead of two uses instead took .1 to .8 moves for the same rates. With half-lives of 64 to 512
tokens the rates differ by 1% at most.

L = layers of the GPU, E = num_local_experts, K = num_experts_per_tok.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from mixchat.experts.cache import ExpertKey

HALF_LIFE_TOKENS = 256  # after which a use counts half


class Exchange(NamedTuple):
    """An expert to bring in, and the one that has to go for it, or None for a free slot."""

    key: ExpertKey
    evicted: ExpertKey | None


class MostUsed:
    """A policy that exchanges the least used expert for one that is used more.

    first: the first of the layers. sizes: the bytes of each layer's experts. An expert only takes
    the place of one of its size.

    With uses of 9, 4 and 1 in one slot each, and 5 of an expert without one, that expert takes the
    place of the last. With uses of 9, 4 and 2 nothing changes.
    """

    def __init__(self, first: int, sizes: Sequence[int], experts: int) -> None:
        self._first = first
        self._sizes = sizes
        # Without uses, each layer gets the same number of experts.
        order = np.arange(experts, 0, -1, dtype=np.float32)
        self._uses = np.tile(1e-6 * order, (len(sizes), 1))
        self._has_slot = np.zeros(self._uses.shape, bool)

    def use(self, key: ExpertKey) -> None:
        self._has_slot[self._index(key)] = True

    def forget(self, key: ExpertKey) -> None:
        self._has_slot[self._index(key)] = False

    def victims(self) -> Iterator[ExpertKey]:
        held = np.where(self._has_slot, self._uses, np.inf).ravel()
        least_first = held.argsort(kind="stable")[: np.count_nonzero(self._has_slot)]
        return map(self._key, least_first.tolist())

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

    def note_token(self, selected: np.ndarray) -> None:
        """Count a token's experts [L, K]."""
        self._uses *= 0.5 ** (1 / HALF_LIFE_TOKENS)
        self._uses[np.arange(len(selected))[:, None], selected] += 1

    def note_rows(self, key: ExpertKey, share: float) -> None:
        """Count an expert that a share of a prompt's tokens have selected, like one token's."""
        self._uses[self._index(key)] += share

    def uses_of(self, key: ExpertKey) -> float:
        return float(self._uses[self._index(key)])

    def next_exchange(self, free: Collection[int]) -> Exchange | None:
        """Return the exchange that gains most, or None if none is worth it.

        free: the sizes of free slots. They are filled before anything is exchanged.
        """
        best = None
        gain = 0.0
        for size in sorted({*self._sizes}):
            of_size = np.equal(self._sizes, size)[:, None]
            missing = np.where(of_size & ~self._has_slot, self._uses, -np.inf)
            candidate = int(missing.argmax())
            more = float(missing.flat[candidate])
            if more < 0:
                continue
            if size in free:
                return Exchange(self._key(candidate), None)
            held = np.where(of_size & self._has_slot, self._uses, np.inf)
            victim = int(held.argmin())
            less = float(held.flat[victim])
            # Each exchange takes a share of the bus and of RAM. Counts of experts that are used
            # alike differ by about the root of their sum, and should not make them take turns.
            lead = more - less - 1 - math.sqrt(more + less)
            if lead > gain:
                best = Exchange(self._key(candidate), self._key(victim))
                gain = lead
        return best

    def _is_own(self, key: ExpertKey) -> bool:
        return 0 <= key.layer - self._first < len(self._uses)

    def _index(self, key: ExpertKey) -> tuple[int, int]:
        return key.layer - self._first, key.expert

    def _key(self, index: int) -> ExpertKey:
        layer, expert = divmod(index, self._uses.shape[1])
        return ExpertKey(self._first + layer, expert)
