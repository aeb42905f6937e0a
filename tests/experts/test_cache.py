"""Bookkeeping of experts: slots, eviction policies, counts of uses."""

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st
from routing_simulation import LRU, POLICIES
from routing_traces import A, B, C, D

from mixchat.experts.cache import ExpertCache, ExpertKey, ExpertStats, LayeredLRU, Passes

keys = st.builds(ExpertKey, st.integers(0, 3), st.integers(0, 3))
policies = pytest.mark.parametrize("make", POLICIES.values(), ids=POLICIES)


@given(st.integers(1, 6), st.lists(st.tuples(keys, st.integers(0, 9)), max_size=80))
def test_it_does_what_a_naive_list_does(slots, uses):
    """The naive model: a list of keys, most recent last, cut to the size of the cache."""
    cache, recent, where = ExpertCache([0] * slots, LRU()), [], {}
    for key, luck in uses:
        cache.slot_of(key)  # is no use
        slot = cache.lookup(key)
        assert (slot is not None) == (key in recent)
        if slot is None:
            slot = cache.admit(key)
            if luck == 0:  # the bytes did not arrive
                cache.discard(key)
                recent = recent[1:] if len(recent) == slots else recent
                continue
        else:
            assert slot == where[key]
        recent = [*(k for k in recent if k != key), key][-slots:]
        where[key] = slot
        assert [k in cache for k in where] == [k in recent for k in where]
        assert len(cache) == len(recent)
        # No two experts in one slot.
        assert len({where[k] for k in recent}) == len(recent)
        assert 0 <= slot < slots


operations = st.tuples(
    st.sampled_from(["use", "use", "use", "discard", "resize"]),
    keys,
    st.sets(keys, max_size=4),
    st.integers(0, 7),
)


@policies
@pytest.mark.parametrize("sizes", [1, 2], ids=["one size", "two sizes"])
@given(events=st.lists(operations, max_size=60))
def test_no_slot_is_lost_or_shared_nothing_pinned_goes_and_sizes_fit(make, sizes, events):
    """With two sizes, layers 0 and 2 have one, 1 and 3 the other, and of 5 slots 3 and 2."""
    passes = Passes(4)
    slot_sizes = [slot % sizes for slot in range(5)]
    cache = ExpertCache(slot_sizes, make(passes), lambda layer: layer % sizes)
    for what, key, pinned, number in events:
        passes.enter(key.layer)
        size = key.layer % sizes
        before = {other: cache.slot_of(other) for other in cache}
        if what == "resize":
            cache.resize(number, pinned)
            assert cache.limit == max(1, min(number, 5))
            assert len(cache) <= max(cache.limit, len(pinned & set(before)))
        elif what == "discard" and key in cache:
            cache.discard(key)
            pinned = pinned - {key}
        elif what != "discard" and cache.lookup(key) is None:
            free = {slot for slot in cache.free_slots() if slot_sizes[slot] == size}
            slot = cache.admit(key, pinned, preferred := set(range(number, 5)))
            assert slot == cache.slot_of(key)
            if slot is None:
                alike = {other for other in cache if other.layer % sizes == size}
                assert alike <= pinned or set(cache) <= pinned
            else:
                assert slot_sizes[slot] == size
                assert len(cache) <= cache.limit
                if len(before) < cache.limit:
                    assert slot in (free & preferred or free or {slot})
        taken = {other: cache.slot_of(other) for other in cache}
        assert len(set(taken.values())) == len(taken) == len(cache)
        assert cache.free_slots() == set(range(5)) - set(taken.values())
        for other in before:
            assert other in cache or other not in pinned
        for other in set(taken) & set(before):  # what stays is not moved
            assert taken[other] == before[other]


def test_a_cache_may_change_while_it_is_gone_through():
    cache = ExpertCache([0] * 2, LRU())
    for key in (A, B):
        cache.admit(key)
    for key in cache:
        cache.discard(key)
    assert len(cache) == 0


def test_layered_lru_evicts_the_layer_that_is_needed_last():
    passes = Passes(3)
    a, b, c = (ExpertKey(layer, 0) for layer in range(3))
    layered, plain = LayeredLRU(passes), LRU()
    for key in (a, b, c):
        passes.enter(key.layer)
        layered.use(key)
        plain.use(key)
    passes.enter(0)
    assert list(layered.victims()) == [a, c, b]
    assert list(plain.victims()) == [a, b, c]


def test_layered_lru_is_lru_among_the_experts_of_a_layer():
    passes = Passes(1)
    policy = LayeredLRU(passes)
    for key in (A, B, C, A, D, B):
        passes.enter(0)
        policy.use(key)
    assert list(policy.victims()) == [C, A, D, B]


def test_what_was_predicted_for_a_layer_to_come_is_given_up_after_what_has_been_used():
    passes = Passes(4)
    policy = LayeredLRU(passes)
    for layer in range(4):
        passes.enter(layer)
        policy.use(ExpertKey(layer, 0))
    passes.enter(0)
    policy.use(predicted := ExpertKey(1, 1))
    assert predicted in list(policy.victims())[-2:]


def test_the_hit_rate_is_of_all_uses_and_none_before_the_first():
    assert ExpertStats().hit_rate == 0
    assert ExpertStats(Counter({A: 2, B: 1}), Counter({B: 1})).hit_rate == 0.75


def test_since_is_what_came_between():
    before = ExpertStats(Counter({A: 5}), Counter({B: 2}), 100, 1.0, 4, 3)
    now = ExpertStats(Counter({A: 5, B: 1}), Counter({B: 4}), 250, 1.5, 6, 3)
    assert now.since(before) == ExpertStats(Counter({B: 1}), Counter({B: 2}), 150, 0.5, 2, 0)
