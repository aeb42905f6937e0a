"""Chooses among ways to do the same work by trying them during the work."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Generic, TypeVar

T = TypeVar("T")

_SOONEST, _LATEST = 8, 64  # rounds until another way gets its next try
_FRESH = 0.5  # weight of a way's last round, against those before it


class Trial(Generic[T]):
    """Uses the way that costs least, and tries the others again from time to time.

    A round is `length` units of work done in one way. With the ways A and B, of which B costs less,
    the rounds are A B B B B B B B A B ...: each has a try, then the better one is used. The longer
    the best one stays the same, the rarer the tries become.
    """

    def __init__(self, ways: Sequence[T], length: float) -> None:
        self._ways, self._length = list(ways), length
        self._costs: list[float | None] = [None] * len(self._ways)  # for a unit
        self._now = self._last_tried = 0
        self._done = self._spent = 0.0
        self._wait, self._rounds = _SOONEST, 0

    @property
    def way(self) -> T:
        """Return the way to use now."""
        return self._ways[self._now]

    def add(self, cost: float, units: float) -> None:
        """Note the `cost` of `units` of work, done in the present way."""
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
        if self._rounds >= self._wait and len(self._ways) > 1:
            self._rounds, self._wait = 0, min(2 * self._wait, _LATEST)
            others = [way for way in range(len(self._ways)) if way != self._best()]
            self._last_tried = next((way for way in others if way > self._last_tried), others[0])
            return self._last_tried
        return self._best()

    def _best(self) -> int:
        known = [(cost, way) for way, cost in enumerate(self._costs) if cost is not None]
        return min(known)[1] if known else 0
