"""Computes on the CPU what a GPU's memory does not hold, where that is sooner done than copied."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch

from mixchat.experts.keys import ExpertKey
from mixchat.experts.sources import HostTier


class HostCompute:
    """The choice between moving an expert and computing it where it lies, and the computing.

    copy_seconds: to bring one expert up; host_seconds: to compute one on the CPU, by rows. What is
    copied and what is computed here goes on at the same time, so that of several experts some are
    moved and some are not. With a copy in 4 ms and 3 ms for a row here, of two experts with a row
    each one is copied and one computed: 4 ms, not 8 or 6.
    """

    def __init__(
        self,
        tier: HostTier,
        *,
        copy_seconds: float,
        host_seconds: Callable[[int], float],
    ) -> None:
        self._tier, self._copy_seconds, self._host_seconds = tier, copy_seconds, host_seconds

    def choose(self, missing: Mapping[ExpertKey, int]) -> list[ExpertKey]:
        """Which of these experts, given with their rows, to compute here: those with few rows."""
        held = [key for key in missing if self._tier.tier(key) == "host"]
        held.sort(key=missing.__getitem__)
        best, shortest = 0, len(missing) * self._copy_seconds
        here = 0.0
        for count, key in enumerate(held, start=1):
            here += self._host_seconds(missing[key])
            seconds = max(here, (len(missing) - count) * self._copy_seconds)
            if seconds < shortest:
                best, shortest = count, seconds
        return held[:best]

    def run(self, key: ExpertKey, x: torch.Tensor) -> torch.Tensor | None:
        """The expert's output for x [n, D], both on the CPU; None if it has left RAM meanwhile."""
        with self._tier.borrow(key) as expert:
            return None if expert is None else expert(x)
