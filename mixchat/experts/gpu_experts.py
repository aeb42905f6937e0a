"""Computes experts on GPUs, and on the CPU those that GPUs do not hold.

T = tokens, D = hidden_size, K = num_experts_per_tok, n = rows of an expert.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence, Set
from itertools import accumulate

import numpy as np
import torch

from mixchat.base import gpu, interrupts
from mixchat.experts.cache import ExpertKey, ExpertStats
from mixchat.experts.dispatcher import Dispatcher
from mixchat.experts.holder import ExpertHolder, LayerExperts
from mixchat.experts.layer_rows import LayerRows
from mixchat.experts.vram import VramTier

# Seconds to copy an expert of a layer to a GPU, and to compute so many rows of it on the CPU.
CopySeconds = Callable[[int], float]
HostSeconds = Callable[[int, int], float]


class GpuExperts(ExpertHolder):
    """Experts in the memory of GPUs, in front of RAM, workers and the disk.

    Each GPU holds experts of its own layers. A token's experts that a GPU holds are computed there.
    The CPU computes the others meanwhile, because it reads them faster than the bus carries them. A
    prompt's experts with many rows are carried to the GPU.

    host: computes the others, and lends their blocks.
    """

    def __init__(
        self,
        host: Dispatcher,
        gpus: Sequence[VramTier],
        *,
        copy_seconds: CopySeconds,
        host_seconds: HostSeconds,
    ) -> None:
        self.host = host
        self.gpus = gpus
        self.ram = host.ram
        self.workers = host.workers
        others = {"other-device": gpus[1:]} if gpus[1:] else {}
        self.tiers = {"device": gpus[:1], **others, **host.tiers}
        self._copy_seconds = copy_seconds
        self._host_seconds = host_seconds
        self._by_layer = {layer: vram for vram in gpus for layer in vram.layers}
        self._hits, self._misses = (
            {vram: np.zeros(vram.table.shape, np.int64) for vram in gpus} for _ in range(2)
        )
        self._changes: list[int] = []  # of the experts on GPUs, when the host was told last

    @property
    def stats(self) -> ExpertStats:
        stats = self.host.stats
        stats.hits.clear()
        stats.misses.clear()
        for counts, counter in ((self._hits, stats.hits), (self._misses, stats.misses)):
            for vram, array in counts.items():
                for layer, expert in np.argwhere(array):
                    key = ExpertKey(vram.layers.start + int(layer), int(expert))
                    counter[key] = int(array[layer, expert])
        stats.bytes_moved = sum(vram.stats.bytes_read for vram in self.gpus)
        return stats

    def fitting(self, keys: Iterable[ExpertKey]) -> list[ExpertKey]:
        """Return the first of these experts that there are slots for."""
        on_gpus = self._fill_gpus()
        keys = list(keys)
        in_ram = self.host.fitting(key for key in keys if key not in on_gpus)
        held = {*on_gpus, *in_ram}
        return [key for key in keys if key in held]

    def load(self, key: ExpertKey, pinned: Collection[ExpertKey]) -> None:
        """Bring an expert to its GPU if it has a slot there, else into RAM."""
        vram = self._by_layer[key.layer]
        if key not in vram.keys:
            self.host.load(key, pinned)
        elif not vram.holds(key):
            vram.hurry(key)
            vram.ready(key)

    def fill(self, keys: Sequence[ExpertKey]) -> None:
        """Load experts in this order into RAM, if there is room for all that GPUs do not get."""
        self._fill_gpus()
        self.host.fill(keys)

    def begin_turn(self) -> None:
        self.host.begin_turn()
        for vram in self.gpus:
            vram.grow()
        self._leave_to_gpus()

    def give_way(self, number: int | None = None) -> bool:
        full = [vram for vram in self.gpus if number in (None, vram.device.index)]
        freed = [vram.give_way() for vram in full or self.gpus]
        self._leave_to_gpus()
        return any(freed)

    def close(self) -> None:
        for vram in self.gpus:
            vram.close()
        self.host.close()

    def resident(self, layers: Sequence[Sequence[ExpertKey]]) -> Sequence[LayerExperts]:
        return ()

    def note_hits(self, layer: int, selected: Sequence[Sequence[int]]) -> None:
        raise AssertionError("GPUs' decoders call `note_token`")

    def publish(self) -> None:
        """Let experts be used that have come to GPUs. Only between two tokens."""
        for vram in self.gpus:
            vram.publish()
        self._leave_to_gpus()

    def note_token(self, selected: np.ndarray) -> None:
        """Count the experts that a token's layers have used [layers, K]."""
        for vram in self.gpus:
            layers = np.arange(len(vram.layers))[:, None]
            own = selected[vram.layers.start : vram.layers.stop]
            is_hit = vram.note_token(own)
            self._hits[vram][layers, own] += is_hit
            self._misses[vram][layers, own] += ~is_hit

    def holds_all(self, device: torch.device) -> bool:
        """Return whether a GPU holds all experts of its layers."""
        return all(vram.holds_all for vram in self.gpus if vram.device == device)

    def table(self, layer: int) -> torch.Tensor:
        """Return the addresses of a layer's experts, int64 [E], on the GPU that computes it."""
        vram = self._by_layer[layer]
        return vram.table[layer - vram.layers.start]

    def row_on_host(
        self, layer: int, x: torch.Tensor, experts: Sequence[int], weights: torch.Tensor
    ) -> torch.Tensor:
        """Return what some experts add for a token, fp32 [D], computed by the CPU.

        x: [D], and weights: fp32 [k], in RAM.
        """
        rows = self.host.compute(layer, x[None], torch.tensor([experts]))
        return weights @ rows.outputs.float()

    def missing(self, layer: int, selected: Sequence[int]) -> list[int]:
        """Return which of a token's choices the GPU does not hold, by their index."""
        return self._by_layer[layer].missing(layer, selected)

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
        """Return the experts' outputs. The arguments are as in `run`."""
        vram = self._by_layer[layer]
        vram.publish()
        self._leave_to_gpus()
        (selected,) = gpu.read([selected_experts])
        rows = LayerRows(layer, hidden_states.to(vram.device), selected, exact=exact)
        self._count(vram, rows)
        held = [key for key in rows.counts if vram.holds(key)]
        arriving = [key for key in rows.counts if vram.hurry(key)]
        on_gpu = {*held, *arriving}
        missing = {key: count for key, count in rows.counts.items() if key not in on_gpu}
        on_host = self._for_host(layer, missing)
        carried = [key for key in missing if key not in on_host]
        with vram.invite(carried) as guests:
            # What the CPU and the bus need would wait for all that the GPU has been given before.
            x = rows.of(*on_host).cpu() if on_host else None
            for key in held:
                interrupts.check()
                rows.put(key, vram.expert(key)(rows.of(key)))
            if x is not None:
                self._compute_on_host(rows, on_host, x)
            for key in arriving:
                rows.put(key, vram.ready(key)(rows.of(key)))
            for key, expert in guests:
                interrupts.check()
                rows.put(key, expert(rows.of(key)))
        return rows

    def _count(self, vram: VramTier, rows: LayerRows) -> None:
        for key, count in rows.counts.items():
            vram.policy.note_rows(key, count / len(rows.hidden_states))
            counts = self._hits if vram.holds(key) else self._misses
            counts[vram][rows.layer - vram.layers.start, key.expert] += count

    def _for_host(self, layer: int, missing: Mapping[ExpertKey, int]) -> list[ExpertKey]:
        """Return the experts that the CPU computes, so that it and the bus end at one time.

        missing: the rows of each. Few rows come first, because a copy's time hangs on no rows.
        """
        # Workers' experts are not in RAM.
        others = [key for key in missing if key not in self.host.on_workers]
        by_rows = sorted(others, key=missing.__getitem__)
        copy = self._copy_seconds(layer)
        each = (self._host_seconds(layer, missing[key]) for key in by_rows)
        ends = accumulate(each, initial=0.0)
        spans = [max(on_host, (len(by_rows) - count) * copy) for count, on_host in enumerate(ends)]
        of_workers = [key for key in missing if key in self.host.on_workers]
        return of_workers + by_rows[: spans.index(min(spans))]

    def _compute_on_host(self, rows: LayerRows, keys: Sequence[ExpertKey], x: torch.Tensor) -> None:
        """Compute experts on the CPU for their rows x [n, D], one expert's after another's."""
        counts = [rows.counts[key] for key in keys]
        selected = torch.tensor([[key.expert for key in keys]])
        if not rows.is_one_token:
            selected = selected[0].repeat_interleave(torch.tensor(counts))[:, None]
        outputs = self.host.compute(rows.layer, x, selected, exact=rows.exact).outputs
        outputs = outputs.to(rows.hidden_states.device, non_blocking=True)
        for key, output in zip(keys, torch.split(outputs, counts), strict=True):
            rows.put(key, output)

    def _fill_gpus(self) -> Set[ExpertKey]:
        """Begin to load experts into all free slots. Return those that have slots."""
        for vram in self.gpus:
            vram.fill_slots()
        self._leave_to_gpus()
        return self.host.on_gpus

    def _leave_to_gpus(self) -> None:
        changes = [vram.changes for vram in self.gpus]
        if changes != self._changes:
            self._changes = changes
            self.host.leave_to_gpus(frozenset(key for vram in self.gpus for key in vram.keys))
