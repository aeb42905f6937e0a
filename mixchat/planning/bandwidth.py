"""Measures how fast a device reads memory, multiplies matrices, and copies from RAM.

On a GPU no measurement takes more than a sixteenth of the free memory, since a loaded model may
have left only a gigabyte. Each task runs once before it is timed.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
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


def memory_rate(device: torch.device, most: int = _SUMMED_BYTES) -> float:
    """Return the bytes a second of a device's memory. RAM is read, a GPU's memory copied."""
    # The fastest try counts, because other programs can only slow a try.
    if gpu.is_gpu(device):
        source = torch.ones(room_on(device, _COPIED_BYTES), dtype=torch.uint8, device=device)
        target = torch.empty_like(source)
        seconds = seconds_of(lambda: target.copy_(source), device)
        return 2 * source.nbytes / min(seconds)  # reads and writes
    numbers = torch.ones(most // _FLOAT_BYTES)
    return numbers.nbytes / min(seconds_of(numbers.sum, device))


def product_rate(device: torch.device) -> float:
    """Return a GPU's operations a second of a matrix product, in bf16, or fp32 if that is faster.

    GPUs without instructions for bf16 multiply it more slowly than fp32.
    """
    tokens = _TOKENS
    columns = _COLUMNS
    rows = _ROWS
    while 8 * columns * rows > room_on(device, 8 * _COLUMNS * _ROWS):
        tokens = tokens // 2
        columns = columns // 2
        rows = rows // 2
    seconds: list[float] = []
    for dtype in (torch.bfloat16, torch.float32):
        x = torch.randn(tokens, columns).to(device, dtype)
        weight = torch.randn(rows, columns).to(device, dtype)
        seconds += seconds_of(partial(torch.nn.functional.linear, x, weight), device, 2)
    return 2 * tokens * columns * rows / min(seconds)


def bus_bandwidth(device: torch.device) -> float:
    """Return the bytes a second from page-locked RAM to a GPU, the median of a few tries.

    If the system refuses to lock RAM, experts are copied from ordinary RAM. Then so is the measured
    block.
    """
    size = room_on(device, _LOCKED_BYTES)
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
