"""The source of experts in RAM: whatever is put off or cancelled, their bytes are right."""

from collections import Counter
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from source_tools import (
    CPU,
    KEYS,
    A,
    B,
    C,
    D,
    Device,
    Disk,
    digest,
    host_source,
    load,
    tier_of,
    tiers,
)

from mixchat.base.errors import CheckpointError
from mixchat.experts.store import new_block

keys = st.sampled_from(KEYS)


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
@settings(max_examples=200)
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
    assert device.stats.bytes_moved == disk.stride
    device.load(B)
    assert device.stats.bytes_moved == 2 * disk.stride
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
