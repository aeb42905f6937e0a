"""Measures how fast a disk reads experts, while the cores compute and while they do not."""

from __future__ import annotations

import math
import os
import random
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import ExitStack, contextmanager
from itertools import cycle, islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from mixchat.base import machine, system
from mixchat.base.files import read_all
from mixchat.base.safetensors import ALIGNMENT
from mixchat.experts.store import PIECE, READS, new_block, touch

_SYNC_BYTES = 2**24  # that are written between two syncs
_ROUNDS = 3
_FRESH = 6  # times as long as for another figure
_SHORT = 0.1  # of a figure's time, below which more blocks are read together
_EXPERTS = "experts-*.safetensors"
# Of a model, because fewer would be read out of some cache. A virtual machine's host gave what it
# had cached at 3.6 GB/s, and what was never read at 1.0 to 1.9.
_MIN_BLOCKS = 32

Places = list[tuple[int, int]]  # a file's descriptor, and the offset


class DiskRates(NamedTuple):
    """Bytes a second.

    In a cold start the system clears fresh memory, which took up to eight times as long as reading.
    """

    busy: float  # while the cores compute
    idle: float  # while they do not
    fresh: float  # as idle, into memory that was not used before


def measure_disk(
    directory: Path,
    block: int,
    size: int,
    work: Callable[[], None],
    seconds: float,
    until: float = math.inf,
) -> DiskRates | None:
    """Return bytes a second, busy with `work` done meanwhile, or None if they are not measurable.

    They are of the faster way to read, through the page cache or past it (O_DIRECT). Blocks of
    `block` bytes are read for about `seconds` a figure, of the model in `directory`, or else of a
    file of up to `size` bytes that is written there. A host gives what was just written several
    times as fast. It ends at `until`, by `time.perf_counter`, if at least one block was read for
    each figure.
    """
    try:
        with ExitStack() as stack:
            places = stack.enter_context(_installed(directory, block))
            if len(places) < _MIN_BLOCKS:
                block, places = stack.enter_context(
                    _written(directory, block, size, seconds, until)
                )
            readers = stack.enter_context(ThreadPoolExecutor(READS))
            return _Disk(places, block, seconds, until, readers).measure(work) if places else None
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
    """Yield the size of the blocks of a new file, and the blocks, if any fit."""
    # A tenth, so that no other program runs out of disk.
    size = min(size, machine.free_disk(directory) // 10)
    if size < block:
        yield block, []
        return
    existing = machine.nearest_existing(directory)
    with tempfile.TemporaryFile(dir=existing, buffering=0) as file:
        started = time.perf_counter()
        system.set_direct(file.fileno(), not system.drops_pages())
        # Random, because some disks compress.
        data, written = memoryview(os.urandom(min(size, _SYNC_BYTES))), 0
        latest = min(started + 4 * seconds, until)
        while written < size and (not written or time.perf_counter() < latest):
            written += os.write(file.fileno(), data[: size - written])
            os.fsync(file.fileno())
        written = written // ALIGNMENT * ALIGNMENT
        # A slow disk is read in pieces, each in about twice `seconds`.
        piece = int(written * 2 * seconds / (time.perf_counter() - started))
        block = max(min(block, piece) // ALIGNMENT * ALIGNMENT, ALIGNMENT)
        yield block, [(file.fileno(), start) for start in _starts(written, block)]


def _starts(size: int, block: int) -> range:
    return range(0, size - block + 1, block // ALIGNMENT * ALIGNMENT)


class _Round(NamedTuple):
    size: int  # bytes
    seconds: float


def _rate(rounds: Sequence[_Round]) -> float:
    """Return bytes a second. While the disk is fast, a round reads more of them."""
    return sum(each.size for each in rounds) / sum(each.seconds for each in rounds)


def _read_piece(fd: int, start: int, target: torch.Tensor, is_fresh: bool) -> int:
    if is_fresh:  # as experts are read into new slots
        touch(target)
    return read_all(fd, start, target.numpy().data)


class _Disk:
    """Reads blocks that are not in the page cache."""

    def __init__(
        self,
        places: Places,
        block: int,
        seconds: float,
        until: float,
        readers: ThreadPoolExecutor,
    ) -> None:
        self._readers, self._until = readers, until
        self._block, self._seconds, self._count = block, seconds, len(places)
        # None again before all were read.
        self._places = cycle(random.sample(places, len(places)))
        self._fds = {fd for fd, _ in places}
        # Small experts are read together, as the queue of loads does, but not on a slow disk.
        self._together, self._most_together = 1, min(-(-2 * READS * PIECE // block), len(places))
        # Filled, so that no page is given while time is taken. Numpy asks for large pages. The
        # small ones that a process gets first are scattered. Reads into these had 1.1 GB/s, where
        # later ones, as slots have, and large ones had 2.1 to 2.8.
        filled = np.ones(self._most_together * block + 2 * ALIGNMENT, np.uint8)
        start = -filled.ctypes.data % ALIGNMENT
        self._target = torch.from_numpy(filled[start:])

    @property
    def _is_over(self) -> bool:
        return time.perf_counter() >= self._until

    def measure(self, work: Callable[[], None]) -> DiskRates:
        busy: dict[bool, list[_Round]] = {}
        idle: dict[bool, list[_Round]] = {}
        ways = self._ways()
        until = time.perf_counter() + 6 * self._seconds
        for number in range(_ROUNDS * len(ways)):
            way = ways[number % len(ways)]
            with ThreadPoolExecutor(1) as pool:
                reading = pool.submit(self._round, way)
                while not reading.done():  # as in use, the main thread computes
                    work()
                busy.setdefault(way, []).append(reading.result())
            idle.setdefault(way, []).append(self._round(way))
            has_tried_all = (number + 1) % len(ways) == 0
            if self._is_over or (has_tried_all and time.perf_counter() > until):
                break
        direct = max(busy, key=lambda way: _rate(busy[way]))
        return DiskRates(_rate(busy[direct]), _rate(idle[direct]), _rate([self._fresh(direct)]))

    def _fresh(self, direct: bool) -> _Round:
        """Read into fresh memory. The first may be what was just given back."""
        most = machine.free_memory() // 8  # as much may go into the page cache
        taken: list[torch.Tensor] = []  # kept, so that the next memory is fresh, too

        def fresh() -> torch.Tensor:
            taken.append(new_block(self._together * self._block))
            return taken[-1]

        return self._round(direct, fresh, _FRESH * self._seconds, most)

    def _round(
        self,
        direct: bool,
        memory: Callable[[], torch.Tensor] | None = None,
        seconds: float | None = None,
        most: float = math.inf,
    ) -> _Round:
        self._set_direct(direct)
        seconds = seconds or self._seconds
        done, spent, unread = 0, 0.0, self._count
        while True:
            count = min(self._together, unread)
            target = self._target if memory is None else memory()
            took = self._read([*islice(self._places, count)], target, is_fresh=memory is not None)
            unread -= count
            done += count * self._block
            spent += took
            if spent > seconds or done > most or self._is_over or not unread:
                return _Round(done, spent)
            if took < _SHORT * seconds and count < self._most_together:
                self._together = min(2 * count, self._most_together)
                done, spent = 0, 0.0

    def _read(self, places: Places, target: torch.Tensor, *, is_fresh: bool) -> float:
        """Read blocks in pieces, as experts are read. Return the seconds that took."""
        for fd, start in places:
            system.advise(fd, start, self._block, needed=False)
        started = time.perf_counter()
        pieces = [
            self._readers.submit(
                _read_piece,
                fd,
                start + at,
                target[number * self._block + at :][: min(PIECE, self._block - at)],
                is_fresh,
            )
            for number, (fd, start) in enumerate(places)
            for at in range(0, self._block, PIECE)
        ]
        wait(pieces)
        if sum(piece.result() for piece in pieces) < len(places) * self._block:
            raise OSError("the file ended early")
        return time.perf_counter() - started

    def _ways(self) -> list[bool]:
        """Return whether to read past the page cache, for each possible way."""
        if not system.drops_pages():
            return [True]
        try:
            self._set_direct(True)
            os.preadv(min(self._fds), [self._target[:ALIGNMENT].numpy().data], 0)
        except OSError:  # not every file system can
            return [False]
        return [False, True]

    def _set_direct(self, direct: bool) -> None:
        for fd in self._fds:
            system.set_direct(fd, direct)
