"""Slots in RAM: what counts as loaded is whole, and a slot that was freed gets nothing."""

import errno
import os
import shutil
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from patience import PATIENCE_S
from source_tools import EXPERTS, KEYS, A, B, digest, disk

from mixchat.base.errors import CheckpointError
from mixchat.experts.cache import ExpertKey, ExpertStats
from mixchat.experts.load_queue import ExpertLoad, LoadQueue
from mixchat.experts.store import ExpertStore, new_block
from mixchat.weights.format.installed_model import InstalledModel

pytestmark = pytest.mark.usefixtures("small_pieces")


class Bytes:
    """Stands in for an `ExpertSpec`: an expert is the block of its bytes."""

    def __init__(self, size: int) -> None:
        self.stride = self.nbytes = size

    def build(self, block: Any) -> Any:
        return block


class Slots:
    """Slots that are filled in several threads."""

    def __init__(self, installed: InstalledModel, *, direct: bool = False) -> None:
        layout: Any = Bytes(installed.blueprint.expert.stride)
        read = disk(installed, direct=direct)
        self.store = ExpertStore(read, lambda _: layout, lambda _: layout.stride, ExpertStats())
        self.queue = LoadQueue(3)

    def load(self, key: ExpertKey, slot: int = 0) -> ExpertLoad:
        load = ExpertLoad(key)
        self.queue.begin(load, self.store.job(load, slot))
        return load

    def digest(self, slot: int) -> str:
        expert: Any = self.store.expert(slot)
        assert expert.data_ptr() == self.store.block(slot).data_ptr()
        return digest(expert)


@pytest.mark.parametrize("direct", [True, False])
def test_experts_that_are_read_in_pieces_at_the_same_time_are_whole(installed, truth, direct):
    if direct and not installed.open_direct():
        pytest.skip("this disk has no O_DIRECT")
    slots = Slots(installed, direct=direct)
    for keys in (KEYS, KEYS[::-1]):  # in new slots, and in those of others
        for load in [slots.load(key, slot) for slot, key in enumerate(keys)]:
            load.wait()
        assert {key: slots.digest(slot) for slot, key in enumerate(keys)} == truth
    assert slots.store.nbytes == len(KEYS) * installed.blueprint.expert.stride


def test_a_load_into_a_slot_that_was_freed_does_not_reach_the_next_expert(installed, truth):
    slots = Slots(installed)
    job = slots.store.job(ExpertLoad(A), 0)
    (first, *others) = job.pieces()
    first()
    slots.store.release(0)
    slots.load(B).wait()  # into the same slot, in new memory
    for step in (*others, job.finish):
        with pytest.raises(MemoryError):
            step()
    assert slots.digest(0) == truth[B]


def test_a_load_begins_while_the_system_gives_memory_to_another(installed, truth, monkeypatch):
    """Memory was taken under the queue's lock, and a prompt waited for it half of a cold start."""
    asked, go = threading.Event(), threading.Event()

    def slow(size: int) -> torch.Tensor:
        asked.set()
        assert go.wait(PATIENCE_S)
        return new_block(size)

    monkeypatch.setattr("mixchat.experts.store.new_block", slow)
    slots = Slots(installed)
    loads = [slots.load(A)]
    asked.wait()
    loads.append(slots.load(B, 1))
    go.set()
    for load in loads:
        load.wait()
    assert [slots.digest(0), slots.digest(1)] == [truth[A], truth[B]]


@pytest.mark.parametrize("direct", [True, False])
@pytest.mark.parametrize("missing", [1, 4096, 5000])
def test_a_file_cut_short_after_it_was_opened_is_named(directory, tmp_path, direct, missing):
    copy = Path(shutil.copytree(directory, tmp_path / "installed"))
    with InstalledModel(copy) as installed:
        slots = Slots(installed, direct=direct and installed.open_direct())
        file = copy / "experts-002.safetensors"
        os.truncate(file, file.stat().st_size - missing)
        slots.load(ExpertKey(2, EXPERTS - 2)).wait()
        for _ in range(2):
            with pytest.raises(CheckpointError, match=r"experts-002\.safetensors: cut short"):
                slots.load(ExpertKey(2, EXPERTS - 1)).wait()
        slots.load(A).wait()


@pytest.mark.parametrize("direct", [True, False])
def test_a_read_error_is_raised_with_the_files_name(directory, direct, monkeypatch):
    def broken(*_: Any) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with InstalledModel(directory) as installed:
        slots = Slots(installed, direct=direct and installed.open_direct())
        monkeypatch.setattr(os, "preadv", broken)
        said = r"experts-001\.safetensors: cannot be read \(Input/output error\)"
        with pytest.raises(CheckpointError, match=said):
            slots.load(KEYS[4]).wait()
        monkeypatch.undo()
        slots.load(KEYS[4]).wait()
