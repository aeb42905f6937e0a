"""Blocks of RAM for experts, in large pages where the system has them.

A block of its own begins and ends within a large page. A sixth of the bytes of Qwen3's experts,
which have 2.5 MB, was in large pages. Side by side all of them are.
"""

from __future__ import annotations

import mmap
import threading
import weakref
from collections import defaultdict

import torch

from mixchat.base import system

BLOCK_ALIGNMENT = 4096  # bytes, for reads past the page cache
_LARGE_PAGE = 2 << 20  # bytes
_REGION = 64 << 20  # bytes of addresses; only blocks that are in use have memory


class _Regions:
    """Hands out blocks side by side, and a block that was dropped again to one of its size."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._pages = mmap.mmap(-1, mmap.PAGESIZE)
        self._start = len(self._pages)  # the first byte that was never handed out
        # A list's methods need no lock, which a finalizer cannot take.
        self._dropped = defaultdict[int, list[tuple[mmap.mmap, int]]](list)

    def block(self, size: int) -> torch.Tensor:
        length = -(-size // BLOCK_ALIGNMENT) * BLOCK_ALIGNMENT
        dropped = self._dropped[length]
        with self._lock:
            pages, start = dropped.pop() if dropped else self._new(length)
        # A block may be made in inference mode, and filled by a thread that is not in it.
        with torch.inference_mode(False):
            block = torch.frombuffer(pages, dtype=torch.uint8, count=size, offset=start)
        storage = block.untyped_storage()
        weakref.finalize(storage, self._drop, pages, start, length).atexit = False
        return block

    def _new(self, length: int) -> tuple[mmap.mmap, int]:
        if self._start + length > len(self._pages):
            size = -(-max(length, _REGION) // _LARGE_PAGE) * _LARGE_PAGE
            flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
            self._pages = mmap.mmap(-1, size + _LARGE_PAGE, flags=flags)
            address = torch.frombuffer(self._pages, dtype=torch.uint8).data_ptr()
            self._start = -address % _LARGE_PAGE
            system.ask_for_large_pages(self._pages)
        self._start += length
        return self._pages, self._start - length

    def _drop(self, pages: mmap.mmap, start: int, length: int) -> None:
        system.give_back(pages, start, length)
        self._dropped[length].append((pages, start))


_regions = _Regions()


def new_block(size: int) -> torch.Tensor:
    """Return `size` bytes from a page's start on. Each page is committed as it is touched.

    The memory goes back to the system as the last view of the block is dropped. Raises `OSError`.
    """
    if not system.has_large_pages():
        with torch.inference_mode(False):
            return torch.frombuffer(mmap.mmap(-1, size), dtype=torch.uint8)
    return _regions.block(size)
