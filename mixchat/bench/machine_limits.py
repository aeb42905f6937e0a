"""Measures the most that this machine can do: limits to put a model's speed beside."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from mixchat.base import gpu
from mixchat.planning.disk_speed import measure_disk

_READ = 250_000_000  # floats that are summed: more than any cache of a CPU holds
_SHAPE = (2048, 4096, 4096)  # tokens, columns, rows of the matrix product
_TRIES = 5


@dataclass(frozen=True)
class Limits:
    """The limits of the device that computes.

    memory: bytes a second in reading; gemm: floating-point operations a second of a matrix product,
    in bf16, or fp32 where that is faster.
    """

    memory: float
    gemm: float


class LimitsMeter:
    """Measures the limits again and again, because they change with what else the machine does."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._data = torch.ones(_READ, device=device)
        tokens, columns, rows = _SHAPE
        self._products = [
            (
                torch.randn(tokens, columns).to(device, kind),
                torch.randn(rows, columns).to(device, kind),
            )
            for kind in (torch.bfloat16, torch.float32)
        ]
        self._kind = min((0, 1), key=self._product_seconds)

    def measure(self) -> Limits:
        """Return the best of a few tries of each."""
        memory = min(self._seconds(lambda: self._data.sum()) for _ in range(_TRIES))
        product = min(self._product_seconds(self._kind) for _ in range(2))
        return Limits(self._data.nbytes / memory, 2 * _volume() / product)

    def _product_seconds(self, kind: int) -> float:
        x, weight = self._products[kind]
        return self._seconds(lambda: torch.nn.functional.linear(x, weight))

    def _seconds(self, run: Callable[[], object]) -> float:
        start = time.perf_counter()
        run()
        gpu.synchronize(self._device)
        return time.perf_counter() - start


def _volume() -> int:
    tokens, columns, rows = _SHAPE
    return tokens * columns * rows


def disk_bandwidth(directory: Path, block: int) -> float | None:
    """Return bytes a second in reading blocks as experts are read; None if not measurable."""
    found = measure_disk(directory, block, max(4 * block, 512_000_000), lambda: None, 0.25)
    return None if found is None else found.idle


def copy_bandwidth(device: torch.device, size: int) -> float | None:
    """Return bytes a second from page-locked RAM to a GPU; None for another device."""
    if not gpu.is_gpu(device):
        return None
    source = torch.ones(size, dtype=torch.uint8)
    gpu.page_lock(source, device)
    target = torch.empty_like(source, device=device)
    seconds = []
    for _ in range(_TRIES):
        gpu.synchronize(device)
        start = time.perf_counter()
        target.copy_(source)
        gpu.synchronize(device)
        seconds.append(time.perf_counter() - start)
    return size / min(seconds)
