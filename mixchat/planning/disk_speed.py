"""Measures how fast a disk reads experts, while the cores compute and while they do not."""

from __future__ import annotations

import fcntl
import os
import random
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median

import torch

from mixchat import machine
from mixchat.safetensors import ALIGNMENT

_PIECE = 2**24  # bytes that are synced at once
_ROUNDS = 3


def measure_disk(
    directory: Path, block: int, size: int, work: Callable[[], None], seconds: float
) -> tuple[float, float] | None:
    """Return bytes a second while `work` is done and without it; None if they are not measurable.

    Both are of the faster way to read: through the page cache, or past it (O_DIRECT). It writes a
    file of up to `size` bytes and reads it in blocks of `block`, about `seconds` a figure.
    """
    if not hasattr(os, "posix_fadvise"):  # macOS: what was just written cannot be dropped
        return None
    try:
        # A tenth of what is free, so that nobody else runs out of disk.
        size = min(size, machine.free_disk(directory) // 10)
        if size < block:
            return None
        place = machine.nearest_existing(directory)
        with tempfile.TemporaryFile(dir=place, buffering=0) as file:
            started = time.perf_counter()
            written = _fill(file.fileno(), size, 4 * seconds)
            # A slow disk is read in pieces, each in about twice `seconds`.
            piece = int(written * 2 * seconds / (time.perf_counter() - started))
            block = max(min(block, piece) // ALIGNMENT * ALIGNMENT, ALIGNMENT)
            return _Disk(file.fileno(), block, written, seconds).measure(work)
    except OSError:
        return None


def _fill(fd: int, size: int, seconds: float) -> int:
    """Write up to `size` bytes to the disk, fewer where that takes longer; return how many."""
    piece = memoryview(os.urandom(min(size, _PIECE)))  # random: some disks compress
    written, started = 0, time.perf_counter()
    while written < size and (not written or time.perf_counter() - started < seconds):
        written += os.write(fd, piece[: size - written])
        os.fsync(fd)
    return written // ALIGNMENT * ALIGNMENT


class _Disk:
    """Reads blocks of a file that is not in the page cache, in each way in turn."""

    def __init__(self, fd: int, block: int, size: int, seconds: float) -> None:
        self._fd, self._block, self._seconds = fd, block, seconds
        self._starts = range(0, size - block + 1, block)
        self._random = random.Random(0)
        # Large pages, where the environment asks for them, and aligned, as the slots of experts.
        memory = torch.zeros(block + ALIGNMENT, dtype=torch.uint8)
        skipped = -memory.data_ptr() % ALIGNMENT
        # Filled, so that the system gives no page while time is taken.
        self._target = memory[skipped : skipped + block].fill_(1).numpy().data

    def measure(self, work: Callable[[], None]) -> tuple[float, float]:
        """Return bytes a second while `work` is done, and without."""
        ways = [False, True] if self._reads_direct() else [False]
        busy: dict[bool, list[float]] = {way: [] for way in ways}
        idle: dict[bool, list[float]] = {way: [] for way in ways}
        started = time.perf_counter()
        for _ in range(_ROUNDS):
            for way in ways:
                busy[way].append(self._rate_during(work, way))
                idle[way].append(self._rate(way))
            if time.perf_counter() - started > 6 * self._seconds:
                break
        direct = max(ways, key=lambda way: median(busy[way]))
        return median(busy[direct]), median(idle[direct])

    def _rate_during(self, work: Callable[[], None], direct: bool) -> float:
        # As in use: a thread reads, the main one computes.
        with ThreadPoolExecutor(1) as pool:
            rate = pool.submit(self._rate, direct)
            while not rate.done():
                work()
            return rate.result()

    def _rate(self, direct: bool) -> float:
        """Return bytes a second over all blocks, or as many as there is time for."""
        os.posix_fadvise(self._fd, 0, 0, os.POSIX_FADV_DONTNEED)
        self._set_direct(direct)
        done, started = 0, time.perf_counter()
        for start in self._random.sample(self._starts, len(self._starts)):
            self._read(start)
            done += self._block
            if time.perf_counter() - started > self._seconds:
                break
        return done / (time.perf_counter() - started)

    def _read(self, start: int) -> None:
        done = 0
        while done < self._block:
            count = os.preadv(self._fd, [self._target[done:]], start + done)
            if count == 0:
                raise OSError("the file ended early")
            done += count

    def _reads_direct(self) -> bool:
        try:
            self._set_direct(True)
            os.preadv(self._fd, [self._target[:ALIGNMENT]], 0)
        except OSError:  # not every file system can
            return False
        return True

    def _set_direct(self, direct: bool) -> None:
        flags = fcntl.fcntl(self._fd, fcntl.F_GETFL)
        flags = flags | os.O_DIRECT if direct else flags & ~os.O_DIRECT
        fcntl.fcntl(self._fd, fcntl.F_SETFL, flags)
