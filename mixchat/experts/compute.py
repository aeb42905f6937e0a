"""Computes experts on one device, and on the CPU if that is faster than a copy to the GPU.

n = rows of an expert, D = hidden_size.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping

import torch

from mixchat.base import interrupts
from mixchat.experts.cache import ExpertKey
from mixchat.experts.fetcher import MISSING, Fetcher
from mixchat.experts.layer_rows import LayerRows
from mixchat.experts.sources import HostSource

_LOADS_AHEAD = 2  # experts on their way while one is computed


class DeviceCompute:
    """Computes experts out of the slots of `device`. Two slots are enough.

    Experts in their slots come first. Otherwise a prefill with more experts than slots would evict
    each just before its turn.
    """

    def __init__(
        self, fetcher: Fetcher, device: torch.device, host: HostCompute | None = None
    ) -> None:
        self.fetcher, self.device, self._host = fetcher, device, host
        self._order: list[ExpertKey] = []
        self._on_host: set[ExpertKey] = set()

    @property
    def may_use_rows_on_cpu(self) -> bool:
        return self._host is not None and not self.fetcher.holds_all

    def begin(self, rows: LayerRows, keys: Collection[ExpertKey]) -> None:
        """Start loading the first of these experts, for `compute_next`."""
        self.fetcher.settle(rows.layer, keys)
        self._on_host = self._chosen_for_host(rows, keys)
        by_state = sorted(keys, key=self.fetcher.state)
        # The CPU's experts come second, so that the GPU has work meanwhile.
        self._order = sorted(
            by_state, key=lambda key: key not in self._on_host and not self.fetcher.holds(key)
        )
        self._request()

    def prefetch(self, keys: Iterable[ExpertKey]) -> None:
        """Start loading predicted experts, after the experts of `begin`."""
        self.fetcher.prefetch(keys, pinned=self._order)

    def compute_next(self, rows: LayerRows) -> bool:
        """Compute the next expert of `begin` into `rows`. Return False if none was left."""
        if not self._order:
            return False
        interrupts.check()
        self._request()
        key = self._order.pop(0)
        rows.put(key, self._output(key, rows))
        return True

    def _chosen_for_host(self, rows: LayerRows, keys: Iterable[ExpertKey]) -> set[ExpertKey]:
        if self._host is None:
            return set()
        missing = {key: rows.counts[key] for key in keys if self.fetcher.state(key) == MISSING}
        return set(self._host.choose(missing))

    def _request(self) -> None:
        ahead = min(_LOADS_AHEAD, self.fetcher.slots - 1)
        needed = [key for key in self._order if key not in self._on_host]
        self.fetcher.request(needed[: 1 + ahead])

    def _output(self, key: ExpertKey, rows: LayerRows) -> torch.Tensor:
        """Return an expert's output, [n, D]."""
        if key in self._on_host and self._host is not None:
            output = self._host.run(key, rows.on_cpu(key))
            if output is not None:
                self.fetcher.stats.misses[key] += 1
                return output
            self.fetcher.request([key])
        expert = self.fetcher.ready(key)
        return expert(rows.of(key).to(self.device, non_blocking=True), exact=rows.exact)


class HostCompute:
    """Chooses between copying an expert and computing it in RAM, and computes it there.

    copy_seconds: to copy one expert to the GPU. host_seconds: to compute one on the CPU, by rows.
    Both overlap, so some experts are copied and others computed.
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
        """Return the experts to compute on the CPU. `missing` maps each to its rows.

        Few rows come first, because a copy costs the same for any number.
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
        """Return the expert's output for x [n, D], on the CPU, or None if it has left RAM."""
        with self._source.borrow(key) as expert:
            return None if expert is None else expert(x)
