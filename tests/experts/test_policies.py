from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st
from routing_traces import A, B, C, D, keys, used

from mixchat.experts.cache import LRU, POLICIES, ExpertKey, LayeredLRU, Passes, Policy


@given(st.lists(st.tuples(keys, st.booleans())))
def test_lru_gives_up_first_what_was_used_longest_ago(events: list[tuple[ExpertKey, bool]]) -> None:
    policy, recent = LRU(), []
    for key, goes in events:
        recent = [other for other in recent if other != key]
        if goes:
            policy.forget(key)
        else:
            policy.use(key)
            recent.append(key)
    assert list(policy.victims()) == recent


def test_layered_lru_does_as_its_docstring_says() -> None:
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


def test_layered_lru_is_lru_among_the_experts_of_a_layer() -> None:
    passes = Passes(1)
    policy = LayeredLRU(passes)
    for key in (A, B, C, A, D, B):
        passes.enter(0)
        policy.use(key)
    assert list(policy.victims()) == [C, A, D, B]


def test_what_was_predicted_for_a_layer_to_come_is_given_up_after_what_has_been_used() -> None:
    passes = Passes(4)
    policy = LayeredLRU(passes)
    for layer in range(4):
        passes.enter(layer)
        policy.use(ExpertKey(layer, 0))
    passes.enter(0)
    policy.use(predicted := ExpertKey(1, 1))
    assert predicted in list(policy.victims())[-2:]


@pytest.mark.parametrize("make", POLICIES.values())
def test_to_forget_what_is_not_there_changes_nothing(make: Callable[[Passes], Policy]) -> None:
    policy = make(Passes(1))
    used(policy, A, B)
    policy.forget(C)
    policy.forget(A)
    policy.forget(A)
    assert list(policy.victims()) == [B]
