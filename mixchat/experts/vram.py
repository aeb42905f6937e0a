"""Holds experts in the memory of one GPU, and brings others there in the background.

L = layers of the GPU, E = num_local_experts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from typing import Any, Protocol

import torch

from mixchat.base import gpu
from mixchat.experts.cache import ExpertKey
from mixchat.experts.mover import FILL, REQUESTED, ExpertLoad, Mover, Steps
from mixchat.experts.residents import Exchange, Residents
from mixchat.experts.store import Layouts, new_block
from mixchat.weights.format.expert import Expert

# Page-locked RAM, through which all bytes go to the GPU: 32 MB, whatever the model's size.
_STAGE_BYTES, _STAGES = 8 << 20, 4
GUESTS = 2  # slots for experts of a prompt that are not to stay

ReadExpert = Callable[[ExpertKey, torch.Tensor, int], None]  # fills a tensor from a byte on


class Lender(Protocol):
    """Lends the blocks of experts in RAM, which need not be read from the disk."""

    def borrow(self, key: ExpertKey) -> torch.Tensor | None:
        """Return a block that stays until `give_back`, or None if it is not in RAM."""

    def give_back(self, key: ExpertKey) -> None: ...


class VramSlots:
    """The experts that a GPU holds, and where: `table` [L, E], int64, has their addresses.

    The address 0 says that an expert is not there. Kernels read the table, so that the host need
    not know a router's choice before they start. It changes in `publish` alone, between tokens.

    layers: those with experts that the GPU computes. sizes: the bytes of each slot. read: reads a
    part of an expert from the disk. reserve: bytes to leave free.
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
        self.device, self.layers, self.reserve = device, layers, reserve
        self._layouts, self._sizes, self._lender = layouts, sizes, lender
        strides = [layouts(layer).stride for layer in layers]
        self.residents = Residents(layers.start, strides, experts, sizes)
        self.table = torch.zeros(len(layers), experts, dtype=torch.int64, device=device)
        self._blocks: dict[int, torch.Tensor] = {}
        for slot, size in enumerate(sizes):
            self._blocks[slot] = torch.empty(size, dtype=torch.uint8, device=device)
        self._guests = [
            torch.empty(max(strides), dtype=torch.uint8, device=device)
            for _ in range(GUESTS if len(sizes) < len(layers) * experts else 0)
        ]
        self._experts: dict[ExpertKey, Expert] = {}
        self._uploads: dict[ExpertKey, ExpertLoad] = {}
        self._upload = Uploader(device, read)
        self.bytes_moved = 0

    @property
    def slots(self) -> int:
        return len(self._blocks)

    @property
    def nbytes(self) -> int:
        return sum(self._sizes[slot] for slot in self._blocks)

    @property
    def holds_all(self) -> bool:
        return self.residents.is_complete

    @property
    def expected(self) -> set[ExpertKey]:
        """Return the experts that the GPU holds, or is to hold."""
        return {*self.residents.keys}

    @property
    def takes_guests(self) -> bool:
        return bool(self._guests)

    def holds(self, key: ExpertKey) -> bool:
        return self.residents.slot_of(key) is not None

    def expert(self, key: ExpertKey) -> Expert:
        """Return an expert that the GPU holds."""
        if key not in self._experts:
            slot = self.residents.slot_of(key)
            assert slot is not None
            self._experts[key] = self._layouts(key.layer).build(self._blocks[slot])
        return self._experts[key]

    def publish(self) -> bool:
        """Let experts that have arrived be used, and begin the next exchange. Return any change.

        Only between two tokens, because kernels of a token read the table.
        """
        if not self._uploads and self.holds_all:
            return False
        ended = [key for key, load in self._uploads.items() if load.ended]
        for key in ended:
            self._end(key)
        if not self._uploads and (exchange := self.residents.next_exchange()) is not None:
            self._begin(exchange)
            return True
        return bool(ended)

    def fill(self, count: int) -> None:
        """Begin to load the first `count` experts into free slots, one after the other."""
        for _ in range(count):
            exchange = self.residents.next_exchange()
            if exchange is None or exchange.evicted is not None:
                return
            self._begin(exchange)

    def request(self, key: ExpertKey) -> bool:
        """Bring an expert soon that is on its way. Return False if it is not."""
        load = self._uploads.get(key)
        return load is not None and self._upload.mover.reorder(load, REQUESTED)

    def wait_for(self, key: ExpertKey) -> None:
        """Wait for an expert that is on its way. Raise the error of its load."""
        load = self._uploads[key]
        try:
            load.wait()
        finally:
            if load.ended:
                self._end(key)

    def invite(self, key: ExpertKey, guest: int) -> ExpertLoad:
        """Begin to bring an expert that is not to stay."""
        load = ExpertLoad(key)
        target = self._guests[guest][: self._layouts(key.layer).stride]
        self._upload.begin(load, target, self._lender.borrow(key))
        return load

    def guest(self, load: ExpertLoad, guest: int) -> Expert:
        """Wait for a guest, and return it. It goes when its place is given to another."""
        try:
            load.wait()
        finally:
            self._lender.give_back(load.key)
        layout = self._layouts(load.key.layer)
        self.bytes_moved += layout.stride
        return layout.build(self._guests[guest])

    def give_way(self) -> bool:
        """Give the memory of an eighth of the slots back. Return False if none is left."""
        for _ in range(max(1, len(self._blocks) // 8)):
            gone = self.residents.give_up()
            if gone is None:
                return False
            slot, key = gone
            if key is not None:
                self._forget(key)
            del self._blocks[slot]
        gpu.release_unused(self.device)
        return True

    def grow(self, free: int) -> None:
        """Take slots again that were given up, if `free` bytes have room for them."""
        for slot, size in enumerate(self._sizes):
            if slot not in self._blocks and free >= size:
                self._blocks[slot] = torch.empty(size, dtype=torch.uint8, device=self.device)
                self.residents.add_slot(slot, size)
                free -= size

    def close(self) -> None:
        """Free the memory. Nothing can be computed after that."""
        for load in self._uploads.values():
            load.cancelled = True
        self._experts.clear()
        self._blocks.clear()
        self._guests.clear()

    def _begin(self, exchange: Exchange) -> None:
        key, slot, evicted = exchange
        if evicted is not None:
            self._forget(evicted)
        self.residents.begin(exchange)
        load = self._uploads[key] = ExpertLoad(key, FILL)
        target = self._blocks[slot][: self._layouts(key.layer).stride]
        self._upload.begin(load, target, self._lender.borrow(key))

    def _end(self, key: ExpertKey) -> None:
        load = self._uploads.pop(key)
        self._lender.give_back(key)
        slot = self.residents.end(key, arrived=not load.failed)
        if not load.failed:
            self._set(key, self._blocks[slot].data_ptr())
            self.bytes_moved += self._layouts(key.layer).stride

    def _forget(self, key: ExpertKey) -> None:
        self._experts.pop(key, None)
        self._set(key, 0)

    def _set(self, key: ExpertKey, address: int) -> None:
        self.table[key.layer - self.layers.start, key.expert].fill_(address)


class Uploader:
    """Copies experts to a GPU in a thread and a stream of its own, requested ones first."""

    def __init__(self, device: torch.device, read: ReadExpert) -> None:
        self._device, self._read = device, read
        self._streams = gpu.streams(device)
        self._side = self._streams.Stream(device)
        self.mover = Mover(lambda: self._streams.stream(self._side))
        self._readers = ThreadPoolExecutor(_STAGES, thread_name_prefix="upload")
        self._stages: Sequence[torch.Tensor] = ()

    def begin(self, load: ExpertLoad, target: torch.Tensor, block: torch.Tensor | None) -> None:
        """Queue the copy of an expert into `target`, from its block in RAM or from the disk."""
        was_read = self._streams.Event()
        was_read.record(self._streams.current_stream(self._device))
        self.mover.begin(load, self._steps(load.key, target, block, was_read))

    def _steps(
        self, key: ExpertKey, target: torch.Tensor, block: torch.Tensor | None, was_read: Any
    ) -> Steps:
        if not self._stages:
            whole = new_block(_STAGES * _STAGE_BYTES)
            gpu.page_lock(whole, self._device)
            self._stages = torch.split(whole, _STAGE_BYTES)
        # The last kernel that reads the slot's former expert may still run.
        was_read.wait(self._side)
        for start in range(0, target.numel(), _STAGES * _STAGE_BYTES):
            pieces = torch.split(target[start : start + _STAGES * _STAGE_BYTES], _STAGE_BYTES)
            offsets = range(start, target.numel(), _STAGE_BYTES)
            filled = [
                self._readers.submit(self._fill, key, stage[: len(piece)], offset, block)
                for piece, stage, offset in zip(pieces, self._stages, offsets, strict=False)
            ]
            try:
                for piece, stage, fill in zip(pieces, self._stages, filled, strict=False):
                    fill.result()
                    piece.copy_(stage[: len(piece)], non_blocking=True)
            finally:
                wait(filled)
            # Stages are filled again, perhaps by another load.
            copied = self._streams.Event(blocking=True)
            copied.record(self._side)
            copied.synchronize()
            yield

    def _fill(
        self, key: ExpertKey, stage: torch.Tensor, offset: int, block: torch.Tensor | None
    ) -> None:
        if block is None:
            self._read(key, stage, offset)
        else:
            # torch's copy would set other threads to work.
            stage.numpy()[:] = block[offset : offset + len(stage)].numpy()
