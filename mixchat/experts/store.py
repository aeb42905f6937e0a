"""Slots of RAM for experts, and the pieces in which their bytes are read. No policy."""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection
from functools import partial

import torch

from mixchat.experts.cache import ExpertKey, ExpertStats
from mixchat.experts.load_queue import ExpertLoad, Job
from mixchat.weights.format.expert import Expert, ExpertSpec

READS = 8  # in flight
# Bytes of a read, which takes 1 to 4 ms. A more urgent load waits for reads in flight.
PIECE = 4 << 20
_ALIGNMENT = 4096  # bytes, for reads past the page cache
Layouts = Callable[[int], ExpertSpec]  # the form of a layer's experts
ReadExpert = Callable[[ExpertKey, torch.Tensor, int], None]  # fills a tensor from a byte on


class ExpertStore:
    """Slots: blocks of memory in RAM, each ready to compute the expert it holds.

    read: reads a part of an expert from its file. layouts: returns the form of a layer's experts.
    size: the bytes of a slot, by its number. A smaller expert leaves the end of a slot alone.
    """

    def __init__(
        self, read: ReadExpert, layouts: Layouts, size: Callable[[int], int], stats: ExpertStats
    ) -> None:
        self._read = read
        self._layouts = layouts
        self._size = size
        self._stats = stats
        self._slots: dict[int, _Slot] = {}
        self._lock = threading.Lock()  # of the memory of slots, and of the count

    def job(self, load: ExpertLoad, slot: int) -> Job:
        """Return the work of loading an expert into a slot."""
        key = load.key
        target = self._slot(slot)
        layout = self._layouts(key.layer)

        def read(start: int) -> int:
            # Not as the load begins, under the queue's lock. The system gives no new memory while
            # it finds pages for the reads in flight.
            view = target.memory()[start : min(start + PIECE, layout.stride)]
            if not target.filled:
                touch(view)
            self._read(key, view, start)
            return len(view)

        def finish() -> None:
            target.take(layout)
            with self._lock:
                self._stats.bytes_moved += layout.nbytes

        starts = range(0, layout.stride, PIECE)
        return Job(target, lambda: [partial(read, start) for start in starts], finish)

    def expert(self, slot: int) -> Expert:
        """Return the expert in a slot, which reads the slot's bytes when it is called."""
        expert = self._slots[slot].expert
        assert expert is not None
        return expert

    def block(self, slot: int) -> torch.Tensor:
        """Return the bytes of a slot that an expert was loaded into."""
        return self._slots[slot].memory()

    @property
    def blocks(self) -> Collection[int]:
        """Return the slots that have memory, or get it as their load begins."""
        return self._slots.keys()

    @property
    def nbytes(self) -> int:
        """Return the bytes of memory that slots take. Untouched pages take none."""
        return sum(slot.filled for slot in self._slots.values())

    def release(self, slot: int) -> None:
        """Free a slot's memory. A load that waits for its turn fails."""
        released = self._slots.pop(slot, None)
        if released is not None:
            released.free()

    def _slot(self, number: int) -> _Slot:
        if number not in self._slots:
            self._slots[number] = _Slot(self._size(number), self._lock)
        return self._slots[number]


class _Slot:
    """A slot's memory, and the expert in it. `filled` counts bytes that were touched."""

    def __init__(self, size: int, lock: threading.Lock) -> None:
        self._size = size
        self._lock = lock
        self._block: torch.Tensor | None = None
        self._layout: ExpertSpec | None = None
        self.expert: Expert | None = None
        self.filled = 0
        self._is_freed = False

    def memory(self) -> torch.Tensor:
        """Return the block. Raises `MemoryError` if the slot was freed."""
        with self._lock:
            if self._is_freed:
                raise MemoryError
            if self._block is None:
                self._block = new_block(self._size)
            return self._block

    def take(self, layout: ExpertSpec) -> None:
        """Let `expert` be of this layout."""
        # It stays the same object if it can: programs of kernels have its addresses.
        if self._layout != layout:
            self._layout, self.expert = layout, layout.build(self.memory())
            self.filled = max(self.filled, layout.stride)

    def free(self) -> None:
        # Queued loads still have the slot, and would keep its memory.
        with self._lock:
            self._is_freed = True
            self._block = None
            self.expert = None


def touch(fresh: torch.Tensor) -> None:
    """Have the system give the pages of new memory before a read asks for them.

    A read past the page cache keeps others from getting memory while it finds pages that were never
    touched. A cold start of 8 GB took a tenth less time.
    """
    fresh.numpy()[::_ALIGNMENT] = 0


def new_block(size: int) -> torch.Tensor:
    """Return `size` bytes from a page's start on. A CPU commits them as they are filled."""
    # Slots are also made in inference mode, and filled by a thread that is not in it.
    with torch.inference_mode(False):
        whole = torch.empty(size + _ALIGNMENT, dtype=torch.uint8)
        start = -whole.data_ptr() % _ALIGNMENT
        return whole[start : start + size]
