"""Sends the rows of a layer to the holders of its experts, and combines the outputs.

T = tokens, D = hidden_size, K = num_experts_per_tok.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence, Set
from itertools import islice

import torch

from mixchat.experts.cache import ExpertKey, ExpertStats
from mixchat.experts.compute import HostCompute
from mixchat.experts.holder import ExpertHolder, LayerExperts, WorkerExperts
from mixchat.experts.layer_rows import LayerRows
from mixchat.experts.prefetch import NextRouters, ranked_keys
from mixchat.experts.sharing import share

_LOCAL = 0  # this machine among the holders. Workers count from 1


class Dispatcher(ExpertHolder):
    """Experts in this machine's RAM, and workers on others.

    copies: experts of workers that this machine is to hold, too. If a worker fails, this machine
    computes its experts from the same rows. layers_ahead: whose experts `next_routers` predict for
    one token. `on_workers` and `on_gpus` are experts that RAM need not hold.
    """

    def __init__(
        self,
        local: HostCompute,
        stats: ExpertStats,
        *,
        next_routers: NextRouters | None = None,
        layers_ahead: int = 0,
        workers: Sequence[WorkerExperts] = (),
        copies: Set[ExpertKey] = frozenset(),
    ) -> None:
        self._local = local
        self.ram = local.ram
        self._stats = stats
        self.tiers = {"host": [self.ram]}
        self.workers = workers
        self._copies = copies
        self._next_routers = next_routers
        self._layers_ahead = layers_ahead
        self.on_gpus: Set[ExpertKey] = frozenset()
        # The last layer's outputs, which nobody reads any more. New memory would take as long as
        # some matrix products.
        self._memory: torch.Tensor | None = None
        self._note_elsewhere()

    @property
    def stats(self) -> ExpertStats:
        self.ram.count_hits()
        return self._stats.copy()

    def fill(self, keys: Sequence[ExpertKey]) -> None:
        """Load experts in this order while nothing else is to be loaded, if all fit."""
        self.ram.fill(keys)

    def fitting(self, keys: Iterable[ExpertKey]) -> list[ExpertKey]:
        """Return the first of these experts that there are slots for."""
        return list(islice(keys, self.slots))

    def load(self, key: ExpertKey, pinned: Collection[ExpertKey]) -> None:
        """Bring an expert into RAM, and evict none in `pinned`."""
        self.ram.load(key, pinned)

    def leave_to_gpus(self, keys: Set[ExpertKey]) -> None:
        """Note the experts that GPUs hold, which nobody has to bring into RAM."""
        self.on_gpus = keys
        self._note_elsewhere()

    def close(self) -> None:
        self.ram.close()
        for worker in self.workers:
            worker.close()

    def give_way(self, number: int | None = None) -> bool:
        return False

    def begin_turn(self) -> None:
        for worker in self.workers:
            worker.begin_turn()
        self._note_elsewhere()

    def resident(self, layers: Sequence[Sequence[ExpertKey]]) -> Sequence[LayerExperts]:
        self._memory = None  # a prompt's, which one token does not need
        return () if self.workers else self.ram.resident(layers)

    def note_hits(self, layer: int, selected: Sequence[Sequence[int]]) -> None:
        self.ram.note_hits(layer, selected)

    def run(
        self,
        layer: int,
        hidden_states: torch.Tensor,
        selected_experts: torch.Tensor,
        routing_weights: torch.Tensor,
        *,
        exact: bool = False,
    ) -> torch.Tensor:
        routing = selected_experts, routing_weights
        if not self.workers:
            combined = self._local.run_resident(layer, hidden_states, *routing, exact=exact)
            if combined is not None:
                return combined
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
        memory = self._memory
        self._memory = None
        rows = LayerRows(layer, hidden_states, selected_experts, exact=exact, memory=memory)
        local, sent = self._divide(rows)
        # The workers compute while this machine does, and its disk reads what comes next.
        for worker, keys in sent:
            worker.begin(rows, keys)
        self._local.begin(rows, local)
        self._look_ahead(rows)
        self._finish(rows)
        failed = [key for worker, _ in sent for key in worker.finish(rows)]
        self._stats.hits.update(key for _, keys in sent for key in keys if key not in failed)
        if failed:
            self._note_elsewhere()
            self._local.begin(rows, failed)
            self._finish(rows)
        return rows

    def _divide(
        self, rows: LayerRows
    ) -> tuple[list[ExpertKey], list[tuple[WorkerExperts, list[ExpertKey]]]]:
        """Return the experts that this machine computes, and those of each worker."""
        if not self.workers:
            return list(rows.counts), []
        holders: dict[ExpertKey, list[int]] = {}
        for key in rows.counts:
            workers = [n for n, worker in enumerate(self.workers, start=1) if key in worker.held]
            # A copy that is not in memory would have to be read first.
            is_copied = key in self._copies and self.ram.holds(key)
            holders[key] = [_LOCAL, *workers] if is_copied or not workers else workers
        shares = share(rows.counts, holders)
        local = shares.pop(_LOCAL, [])
        return local, [(self.workers[number - 1], keys) for number, keys in shares.items()]

    def _finish(self, rows: LayerRows) -> None:
        while self._local.compute_next(rows):
            pass

    def _look_ahead(self, rows: LayerRows) -> None:
        """Prefetch the copies of this layer's experts, then the predicted experts."""
        if self._next_routers is None or self.ram.holds_all:
            return
        # A prompt needs most experts of the next layer.
        is_prompt = not rows.is_one_token
        depth = 1 if is_prompt else self._layers_ahead
        predicted = self._next_routers(rows.layer, rows.hidden_states, depth)
        copies = [key for key in rows.counts if key in self._copies]
        keys = [*copies, *ranked_keys(rows.layer, predicted)]
        self._local.prefetch(keys, certain=is_prompt)

    def _note_elsewhere(self) -> None:
        held = frozenset(key for worker in self.workers for key in worker.held)
        self.on_workers: Set[ExpertKey] = held - self._copies
        self.ram.elsewhere = self.on_workers | self.on_gpus
