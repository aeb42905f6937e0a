"""Computes experts on one device, bringing them into its slots as needed.

D = hidden_size.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence, Set
from itertools import takewhile

import torch

from mixchat.base import interrupts
from mixchat.experts.fetcher import MISSING, Fetcher
from mixchat.experts.host_compute import HostCompute
from mixchat.experts.keys import ExpertKey
from mixchat.experts.layer_rows import LayerRows
from mixchat.weights.format.blueprint import Expert

AHEAD = 2  # experts on their way while one is computed


class CachedExperts:
    """Runs experts out of the slots of `device`, which a `Fetcher` fills; two slots are enough.

    Those in their slots come first: otherwise a prefill that walks through more experts than there
    are slots would evict each just before its turn. While one is computed, the next ones are on
    their way, and after them those that are predicted. `elsewhere`: experts that are computed by
    others as long as these can.
    """

    def __init__(
        self,
        fetcher: Fetcher,
        device: torch.device,
        host: HostCompute | None = None,
    ) -> None:
        self._fetcher, self._device, self._host = fetcher, device, host
        self.elsewhere: Set[ExpertKey] = frozenset()
        self._order: list[ExpertKey] = []
        self._on_host: set[ExpertKey] = set()

    @property
    def number(self) -> int | None:
        """Return the number of the GPU; a CPU has none."""
        return self._device.index

    @property
    def slots(self) -> int:
        """Return how many experts may be held in the device's memory."""
        return self._fetcher.slots

    @property
    def slots_by_tier(self) -> dict[str, int]:
        """Return how many experts may be held in each tier but the disk, the fastest one first."""
        return self._fetcher.slots_by_tier

    @property
    def bytes_held(self) -> int:
        """Return the bytes of memory that experts take on the device."""
        return self._fetcher.bytes_held

    @property
    def may_use_rows_on_cpu(self) -> bool:
        """Return whether the CPU may compute experts, though the rest is on a GPU."""
        return self._host is not None

    @property
    def holds_all(self) -> bool:
        """Return whether there is nothing left to fetch."""
        return self._fetcher.holds_all(but=self.elsewhere)

    def holds(self, key: ExpertKey) -> bool:
        """Return whether the expert is whole in its slot."""
        return self._fetcher.holds(key)

    def tier(self, key: ExpertKey) -> str:
        """Return the tier of the expert's fastest copy."""
        return self._fetcher.tier(key)

    def halve(self) -> bool:
        """Hold half as many experts from now on; return False where that would be too few."""
        return self._fetcher.halve()

    def close(self) -> None:
        """Give the memory of all slots back; nothing can be computed any more."""
        self._fetcher.close()

    def follow_memory(self) -> None:
        """Hold fewer experts where other programs need the memory, or more again."""
        self._fetcher.follow_memory()

    def load(self, key: ExpertKey, beside: Collection[ExpertKey]) -> None:
        """Bring an expert into its slot, and wait for it; those in `beside` are not evicted."""
        self._fetcher.request([key], beside)
        self._fetcher.ready(key)

    def resident(self, layers: Sequence[Sequence[ExpertKey]]) -> Sequence[Sequence[Expert]]:
        """Return the experts of the first layers whose experts are all in slots.

        Return nothing where slots are needed for others. The next layer has to `begin` instead.
        """
        self._fetcher.follow_memory()
        if not self._fetcher.has_room_for_all:
            return ()
        whole = takewhile(lambda keys: all(map(self._fetcher.holds, keys)), layers)
        return [[self._fetcher.expert(key) for key in keys] for keys in whole]

    def note_hits(self, keys: Sequence[ExpertKey]) -> None:
        """Note that these experts of a layer were computed out of their slots."""
        self._fetcher.count_hits(keys[0].layer, keys)

    def begin(self, rows: LayerRows, keys: Collection[ExpertKey]) -> None:
        """Let the first of these experts be on their way; `compute_next` computes them."""
        self._fetcher.settle(rows.layer, keys)
        self._on_host = self._chosen_for_host(rows, keys)
        by_state = sorted(keys, key=self._fetcher.state)
        # The CPU's experts come second: a GPU then has its own work meanwhile.
        self._order = sorted(
            by_state, key=lambda key: key not in self._on_host and not self._fetcher.holds(key)
        )
        self._request(self._order)

    def prefetch(self, keys: Iterable[ExpertKey]) -> None:
        """Let experts that are predicted be on their way after those of `begin`."""
        wanted = [key for key in keys if key not in self.elsewhere]
        self._fetcher.prefetch(wanted, pinned=self._order)

    def compute_next(self, rows: LayerRows) -> bool:
        """Wait for the next expert of `begin`, and compute it.

        Its output is stored in `rows`. Returns False where none was left.
        """
        if not self._order:
            return False
        interrupts.check()
        self._request(self._order)
        key = self._order.pop(0)
        rows.put(key, self._output(key, rows))
        return True

    def _chosen_for_host(self, rows: LayerRows, keys: Iterable[ExpertKey]) -> set[ExpertKey]:
        """Return the experts without a slot that the CPU computes, though the rest is on a GPU."""
        if self._host is None:
            return set()
        missing = {key: rows.counts[key] for key in keys if self._fetcher.state(key) == MISSING}
        return set(self._host.choose(missing))

    def _request(self, keys: Sequence[ExpertKey]) -> None:
        ahead = min(AHEAD, self._fetcher.slots - 1)
        coming = [key for key in keys if key not in self._on_host]
        self._fetcher.request(coming[: 1 + ahead])

    def _output(self, key: ExpertKey, rows: LayerRows) -> torch.Tensor:
        """Return an expert's output, [n, D]."""
        if key in self._on_host and self._host is not None:
            result = self._host.run(key, rows.on_cpu(key))
            if result is not None:
                self._fetcher.stats.misses[key] += 1
                return result
            self._fetcher.request([key])
        expert = self._fetcher.ready(key)
        return expert(rows.of(key).to(self._device, non_blocking=True), exact=rows.exact)
