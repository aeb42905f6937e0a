"""Moves the bytes of experts from a source into slots, without a policy."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from functools import cache, partial
from typing import Protocol

import torch

from mixchat.experts.cache import ExpertKey, ExpertStats
from mixchat.experts.mover import Steps
from mixchat.weights.format.expert import Expert, ExpertSpec

_ALIGNMENT = 4096  # bytes, for reads past the page cache
Layouts = Callable[[int], ExpertSpec]  # the form of a layer's experts


class ExpertSource(Protocol):
    """Brings every expert from a slower tier, on demand."""

    def load(self, key: ExpertKey, block: torch.Tensor) -> Steps:
        """Fill the beginning of `block` (uint8) with the expert's bytes."""


class ExpertStore:
    """Slots: blocks of memory in RAM, each ready to compute the expert it holds.

    layouts: returns the form of a layer's experts. size: the bytes of a slot, by its number. A
    smaller expert leaves the end of a slot alone.
    """

    def __init__(
        self,
        source: ExpertSource,
        layouts: Layouts,
        size: Callable[[int], int],
        stats: ExpertStats,
    ) -> None:
        self._source, self._layouts, self._size, self._stats = source, layouts, size, stats
        self._slots: dict[int, _Slot] = {}

    def load(self, key: ExpertKey, slot: int) -> Steps:
        """Return the steps that load an expert into a slot."""
        target = self._slot(slot)

        def steps() -> Steps:
            layout, new_memory = self._layouts(key.layer), target.block
            if new_memory is None:
                raise MemoryError  # the slot was freed before its load began
            block = new_memory()
            yield from self._source.load(key, block)
            target.take(layout, block)
            self._stats.bytes_moved += layout.nbytes

        return steps()

    def expert(self, slot: int) -> Expert:
        """Return the expert in a slot, which reads the slot's bytes when it is called."""
        expert = self._slots[slot].expert
        assert expert is not None
        return expert

    def block(self, slot: int) -> torch.Tensor:
        """Return the bytes of a slot that an expert was loaded into."""
        block = self._slots[slot].block
        assert block is not None
        return block()

    @property
    def blocks(self) -> Collection[int]:
        """Return the slots that have memory, or get it as their load begins."""
        return self._slots.keys()

    @property
    def nbytes(self) -> int:
        """Return the bytes of memory that slots take. Untouched pages take none."""
        return sum(slot.filled for slot in self._slots.values())

    def release(self, slot: int) -> None:
        """Free a slot's memory. A load on its way there has no effect."""
        released = self._slots.pop(slot, None)
        if released is not None:
            # Queued loads still have the slot, and would keep its memory.
            released.block = released.expert = None

    def _slot(self, number: int) -> _Slot:
        if number not in self._slots:
            self._slots[number] = _Slot(cache(partial(new_block, self._size(number))))
        return self._slots[number]


@dataclass
class _Slot:
    """A slot's memory and the expert in it.

    block: takes the memory when it is first called, None after the slot was freed. filled: counts
    bytes that were touched.
    """

    block: Callable[[], torch.Tensor] | None
    layout: ExpertSpec | None = None
    expert: Expert | None = None
    filled: int = 0

    def take(self, layout: ExpertSpec, block: torch.Tensor) -> None:
        """Let `expert` be of this layout."""
        # It stays the same object if it can: programs of kernels have its addresses.
        if self.layout != layout:
            self.layout, self.expert = layout, layout.build(block)
            self.filled = max(self.filled, layout.stride)


def new_block(size: int) -> torch.Tensor:
    """Return `size` bytes from a page's start on. A CPU commits them as they are filled."""
    # Slots are also made in inference mode, and filled by a thread that is not in it.
    with torch.inference_mode(False):
        whole = torch.empty(size + _ALIGNMENT, dtype=torch.uint8)
        start = -whole.data_ptr() % _ALIGNMENT
        return whole[start : start + size]
