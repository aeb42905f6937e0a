"""Moves the bytes of experts: from where the master copy is, into slots in the fastest memory.

It knows no policy: which expert goes into which slot is the cache's decision.
"""

from __future__ import annotations

from collections.abc import Collection
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from mixchat.experts.keys import ExpertKey
from mixchat.experts.memory import CPU
from mixchat.experts.mover import Steps
from mixchat.weights.format.blueprint import Expert, ExpertLayout

_ALIGNMENT = 4096  # bytes: what reading past the page cache wants of memory


class ExpertSource(Protocol):
    """Holds the master copy of every expert."""

    def load(self, key: ExpertKey, block: torch.Tensor, evicted: ExpertKey | None) -> Steps:
        """Fill `block` (uint8, `stride` bytes, on any device) with the expert's bytes.

        `evicted` is the expert, if there is one, whose bytes are in the block before that.
        """

    def tier(self, key: ExpertKey) -> str:
        """Where the expert is: `host` or `disk`."""


class ExpertStore:
    """`slots` blocks of memory on `device`, each ready to compute the expert it holds.

    stored: how the experts lie at the source; used: how this device wants them. Where the two
    differ a block is reordered after each load, which costs a GPU a millisecond and a CPU a second.
    `bytes_moved` counts what came into slots.
    """

    def __init__(
        self,
        source: ExpertSource,
        *,
        stored: ExpertLayout,
        used: ExpertLayout,
        device: torch.device,
    ) -> None:
        self._source, self._stored, self._used, self._device = source, stored, used, device
        self._streams: Any = torch.get_device_module(device)  # whose streams do nothing on a CPU
        self._side = self._streams.Stream()
        self._slots: dict[int, _Slot] = {}
        self.bytes_moved = 0

    @property
    def name(self) -> str:
        """The tier of our slots: `host`, or `device` for a GPU's."""
        return "host" if self._device == CPU else "device"

    def stream(self) -> AbstractContextManager[object]:
        """What whoever carries out loads has to be in, so that they run beside the computing."""
        inside: AbstractContextManager[object] = self._streams.stream(self._side)
        return inside

    def load(self, key: ExpertKey, slot: int) -> Steps:
        """The steps that bring an expert into a slot, which the device may read until now."""
        before = self._streams.Event()
        before.record()
        return self._load(key, self._slot(slot), before)

    def expert(self, slot: int) -> Expert:
        """The expert in a slot; it reads the slot's bytes when it is called."""
        return self._slots[slot].expert

    def tier(self, key: ExpertKey, *, resident: bool) -> str:
        """Where the expert is: in a slot of ours, if it is `resident`, or where the source says."""
        if not resident:
            return self._source.tier(key)
        return self.name

    def reserve(self, slots: int) -> None:
        """Take the memory of slots 0 .. slots-1 now. Raises torch's own error for want of it."""
        for slot in range(slots):
            self._slot(slot)

    @property
    def blocks(self) -> Collection[int]:
        """The slots that have memory."""
        return self._slots.keys()

    @property
    def nbytes(self) -> int:
        """Bytes of memory that the slots take."""
        return len(self._slots) * self._used.stride

    def release(self, slot: int) -> None:
        """Give back a slot's memory; a load that is on its way there ends in nothing."""
        self._slots.pop(slot, None)

    def _slot(self, number: int) -> _Slot:
        if number not in self._slots:
            block = new_block(self._used.stride, self._device)
            self._slots[number] = _Slot(block, self._used.build(block))
        return self._slots[number]

    def _load(self, key: ExpertKey, slot: _Slot, before: Any) -> Steps:
        before.wait()
        evicted, slot.holds = slot.holds, None
        yield from self._source.load(key, slot.block, evicted)
        self._stored.convert(slot.block, self._used)
        arrived = self._streams.Event()
        arrived.record()
        arrived.synchronize()
        slot.holds = key
        self.bytes_moved += self._used.nbytes


@dataclass
class _Slot:
    """Memory for one expert. `holds` is whose bytes are in it, as far as loads have come."""

    block: torch.Tensor
    expert: Expert
    holds: ExpertKey | None = None


def new_block(size: int, device: torch.device) -> torch.Tensor:
    """`size` bytes that begin with a page; on a CPU the system commits them as they are filled."""
    # Slots are also made within inference mode, and filled by a thread that is not in it.
    with torch.inference_mode(False):
        whole = torch.empty(size + _ALIGNMENT, dtype=torch.uint8, device=device)
        start = -whole.data_ptr() % _ALIGNMENT
        return whole[start : start + size]
