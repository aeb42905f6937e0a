"""The sources of experts: whatever is loaded, put off or cancelled, their bytes are right."""

import errno
import hashlib
import itertools
import math
import os
import shutil
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import nullcontext
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mixchat.base.errors import CheckpointError, ResourceError
from mixchat.experts import sources
from mixchat.experts.cache import LRU, ExpertCache, ExpertKey, ExpertStats
from mixchat.experts.mover import Steps
from mixchat.experts.sources import DiskSource, HostSource
from mixchat.experts.store import ExpertSource, ExpertStore, new_block
from mixchat.weights.format.installed_model import InstalledModel

CPU = torch.device("cpu")
LAYERS, EXPERTS = 4, 4
KEYS = [ExpertKey(layer, expert) for layer in range(LAYERS) for expert in range(EXPERTS)]
A, B, C, D = KEYS[0], KEYS[1], KEYS[2], KEYS[3]
keys = st.sampled_from(KEYS)


@pytest.fixture(scope="module", autouse=True)
def small_steps() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sources, "STEP", 4096)
        yield


@pytest.fixture(scope="module")
def directory(make_checkpoint: Callable[..., Path], install: Callable[..., Path]) -> Path:
    """A model of sixteen experts. Do not write into it."""
    return install(make_checkpoint(num_hidden_layers=LAYERS))


@pytest.fixture(scope="module")
def installed(directory: Path) -> Iterator[InstalledModel]:
    with InstalledModel(directory) as installed:
        yield installed


@pytest.fixture(scope="module")
def truth(installed: InstalledModel) -> dict[ExpertKey, str]:
    """The digest of every expert's bytes, each read in one go."""
    digests = {key: digest(whole(installed, key)) for key in KEYS}
    assert len(set(digests.values())) == len(KEYS)
    return digests


@pytest.fixture
def a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks on the CPU pass for blocks elsewhere: they are on `cpu`, which is not `cpu:0`."""
    monkeypatch.setattr(sources, "CPU", torch.device("cpu:0"))


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
        self.cache = ExpertCache(slots)
        self.store = ExpertStore(
            source,
            stored=lambda _: layout,
            used=lambda _: layout,
            size=lambda _: stride,
            device=CPU,
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


def test_all_ways_from_disk_read_the_same_bytes(directory, truth, monkeypatch):
    ways: Counter[tuple[bool, bool]] = Counter()
    read = InstalledModel.read_expert

    def noted(self, *args, direct=False):
        ways[direct, any(args[2].data_ptr() == one.data_ptr() for one in source._stages)] += 1
        read(self, *args, direct=direct)

    monkeypatch.setattr(InstalledModel, "read_expert", noted)
    with InstalledModel(directory) as installed:
        source = DiskSource(installed, ExpertStats(), choose=True)
        for _ in range(4):
            for key in KEYS:
                assert load(source, key, installed.blueprint.expert.stride) == truth[key]
        # They take turns.
        assert ways[False, False] >= 4
        if installed.open_direct():
            assert ways[True, False] >= 4 <= ways[True, True]
        assert source.tier(A) == "disk"


def test_without_a_choice_it_reads_through_the_page_cache(installed, monkeypatch, truth):
    monkeypatch.setattr(installed, "open_direct", lambda: pytest.fail("not asked for"))
    source = DiskSource(installed, ExpertStats(), choose=False)
    assert load(source, B, installed.blueprint.expert.stride) == truth[B]


def test_where_the_system_cannot_read_past_the_page_cache_it_reads_through_it(
    directory, truth, monkeypatch
):
    opened = os.open

    def refused(path, flags, *args):
        if flags & getattr(os, "O_DIRECT", 0):
            raise OSError(errno.EINVAL, "Invalid argument")
        return opened(path, flags, *args)

    monkeypatch.setattr(os, "open", refused)
    with InstalledModel(directory) as installed:
        source = DiskSource(installed, ExpertStats(), choose=True)
        for key in KEYS:
            assert load(source, key, installed.blueprint.expert.stride) == truth[key]


def test_bytes_that_are_read_and_the_time_are_counted(directory, monkeypatch):
    monkeypatch.setattr(sources, "STEP", 3 * 4096)  # an expert's last read is shorter
    times = itertools.count()
    monkeypatch.setattr(sources.time, "perf_counter", lambda: float(next(times)))
    for choose in (False, True):
        with InstalledModel(directory) as installed:
            stats, size = ExpertStats(), installed.blueprint.expert.stride
            source = DiskSource(installed, stats, choose=choose)
            for key in (A, B, C):
                load(source, key, size)
            assert stats.bytes_read == 3 * size
            assert stats.read_seconds == 3 * (1 + math.ceil(size / sources.STEP))


def test_it_reads_in_steps(installed, monkeypatch):
    monkeypatch.setattr(sources, "AT_ONCE", 1)
    right = whole(installed, C)
    block = torch.full_like(right, 0xEE)
    steps = DiskSource(installed, ExpertStats(), choose=False).load(C, block, None)
    assert len(block) >= 2 * 4096
    for done in range(4096, len(block) + 1, 4096):
        next(steps)
        assert torch.equal(block[:done], right[:done])
        assert bool((block[done:] == 0xEE).all())
    assert next(steps, "there") == "there"


@pytest.mark.parametrize("on_a_gpu", [False, True])
def test_where_no_thread_can_be_started_reads_that_wait_for_one_end_too(
    installed, truth, monkeypatch, request, on_a_gpu
):
    """They were waited for without an end."""

    class Full:
        reads: ClassVar[list[Future[int]]] = []

        def submit(self, *_):
            if len(self.reads) == 2:
                raise RuntimeError("can't start new thread")
            self.reads.append(Future())
            return self.reads[-1]

        def shutdown(self, **_):
            for read in self.reads:
                read.cancel()

    if on_a_gpu:
        request.getfixturevalue("a_gpu")
    source = DiskSource(installed, ExpertStats(), choose=False)
    readers: Any = Full()
    monkeypatch.setattr(source, "_readers", readers)
    with pytest.raises(ResourceError, match="cannot start a thread"):
        load(source, A, installed.blueprint.expert.stride)
    assert load(source, B, installed.blueprint.expert.stride) == truth[B]


@pytest.mark.usefixtures("a_gpu")
def test_loads_to_a_gpu_that_put_each_other_off_do_not_mix(installed, truth):
    """The bytes pass through RAM, where the next load finds the same place."""
    source = DiskSource(installed, ExpertStats(), choose=False)
    blocks = [new_block(installed.blueprint.expert.stride, CPU) for _ in range(3)]
    late, later = source.load(A, blocks[0], None), source.load(B, blocks[1], None)
    next(late)
    next(later)
    for _ in source.load(C, blocks[2], D):
        pass
    for steps in (late, later):
        for _ in steps:
            pass
    assert [digest(block) for block in blocks] == [truth[A], truth[B], truth[C]]


@pytest.mark.parametrize("resumes", [False, True])
def test_reads_of_a_load_that_was_put_off_never_fill_the_slot_of_another_expert(
    directory, truth, monkeypatch, resumes
):
    """A prefetch that is put off and cancelled leaves its slot to an expert that is requested,
    and that one is read first: the reads that were in flight must not come behind its own. They
    did where the prefetch had been put off before, and had resumed."""
    read = InstalledModel.read_expert

    def slow(self, *given, **how):
        layer, expert, _, start = given
        if (layer, expert) == A and start:
            threading.Event().wait(0.3)
        read(self, *given, **how)

    monkeypatch.setattr(InstalledModel, "read_expert", slow)
    with InstalledModel(directory) as installed:
        source = DiskSource(installed, ExpertStats(), choose=True)
        block, other = (new_block(installed.blueprint.expert.stride, CPU) for _ in range(2))
        put_off = source.load(A, block, None)
        next(put_off)
        if resumes:
            for _ in source.load(C, other, None):
                pass
            next(put_off)
        for _ in source.load(B, block, None):
            pass
        put_off.close()
        assert digest(block) == truth[B]


@pytest.mark.parametrize("choose", [True, False])
@pytest.mark.parametrize("missing", [1, 4096, 5000])
def test_a_file_cut_short_after_it_was_opened_is_named(directory, tmp_path, choose, missing):
    copy = Path(shutil.copytree(directory, tmp_path / "installed"))
    with InstalledModel(copy) as installed:
        size = installed.blueprint.expert.stride
        source = DiskSource(installed, ExpertStats(), choose=choose)
        file = copy / "experts-002.safetensors"
        os.truncate(file, file.stat().st_size - missing)
        load(source, ExpertKey(2, EXPERTS - 2), size)
        for _ in range(2):
            with pytest.raises(CheckpointError, match=r"experts-002\.safetensors: cut short"):
                load(source, ExpertKey(2, EXPERTS - 1), size)
        load(source, A, size)


@pytest.mark.parametrize("choose", [True, False])
def test_a_read_error_is_raised_with_the_files_name(directory, choose, monkeypatch):
    def broken(*args):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with InstalledModel(directory) as installed:
        size = installed.blueprint.expert.stride
        source = DiskSource(installed, ExpertStats(), choose=choose)
        monkeypatch.setattr(os, "preadv", broken)
        said = r"experts-001\.safetensors: cannot be read \(Input/output error\)"
        with pytest.raises(CheckpointError, match=said):
            load(source, ExpertKey(1, 0), size)
        monkeypatch.undo()
        load(source, ExpertKey(1, 0), size)


@settings(deadline=None)
@given(st.lists(keys, max_size=60))
def test_where_ram_has_room_for_all_each_is_read_from_disk_once(installed, truth, wanted):
    disk = Disk(installed)
    tier = tier_of(disk, len(KEYS), swaps=False)
    device = Device(tier, disk.stride, 2)
    for key in wanted:
        device.load(key)
        assert device.contents().items() <= truth.items()
    assert disk.reads == Counter(set(wanted))
    assert {key for key in KEYS if tier.tier(key) == "host"} == set(wanted)


@settings(deadline=None)
@given(st.integers(2, 5), st.integers(4, 9), st.lists(keys, max_size=80))
def test_with_swaps_both_memories_together_hold_as_many_as_they_can(
    installed, truth, slots, host_slots, wanted
):
    _, tier, device = tiers(installed, host_slots, slots, swaps=True)
    for number, key in enumerate(wanted, 1):
        device.load(key)
        there = device.contents()
        assert there.items() <= truth.items()
        held = set(there) | {key for key in KEYS if tier.tier(key) == "host"}
        assert len(held) >= min(len(set(wanted[:number])), slots + host_slots - 1)


def test_with_swaps_one_that_goes_up_leaves_its_place_to_the_one_it_drives_out(installed, truth):
    disk, tier, device = tiers(installed, 4, 2, swaps=True)
    for key in (A, B, C):  # A comes down
        device.load(key)
    assert [tier.tier(key) for key in (A, B, C)] == ["host", "disk", "disk"]
    for key in (A, B, C, A, B, C):  # each is what the last one drove out
        device.load(key)
    assert disk.reads == Counter({A: 1, B: 1, C: 1})
    assert device.contents() == {key: truth[key] for key in (B, C)}
    assert [tier.tier(key) for key in (A, B, C)] == ["host", "disk", "disk"]


operations = st.one_of(
    st.tuples(st.just("load"), keys, st.just(0)),
    st.tuples(st.just("prefetch"), keys, st.integers(0, 4)),
    st.tuples(st.just("cancel"), keys, st.just(0)),
)


@pytest.mark.parametrize("swaps", [True, False])
@settings(deadline=None, max_examples=200)
@given(st.integers(3, 7), st.integers(4, 9), st.lists(operations, max_size=60))
def test_whatever_is_put_off_or_cancelled_what_counts_as_there_is_whole(
    installed, truth, swaps, slots, host_slots, events
):
    disk, tier, device = tiers(installed, host_slots, slots, swaps=swaps)
    for what, key, steps in [*events, *(("load", key, 0) for key in KEYS)]:
        in_ram, reads = tier.tier(key) == "host", disk.reads[key]
        if what == "load":
            device.load(key)
        elif what == "prefetch":
            device.prefetch(key, steps)
        else:
            device.cancel(key)
        assert device.contents().items() <= truth.items()
        assert disk.reads[key] == reads or not in_ram
    assert not (set(device.contents()) & set(device.put_off))


@pytest.mark.parametrize("lends", [False, True])
def test_an_expert_goes_up_from_ram_while_as_many_as_there_may_be_are_put_off(
    installed, truth, lends
):
    """The one that it evicts needs a slot, beside all that are half and one that is lent."""
    disk, tier, device = tiers(installed, 4, 6, swaps=True)
    for key in KEYS[:8]:
        device.load(key)
    assert (tier.tier(A), tier.tier(B)) == ("host", "host")
    with tier.borrow(A) if lends else nullcontext() as lent:
        for key in KEYS[8:12]:
            device.prefetch(key, 1)
        device.load(B)
        block: Any = lent
        assert not lends or digest(block) == truth[A]
    assert disk.reads[B] == 1
    for key in KEYS:
        device.load(key)
        assert device.contents().items() <= truth.items()


def test_what_was_half_written_over_does_not_come_down(installed, truth):
    _, _, device = tiers(installed, 4, 8, swaps=True)
    for key in KEYS[:8]:
        device.load(key)
    for key in KEYS[8:12]:  # those that find no place in RAM go straight into their slots
        device.prefetch(key, 1)
    for key in KEYS[8:12]:
        device.cancel(key)
    for key in KEYS[12:]:  # into the same slots
        device.load(key)
    for key in reversed(KEYS[:4]):
        device.load(key)
    assert device.contents().items() <= truth.items()


def test_what_is_borrowed_from_ram_stays_as_it_is_until_it_is_given_back(installed, truth):
    disk, tier, device = tiers(installed, 4, 3, swaps=True)
    for key in (A, B, C, D):  # A comes down
        device.load(key)
    with tier.borrow(A) as lent:
        block: Any = lent
        for key in (*KEYS[4:12], A, *KEYS[4:12]):  # in their midst it goes up
            device.load(key)
            assert digest(block) == truth[A]
            assert tier.tier(A) == "host"
    assert disk.reads[A] == 1
    device.load(A)
    assert tier.tier(A) == "disk"  # it has gone up, and left its place
    for key in KEYS[4:12]:
        device.load(key)
        assert device.contents().items() <= truth.items()


def test_only_what_is_whole_in_ram_is_lent(installed, truth):
    tier = tier_of(Disk(installed), 4, swaps=False)
    steps = tier.load(A, new_block(installed.blueprint.expert.stride, CPU), None)
    for _ in range(2):
        with tier.borrow(A) as lent:
            assert lent is None
        next(steps)
    for _ in steps:
        pass
    with tier.borrow(A) as lent:
        block: Any = lent
        assert digest(block) == truth[A]


@pytest.mark.parametrize("swaps", [True, False])
def test_what_is_being_copied_into_ram_is_not_lent(installed, swaps):
    """Whoever computes asks at any time: also while the place is being made for the bytes."""
    seen: list[str] = []
    disk = Disk(installed)
    tier = host_source(
        disk,
        4,
        swaps=swaps,
        lock=lambda block: seen.extend(tier.tier(key) for key in (B, A)),
    )
    device = Device(tier, disk.stride, 2)
    for key in (A, B, C):  # with swaps, A comes down into a new place
        device.load(key)
    assert seen[:2] == ["disk", "disk"]
    assert seen[-2:] == (["disk", "disk"] if swaps else ["host", "host"])


@pytest.mark.parametrize("swaps", [True, False])
@pytest.mark.parametrize("steps", [1, 2])
def test_a_load_that_was_cancelled_leaves_no_half_expert(installed, truth, swaps, steps):
    disk = Disk(installed)
    tier = tier_of(disk, 4, swaps=swaps)
    block = new_block(disk.stride, CPU)
    cancelled = tier.load(A, block, None)
    for _ in range(steps):
        next(cancelled)
        assert tier.tier(A) == "disk"
    cancelled.close()
    assert tier.tier(A) == "disk"
    assert load(tier, A, disk.stride) == truth[A]
    assert disk.reads[A] == 2


@pytest.mark.parametrize("swaps", [True, False])
def test_one_that_was_put_off_may_be_loaded_again_before_it_is_closed(installed, truth, swaps):
    disk = Disk(installed)
    tier = tier_of(disk, 4, swaps=swaps)
    old = tier.load(A, new_block(disk.stride, CPU), None)
    next(old)
    assert load(tier, A, disk.stride) == truth[A]
    before = tier.tier(A)
    old.close()
    assert tier.tier(A) == before == ("disk" if swaps else "host")
    assert load(tier, A, disk.stride) == truth[A]


@pytest.mark.parametrize("swaps", [True, False])
def test_a_load_that_failed_leaves_no_half_expert(installed, truth, swaps):
    disk = Disk(installed)
    tier = tier_of(disk, 4, swaps=swaps)
    disk.fails = True
    with pytest.raises(CheckpointError, match="says no"):
        load(tier, A, disk.stride)
    disk.fails = False
    assert tier.tier(A) == "disk"
    assert load(tier, A, disk.stride) == truth[A]


def test_where_there_is_no_memory_for_a_place_nothing_counts_as_being_there(installed, truth):
    refusals = [RuntimeError("no memory")]

    def lock(block):
        if refusals:
            raise refusals.pop()

    disk = Disk(installed)
    tier = host_source(disk, 4, swaps=False, lock=lock)
    with pytest.raises(RuntimeError, match="no memory"):
        load(tier, A, disk.stride)
    assert tier.tier(A) == "disk"
    assert load(tier, A, disk.stride) == truth[A]


def test_each_place_in_ram_is_locked_once_and_begins_with_a_page(installed):
    locked: list[torch.Tensor] = []
    disk = Disk(installed)
    device = Device(host_source(disk, 4, swaps=True, lock=locked.append), disk.stride, 2)
    for key in KEYS * 2:
        device.load(key)
    assert len({block.data_ptr() for block in locked}) == len(locked) == 4
    assert all(block.data_ptr() % 4096 == 0 and len(block) == disk.stride for block in locked)


def test_a_store_counts_what_came_and_says_where_experts_are(installed):
    disk = Disk(installed)
    device = Device(disk, disk.stride, 2)
    device.load(A)
    device.prefetch(B, 1)
    assert device.store.bytes_moved == disk.stride
    device.load(B)
    assert device.store.bytes_moved == 2 * disk.stride
    assert device.store.tier(A, resident=True) == "host"
    assert device.store.tier(A, resident=False) == "disk"


def test_a_load_into_a_slot_that_was_given_back_ends_in_nothing(installed, truth):
    disk = Disk(installed)
    device = Device(disk, disk.stride, 2)
    on_its_way = device.store.load(A, 0)
    next(on_its_way)
    device.store.release(0)
    device.load(B)  # into the same slot, in new memory
    for _ in on_its_way:
        pass
    assert device.contents() == {B: truth[B]}
