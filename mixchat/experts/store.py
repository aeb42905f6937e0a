"""Moves the bytes of experts from a source into slots, without a policy."""

from __future__ import annotations

from collections.abc import Callable, Collection
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cache, partial
from typing import Protocol

import torch

from mixchat.base import gpu
from mixchat.experts.cache import ExpertKey, ExpertStats
from mixchat.experts.memory import CPU
from mixchat.experts.mover import Steps
from mixchat.weights.format.expert import Expert, ExpertSpec

_ALIGNMENT = 4096  # bytes, for reads past the page cache
Layouts = Callable[[int], ExpertSpec]  # the form of a layer's experts


class ExpertSource(Protocol):
    """Brings every expert from the slower tiers, on demand."""

    def load(self, key: ExpertKey, block: torch.Tensor, evicted: ExpertKey | None) -> Steps:
        """Fill the beginning of `block` (uint8, on any device) with the expert's bytes.

        `evicted` is the expert that is in the block now, if any.
        """

    def tier(self, key: ExpertKey) -> str:
        """Return the tier of the expert: `host` or `disk`."""


class ExpertStore:
    """Slots: blocks of memory on `device`, each ready to compute the expert it holds.

    stored: returns a layer's layout at the source. used: the layout that this device computes. If
    they differ a block is reordered after its load, which takes a GPU a millisecond and a CPU a
    second. size: the bytes of a slot, by its number. A smaller expert leaves the end of a slot
    alone. name: the tier of slots on a GPU.
    """

    def __init__(
        self,
        source: ExpertSource,
        *,
        stored: Layouts,
        used: Layouts,
        size: Callable[[int], int],
        device: torch.device,
        stats: ExpertStats,
        name: str = "device",
    ) -> None:
        self.name = "host" if device == CPU else name
        self._source, self._stored, self._used, self._stats = source, stored, used, stats
        self._size, self._device = size, device
        self._streams = gpu.streams(device)
        self._side = self._streams.Stream(device)
        self._slots: dict[int, _Slot] = {}

    def stream(self) -> AbstractContextManager[object]:
        """Return the context in which loads overlap with computing."""
        inside: AbstractContextManager[object] = self._streams.stream(self._side)
        return inside

    def load(self, key: ExpertKey, slot: int) -> Steps:
        """Return the steps that load an expert into a slot, which the device may still read."""
        target, was_read = self._slot(slot), self._streams.Event()
        was_read.record(self._streams.current_stream(self._device))

        def steps() -> Steps:
            was_read.wait(self._side)
            evicted, target.holds = target.holds, None
            layout, new_memory = self._used(key.layer), target.block
            if new_memory is None:
                raise MemoryError  # the slot was freed before its load began
            block = new_memory()
            yield from self._source.load(key, block, evicted)
            self._stored(key.layer).convert(block, layout)
            target.take(layout, block)
            arrived = self._streams.Event()
            arrived.record(self._side)
            arrived.synchronize()
            target.holds = key
            self._stats.bytes_moved += layout.nbytes

        return steps()

    def expert(self, slot: int) -> Expert:
        """Return the expert in a slot, which reads the slot's bytes when it is called."""
        expert = self._slots[slot].expert
        assert expert is not None
        return expert

    def tier(self, key: ExpertKey, *, resident: bool) -> str:
        """Return the tier of the expert, at the source unless it is `resident`."""
        return self.name if resident else self._source.tier(key)

    def reserve(self, slots: int) -> None:
        """Take the memory of slots 0 .. slots-1. Raises torch's error if it runs out."""
        for slot in range(slots):
            self._slot(slot)

    @property
    def blocks(self) -> Collection[int]:
        """Return the slots that have memory, or get it as their load begins."""
        return self._slots.keys()

    @property
    def nbytes(self) -> int:
        """Return the bytes of memory that slots take. Untouched pages of a CPU take none."""
        if self._device != CPU:
            return sum(map(self._size, self._slots))
        return sum(slot.filled for slot in self._slots.values())

    def release(self, slot: int) -> None:
        """Free a slot's memory. A load on its way there has no effect."""
        released = self._slots.pop(slot, None)
        if released is not None:
            # Queued loads still have the slot, and would keep its memory.
            released.block = released.expert = None

    def _slot(self, number: int) -> _Slot:
        if number not in self._slots:
            block = cache(partial(new_block, self._size(number), self._device))
            if self._device != CPU:
                # Memory belongs to the stream that takes it, which is not to be the mover's.
                block()
            self._slots[number] = _Slot(block)
        return self._slots[number]


@dataclass
class _Slot:
    """A slot's memory and the expert in it.

    block: takes the memory when it is first called, None after the slot was freed. holds: the key
    that was completely loaded. filled: counts bytes that were touched.
    """

    block: Callable[[], torch.Tensor] | None
    layout: ExpertSpec | None = None
    expert: Expert | None = None
    holds: ExpertKey | None = None
    filled: int = 0

    def take(self, layout: ExpertSpec, block: torch.Tensor) -> None:
        """Let `expert` be of this layout."""
        # It stays the same object if it can: programs of kernels have its addresses.
        if self.layout != layout:
            self.layout, self.expert = layout, layout.build(block)
            self.filled = max(self.filled, layout.stride)


def new_block(size: int, device: torch.device) -> torch.Tensor:
    """Return `size` bytes from a page's start on. A CPU commits them as they are filled."""
    # Slots are also made in inference mode, and filled by a thread that is not in it.
    with torch.inference_mode(False):
        whole = torch.empty(size + _ALIGNMENT, dtype=torch.uint8, device=device)
        start = -whole.data_ptr() % _ALIGNMENT
        return whole[start : start + size]
