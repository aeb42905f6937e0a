"""The files of experts on disk, as a source of experts."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from functools import partial
from queue import SimpleQueue
from typing import NamedTuple, TypeVar

import torch

from mixchat.experts.cache import ExpertKey, ExpertStats
from mixchat.experts.mover import Steps, no_thread
from mixchat.experts.store import new_block
from mixchat.experts.tuner import Tuner
from mixchat.weights.format.installed_model import InstalledModel

# Bytes of a read, which takes 2 to 8 ms. A more urgent load waits for reads in flight.
STEP = 8 << 20
AT_ONCE = 4  # reads in flight
_TUNER_ROUND = 2  # experts
_T = TypeVar("_T")


class _Piece(NamedTuple):
    """A part of an expert, from byte `start` on."""

    start: int
    bytes: torch.Tensor


class _Mode(NamedTuple):
    """Reads past the page cache if `direct`, and into other memory first if `staged`."""

    direct: bool = False
    staged: bool = False


class Readers:
    """Threads that read."""

    def __init__(self, name: str, count: int) -> None:
        self._new = partial(ThreadPoolExecutor, count, thread_name_prefix=name)
        self._threads = self._new()

    def submit(self, read: Callable[..., _T], *arguments: object) -> Future[_T]:
        """Return the result to be. Raises `ResourceError` if no thread can be started."""
        try:
            return self._threads.submit(read, *arguments)
        except RuntimeError as error:
            # The read is queued nevertheless, and a running thread would still do it.
            self._threads.shutdown(cancel_futures=True)
            self._threads = self._new()
            raise no_thread() from error


def _pieces(block: torch.Tensor) -> deque[_Piece]:
    return deque(_Piece(n * STEP, view) for n, view in enumerate(torch.split(block, STEP)))


def _end(reads: Iterable[Future[int]]) -> None:
    """Cancel or await reads, before their memory is another expert's."""
    wait([read for read in reads if not read.cancel()])


class DiskSource:
    """The experts' files, which have the master copies.

    With `choose`, reading past the page cache (O_DIRECT) is tried, too, and the fastest mode is
    used.
    """

    def __init__(self, model: InstalledModel, stats: ExpertStats, *, choose: bool) -> None:
        self._model, self._stats = model, stats
        modes = [_Mode()]
        # O_DIRECT takes no core and no memory, but only the page cache has pages that others have
        # read. In fragmented memory slots are made of small pages, which gave 2.1 GB/s instead of
        # 3.5. Then it can be faster to read into a few large pages, and copy.
        if choose and model.open_direct():
            modes = [_Mode(direct=True), _Mode(direct=True, staged=True), *modes]
        self._tuner = Tuner(modes, length=_TUNER_ROUND * model.blueprint.expert.stride)
        self._readers = Readers("read", AT_ONCE)
        self._reads: deque[Future[int]] = deque()  # in flight
        self._stages: Sequence[torch.Tensor] = ()
        self._free_stages = SimpleQueue[torch.Tensor]()

    def load(self, key: ExpertKey, block: torch.Tensor) -> Steps:
        # A load that was put off may have left reads in flight into this block.
        began = time.perf_counter()
        wait(self._reads)
        self._count(time.perf_counter() - began, 0)
        yield from self._steps(key, block[: self._model.blueprint.expert_of(key.layer).stride])

    def _steps(self, key: ExpertKey, block: torch.Tensor) -> Steps:
        """Read a block, with the next reads in flight between two steps."""
        pieces, reads = _pieces(block), deque[Future[int]]()
        try:
            while pieces or reads:
                # Another load may have come between two steps.
                self._reads = reads
                began = time.perf_counter()
                while pieces and len(reads) < AT_ONCE:
                    reads.append(self._begin(key, pieces.popleft(), self._tuner.variant))
                size = reads.popleft().result()
                self._count(time.perf_counter() - began, size)
                yield
        finally:
            _end(reads)
            reads.clear()

    def _count(self, seconds: float, size: int) -> None:
        self._tuner.add(seconds, size)
        self._stats.read_seconds += seconds
        self._stats.bytes_read += size

    def _begin(self, key: ExpertKey, piece: _Piece, mode: _Mode) -> Future[int]:
        if mode.staged:
            self._staging()
        return self._readers.submit(self._read, key, piece, mode)

    def _read(self, key: ExpertKey, piece: _Piece, mode: _Mode) -> int:
        if not mode.staged:
            self._model.read_expert(*key, piece.bytes, piece.start, direct=mode.direct)
            return len(piece.bytes)
        whole = self._free_stages.get()
        try:
            stage = whole[: len(piece.bytes)]
            self._model.read_expert(*key, stage, piece.start, direct=mode.direct)
            # torch's copy would set other threads to work.
            piece.bytes.numpy()[:] = stage.numpy()
        finally:
            self._free_stages.put(whole)
        return len(piece.bytes)

    def _staging(self) -> Sequence[torch.Tensor]:
        """Return all stages."""
        # Made at once, because large pages are rare.
        if not self._stages:
            self._stages = torch.split(new_block(AT_ONCE * STEP).fill_(0), STEP)
            for stage in self._stages:
                self._free_stages.put(stage)
        return self._stages
