"""Sends the rows of a layer to the holders of its experts, and combines the outputs.

T = tokens, D = hidden_size, K = num_experts_per_tok.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence, Set
from typing import Protocol

import torch

from mixchat.base import gpu
from mixchat.experts.cache import ExpertKey, ExpertStats
from mixchat.experts.compute import DeviceCompute
from mixchat.experts.fetcher import Fetcher
from mixchat.experts.holder import LayerExperts
from mixchat.experts.layer_rows import LayerRows
from mixchat.experts.prefetch import Prefetch, ranked_keys
from mixchat.experts.sharing import share

_LOCAL = 0  # this machine among the holders. Workers count from 1


class WorkerExperts(Protocol):
    """A worker on another machine. No method raises its faults."""

    @property
    def held(self) -> Collection[ExpertKey]:
        """Return the experts that it holds, or none while it is lost."""

    def begin_turn(self) -> None:
        """Connect again if the worker was lost."""

    def begin(self, rows: LayerRows, keys: Sequence[ExpertKey]) -> None:
        """Send the rows of these experts."""

    def finish(self, rows: LayerRows) -> Sequence[ExpertKey]:
        """Store the outputs in `rows`, and return the experts that it has not computed."""

    def close(self) -> None:
        """End the chat with the worker."""


class Dispatcher:
    """An `ExpertHolder`: the devices of this machine, and workers on others.

    devices: the first one computes the rest of the model. owner: the index of the device that
    computes an expert unless a worker does. copies: experts of workers that this machine is to
    hold, too.

    If a worker fails, this machine computes its experts from the same rows.
    """

    def __init__(
        self,
        devices: Sequence[DeviceCompute],
        stats: ExpertStats,
        *,
        owner: Callable[[ExpertKey], int] = lambda key: 0,
        prefetch: Prefetch | None = None,
        workers: Sequence[WorkerExperts] = (),
        copies: Set[ExpertKey] = frozenset(),
    ) -> None:
        self._devices, self._stats, self._owner = devices, stats, owner
        self._fetchers = [device.fetcher for device in devices]
        self._prefetch, self._workers, self._copies = prefetch, workers, copies
        # The last layer's outputs, which nobody reads any more. New memory would take as long as
        # some matrix products.
        self._memory: torch.Tensor | None = None
        self._note_workers()

    @property
    def stats(self) -> ExpertStats:
        for fetcher in self._fetchers:
            fetcher.count_hits()
        return self._stats

    @property
    def slots(self) -> int:
        return sum(fetcher.slots for fetcher in self._fetchers)

    @property
    def slots_by_tier(self) -> dict[str, int]:
        slots: dict[str, int] = {}
        counts = [item for fetcher in self._fetchers for item in fetcher.slots_by_tier.items()]
        for tier, count in sorted(counts, key=lambda item: item[0] == "host"):  # RAM comes last
            slots[tier] = slots.get(tier, 0) + count
        if self._workers:
            slots["worker"] = sum(len(worker.held) for worker in self._workers)
        return slots

    @property
    def bytes_held(self) -> int:
        return sum(fetcher.bytes_held for fetcher in self._fetchers)

    def tier(self, key: ExpertKey) -> str:
        fetcher = self._fetcher(key)
        on_worker = any(key in worker.held for worker in self._workers)
        return "worker" if on_worker and not fetcher.holds(key) else fetcher.tier(key)

    def holds(self, key: ExpertKey) -> bool:
        return self._fetcher(key).holds(key)

    @property
    def is_filling(self) -> bool:
        return any(fetcher.is_filling for fetcher in self._fetchers)

    def fill(self, keys: Sequence[ExpertKey]) -> None:
        """Load experts in this order while nothing else is to be loaded, if all fit."""
        for number, fetcher in enumerate(self._fetchers):
            fetcher.fill([key for key in keys if self._owner(key) == number])

    def fitting(self, keys: Iterable[ExpertKey]) -> list[ExpertKey]:
        """Return the first of these experts that each device has slots for."""
        room = [fetcher.slots for fetcher in self._fetchers]
        fit = []
        for key in keys:
            if room[self._owner(key)]:
                room[self._owner(key)] -= 1
                fit.append(key)
        return fit

    def load(self, key: ExpertKey, pinned: Collection[ExpertKey]) -> None:
        """Bring an expert into the memory of its device, and evict none in `pinned`."""
        self._fetcher(key).load(key, pinned)

    def follow_memory(self) -> None:
        for fetcher in self._fetchers:
            fetcher.follow_memory()

    def close(self) -> None:
        for fetcher in self._fetchers:
            fetcher.close()
        for worker in self._workers:
            worker.close()

    def halve(self, number: int | None = None) -> bool:
        full = [each.fetcher for each in self._devices if number in (None, each.device.index)]
        halved = [fetcher.halve() for fetcher in full or self._fetchers]
        return any(halved)

    def begin_turn(self) -> None:
        for worker in self._workers:
            worker.begin_turn()
        self._note_workers()

    def resident(self, layers: Sequence[Sequence[ExpertKey]]) -> Sequence[LayerExperts]:
        is_alone = len(self._fetchers) == 1 and not self._workers
        self._memory = None  # a prompt's, which one token does not need
        return self._fetchers[0].resident(layers) if is_alone else ()

    def note_hits(self, layer: int, selected: Sequence[Sequence[int]]) -> None:
        self._fetchers[0].note_hits(layer, selected)

    def run(
        self,
        layer: int,
        hidden_states: torch.Tensor,
        selected_experts: torch.Tensor,
        routing_weights: torch.Tensor,
        *,
        exact: bool = False,
    ) -> torch.Tensor:
        rows = self.compute(layer, hidden_states, selected_experts, exact=exact)
        combined = rows.combine(routing_weights)
        self._memory = rows.memory
        return combined

    def compute(
        self,
        layer: int,
        hidden_states: torch.Tensor,
        selected_experts: torch.Tensor,
        *,
        exact: bool = False,
    ) -> LayerRows:
        """Return the experts' outputs. The arguments are as in `run`."""
        rows, predicted = self._read(layer, hidden_states, selected_experts, exact)
        local, sent = self._divide(rows)
        # The workers compute while this machine does, and its disk reads what comes next.
        for worker, keys in sent:
            worker.begin(rows, keys)
        self._begin(rows, local)
        self._look_ahead(rows, predicted)
        self._finish(rows)
        failed = [key for worker, _ in sent for key in worker.finish(rows)]
        self._stats.hits.update(key for _, keys in sent for key in keys if key not in failed)
        if failed:
            self._note_workers()
            self._begin(rows, failed)
            self._finish(rows)
        return rows

    def _read(
        self, layer: int, hidden_states: torch.Tensor, selected: torch.Tensor, exact: bool
    ) -> tuple[LayerRows, torch.Tensor | None]:
        """Return the rows of each expert, and the predicted experts on the CPU.

        A GPU that decodes is waited for only here, so all is read at once. Otherwise the
        predicted experts are None, so that the next experts are on their way first.
        """
        decodes = hidden_states.shape[0] == 1 and gpu.is_gpu(hidden_states.device)
        needs_copy = decodes and (
            bool(self._workers) or any(device.may_use_rows_on_cpu for device in self._devices)
        )
        predicts = decodes and self._predicts
        wanted = [selected]
        if needs_copy:
            wanted.append(hidden_states)
        if predicts:
            assert self._prefetch is not None
            wanted.append(self._prefetch.predict(layer, hidden_states))
        tensors = gpu.read(wanted)
        copy = tensors[1] if needs_copy else None
        memory, self._memory = self._memory, None
        rows = LayerRows(layer, hidden_states, tensors[0], copy=copy, exact=exact, memory=memory)
        return rows, tensors[-1] if predicts else None

    @property
    def _predicts(self) -> bool:
        return self._prefetch is not None and not all(each.holds_all for each in self._fetchers)

    def _divide(
        self, rows: LayerRows
    ) -> tuple[list[ExpertKey], list[tuple[WorkerExperts, list[ExpertKey]]]]:
        """Return the experts that this machine computes, and those of each worker."""
        if not self._workers:
            return list(rows.counts), []
        holders: dict[ExpertKey, list[int]] = {}
        for key in rows.counts:
            workers = [n for n, worker in enumerate(self._workers, start=1) if key in worker.held]
            # A copy that is not in memory would have to be read first.
            is_copied = key in self._copies and self.holds(key)
            holders[key] = [_LOCAL, *workers] if is_copied or not workers else workers
        shares = share(rows.counts, holders)
        local = shares.pop(_LOCAL, [])
        return local, [(self._workers[number - 1], keys) for number, keys in shares.items()]

    def _begin(self, rows: LayerRows, keys: Sequence[ExpertKey]) -> None:
        for number, device in enumerate(self._devices):
            device.begin(rows, [key for key in keys if self._owner(key) == number])

    def _finish(self, rows: LayerRows) -> None:
        # In turns, so that no device waits for another one's loads. The first one has most to do
        # and comes last.
        busy = list(reversed(self._devices))
        while busy:
            busy = [device for device in busy if device.compute_next(rows)]

    def _look_ahead(self, rows: LayerRows, predicted: torch.Tensor | None) -> None:
        """Prefetch the copies of this layer's experts, then the predicted experts."""
        if self._prefetch is None or not self._predicts:
            return
        if predicted is None:
            (predicted,) = gpu.read([self._prefetch.predict(rows.layer, rows.hidden_states)])
        copies = [key for key in rows.counts if key in self._copies]
        keys = [*copies, *ranked_keys(rows.layer, predicted)]
        for number, device in enumerate(self._devices):
            device.prefetch(key for key in keys if self._owner(key) == number)

    def _note_workers(self) -> None:
        held = frozenset(key for worker in self._workers for key in worker.held) - self._copies
        for number, fetcher in enumerate(self._fetchers):
            fetcher.on_workers = frozenset(key for key in held if self._owner(key) == number)

    def _fetcher(self, key: ExpertKey) -> Fetcher:
        return self._fetchers[self._owner(key)]
