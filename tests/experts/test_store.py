"""Slots in RAM: whatever is cancelled or freed, what counts as loaded is whole."""

import errno
import os
import shutil
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from queue_doubles import PATIENCE
from routing_simulation import LRU
from source_tools import EXPERTS, KEYS, A, B, digest, disk

from mixchat.base.errors import CheckpointError
from mixchat.base.ram_blocks import new_block
from mixchat.experts.cache import ExpertCache, ExpertKey, ExpertStats
from mixchat.experts.load_queue import PREDICTED, REQUESTED, ExpertLoad, LoadQueue
from mixchat.experts.store import ExpertStore
from mixchat.weights.format.installed_model import InstalledModel

pytestmark = pytest.mark.usefixtures("small_pieces")
keys = st.sampled_from(KEYS)


class Bytes:
    """Stands in for an `ExpertSpec`: an expert is the block of its bytes."""

    def __init__(self, size: int) -> None:
        self.stride = self.nbytes = size

    def build(self, block: Any) -> Any:
        return block


class Slots:
    """Slots, as a tier uses them: experts arrive in several threads, or are cancelled."""

    def __init__(self, installed: InstalledModel, slots: int, *, direct: bool = False) -> None:
        layout: Any = Bytes(installed.blueprint.expert.stride)
        self.cache, self.stats = ExpertCache([0] * slots, LRU()), ExpertStats()
        self.store = ExpertStore(
            disk(installed, direct=direct), lambda _: layout, lambda _: layout.stride, self.stats
        )
        self.queue = LoadQueue(3)
        self.loads: dict[ExpertKey, ExpertLoad] = {}

    def load(self, key: ExpertKey) -> None:
        """Bring an expert that is needed, however far it has come."""
        if key not in self.loads and self.cache.lookup(key) is None:
            if self.cache.slots == len(self.loads):
                self.cancel(next(iter(self.loads)))
            self._begin(key, REQUESTED)
        if key in self.loads:
            self.queue.reorder(self.loads[key], REQUESTED)
            self.loads[key].wait()
            del self.loads[key]

    def prefetch(self, key: ExpertKey) -> None:
        if key not in self.cache and len(self.loads) < self.cache.slots - 1:
            self._begin(key, PREDICTED)

    def cancel(self, key: ExpertKey) -> None:
        if key in self.loads:
            self.loads.pop(key).cancelled = True
            self.cache.discard(key)

    def contents(self) -> dict[ExpertKey, str]:
        """Return the digests of all experts that count as being there."""
        contents: dict[ExpertKey, str] = {}
        for key in self.cache:
            if key in self.loads and not self.loads[key].ended:
                continue
            slot = self.cache.slot_of(key)
            assert slot is not None
            expert: Any = self.store.expert(slot)
            assert expert.data_ptr() == self.store.block(slot).data_ptr()
            contents[key] = digest(expert)
        return contents

    def _begin(self, key: ExpertKey, priority: int) -> None:
        slot = self.cache.admit(key, pinned=self.loads)
        assert slot is not None
        self.loads[key] = ExpertLoad(key, priority)
        self.queue.begin(self.loads[key], self.store.job(self.loads[key], slot))


operations = st.tuples(st.sampled_from(["load", "prefetch", "cancel"]), keys)


@pytest.mark.parametrize("direct", [True, False])
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60)
@given(st.integers(3, 7), st.lists(operations, max_size=60))
def test_whatever_is_cancelled_what_counts_as_there_is_whole(
    installed, truth, small_pieces, direct, slots, events
):
    if direct and not installed.open_direct():
        pytest.skip("this disk has no O_DIRECT")
    memory = Slots(installed, slots, direct=direct)
    for operation, key in [*events, *(("load", key) for key in KEYS)]:
        getattr(memory, operation)(key)
        assert memory.contents().items() <= truth.items()
        assert memory.store.nbytes <= slots * installed.blueprint.expert.stride


def test_a_store_counts_the_bytes_of_experts_that_have_come(installed):
    memory, size = Slots(installed, 2), installed.blueprint.expert.stride
    memory.load(A)
    assert (memory.stats.bytes_moved, memory.store.nbytes) == (size, size)
    memory.load(B)
    assert (memory.stats.bytes_moved, memory.store.nbytes) == (2 * size, 2 * size)


def test_reads_in_flight_when_a_load_is_cancelled_never_fill_the_slot_of_the_next_expert(
    installed, truth, monkeypatch
):
    read, begun, go = InstalledModel.read_expert, threading.Event(), threading.Event()

    def slow(self: InstalledModel, *given: Any, **options: Any) -> None:
        layer, expert, _, start = given
        if (layer, expert) == A and start:
            begun.set()
            go.wait()
        read(self, *given, **options)

    monkeypatch.setattr(InstalledModel, "read_expert", slow)
    memory = Slots(installed, 1)
    memory._begin(A, REQUESTED)
    begun.wait()
    memory.cancel(A)
    memory._begin(B, REQUESTED)
    assert not memory.loads[B].ended
    go.set()
    memory.load(B)
    assert memory.contents() == {B: truth[B]}


def test_a_load_into_a_slot_that_was_freed_does_not_reach_the_next_expert(installed, truth):
    memory = Slots(installed, 2)
    job = memory.store.job(ExpertLoad(A), 0)
    (first, *others) = job.pieces()
    first()
    memory.store.release(0)
    memory.load(B)  # into the same slot, in new memory
    for piece in others:
        with pytest.raises(MemoryError):
            piece()
    with pytest.raises(MemoryError):
        job.finish()
    assert memory.contents() == {B: truth[B]}


def test_a_load_whose_slot_is_freed_before_its_turn_fails(installed):
    memory = Slots(installed, 2)
    job = memory.store.job(ExpertLoad(A), 0)
    memory.store.release(0)
    for piece in job.pieces():
        with pytest.raises(MemoryError):
            piece()


def test_a_load_begins_while_the_system_gives_memory_to_another(installed, truth, monkeypatch):
    """Memory was taken under the queue's lock, and a prompt waited for it half of a cold start."""
    asked, go = threading.Event(), threading.Event()

    def slow(size: int) -> torch.Tensor:
        asked.set()
        assert go.wait(PATIENCE)
        return new_block(size)

    monkeypatch.setattr("mixchat.experts.store.new_block", slow)
    memory = Slots(installed, 2)
    memory.prefetch(A)
    asked.wait()
    memory._begin(B, REQUESTED)
    go.set()
    memory.load(A)
    memory.load(B)
    assert memory.contents() == {A: truth[A], B: truth[B]}


def test_a_load_that_failed_leaves_no_half_expert(installed, truth, monkeypatch):
    memory = Slots(installed, 2)

    def fail(*_: Any, **__: Any) -> None:
        raise CheckpointError("the disk says no")

    with monkeypatch.context() as patch:
        patch.setattr(InstalledModel, "read_expert", fail)
        with pytest.raises(CheckpointError, match="says no"):
            memory.load(A)
    memory.cancel(A)
    memory.load(A)
    assert memory.contents() == {A: truth[A]}


@pytest.mark.parametrize("direct", [True, False])
@pytest.mark.parametrize("missing", [1, 4096, 5000])
def test_a_file_cut_short_after_it_was_opened_is_named(directory, tmp_path, direct, missing):
    copy = Path(shutil.copytree(directory, tmp_path / "installed"))
    with InstalledModel(copy) as installed:
        memory = Slots(installed, 4, direct=direct and installed.open_direct())
        file = copy / "experts-002.safetensors"
        os.truncate(file, file.stat().st_size - missing)
        memory.load(ExpertKey(2, EXPERTS - 2))
        last = ExpertKey(2, EXPERTS - 1)
        for _ in range(2):
            with pytest.raises(CheckpointError, match=r"experts-002\.safetensors: cut short"):
                memory.load(last)
            memory.cancel(last)
        memory.load(A)


@pytest.mark.parametrize("direct", [True, False])
def test_a_read_error_is_raised_with_the_files_name(directory, direct, monkeypatch):
    def broken(*_: Any) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with InstalledModel(directory) as installed:
        memory, key = Slots(installed, 4, direct=direct and installed.open_direct()), KEYS[4]
        monkeypatch.setattr(os, "preadv", broken)
        said = r"experts-001\.safetensors: cannot be read \(Input/output error\)"
        with pytest.raises(CheckpointError, match=said):
            memory.load(key)
        monkeypatch.undo()
        memory.cancel(key)
        memory.load(key)
