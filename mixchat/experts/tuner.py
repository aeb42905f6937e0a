"""Chooses among variants of the same work by trying them while it is done."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from statistics import mean
from typing import Generic, TypeVar

_T = TypeVar("_T")

_ROUNDS = 4  # of each variant in a comparison
_MIN_WAIT, _MAX_WAIT = 32, 256  # rounds until the next comparison


class Tuner(Generic[_T]):
    """Uses the variant that costs least, and tries the others again from time to time.

    A round is `length` units of work with one variant. A variant's cost is the mean of the last
    four rounds. If B is a little cheaper than A, the rounds are A B A B A B A B, then B B B and so
    on, and later A B A B A B A B again. The longer the best one stays the same, the rarer
    comparisons become.
    """

    # The compared variants take turns, because a machine's speed changes within seconds.

    def __init__(self, variants: Sequence[_T], length: float) -> None:
        self._variants, self._length = list(variants), length
        self._costs = [deque[float](maxlen=_ROUNDS) for _ in self._variants]  # of a unit
        self._turns = deque[int]()  # the variants of the next rounds
        self._compared: dict[int, list[float]] = {}  # the costs in this comparison
        self._compare(range(len(self._variants)))
        self._now: int = self._turns.popleft()
        self._last_tried = self._rounds = 0
        self._done = self._spent = 0.0
        self._wait = _MIN_WAIT

    @property
    def variant(self) -> _T:
        return self._variants[self._now]

    def add(self, cost: float, units: float) -> None:
        """Note the `cost` of `units` of work with the present variant."""
        self._spent += cost
        self._done += units
        if self._done < self._length:
            return
        best, mean_cost = self._best(), self._spent / self._done
        self._costs[self._now].append(mean_cost)
        if self._turns:
            self._compared[self._now].append(mean_cost)
            # A variant leaves the comparison early if two rounds or more of it cost more than all
            # rounds of the best one.
            costs, best_costs = self._compared, self._compared.get(self._best(), [])
            self._turns = deque(
                n
                for n in self._turns
                if min(len(costs[n]), len(best_costs)) < 2 or min(costs[n]) <= max(best_costs)
            )
        self._done = self._spent = 0.0
        self._rounds += 1
        if self._best() != best:
            self._wait = _MIN_WAIT
        self._now = self._next()

    def _next(self) -> int:
        if not self._turns and self._rounds >= self._wait and len(self._variants) > 1:
            self._rounds, self._wait = 0, min(2 * self._wait, _MAX_WAIT)
            best = self._best()
            rivals = [n for n in range(len(self._variants)) if n != best]
            # One rival at a time, so that a comparison of many variants does not cost more.
            self._last_tried = next((n for n in rivals if n > self._last_tried), rivals[0])
            self._compare([self._last_tried, best])
        return self._turns.popleft() if self._turns else self._best()

    def _compare(self, variants: Sequence[int]) -> None:
        self._turns.extend([*variants] * _ROUNDS)
        self._compared = {variant: [] for variant in variants}

    def _best(self) -> int:
        known = [(mean(costs), n) for n, costs in enumerate(self._costs) if costs]
        return min(known)[1] if known else 0
