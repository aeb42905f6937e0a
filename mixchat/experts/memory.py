"""Asks how much memory is free, and limits experts by it."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

from mixchat.base import gpu, machine
from mixchat.base.errors import ResourceError
from mixchat.base.progress import Note

if TYPE_CHECKING:
    from mixchat.experts.holder import ExpertHolder

CPU = torch.device("cpu")
INTERVAL = 0.5  # seconds between two measurements
_FILL_INTERVAL = 0.05  # the same while experts come that nobody needs yet


def free_on(device: torch.device) -> int:
    """Return the bytes that can be taken on the device without evicting anything."""
    return gpu.free_memory(device) if gpu.is_gpu(device) else machine.free_memory()


class MemoryWatch:
    """Limits how many experts are held while the free memory, in bytes, changes.

    When less than half of `reserve` is free, the limit falls until all of it would be free. It
    rises when there is room for two more. While fewer are held, the free room sets it.
    """

    def __init__(
        self, free: Callable[[], int], *, reserve: int, expert: int, slots: int, least: int
    ) -> None:
        self._free = free
        self._reserve = reserve
        self._expert = expert
        self._slots = slots
        self._least = least
        self._limit = slots
        self._measured = self._asked = -INTERVAL
        self._is_ample = True

    def limit(self, held: int) -> int:
        """Return how many experts may be held, if `held` are. Measure twice a second at most."""
        now = time.monotonic()
        if now - self._measured < INTERVAL:
            return self._limit
        self._measured = now
        free = self._free()
        room = (free - self._reserve) // self._expert
        target = held + (room if free < self._reserve // 2 else max(room, 0))
        if not self._limit <= target <= self._limit + 1:
            self._limit = min(max(target, self._least), self._slots)
        return self._limit

    def is_ample(self) -> bool:
        """Return whether no other program needs the memory. Only the queue asks, under its lock."""
        now = time.monotonic()
        if now - self._asked >= _FILL_INTERVAL:
            self._asked, self._is_ample = now, self._free() >= self._reserve // 2
        return self._is_ample


def within_memory(
    holder: ExpertHolder, compute: Callable[[], torch.Tensor], note: Note
) -> torch.Tensor:
    """Call `compute`, again with fewer experts if a GPU's memory runs out.

    Raises `ResourceError` if it holds none.
    """
    while True:
        try:
            return compute()
        except torch.OutOfMemoryError as error:
            number = gpu.number_in(error)
            name = "the GPU" if number is None else f"GPU {number}"
            if not holder.give_way(number):
                raise ResourceError(
                    f"{name} ran out of memory, without any expert in it",
                    hint="A smaller --ctx-size needs less; --device cpu takes the RAM instead.",
                ) from None
            note(f"{name} ran out of memory: it holds fewer experts now")
