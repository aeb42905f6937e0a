"""Measures how fast a disk reads experts, while the cores compute and while they do not."""

from __future__ import annotations

import math
import os
import random
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from itertools import cycle, islice
from pathlib import Path
from typing import NamedTuple

import numpy as np

from mixchat.base import machine, system
from mixchat.base.files import read_all
from mixchat.base.safetensors import ALIGNMENT
from mixchat.experts.store import PIECE, READS

_SYNC_BYTES = 2**24  # that are written between two syncs
_ROUNDS = 3
_SHORT = 0.1  # part of a round; if reads take less time, more blocks are read together
_EXPERTS = "experts-*.safetensors"
# The least blocks of a model, because fewer would be read out of some cache. The host of a virtual
# machine read cached blocks at 3.6 GB/s, and others at 1.0 to 1.9.
_MIN_BLOCKS = 32

Places = list[tuple[int, int]]  # a file's descriptor, and the offset


class DiskRates(NamedTuple):
    """Bytes a second."""

    busy: float  # while the cores compute
    idle: float  # while they do not


def measure_disk(
    directory: Path,
    block: int,
    size: int,
    work: Callable[[], None],
    seconds: float,
    until: float = math.inf,
) -> DiskRates | None:
    """Return bytes a second, idle and while `work` runs, or None if they cannot be measured.

    Blocks of `block` bytes are read past the page cache if possible, for about `seconds` a round.
    They belong to the model in `directory`, or else to a file of up to `size` bytes that is written
    there. A virtual machine's host returns new bytes several times as fast. The measurement ends at
    `until`, by `time.perf_counter`, after at least one round of each rate.
    """
    try:
        with ExitStack() as stack:
            places = stack.enter_context(_installed(directory, block))
            if len(places) < _MIN_BLOCKS:
                written = _written(directory, block, size, seconds, until)
                block, places = stack.enter_context(written)
            readers = stack.enter_context(ThreadPoolExecutor(READS))
            return _Disk(places, block, readers).measure(work, seconds, until) if places else None
    except OSError:
        return None


@contextmanager
def _installed(directory: Path, block: int) -> Iterator[Places]:
    with ExitStack() as stack:
        files = [
            stack.enter_context(path.open("rb", buffering=0))
            for path in sorted(directory.glob(_EXPERTS))
        ]
        yield [
            (file.fileno(), start)
            for file in files
            for start in _starts(os.fstat(file.fileno()).st_size, block)
        ]


@contextmanager
def _written(
    directory: Path, block: int, size: int, seconds: float, until: float
) -> Iterator[tuple[int, Places]]:
    """Yield the size of the new file's blocks, and the blocks. Without free disk there are none."""
    # The file takes a tenth of the free disk, so that no other program runs out of disk.
    size = min(size, machine.free_disk(directory) // 10)
    if size < block:
        yield block, []
        return
    existing = machine.nearest_existing(directory)
    with tempfile.TemporaryFile(dir=existing, buffering=0) as file:
        system.set_direct(file.fileno(), not system.drops_pages())
        # The bytes are random, because some disks compress.
        data = memoryview(os.urandom(min(size, _SYNC_BYTES)))
        written = 0
        latest = min(time.perf_counter() + 4 * seconds, until)
        while written < size and (not written or time.perf_counter() < latest):
            written += os.write(file.fileno(), data[: size - written])
            os.fsync(file.fileno())
        block = max(min(block, written) // ALIGNMENT * ALIGNMENT, ALIGNMENT)
        yield block, [(file.fileno(), start) for start in _starts(written, block)]


def _starts(size: int, block: int) -> range:
    return range(0, size - block + 1, block // ALIGNMENT * ALIGNMENT)


def _rate(rounds: Sequence[tuple[int, float]]) -> float:
    """Return bytes a second of rounds of (bytes, seconds)."""
    return sum(size for size, _ in rounds) / sum(seconds for _, seconds in rounds)


class _Disk:
    """Reads blocks that are not in the page cache."""

    def __init__(self, places: Places, block: int, readers: ThreadPoolExecutor) -> None:
        self._block = block
        self._readers = readers
        # No block is read again before all others were read.
        self._places = cycle(random.sample(places, len(places)))
        # Small experts are read together, as by the queue of loads, but not on a slow disk.
        self._together = 1
        self._most_together = min(-(-2 * READS * PIECE // block), len(places))
        # The memory is filled before, so that the system hands out no page while reads are timed.
        # Numpy asks for large pages. Reads into small pages had 1.1 GB/s, and reads into large ones
        # 2.1 to 2.8.
        filled = np.ones(self._most_together * block + ALIGNMENT, np.uint8)
        self._target = filled[-filled.ctypes.data % ALIGNMENT :].data
        fds = {fd for fd, _ in places}
        try:
            for fd in fds:
                system.set_direct(fd, True)
            os.preadv(min(fds), [self._target[:ALIGNMENT]], 0)
        except OSError:  # not every file system can
            if not system.drops_pages():
                raise
            for fd in fds:
                system.set_direct(fd, False)

    def measure(self, work: Callable[[], None], seconds: float, until: float) -> DiskRates:
        busy = []
        idle = []
        for _ in range(_ROUNDS):
            with ThreadPoolExecutor(1) as pool:
                reading = pool.submit(self._round, seconds, until)
                while not reading.done():  # the main thread computes, as it does for a chat
                    work()
                busy.append(reading.result())
            idle.append(self._round(seconds, until))
            if time.perf_counter() >= until:
                break
        return DiskRates(_rate(busy), _rate(idle))

    def _round(self, seconds: float, until: float) -> tuple[int, float]:
        """Read for so many seconds. Return bytes and seconds."""
        size = 0
        total = 0.0
        while not size or (total < seconds and time.perf_counter() < until):
            taken = self._read(list(islice(self._places, self._together)))
            if taken < _SHORT * seconds and self._together < self._most_together:
                self._together = min(2 * self._together, self._most_together)
                continue
            total += taken
            size += self._together * self._block
        return size, total

    def _read(self, places: Places) -> float:
        """Read blocks in pieces, as experts are read. Return the seconds."""
        for fd, start in places:
            system.advise(fd, start, self._block, needed=False)
        started = time.perf_counter()
        pieces = [
            self._readers.submit(
                read_all,
                fd,
                start + at,
                self._target[number * self._block :][at : min(at + PIECE, self._block)],
            )
            for number, (fd, start) in enumerate(places)
            for at in range(0, self._block, PIECE)
        ]
        if sum(piece.result() for piece in pieces) < len(places) * self._block:
            raise OSError("the file ended early")
        return time.perf_counter() - started
