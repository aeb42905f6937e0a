"""Sources of experts: their file on disk, and RAM in front of it."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from queue import SimpleQueue
from typing import NamedTuple

import torch

from mixchat.experts.cache import ExpertCache, ExpertKey, ExpertStats, Policy
from mixchat.experts.memory import CPU
from mixchat.experts.mover import Steps, no_thread
from mixchat.experts.placement import MIN_HOST_SLOTS
from mixchat.experts.store import ExpertSource, Layouts, new_block
from mixchat.experts.tuner import Tuner
from mixchat.weights.format.expert import Expert
from mixchat.weights.format.installed_model import InstalledModel

# Bytes of a read, which takes 2 to 8 ms. A more urgent load waits for reads in flight.
STEP = 8 << 20
AT_ONCE = 4  # reads in flight
_TUNER_ROUND = 2  # experts

PageLock = Callable[[torch.Tensor], None]  # pins a block in RAM for copies to a GPU


class _Piece(NamedTuple):
    """A part of an expert, from byte `start` on."""

    start: int
    bytes: torch.Tensor


class _Mode(NamedTuple):
    """Reads past the page cache if `direct`, and into other memory first if `staged`."""

    direct: bool = False
    staged: bool = False


def _new_readers() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(AT_ONCE, thread_name_prefix="read")


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
        self._readers = _new_readers()
        self._reads: deque[Future[int]] = deque()  # in flight
        self._stages: Sequence[torch.Tensor] = ()
        self._free_stages = SimpleQueue[torch.Tensor]()

    def load(self, key: ExpertKey, block: torch.Tensor, evicted: ExpertKey | None) -> Steps:
        # A load that was put off may have left reads in flight into this block.
        began = time.perf_counter()
        wait(self._reads)
        self._count(time.perf_counter() - began, 0)
        steps = self._steps if block.device == CPU else self._steps_to_gpu
        yield from steps(key, block[: self._model.blueprint.expert_of(key.layer).stride])

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

    def _steps_to_gpu(self, key: ExpertKey, block: torch.Tensor) -> Steps:
        """Copy each step at once, since other loads use the stages."""
        pieces = _pieces(block)
        while pieces:
            mode = self._tuner.variant._replace(staged=False)
            began = time.perf_counter()
            targets = [pieces.popleft() for _ in range(min(AT_ONCE, len(pieces)))]
            staged = [
                _Piece(piece.start, stage[: len(piece.bytes)])
                for piece, stage in zip(targets, self._staging(), strict=False)
            ]
            reads: list[Future[int]] = []
            try:
                for piece in staged:
                    reads.append(self._begin(key, piece, mode))
                size = sum(read.result() for read in reads)
            finally:
                _end(reads)
            for piece, stage in zip(targets, staged, strict=True):
                piece.bytes.copy_(stage.bytes)
            self._count(time.perf_counter() - began, size)
            yield

    def _count(self, seconds: float, size: int) -> None:
        self._tuner.add(seconds, size)
        self._stats.read_seconds += seconds
        self._stats.bytes_read += size

    def tier(self, key: ExpertKey) -> str:
        return "disk"

    def _begin(self, key: ExpertKey, piece: _Piece, mode: _Mode) -> Future[int]:
        if mode.staged:
            self._staging()
        try:
            return self._readers.submit(self._read, key, piece, mode)
        except RuntimeError as error:
            # The read is queued nevertheless, and a running thread would still do it.
            self._readers.shutdown(cancel_futures=True)
            self._readers = _new_readers()
            raise no_thread() from error

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
            self._stages = torch.split(new_block(AT_ONCE * STEP, CPU).fill_(0), STEP)
            for stage in self._stages:
                self._free_stages.put(stage)
        return self._stages


class HostSource:
    """`slots` experts in RAM, between another source and the slots of a GPU.

    A slot has `size` bytes, enough for the largest expert. With `swaps`, RAM holds other experts
    than the GPU. An expert that goes up leaves its slot to the one that it evicts.
    """

    def __init__(
        self,
        source: ExpertSource,
        slots: int,
        layouts: Layouts,
        policy: Policy,
        *,
        size: int,
        swaps: bool,
        lock: PageLock,
    ) -> None:
        assert slots >= MIN_HOST_SLOTS
        self._source, self._layouts, self._size = source, layouts, size
        self._swaps, self._lock = swaps, lock
        self._cache = ExpertCache(slots, policy)
        self._blocks: dict[int, torch.Tensor] = {}
        self._partial: set[ExpertKey] = set()  # started loads, which may be put off
        self._borrowed: set[ExpertKey] = set()
        # The mover's thread loads, and the computing thread borrows.
        self._access = threading.Lock()

    def tier(self, key: ExpertKey) -> str:
        with self._access:
            return "host" if self._whole(key) else self._source.tier(key)

    @contextmanager
    def borrow(self, key: ExpertKey) -> Iterator[Expert | None]:
        """Yield the expert, which stays in RAM meanwhile, or None if it is not there."""
        try:
            with self._access:
                slot = self._cache.lookup(key) if self._whole(key) else None
                if slot is not None:
                    self._borrowed.add(key)
            layout = self._layouts(key.layer)
            yield None if slot is None else layout.build(self._blocks[slot])
        finally:
            self._borrowed.discard(key)

    def load(self, key: ExpertKey, block: torch.Tensor, evicted: ExpertKey | None) -> Steps:
        if key not in self._cache and len(self._partial) >= self._cache.slots - 3:
            # Those put off leave slots for one that goes up, for `evicted`, and a borrowed one.
            yield from self._source.load(key, block, evicted)
            return
        if self._cache.lookup(key) is None or key in self._partial:
            with self._filling(key) as slot_block:
                yield from self._source.load(key, slot_block, None)
        if self._swaps and evicted is not None and evicted not in self._cache:
            with self._filling(evicted, kept=key) as slot_block:
                self._copy(evicted, block, slot_block)
        slot = self._cache.slot_of(key)
        assert slot is not None
        self._copy(key, self._blocks[slot], block)
        if self._swaps:
            with self._access:
                if key not in self._borrowed:
                    self._cache.discard(key)

    @contextmanager
    def _filling(self, key: ExpertKey, kept: ExpertKey | None = None) -> Iterator[torch.Tensor]:
        """Yield a slot's block. Its expert counts as missing until it is filled."""
        try:
            with self._access:
                # An expert whose load was put off has its slot already.
                slot = self._cache.slot_of(key)
                if slot is None:
                    pinned = {*self._partial, *self._borrowed, *([] if kept is None else [kept])}
                    self._partial.add(key)
                    slot = self._cache.admit(key, pinned)
            assert slot is not None, "loads that were put off leave enough slots"
            if slot not in self._blocks:
                block = new_block(self._size, CPU)
                self._lock(block)
                self._blocks[slot] = block
            yield self._blocks[slot]
        except BaseException:
            # Also if the load is cancelled, which closes its steps.
            if key in self._partial:
                with self._access:
                    self._cache.discard(key)
            raise
        finally:
            self._partial.discard(key)

    def _copy(self, key: ExpertKey, source: torch.Tensor, target: torch.Tensor) -> None:
        size = self._layouts(key.layer).stride
        target[:size].copy_(source[:size], non_blocking=target.device != CPU)

    def _whole(self, key: ExpertKey) -> bool:
        return key in self._cache and key not in self._partial
