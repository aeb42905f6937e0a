"""Computes experts on the CPU where that is faster than copying them to the GPU."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch

from mixchat.experts.keys import ExpertKey
from mixchat.experts.sources import HostTier


class HostCompute:
    """Chooses between copying an expert and computing it in RAM, and computes it there.

    copy_seconds: to copy one expert to the GPU; host_seconds: to compute one on the CPU, by rows.
    Copying and computing overlap, so that of several experts some are copied and some are not. With
    a copy in 4 ms and 3 ms for a row on the CPU, of two experts with a row each one is copied and
    one computed: 4 ms, not 8 or 6.
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
        """Return which of these experts, given with their rows, to compute here: those with few."""
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
        """Return the expert's output for x [n, D], on the CPU; None if it has left RAM."""
        with self._tier.borrow(key) as expert:
            return None if expert is None else expert(x)
