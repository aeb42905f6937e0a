"""The bytes that torch's caching allocator takes from a GPU, for tensors of these sizes.

After `c10/cuda/CUDACachingAllocator.cpp` with its default settings. It takes segments: 2 MB for
tensors of up to 1 MB, 20 MB for those below 10 MB, else the tensor's size, rounded up to 2 MB. The
rest of a segment is for further tensors, and so is a tensor's memory once it is freed. Only whole
free segments go back to the GPU. So eight tensors of 2.4 MB take 20 MB, and 14 MB take 14 MB.
"""

from __future__ import annotations

import threading
from collections import deque
from dataclasses import dataclass, field

MB = 2**20
_GRAIN = 512
_SMALL, _LARGE = MB, 10 * MB  # tensors
_SMALL_SEGMENT, _SEGMENT, _ROUNDED = 2 * MB, 20 * MB, 2 * MB


@dataclass
class _Segment:
    """Memory in one piece. blocks: their bytes, and whether each is free, in their order."""

    size: int
    is_small: bool
    blocks: list[Block] = field(default_factory=list)


@dataclass(eq=False)
class Block:
    segment: _Segment
    size: int
    is_free: bool = True


class Allocator:
    """`reserved`: the bytes taken from the GPU, also for memory that no tensor has now."""

    def __init__(self) -> None:
        self._segments: list[_Segment] = []
        self._freed = deque[Block]()  # by finalizers, which run at any time
        self._lock = threading.Lock()

    @property
    def reserved(self) -> int:
        return sum(segment.size for segment in self._segments)

    def take(self, size: int, total: int) -> Block | None:
        """Return a block for a tensor, None if a GPU of `total` bytes has no room for it."""
        size = -(-size // _GRAIN) * _GRAIN
        is_small = size <= _SMALL
        with self._lock:
            self._join_freed()
            block = self._free_block(size, is_small) or self._new_block(size, is_small, total)
            if block is None:
                return None
            rest = block.size - size
            if rest >= (_GRAIN if is_small else _SMALL + 1):
                block.size = size
                blocks = block.segment.blocks
                blocks.insert(blocks.index(block) + 1, Block(block.segment, rest))
            block.is_free = False
            return block

    def free(self, block: Block) -> None:
        self._freed.append(block)

    def empty(self) -> None:
        """Give whole free segments back, as `torch.cuda.empty_cache` does."""
        with self._lock:
            self._empty()

    def _empty(self) -> None:
        self._join_freed()
        self._segments = [
            segment
            for segment in self._segments
            if len(segment.blocks) > 1 or not segment.blocks[0].is_free
        ]

    def _join_freed(self) -> None:
        """Make one block of free ones side by side."""
        while self._freed:
            block = self._freed.popleft()
            block.is_free = True
            joined: list[Block] = []
            for each in block.segment.blocks:
                if joined and joined[-1].is_free and each.is_free:
                    joined[-1].size += each.size
                else:
                    joined.append(each)
            block.segment.blocks = joined

    def _free_block(self, size: int, is_small: bool) -> Block | None:
        segments = [segment for segment in self._segments if segment.is_small == is_small]
        free = (
            block
            for segment in segments
            for block in segment.blocks
            if block.is_free and block.size >= size
        )
        return min(free, key=lambda block: block.size, default=None)

    def _new_block(self, size: int, is_small: bool, total: int) -> Block | None:
        whole = _SMALL_SEGMENT if is_small else _SEGMENT
        if size >= _LARGE:
            whole = -(-size // _ROUNDED) * _ROUNDED
        if self.reserved + whole > total:
            self._empty()  # as torch does before it gives up
        if self.reserved + whole > total:
            return None
        segment = _Segment(whole, is_small)
        segment.blocks.append(Block(segment, whole))
        self._segments.append(segment)
        return segment.blocks[0]
