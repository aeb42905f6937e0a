"""Experts and their digests, a disk that counts what is read, and the slots of a GPU."""

import hashlib
from collections import Counter
from typing import Any

import torch

from mixchat.base.errors import CheckpointError
from mixchat.experts.cache import LRU, ExpertCache, ExpertKey, ExpertStats
from mixchat.experts.disk_source import DiskSource, HostSource
from mixchat.experts.mover import Steps
from mixchat.experts.store import ExpertSource, ExpertStore, new_block
from mixchat.weights.format.installed_model import InstalledModel

CPU = torch.device("cpu")
LAYERS, EXPERTS = 4, 4
KEYS = [ExpertKey(layer, expert) for layer in range(LAYERS) for expert in range(EXPERTS)]
A, B, C, D = KEYS[0], KEYS[1], KEYS[2], KEYS[3]


def whole(installed: InstalledModel, key: ExpertKey) -> torch.Tensor:
    block = new_block(installed.blueprint.expert.stride, CPU)
    installed.read_expert(*key, block)
    return block


def digest(block: torch.Tensor) -> str:
    return hashlib.sha256(block.numpy().tobytes()).hexdigest()[:16]


class Bytes:
    """Stands in for an `ExpertSpec`: an expert is the block of its bytes."""

    def __init__(self, size: int) -> None:
        self.stride = self.nbytes = size

    def build(self, block: torch.Tensor) -> torch.Tensor:
        return block

    def convert(self, block: torch.Tensor, to: Any) -> None:
        pass


class Disk(DiskSource):
    """Notes what is read from it, and fails where `fails` says so."""

    def __init__(self, installed: InstalledModel) -> None:
        super().__init__(installed, ExpertStats(), choose=False)
        self.stride = installed.blueprint.expert.stride
        self.reads: Counter[ExpertKey] = Counter()
        self.fails = False

    def load(self, key: ExpertKey, block: torch.Tensor, evicted: ExpertKey | None) -> Steps:
        self.reads[key] += 1
        for _ in super().load(key, block, evicted):
            if self.fails:
                raise CheckpointError("the disk says no")
            yield


class Device:
    """The slots of a GPU, as a fetcher uses them: experts arrive, are put off, or cancelled."""

    def __init__(self, source: ExpertSource, stride: int, slots: int) -> None:
        layout: Any = Bytes(stride)
        self.cache, self.stats = ExpertCache(slots), ExpertStats()
        self.store = ExpertStore(
            source,
            stored=lambda _: layout,
            used=lambda _: layout,
            size=lambda _: stride,
            device=CPU,
            stats=self.stats,
        )
        self.put_off: dict[ExpertKey, Steps] = {}

    def load(self, key: ExpertKey) -> None:
        """Bring an expert that is wanted, however far it has come."""
        if key not in self.put_off and self.cache.lookup(key) is None:
            if self.cache.slots == len(self.put_off):
                self.cancel(next(iter(self.put_off)))
            self._begin(key)
        for _ in self.put_off.pop(key, ()):
            pass

    def prefetch(self, key: ExpertKey, steps: int) -> None:
        """Begin to bring an expert, and put it off after so many steps, if it is not there."""
        if key in self.cache or len(self.put_off) == self.cache.slots - 1:
            return
        self._begin(key)
        for _ in range(steps):
            if next(self.put_off[key], "there") == "there":
                del self.put_off[key]
                return

    def cancel(self, key: ExpertKey) -> None:
        if key in self.put_off:
            self.put_off.pop(key).close()
            self.cache.discard(key)

    def contents(self) -> dict[ExpertKey, str]:
        """Return the content of the slots of all experts that count as being there."""
        contents: dict[ExpertKey, str] = {}
        for key in self.cache:
            if key not in self.put_off:
                slot = self.cache.slot_of(key)
                assert slot is not None
                block: Any = self.store.expert(slot)
                contents[key] = digest(block)
        return contents

    def _begin(self, key: ExpertKey) -> None:
        slot = self.cache.admit(key, pinned=self.put_off)
        assert slot is not None
        self.put_off[key] = self.store.load(key, slot)


def tier_of(disk: Disk, slots: int, *, swaps: bool) -> HostSource:
    return host_source(disk, slots, swaps=swaps, lock=lambda block: None)


def host_source(disk: Disk, slots: int, **given: Any) -> HostSource:
    return HostSource(disk, slots, lambda _: layout_of(disk), LRU(), size=disk.stride, **given)


def tiers(
    installed: InstalledModel, host_slots: int, slots: int, *, swaps: bool
) -> tuple[Disk, HostSource, Device]:
    disk = Disk(installed)
    tier = tier_of(disk, host_slots, swaps=swaps)
    return disk, tier, Device(tier, disk.stride, slots)


def layout_of(disk: Disk) -> Any:
    return Bytes(disk.stride)


def load(source: ExpertSource, key: ExpertKey, size: int) -> str:
    block = new_block(size, CPU).fill_(0xEE)
    for _ in source.load(key, block, None):
        pass
    return digest(block)
