"""Slots in RAM: whatever is put off, cancelled or freed, what counts as loaded is whole."""

from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from source_tools import KEYS, A, B, digest

from mixchat.base.errors import CheckpointError
from mixchat.experts.cache import ExpertCache, ExpertKey, ExpertStats
from mixchat.experts.disk_source import DiskSource
from mixchat.experts.mover import Steps
from mixchat.experts.store import ExpertStore
from mixchat.weights.format.installed_model import InstalledModel

pytestmark = pytest.mark.usefixtures("small_steps")
keys = st.sampled_from(KEYS)


class Bytes:
    """Stands in for an `ExpertSpec`: an expert is the block of its bytes."""

    def __init__(self, size: int) -> None:
        self.stride = self.nbytes = size

    def build(self, block: Any) -> Any:
        return block


class Slots:
    """Slots, as a fetcher uses them: experts arrive, are put off, or cancelled."""

    def __init__(self, installed: InstalledModel, slots: int) -> None:
        layout: Any = Bytes(installed.blueprint.expert.stride)
        self.cache, self.stats = ExpertCache(slots), ExpertStats()
        source = DiskSource(installed, ExpertStats(), choose=False)
        self.store = ExpertStore(source, lambda _: layout, lambda _: layout.stride, self.stats)
        self.put_off: dict[ExpertKey, Steps] = {}

    def load(self, key: ExpertKey) -> None:
        """Bring an expert that is needed, however far it has come."""
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
        """Return the digests of all experts that count as being there."""
        contents: dict[ExpertKey, str] = {}
        for key in set(self.cache) - set(self.put_off):
            slot = self.cache.slot_of(key)
            assert slot is not None
            expert: Any = self.store.expert(slot)
            assert expert.data_ptr() == self.store.block(slot).data_ptr()
            contents[key] = digest(expert)
        return contents

    def _begin(self, key: ExpertKey) -> None:
        slot = self.cache.admit(key, pinned=self.put_off)
        assert slot is not None
        self.put_off[key] = self.store.load(key, slot)


operations = st.one_of(
    st.tuples(st.just("load"), keys, st.just(0)),
    st.tuples(st.just("prefetch"), keys, st.integers(0, 4)),
    st.tuples(st.just("cancel"), keys, st.just(0)),
)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(3, 7), st.lists(operations, max_size=60))
def test_whatever_is_put_off_or_cancelled_what_counts_as_there_is_whole(
    installed, truth, small_steps, slots, events
):
    memory = Slots(installed, slots)
    for what, key, steps in [*events, *(("load", key, 0) for key in KEYS)]:
        if what == "load":
            memory.load(key)
        elif what == "prefetch":
            memory.prefetch(key, steps)
        else:
            memory.cancel(key)
        assert memory.contents().items() <= truth.items()
        assert memory.store.nbytes <= slots * installed.blueprint.expert.stride


def test_a_store_counts_the_bytes_of_experts_that_have_come(installed):
    memory, size = Slots(installed, 2), installed.blueprint.expert.stride
    memory.load(A)
    memory.prefetch(B, 1)
    assert (memory.stats.bytes_moved, memory.store.nbytes) == (size, size)
    memory.load(B)
    assert (memory.stats.bytes_moved, memory.store.nbytes) == (2 * size, 2 * size)


def test_a_load_into_a_slot_that_was_given_back_ends_in_nothing(installed, truth):
    memory = Slots(installed, 2)
    on_its_way = memory.store.load(A, 0)
    next(on_its_way)
    memory.store.release(0)
    memory.load(B)  # into the same slot, in new memory
    for _ in on_its_way:
        pass
    assert memory.contents() == {B: truth[B]}


def test_a_load_that_failed_leaves_no_half_expert(installed, truth, monkeypatch):
    memory = Slots(installed, 2)

    def fail(*_: Any, **__: Any) -> None:
        raise CheckpointError("the disk says no")

    with monkeypatch.context() as patch:
        patch.setattr(InstalledModel, "read_expert", fail)
        with pytest.raises(CheckpointError, match="says no"):
            memory.load(A)
    memory.cache.discard(A)
    memory.load(A)
    assert memory.contents() == {A: truth[A]}
