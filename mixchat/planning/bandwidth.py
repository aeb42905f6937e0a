"""Measures how fast a device reads memory, multiplies matrices, and gets bytes from RAM.

On a GPU nothing takes more than a sixteenth of what is free, since a loaded model may have taken
all but a gigabyte. Everything is done once before its time is taken.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median

import torch

from mixchat.base import gpu

_TRIES = 5
_FREE_PART = 16
_SUMMED_BYTES = 10**9  # of RAM, more than any CPU's cache
_FLOAT_BYTES = 4
_COPIED_BYTES = 2**28  # within a GPU, more than any GPU's cache
_LOCKED_BYTES = 2**26  # of RAM that is page-locked for the bus
_TOKENS, _COLUMNS, _ROWS = 2048, 4096, 4096  # of a matrix product


class MemoryMeter:
    """Measures the bytes a second of a device's memory. RAM is read, a GPU's memory copied."""

    def __init__(self, device: torch.device, most: int = _SUMMED_BYTES) -> None:
        self._device = device
        if gpu.is_gpu(device):
            size = room_on(device, _COPIED_BYTES)
            self._source = torch.ones(size, dtype=torch.uint8, device=device)
            self._target = torch.empty_like(self._source)
        else:
            self._source = torch.ones(most // _FLOAT_BYTES)

    def rate(self) -> float:
        """Return the best of a few tries."""
        # A try can only be slowed, by other programs, and never hastened.
        if gpu.is_gpu(self._device):
            seconds = seconds_of(lambda: self._target.copy_(self._source), self._device)
            return 2 * self._source.nbytes / min(seconds)  # reads and writes
        return self._source.nbytes / min(seconds_of(self._source.sum, self._device))


class ProductMeter:
    """Measures a GPU's operations a second of a matrix product, in bf16 or fp32 if it is faster."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        tokens, columns, rows = _TOKENS, _COLUMNS, _ROWS
        while 8 * columns * rows > room_on(device, 8 * _COLUMNS * _ROWS):
            tokens, columns, rows = tokens // 2, columns // 2, rows // 2
        self._operations = 2 * tokens * columns * rows
        self._products = [
            (
                torch.randn(tokens, columns).to(device, dtype),
                torch.randn(rows, columns).to(device, dtype),
            )
            for dtype in (torch.bfloat16, torch.float32)
        ]
        # GPUs without instructions for bf16 multiply it more slowly than fp32.
        self._fastest = min((0, 1), key=lambda product: min(self._seconds(product)))

    def rate(self) -> float:
        return self._operations / min(self._seconds(self._fastest))

    def _seconds(self, product: int) -> list[float]:
        x, weight = self._products[product]
        return seconds_of(lambda: torch.nn.functional.linear(x, weight), self._device, 2)


def bus_bandwidth(device: torch.device, most: int = _LOCKED_BYTES) -> float:
    """Return the bytes a second from page-locked RAM to a GPU, the median of a few tries.

    If the system refuses to lock RAM, experts are copied from other RAM, and so is this.
    """
    size = room_on(device, min(most, _LOCKED_BYTES))
    try:
        source = gpu.locked_block(size, device)
    except gpu.PageLockError:
        source = torch.ones(size, dtype=torch.uint8)
    target = torch.empty_like(source, device=device)
    return source.nbytes / median(seconds_of(lambda: target.copy_(source), device))


def room_on(device: torch.device, most: int) -> int:
    """Return the bytes that measuring may take on a GPU, at most `most` and at least 4096."""
    return max(min(gpu.free_memory(device) // _FREE_PART, most) // 4096, 1) * 4096


def seconds_of(run: Callable[[], object], device: torch.device, tries: int = _TRIES) -> list[float]:
    """Return the seconds of a few calls after the first one, each to its end on the device."""
    seconds = []
    for _ in range(1 + tries):
        gpu.synchronize(device)
        start = time.perf_counter()
        run()
        gpu.synchronize(device)
        seconds.append(time.perf_counter() - start)
    return seconds[1:]
