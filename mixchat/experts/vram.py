"""Holds experts in the memory of one GPU, and brings others there in the background.

L = layers of the GPU, E = num_local_experts.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence, Set
from contextlib import contextmanager, suppress
from functools import partial
from queue import SimpleQueue

import numpy as np
import torch

from mixchat.base import gpu
from mixchat.base.errors import ResourceError
from mixchat.experts.arena import Arena
from mixchat.experts.cache import ExpertCache, ExpertKey, ExpertStats, LayeredLRU, Passes
from mixchat.experts.load_queue import FILL, REQUESTED, ExpertLoad, Job, LoadQueue, Piece
from mixchat.experts.most_used import Exchange, MostUsed
from mixchat.experts.store import Layouts, ReadExpert, new_block
from mixchat.experts.tier import Tier
from mixchat.weights.format.expert import Expert, ExpertSpec

# Page-locked RAM, through which all bytes go to the GPU: 32 MB, whatever the model's size.
_STAGE_BYTES = 8 << 20
_STAGES = 4
_GUESTS = 2  # slots for experts of a prompt that are not to stay


class VramTier(Tier):
    """The experts that a GPU holds, and where: `table` [L, E], int64, has their addresses.

    The address 0 says that an expert is not there. Kernels read the table, so that the host need
    not know a router's choice before they start. It changes between two tokens alone. Until then an
    expert that has come counts as being on its way.

    layers: those with experts that the GPU computes. sizes: the bytes of each slot. read: reads a
    part of an expert from the disk. behind: RAM. reserve: bytes to leave free.
    """

    def __init__(
        self,
        device: torch.device,
        layers: range,
        experts: int,
        layouts: Layouts,
        sizes: Sequence[int],
        read: ReadExpert,
        behind: Tier,
        reserve: int = 0,
    ) -> None:
        self.device = device
        self.layers = layers
        self._reserve = reserve
        self._strides = [layouts(layer).stride for layer in layers]
        self.policy = MostUsed(layers.start, self._strides, experts)
        self.table = torch.zeros(len(layers), experts, dtype=torch.int64, device=device)
        self._is_held = np.zeros(self.table.shape, bool)  # the table's addresses that are not 0
        self._layouts = layouts
        self._uploader = Uploader(device, read, behind)
        self._arena = VramSlots(device, sizes, self._uploader, layouts)
        super().__init__(
            ExpertCache(sizes, self.policy, lambda layer: self._strides[layer - layers.start]),
            self._arena,
            self._uploader.queue,
            Passes(len(layers)),
            self._uploader.stats,
            experts=self._is_held.size,
        )
        self._guests: Tier | None = None
        if len(sizes) < self._is_held.size:
            self._guests = self._new_guests()

    @property
    def keys(self) -> Set[ExpertKey]:
        """Return the experts with slots, of which some may still be on their way."""
        return self._cache.keys

    @property
    def changes(self) -> int:
        """Return how often `keys` have changed."""
        return self._cache.changes

    @property
    def is_filling(self) -> bool:
        return any(not load.ended for load in self._loads.values())

    def missing(self, layer: int, selected: Sequence[int]) -> list[int]:
        """Return which of a token's choices the GPU does not hold, by their index."""
        held = self._is_held[layer - self.layers.start, selected]
        return [index for index, is_held in enumerate(held.tolist()) if not is_held]

    def note_token(self, selected: np.ndarray) -> np.ndarray:
        """Count a token's experts [L, K]. Return which of them the GPU holds [L, K]."""
        self.policy.note_token(selected)
        return np.asarray(self._is_held[np.arange(len(selected))[:, None], selected])

    def expert(self, key: ExpertKey) -> Expert:
        """Return an expert that the GPU holds."""
        return self._expert(self._cache.slot_of(key))

    def publish(self) -> None:
        """Let experts that have arrived be used, and begin the next exchange.

        Only between two tokens, because kernels of a token read the table.
        """
        for key in [key for key, load in self._loads.items() if load.ended]:
            if not self._has_failed(key):
                del self._loads[key]
                self._show(key)
        if self._loads or self.holds_all:
            return
        if (exchange := self.policy.next_exchange(self._cache.free_sizes)) is not None:
            with suppress(ResourceError):  # no thread
                self._exchange(exchange)

    def fill_slots(self) -> None:
        """Begin to load experts into all free slots, the most used ones first."""
        with suppress(ResourceError):  # no thread
            while free := self._cache.free_sizes:
                exchange = self.policy.next_exchange(free)
                if exchange is None or exchange.evicted is not None:
                    return
                self._exchange(exchange)

    def hurry(self, key: ExpertKey) -> bool:
        """Bring an expert soon that is on its way. Return False if it is not."""
        load = self._loads.get(key)
        return load is not None and self._queue.reorder(load, REQUESTED)

    def ready(self, key: ExpertKey) -> Expert:
        expert = super().ready(key)
        self._show(key)
        return expert

    @contextmanager
    def invite(self, keys: Sequence[ExpertKey]) -> Iterator[Iterable[tuple[ExpertKey, Expert]]]:
        """Bring experts that are not to stay through a few slots, one after the other.

        The first ones are on their way from the beginning. Each may be used until the next one is
        asked for.
        """
        if not keys:
            yield ()
            return
        self._guests = self._guests or self._new_guests()
        self._guests.request(keys)
        try:
            yield self._guests.in_turn(keys)
        finally:
            self._guests.cancel()

    def give_way(self) -> bool:
        """Give the memory of an eighth of the slots back. Return False if there are none."""
        pieces = self._arena.pieces
        for slots in pieces[::-1][: -(-len(pieces) // 8)]:
            self._give_back(slots)
        gpu.release_unused(self.device)
        return bool(pieces)

    def grow(self) -> None:
        """Take slots again that were given up, as far as the memory has room, and fill them."""
        free = gpu.free_memory(self.device) - self._reserve
        while (size := self._arena.next_size) is not None and size <= free:
            try:
                self._cache.add(self._arena.take())
            except torch.OutOfMemoryError:
                break
            free -= size
        self.fill_slots()

    def close(self) -> None:
        super().close()
        if self._guests is not None:
            self._guests.close()

    def _exchange(self, exchange: Exchange) -> None:
        key, evicted = exchange
        if evicted is not None:
            self._give_up(evicted)
        slot = self._cache.admit(key)
        assert slot is not None
        self._begin(ExpertLoad(key, FILL), slot, self._loads)

    def _give_back(self, slots: range) -> None:
        """Give the last piece back. Of all experts, those that are used least lose their slots.

        With uses of 9 and 1 in the piece, and 4 and 2 in others, the expert of 9 moves into the
        slot of 2. The experts of 1 and 2 lose theirs. No expert moves into a slot that something
        may still be on its way to.
        """
        for key in [key for key in self._loads if self._slot_of(key) in slots]:
            self._give_up(key)
        least_first = [key for key in self.policy.victims() if key not in self._loads]
        outside = defaultdict[int, list[ExpertKey]](list)  # by their size
        for key in reversed(least_first):
            if self._slot_of(key) not in slots:
                outside[self._size_of(key)].append(key)
        for key in [key for key in reversed(least_first) if self._slot_of(key) in slots]:
            alike = outside[self._size_of(key)]
            if alike and self.policy.uses_of(alike[-1]) < self.policy.uses_of(key):
                slot = self._slot_of(alike[-1])
                self._give_up(alike.pop())
                self._arena.move(self._slot_of(key), slot)
                self._cache.move(key, slot)
                self._show(key)
            else:
                self._give_up(key)
        self._cache.remove(slots)
        self._arena.give_back()

    def _slot_of(self, key: ExpertKey) -> int:
        slot = self._cache.slot_of(key)
        assert slot is not None
        return slot

    def _index(self, key: ExpertKey) -> tuple[int, int]:
        """Return the place of an expert in `table`."""
        return key.layer - self.layers.start, key.expert

    def _size_of(self, key: ExpertKey) -> int:
        return self._strides[key.layer - self.layers.start]

    def _give_up(self, key: ExpertKey) -> None:
        super()._give_up(key)
        index = self._index(key)
        if self._is_held[index]:
            self._is_held[index] = False
            self.table[index].fill_(0)

    def _fail(self, key: ExpertKey) -> None:
        super()._fail(key)
        self.policy.exclude([key])  # it would be read again and again

    def _show(self, key: ExpertKey) -> None:
        index = self._index(key)
        self._is_held[index] = True
        self.table[index].fill_(self._arena.block(self._slot_of(key)).data_ptr())

    def _new_guests(self) -> Tier:
        sizes = [max(self._strides)] * _GUESTS
        passes = Passes(self.layers.stop)
        return Tier(
            ExpertCache(sizes, LayeredLRU(passes), lambda layer: sizes[0]),
            VramSlots(self.device, sizes, self._uploader, self._layouts),
            self._queue,
            passes,
            self.stats,
            experts=self._is_held.size,
        )


class VramSlots(Arena):
    """The memory of a GPU's slots, which are filled from RAM, or from the disk behind it."""

    def __init__(
        self, device: torch.device, sizes: Sequence[int], uploader: Uploader, layouts: Layouts
    ) -> None:
        super().__init__(device, sizes)
        self._uploader = uploader
        self._layouts = layouts
        self._layout_of: dict[int, ExpertSpec] = {}
        self._experts: dict[int, Expert] = {}  # those that were asked for, by slot

    def job(self, load: ExpertLoad, slot: int) -> Job:
        """Return the work of copying the load's expert into a slot."""
        layout = self._layouts(load.key.layer)
        if self._layout_of.get(slot) != layout:
            self._layout_of[slot] = layout
            self._experts.pop(slot, None)
        # The slot may be given up before its turn comes.
        return self._uploader.job(load, lambda: self.blocks.get(slot), layout.stride)

    def expert(self, slot: int) -> Expert:
        """Return the expert that was brought into a slot."""
        if slot not in self._experts:
            self._experts[slot] = self._layout_of[slot].build(self.blocks[slot])
        return self._experts[slot]

    def block(self, slot: int) -> torch.Tensor:
        return self.blocks[slot]

    def move(self, before: int, after: int) -> None:
        """Copy an expert into another slot, in the stream of the kernels that have read both."""
        self.blocks[after].copy_(self.blocks[before])
        self._layout_of[after] = self._layout_of[before]
        self._experts.pop(after, None)

    def give_back(self) -> None:
        for slot in self.pieces[-1]:
            self._experts.pop(slot, None)
        super().give_back()

    def release(self, slot: int) -> None:
        """Free a slot as the tier is closed. A load that has begun keeps the piece."""
        self._experts.pop(slot, None)
        del self.blocks[slot]


class Uploader:
    """Copies experts to a GPU in threads and a stream of its own, requested ones first.

    read: reads a part of an expert from the disk. behind: RAM, which lends blocks.
    """

    def __init__(self, device: torch.device, read: ReadExpert, behind: Tier) -> None:
        self._device = device
        self._read = read
        self._behind = behind
        self._streams = gpu.streams(device)
        self._side = self._streams.Stream(device)
        self.stats = ExpertStats()
        self.queue = LoadQueue(
            _STAGES,
            lambda: self._streams.stream(self._side),
            count_moved=self.stats.count_read,
        )
        self._stages = SimpleQueue[torch.Tensor]()  # free ones
        self._has_stages = False

    def job(self, load: ExpertLoad, memory: Callable[[], torch.Tensor | None], size: int) -> Job:
        """Return the work of copying an expert of `size` bytes.

        `memory` returns the slot's when its turn has come, or None if nobody wants it there.
        """
        block = self._behind.borrow(load)
        target = memory()
        assert target is not None
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

        return Job(target.data_ptr(), pieces)

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
