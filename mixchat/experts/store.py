"""Moves the bytes of experts: from where the master copy is, into slots in the fastest memory.

It knows no policy: which expert goes into which slot is the cache's decision. The master copy stays
where it is, so evicting an expert moves nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch

from mixchat.experts.cache import ExpertKey
from mixchat.weights.blueprint import Expert, ExpertLayout
from mixchat.weights.checkpoint import KeptModel

Lock = Callable[[torch.Tensor], None]  # makes a buffer in RAM fit for fast copies to the device


class ExpertSource(Protocol):
    """Holds the master copy of every expert."""

    def load(self, key: ExpertKey, slot: torch.Tensor) -> None:
        """Fill `slot` (uint8, `stride` bytes, on any device) with the expert's bytes."""


class DiskSource:
    """The master copy is the file: one `pread` an expert.

    A slot in RAM is filled directly, one on a GPU by way of a buffer that `lock` makes fit for it.
    """

    def __init__(self, model: KeptModel, lock: Lock | None = None) -> None:
        self._model = model
        self._staging = None if lock is None else _host_buffer(1, model, lock)[0]

    def load(self, key: ExpertKey, slot: torch.Tensor) -> None:
        if self._staging is None:
            self._model.read_expert(*key, slot)
            return
        self._model.read_expert(*key, self._staging)
        slot.copy_(self._staging)  # blocking: the buffer is written again on the next call


class HostSource:
    """The master copy is in RAM; `lock` makes it fit for copies to a GPU."""

    def __init__(self, model: KeptModel, lock: Lock) -> None:
        self._experts = model.config.num_local_experts
        self._blocks = _host_buffer(model.blueprint.expert_count, model, lock)
        for index in range(model.blueprint.expert_count):
            model.read_expert(*divmod(index, self._experts), self._blocks[index])

    def load(self, key: ExpertKey, slot: torch.Tensor) -> None:
        # Ordered with the kernels that read the slot, because it runs on the same stream.
        slot.copy_(self._blocks[key.layer * self._experts + key.expert], non_blocking=True)


class ExpertStore:
    """`slots` blocks of memory on `device`, each ready to compute the expert it holds.

    stored: how the experts lie at the source; used: how this device wants them. Where the two
    differ a block is reordered after each load, which costs a GPU a millisecond and a CPU a second.
    `bytes_moved` counts what came into slots.
    """

    def __init__(
        self,
        source: ExpertSource,
        slots: int,
        *,
        stored: ExpertLayout,
        used: ExpertLayout,
        device: torch.device,
    ) -> None:
        self._source, self._stored, self._used = source, stored, used
        # On a CPU the system commits the pages as they are filled.
        self._blocks = torch.empty((slots, used.stride), dtype=torch.uint8, device=device)
        self._experts = [used.build(block) for block in self._blocks]
        self.bytes_moved = 0

    @property
    def slots(self) -> int:
        """Count of slots."""
        return len(self._experts)

    def load(self, key: ExpertKey, slot: int) -> None:
        """Bring an expert into a slot."""
        block = self._blocks[slot]
        self._source.load(key, block)
        self._stored.convert(block, self._used)
        self.bytes_moved += self._used.nbytes

    def expert(self, slot: int) -> Expert:
        """The expert in a slot; it reads the slot's bytes when it is called."""
        return self._experts[slot]


def _host_buffer(count: int, model: KeptModel, lock: Lock) -> torch.Tensor:
    buffer = torch.empty((count, model.blueprint.expert.stride), dtype=torch.uint8)
    lock(buffer)
    return buffer
