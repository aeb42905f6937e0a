"""Computes experts on the CPU where that is faster than copying them to the GPU."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch

from mixchat.experts.keys import ExpertKey
from mixchat.experts.sources import HostSource


class HostCompute:
    """Chooses between copying an expert and computing it in RAM, and computes it there.

    copy_seconds: to copy one expert to the GPU; host_seconds: to compute one on the CPU, by rows.
    Copying and computing overlap, so that of several experts some are copied and some are not. With
    a copy in 4 ms and 3 ms for a row on the CPU, of two experts with a row each one is copied and
    one computed: 4 ms, not 8 or 6.
    """

    def __init__(
        self,
        source: HostSource,
        *,
        copy_seconds: float,
        host_seconds: Callable[[int], float],
    ) -> None:
        self._source, self._copy_seconds, self._host_seconds = source, copy_seconds, host_seconds

    def choose(self, missing: Mapping[ExpertKey, int]) -> list[ExpertKey]:
        """Return the experts to compute on the CPU; `missing` maps each to its rows of x.

        Those with few rows come first, because a copy costs the same for any number of rows.
        """
        held = [key for key in missing if self._source.tier(key) == "host"]
        held.sort(key=missing.__getitem__)
        best, shortest = 0, len(missing) * self._copy_seconds
        on_host = 0.0
        for count, key in enumerate(held, start=1):
            on_host += self._host_seconds(missing[key])
            seconds = max(on_host, (len(missing) - count) * self._copy_seconds)
            if seconds < shortest:
                best, shortest = count, seconds
        return held[:best]

    def run(self, key: ExpertKey, x: torch.Tensor) -> torch.Tensor | None:
        """Return the expert's output for x [n, D], on the CPU; None if it has left RAM."""
        with self._source.borrow(key) as expert:
            return None if expert is None else expert(x)
