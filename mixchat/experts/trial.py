"""Chooses among variants of the same work by trying them while it is done."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Generic, TypeVar

_T = TypeVar("_T")

_SOONEST, _LATEST = 8, 64  # rounds until another variant gets its next try
_FRESH = 0.5  # weight of a variant's last round, against those before it


class Trial(Generic[_T]):
    """Uses the variant that costs least, and tries the others again from time to time.

    A round is `length` units of work done with one variant. With the variants A and B, of which B
    costs less, the rounds are A B B B B B B B A B ...: each has a try, then the better one is used.
    The longer the best one stays the same, the rarer the tries become.
    """

    def __init__(self, variants: Sequence[_T], length: float) -> None:
        self._variants, self._length = list(variants), length
        self._costs: list[float | None] = [None] * len(self._variants)  # for a unit
        self._now = self._last_tried = 0
        self._done = self._spent = 0.0
        self._wait, self._rounds = _SOONEST, 0

    @property
    def variant(self) -> _T:
        """Return the variant to use now."""
        return self._variants[self._now]

    def add(self, cost: float, units: float) -> None:
        """Note the `cost` of `units` of work, done with the present variant."""
        self._spent += cost
        self._done += units
        if self._done >= self._length:
            self._end_round(self._spent / self._done)

    def _end_round(self, cost: float) -> None:
        before = self._costs[self._now]
        best = self._best()
        self._costs[self._now] = cost if before is None else before + _FRESH * (cost - before)
        self._done = self._spent = 0.0
        self._rounds += 1
        if self._best() != best:
            self._wait = _SOONEST
        self._now = self._next()

    def _next(self) -> int:
        if None in self._costs:
            return self._costs.index(None)
        if self._rounds >= self._wait and len(self._variants) > 1:
            self._rounds, self._wait = 0, min(2 * self._wait, _LATEST)
            others = [n for n in range(len(self._variants)) if n != self._best()]
            self._last_tried = next((n for n in others if n > self._last_tried), others[0])
            return self._last_tried
        return self._best()

    def _best(self) -> int:
        known = [(cost, n) for n, cost in enumerate(self._costs) if cost is not None]
        return min(known)[1] if known else 0
