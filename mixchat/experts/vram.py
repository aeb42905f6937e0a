"""Holds experts in the memory of one GPU, and brings others there in the background.

L = layers of the GPU, E = num_local_experts.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import suppress
from functools import partial
from itertools import cycle, islice
from queue import SimpleQueue
from typing import Protocol

import torch

from mixchat.base import gpu
from mixchat.base.errors import ResourceError
from mixchat.experts.arena import Arena
from mixchat.experts.cache import ExpertKey
from mixchat.experts.load_queue import FILL, REQUESTED, ExpertLoad, Job, LoadQueue, Piece
from mixchat.experts.residents import Exchange, Residents
from mixchat.experts.store import Layouts, ReadExpert, new_block
from mixchat.weights.format.expert import Expert

# Page-locked RAM, through which all bytes go to the GPU: 32 MB, whatever the model's size.
_STAGE_BYTES = 8 << 20
_STAGES = 4
_GUESTS = 2  # slots for experts of a prompt that are not to stay


class Lender(Protocol):
    """Lends the blocks of experts in RAM, which need not be read from the disk."""

    def borrow(self, key: ExpertKey) -> torch.Tensor | None:
        """Return a block that stays until `give_back`, or None if it is not in RAM."""

    def give_back(self, key: ExpertKey) -> None: ...


class VramSlots:
    """The experts that a GPU holds, and where: `table` [L, E], int64, has their addresses.

    The address 0 says that an expert is not there. Kernels read the table, so that the host need
    not know a router's choice before they start. It changes between two tokens alone.

    layers: those with experts that the GPU computes. sizes: the bytes of each slot. read: reads a
    part of an expert from the disk. reserve: bytes to leave free. `has_changed`: whether
    `residents.keys` have, since somebody set it to False.
    """

    def __init__(
        self,
        device: torch.device,
        layers: range,
        experts: int,
        layouts: Layouts,
        sizes: Sequence[int],
        read: ReadExpert,
        lender: Lender,
        reserve: int = 0,
    ) -> None:
        self.device = device
        self.layers = layers
        self._reserve = reserve
        self._layouts = layouts
        self._sizes = sizes
        self._lender = lender
        self._strides = [layouts(layer).stride for layer in layers]
        self.residents = Residents(layers.start, self._strides, experts, sizes)
        self.table = torch.zeros(len(layers), experts, dtype=torch.int64, device=device)
        self._arena = Arena(device, sizes)
        self._guests: list[torch.Tensor] = []
        if len(sizes) < len(layers) * experts:
            self._make_guests()
        self._experts: dict[ExpertKey, Expert] = {}
        self._loads: dict[ExpertKey, ExpertLoad] = {}
        self._uploader = Uploader(device, read)
        self.has_changed = False

    @property
    def slots(self) -> int:
        return len(self._arena.blocks)

    @property
    def nbytes(self) -> int:
        return self._arena.nbytes

    @property
    def bytes_moved(self) -> int:
        """Return the bytes of all experts that were copied to the GPU."""
        return self._uploader.bytes_moved

    @property
    def holds_all(self) -> bool:
        return self.residents.is_complete

    @property
    def is_filling(self) -> bool:
        """Return whether experts that nobody needs yet are on their way."""
        return any(not load.ended for load in self._loads.values())

    def holds(self, key: ExpertKey) -> bool:
        return self.residents.slot_of(key) is not None

    def expert(self, key: ExpertKey) -> Expert:
        """Return an expert that the GPU holds."""
        if key not in self._experts:
            slot = self.residents.slot_of(key)
            assert slot is not None
            self._experts[key] = self._layouts(key.layer).build(self._arena.blocks[slot])
        return self._experts[key]

    def publish(self) -> None:
        """Let experts that have arrived be used, and begin the next exchange.

        Only between two tokens, because kernels of a token read the table.
        """
        for key in [key for key, load in self._loads.items() if load.ended]:
            self._end(key)
        if self._loads or self.holds_all:
            return
        if (exchange := self.residents.next_exchange()) is not None:
            with suppress(ResourceError):  # no thread
                self._begin(exchange)

    def fill(self) -> None:
        """Begin to load experts into all free slots, one after the other."""
        with suppress(ResourceError):  # no thread
            while (exchange := self.residents.next_exchange()) is not None:
                if exchange.evicted is not None:
                    return
                self._begin(exchange)

    def request(self, key: ExpertKey) -> bool:
        """Bring an expert soon that is on its way. Return False if it is not."""
        load = self._loads.get(key)
        return load is not None and self._uploader.queue.reorder(load, REQUESTED)

    def wait_for(self, key: ExpertKey) -> None:
        """Wait for an expert that is on its way. Raise the error of its load."""
        load = self._loads[key]
        try:
            load.wait()
        finally:
            if load.ended:
                self._end(key)

    def invite(self, keys: Sequence[ExpertKey]) -> Guests:
        """Begin to bring experts that are not to stay."""
        if keys and not self._guests:
            self._make_guests()
        blocks = zip(keys, cycle(self._guests), strict=False)
        return Guests(self._uploader, self._layouts, self._lender, blocks)

    def give_way(self) -> bool:
        """Give the memory of an eighth of the slots back. Return False if there are none."""
        pieces = self._arena.pieces
        for slots in pieces[::-1][: -(-len(pieces) // 8)]:
            self._give_up(slots)
        gpu.release_unused(self.device)
        return bool(pieces)

    def _give_up(self, slots: range) -> None:
        """Give the last piece back. Of all experts, those that are used least lose their slots."""
        lost, moved = self.residents.give_up(slots)
        for key in lost:
            self._forget(key)
        blocks = self._arena.blocks
        for key, (before, after) in moved.items():
            # In the stream of the kernels that have read both, and nothing is on its way there.
            blocks[after].copy_(blocks[before])
            self._experts.pop(key, None)
            self._set(key, blocks[after].data_ptr())
        # A load that has begun keeps the memory until its pieces have ended.
        self._arena.give_back()

    def grow(self) -> None:
        """Take slots again that were given up, as far as the memory has room, and fill them."""
        free = gpu.free_memory(self.device) - self._reserve
        while (size := self._arena.next_size) is not None and size <= free:
            try:
                slots = self._arena.take()
            except torch.OutOfMemoryError:
                break
            for slot in slots:
                self.residents.add_slot(slot, self._sizes[slot])
            free -= size
        self.fill()

    def close(self) -> None:
        """Free the memory. Nothing can be computed after that."""
        for load in self._loads.values():
            load.cancelled = True
        self._loads.clear()
        self._uploader.queue.close()
        self._experts.clear()
        self._arena.blocks.clear()
        self._guests.clear()

    def _begin(self, exchange: Exchange) -> None:
        key, slot, evicted = exchange
        if evicted is not None:
            self._forget(evicted)
        self.residents.begin(exchange)
        self.has_changed = True
        load = self._loads[key] = ExpertLoad(key, FILL)
        try:
            # The slot may be given up before its turn comes.
            block = self._lender.borrow(key)
            size = self._layouts(key.layer).stride
            self._uploader.begin(load, slot, lambda: self._arena.blocks.get(slot), size, block)
        except BaseException as error:
            load.end(error)
            raise

    def _end(self, key: ExpertKey) -> None:
        load = self._loads.pop(key)
        self._lender.give_back(key)
        slot = self.residents.end(key, arrived=not load.failed)
        if load.failed:
            self.has_changed = True
        else:
            self._set(key, self._arena.blocks[slot].data_ptr())

    def _forget(self, key: ExpertKey) -> None:
        self.has_changed = True
        if (load := self._loads.pop(key, None)) is not None:
            load.cancelled = True
            self._lender.give_back(key)
        else:
            self._experts.pop(key, None)
            self._set(key, 0)

    def _set(self, key: ExpertKey, address: int) -> None:
        self.table[key.layer - self.layers.start, key.expert].fill_(address)

    def _make_guests(self) -> None:
        self._guests = [*Arena(self.device, [max(self._strides)] * _GUESTS).blocks.values()]


class Guests:
    """Experts that pass through a few slots of a GPU, one after the other, as a context.

    queue: the experts and their slots. The first ones are on their way from the beginning.
    """

    def __init__(
        self,
        uploader: Uploader,
        layouts: Layouts,
        lender: Lender,
        queue: Iterator[tuple[ExpertKey, torch.Tensor]],
    ) -> None:
        self._uploader = uploader
        self._layouts = layouts
        self._lender = lender
        self._queue = queue
        self._loads = deque[tuple[ExpertLoad, torch.Tensor]]()

    def __enter__(self) -> Guests:
        for key, block in islice(self._queue, _GUESTS):
            self._invite(key, block)
        return self

    def __exit__(self, *error: object) -> None:
        for load, _ in self._loads:
            load.cancelled = True
            # The queue may read the block although it is another expert's. Nobody reads the copy.
            self._lender.give_back(load.key)

    def __iter__(self) -> Iterator[tuple[ExpertKey, Expert]]:
        """Wait for each expert, and yield it. It may be used until the next one is asked for."""
        while self._loads:
            load, block = self._loads[0]
            load.wait()
            self._loads.popleft()
            self._lender.give_back(load.key)
            yield load.key, self._layouts(load.key.layer).build(block)
            for following in islice(self._queue, 1):
                self._invite(*following)

    def _invite(self, key: ExpertKey, block: torch.Tensor) -> None:
        load = ExpertLoad(key)
        size = self._layouts(key.layer).stride
        self._loads.append((load, block))
        self._uploader.begin(load, id(block), lambda: block, size, self._lender.borrow(key))


class Uploader:
    """Copies experts to a GPU in threads and a stream of its own, requested ones first."""

    def __init__(self, device: torch.device, read: ReadExpert) -> None:
        self._device = device
        self._read = read
        self._streams = gpu.streams(device)
        self._side = self._streams.Stream(device)
        self.queue = LoadQueue(
            _STAGES, lambda: self._streams.stream(self._side), count_moved=self._count
        )
        self._stages = SimpleQueue[torch.Tensor]()  # free ones
        self._has_stages = False
        self.bytes_moved = 0

    def begin(
        self,
        load: ExpertLoad,
        slot: Hashable,
        memory: Callable[[], torch.Tensor | None],
        size: int,
        block: torch.Tensor | None,
    ) -> None:
        """Queue the copy of an expert of `size` bytes from its block in RAM, or from the disk.

        `memory` returns the slot's when its turn has come, or None if nobody wants it there.
        """
        was_read = self._streams.Event()
        was_read.record(self._streams.current_stream(self._device))

        def pieces() -> list[Piece]:
            if (whole := memory()) is None:
                raise MemoryError
            self._lock_stages()
            # The last kernel that reads the slot's former expert may still run.
            was_read.wait(self._side)
            views = torch.split(whole[:size], _STAGE_BYTES)
            return [
                partial(self._copy, load.key, view, number * _STAGE_BYTES, block)
                for number, view in enumerate(views)
            ]

        self.queue.begin(load, Job(slot, pieces))

    def _copy(
        self, key: ExpertKey, target: torch.Tensor, start: int, block: torch.Tensor | None
    ) -> int:
        stage = self._stages.get()
        try:
            filled = stage[: len(target)]
            if block is None:
                self._read(key, filled, start)
            else:
                # torch's copy would set other threads to work.
                filled.numpy()[:] = block[start : start + len(filled)].numpy()
            target.copy_(filled, non_blocking=True)
            # The stage is filled again, perhaps by another load.
            copied = self._streams.Event(blocking=True)
            copied.record(self._side)
            copied.synchronize()
        finally:
            self._stages.put(stage)
        return len(target)

    def _count(self, seconds: float, size: int) -> None:
        self.bytes_moved += size

    def _lock_stages(self) -> None:
        if not self._has_stages:
            size = _STAGES * _STAGE_BYTES
            try:
                whole = gpu.locked_block(size, self._device)
            except gpu.PageLockError:  # copies are slower
                whole = new_block(size)
            for stage in torch.split(whole, _STAGE_BYTES):
                self._stages.put(stage)
            self._has_stages = True
