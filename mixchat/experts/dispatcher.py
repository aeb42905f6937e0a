"""Dispatches the rows of a layer to those who hold its experts, and combines the outputs.

T = tokens, D = hidden_size, K = num_experts_per_tok.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence, Set

import torch

from mixchat.base import gpu
from mixchat.experts.cached_experts import CachedExperts
from mixchat.experts.holder import WorkerExperts
from mixchat.experts.keys import ExpertKey
from mixchat.experts.layer_rows import LayerRows
from mixchat.experts.prefetch import Prefetch, ranked_keys
from mixchat.experts.sharing import share
from mixchat.experts.stats import ExpertStats
from mixchat.weights.format.blueprint import Expert

_HERE = 0  # this machine, among those who hold an expert


class Dispatcher:
    """An `ExpertHolder`: the devices of this machine, and workers on others.

    devices: the first one computes the rest of the model; `home` gives the index of the device that
    computes an expert where no worker does. copies: experts that are to be held on their device
    although a worker holds them. `stats` is that of all devices' fetchers.

    Rows go to the workers first; the devices compute while these do; then outputs come back. What a
    worker fails to compute is computed at home, from the same rows, so that a fault does not show
    in the result.
    """

    def __init__(
        self,
        devices: Sequence[CachedExperts],
        stats: ExpertStats,
        *,
        home: Callable[[ExpertKey], int] = lambda key: 0,
        prefetch: Prefetch | None = None,
        workers: Sequence[WorkerExperts] = (),
        copies: Set[ExpertKey] = frozenset(),
    ) -> None:
        self._devices, self.stats, self._home = devices, stats, home
        self._prefetch, self._workers, self._copies = prefetch, workers, copies
        self._look_around()

    @property
    def slots(self) -> int:
        return sum(device.slots for device in self._devices)

    @property
    def slots_by_tier(self) -> dict[str, int]:
        slots: dict[str, int] = {}
        counts = [item for device in self._devices for item in device.slots_by_tier.items()]
        for tier, count in sorted(counts, key=lambda item: item[0] == "host"):  # RAM comes last
            slots[tier] = slots.get(tier, 0) + count
        if self._workers:
            slots["worker"] = sum(len(worker.held) for worker in self._workers)
        return slots

    @property
    def bytes_held(self) -> int:
        return sum(device.bytes_held for device in self._devices)

    def tier(self, key: ExpertKey) -> str:
        device = self._devices[self._home(key)]
        on_worker = any(key in worker.held for worker in self._workers)
        return "worker" if on_worker and not device.holds(key) else device.tier(key)

    def holds(self, key: ExpertKey) -> bool:
        """Return whether the expert is in the memory of its device."""
        return self._devices[self._home(key)].holds(key)

    def fitting(self, keys: Iterable[ExpertKey]) -> list[ExpertKey]:
        """Return the first of these experts that each device has slots for."""
        room = [device.slots for device in self._devices]
        fit = []
        for key in keys:
            if room[self._home(key)]:
                room[self._home(key)] -= 1
                fit.append(key)
        return fit

    def load(self, key: ExpertKey, beside: Collection[ExpertKey]) -> None:
        """Bring an expert into the memory of its device; those in `beside` are not evicted."""
        self._devices[self._home(key)].load(key, beside)

    def follow_memory(self) -> None:
        """Hold fewer experts where other programs need the memory, or more again."""
        for device in self._devices:
            device.follow_memory()

    def close(self) -> None:
        for device in self._devices:
            device.close()
        for worker in self._workers:
            worker.close()

    def halve(self, number: int | None = None) -> bool:
        full = [device for device in self._devices if number in (None, device.number)]
        halved = [device.halve() for device in full or self._devices]
        return any(halved)

    def begin_turn(self) -> None:
        for worker in self._workers:
            worker.begin_turn()
        self._look_around()

    def resident(self, layers: Sequence[Sequence[ExpertKey]]) -> Sequence[Sequence[Expert]]:
        alone = len(self._devices) == 1 and not self._workers
        return self._devices[0].resident(layers) if alone else ()

    def note_hits(self, keys: Sequence[ExpertKey]) -> None:
        self._devices[0].note_hits(keys)

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
        return rows.combine(routing_weights)

    def compute(
        self,
        layer: int,
        hidden_states: torch.Tensor,
        selected_experts: torch.Tensor,
        *,
        exact: bool = False,
    ) -> LayerRows:
        """Return the outputs of the selected experts; all are as in `run`."""
        rows, predicted = self._read(layer, hidden_states, selected_experts, exact)
        at_home, sent = self._shared(rows)
        for worker, keys in sent:
            worker.begin(rows, keys)
        self._begin_at_home(rows, at_home)
        self._look_ahead(rows, predicted)
        self._finish_at_home(rows)
        failed = [key for worker, _ in sent for key in worker.finish(rows)]
        self.stats.hits.update(key for _, keys in sent for key in keys if key not in failed)
        if failed:
            self._look_around()
            self._begin_at_home(rows, failed)
            self._finish_at_home(rows)
        return rows

    def _read(
        self, layer: int, hidden_states: torch.Tensor, selected: torch.Tensor, exact: bool
    ) -> tuple[LayerRows, torch.Tensor | None]:
        """Return the rows of each expert, and the predicted experts, on the CPU.

        A GPU that decodes is waited for here, and nowhere else in a layer: what may be needed of it
        is read together. Else the predicted ones are None, and read later: the next experts are
        then on their way first.
        """
        decodes = hidden_states.shape[0] == 1 and gpu.is_gpu(hidden_states.device)
        on_cpu, predicts = decodes and self._needs_rows_on_cpu, decodes and self._predicts
        wanted = [selected]
        if on_cpu:
            wanted.append(hidden_states)
        if predicts:
            assert self._prefetch is not None
            wanted.append(self._prefetch.predict(layer, hidden_states))
        found = gpu.read(wanted)
        copy = found[1] if on_cpu else None
        rows = LayerRows(layer, hidden_states, selected, found[0], copy, exact=exact)
        return rows, found[-1] if predicts else None

    @property
    def _predicts(self) -> bool:
        return self._prefetch is not None and not all(part.holds_all for part in self._devices)

    @property
    def _needs_rows_on_cpu(self) -> bool:
        """Return whether rows of a GPU may be needed on the CPU: by itself, or for a worker."""
        used = any(device.may_use_rows_on_cpu and not device.holds_all for device in self._devices)
        return used or bool(self._workers)

    def _shared(
        self, rows: LayerRows
    ) -> tuple[list[ExpertKey], list[tuple[WorkerExperts, list[ExpertKey]]]]:
        """Return the experts that this machine computes, and those of each worker."""
        if not self._workers:
            return list(rows.counts), []
        shares = share(rows.counts, {key: self._holders(key) for key in rows.counts})
        at_home = shares.pop(_HERE, [])
        return at_home, [(self._workers[number - 1], keys) for number, keys in shares.items()]

    def _holders(self, key: ExpertKey) -> list[int]:
        """Return who can compute an expert at once: `_HERE`, or a worker counted from 1."""
        workers = [n for n, worker in enumerate(self._workers, start=1) if key in worker.held]
        copied = key in self._copies and self._devices[self._home(key)].holds(key)
        return [_HERE, *workers] if copied or not workers else workers

    def _begin_at_home(self, rows: LayerRows, keys: Sequence[ExpertKey]) -> None:
        for number, device in enumerate(self._devices):
            device.begin(rows, [key for key in keys if self._home(key) == number])

    def _finish_at_home(self, rows: LayerRows) -> None:
        # In turns, so that what one device holds does not wait for what another one has to fetch.
        # The first one comes last: it has the most to do, and others only have to be told.
        left = list(reversed(self._devices))
        while left:
            left = [device for device in left if device.compute_next(rows)]

    def _look_ahead(self, rows: LayerRows, predicted: torch.Tensor | None) -> None:
        """Prefetch the copies of experts that workers compute now, and what is predicted."""
        if self._prefetch is None or not self._predicts:
            return
        if predicted is None:
            (predicted,) = gpu.read([self._prefetch.predict(rows.layer, rows.hidden_states)])
        copies = [key for key in rows.counts if key in self._copies]
        keys = [*copies, *ranked_keys(rows.layer, predicted)]
        for number, device in enumerate(self._devices):
            device.prefetch(key for key in keys if self._home(key) == number)

    def _look_around(self) -> None:
        """Note which experts workers hold now."""
        held = frozenset(key for worker in self._workers for key in worker.held) - self._copies
        for number, device in enumerate(self._devices):
            device.elsewhere = frozenset(key for key in held if self._home(key) == number)
