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


def filled(*experts: ExpertKey) -> ExpertCache:
    cache = ExpertCache([0] * len(experts), LRU())
    for key in experts:
        cache.admit(key)
    return cache


@given(st.integers(1, 6), st.lists(st.tuples(keys, st.integers(0, 9)), max_size=80))
def test_it_does_what_a_naive_list_does(slots, uses):
    """The naive model: a list of keys, most recent last, cut to the size of the cache."""
    cache, recent, where = ExpertCache([0] * slots, LRU()), [], {}
    for key, luck in uses:
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
@given(events=st.lists(operations, max_size=60))
def test_whatever_happens_no_slot_is_lost_or_shared_and_nothing_pinned_goes(make, events):
    passes = Passes(4)
    cache = ExpertCache([0] * 5, make(passes))
    for what, key, pinned, number in events:
        passes.enter(key.layer)
        before = {other: cache.slot_of(other) for other in cache}
        if what == "resize":
            cache.resize(number, pinned)
            assert len(cache) <= max(cache.limit, len(pinned & set(before)))
        elif what == "discard" and key in cache:
            cache.discard(key)
            pinned = pinned - {key}
        elif what != "discard" and cache.lookup(key) is None:
            slot = cache.admit(key, pinned)
            assert slot == cache.slot_of(key)
            assert slot is not None or set(cache) <= pinned
            assert slot is None or len(cache) <= cache.limit
        taken = {other: cache.slot_of(other) for other in cache}
        assert len(set(taken.values())) == len(taken) == len(cache)
        assert cache.free_slots() == set(range(5)) - set(taken.values())
        for other in before:
            assert other in cache or other not in pinned
        for other in set(taken) & set(before):  # what stays is not moved
            assert taken[other] == before[other]


@policies
@given(events=st.lists(operations, max_size=60))
def test_an_expert_only_takes_a_slot_of_its_size(make, events):
    """Layers 0 and 2 have one size, 1 and 3 the other, and of 5 slots 3 and 2."""
    passes = Passes(4)
    cache = ExpertCache([0, 1, 0, 1, 0], make(passes), lambda layer: layer % 2)
    for what, key, pinned, number in events:
        passes.enter(key.layer)
        if what == "resize":
            cache.resize(number, pinned)
        elif what == "discard":
            cache.discard(key)
        elif cache.lookup(key) is None:
            slot = cache.admit(key, pinned)
            assert slot is None or slot % 2 == key.layer % 2
            alike = {other for other in cache if other.layer % 2 == key.layer % 2}
            assert slot is not None or alike <= pinned or set(cache) <= pinned
            assert slot is None or len(cache) <= cache.limit
        taken = {cache.slot_of(other) for other in cache}
        assert len(taken) == len(cache)
        assert cache.free_slots() == set(range(5)) - taken


def test_of_free_slots_a_preferred_one_is_taken():
    cache = ExpertCache([0] * 4, LRU())
    assert cache.admit(A, preferred={2, 3}) == 2
    assert cache.admit(B, preferred={2}) == 0
    assert cache.admit(C, preferred={3}) == 3


def test_lookup_is_a_use_and_slot_of_is_none():
    cache = filled(A, B)
    assert cache.slot_of(A) == 0
    cache.admit(C)
    assert set(cache) == {B, C}
    cache.lookup(B)
    cache.admit(A)
    assert set(cache) == {A, B}
    assert cache.slot_of(C) is None


def test_what_is_pinned_stays_and_where_all_is_there_is_no_slot():
    cache = filled(A, B)
    assert cache.admit(C, pinned=[A]) == 1
    assert cache.admit(D, pinned=[A, C]) is None
    assert set(cache) == {A, C}


def test_a_smaller_limit_evicts_and_a_larger_one_lets_in_again():
    cache = filled(A, B, C)
    cache.resize(1)
    assert set(cache) == {C}
    assert cache.free_slots() == {0, 1}
    assert cache.admit(A) == 2
    assert set(cache) == {A}
    cache.resize(3)
    assert (cache.admit(B), cache.admit(C)) == (0, 1)
    assert len(cache) == 3


def test_a_limit_is_at_least_one_and_at_most_all_slots():
    cache = filled(A, B)
    cache.resize(0)
    assert (cache.limit, set(cache)) == (1, {B})
    cache.resize(9)
    assert cache.limit == 2


def test_what_is_pinned_may_exceed_a_limit_until_it_is_pinned_no_more():
    cache = filled(A, B, C)
    cache.resize(1, pinned=[A, B])
    assert set(cache) == {A, B}
    assert cache.admit(D, pinned=[A, B]) is None
    cache.admit(D)
    assert set(cache) == {D}


def test_a_cache_may_change_while_it_is_gone_through():
    cache = filled(A, B)
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
