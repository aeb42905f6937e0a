from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mixchat.experts.keys import ExpertKey
from mixchat.experts.policies import LFU, LRU, POLICIES, Belady, LayeredLRU, Passes, Policy

A, B, C, D = (ExpertKey(0, expert) for expert in range(4))
keys = st.sampled_from([A, B, C, D, ExpertKey(1, 0)])


def used(policy: Policy, *uses: ExpertKey) -> list[ExpertKey]:
    for key in uses:
        policy.use(key)
    return list(policy.victims())


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


def test_lfu_gives_up_first_what_was_used_least() -> None:
    assert used(LFU(), A, A, A, B, C, C) == [B, C, A]


def test_lfu_decides_between_equals_by_the_last_use() -> None:
    assert used(LFU(), A, B, C, C, B, A) == [C, B, A]


def test_lfu_remembers_the_uses_of_an_expert_that_went() -> None:
    policy = LFU()
    used(policy, A, A, A)
    policy.forget(A)
    assert used(policy, B, B) == [B]
    assert used(policy, A) == [B, A]


def test_a_use_a_half_life_ago_counts_half() -> None:
    """Three uses of A, and B's two come 10 uses later: 1.5 against 2."""
    assert used(LFU(half_life=10), A, A, A, *[C] * 7, B, B)[:2] == [A, B]
    assert used(LFU(half_life=1000), A, A, A, *[C] * 7, B, B)[:2] == [B, A]


@given(st.lists(keys, max_size=30), st.lists(keys, min_size=1, max_size=30))
def test_lfu_orders_as_sums_of_fading_uses_do_also_after_rescaling(
    early: list[ExpertKey], late: list[ExpertKey]
) -> None:
    """With a half-life of one use the weights pass 1e200 in 665 uses, and are scaled down."""
    uses = [*early, *[A] * 650, *late]
    # An expert's uses, the last of all worth 1: what went below a float's reach is worth nothing.
    scores = dict.fromkeys(uses, 0.0)
    for age, key in enumerate(reversed(uses)):
        scores[key] += 0.5**age
    last = {key: time for time, key in enumerate(uses)}
    naive = sorted(scores, key=lambda key: (scores[key], last[key]))
    assert used(LFU(half_life=1), *uses) == naive


def test_lfu_does_not_overflow() -> None:
    policy = LFU(half_life=1)
    assert used(policy, B, *[A] * 5000) == [B, A]
    assert used(policy, *[B] * 3) == [A, B]


def test_belady_gives_up_first_what_is_used_again_last() -> None:
    uses = [A, B, C, B, C, A]
    assert used(Belady(uses), *uses[:3]) == [A, C, B]


def test_belady_gives_up_first_of_all_what_is_never_used_again() -> None:
    assert used(Belady([A, B, C, B, A]), A, B, C) == [C, A, B]


def test_belady_counts_uses_that_came_before_an_expert_went() -> None:
    policy = Belady([A, B, A, C, B, A])
    used(policy, A, B)
    policy.forget(A)
    assert list(policy.victims()) == [B]
    assert used(policy, A, C) == [C, A, B]


@pytest.mark.parametrize("make", [*POLICIES.values(), lambda passes: Belady([A, B])])
def test_to_forget_what_is_not_there_changes_nothing(make: Callable[[Passes], Policy]) -> None:
    policy = make(Passes(1))
    used(policy, A, B)
    policy.forget(C)
    policy.forget(A)
    policy.forget(A)
    assert list(policy.victims()) == [B]
