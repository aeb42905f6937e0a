"""The policies that only the benchmark has, against naive ones and against trying everything."""

from itertools import permutations

from cache_policies import LFU, NAMES, replay, replay_on_gpu
from hypothesis import given, settings
from hypothesis import strategies as st
from routing_simulation import Counts, Trace
from routing_traces import A, B, C, keys, trace, traces, used

from mixchat.experts.cache import ExpertKey


def test_lfu_decides_between_equals_by_the_last_use():
    assert used(LFU(), A, B, C, C, B, A) == [C, B, A]


def test_lfu_remembers_the_uses_of_an_expert_that_went():
    policy = LFU()
    used(policy, A, A, A)
    policy.forget(A)
    assert used(policy, B, B) == [B]
    assert used(policy, A) == [B, A]


def test_a_use_a_half_life_ago_counts_half():
    """Three uses of A, and B's two come 10 uses later: 1.5 against 2."""
    assert used(LFU(half_life=10), A, A, A, *[C] * 7, B, B)[:2] == [A, B]
    assert used(LFU(half_life=1000), A, A, A, *[C] * 7, B, B)[:2] == [B, A]


@given(st.lists(keys, max_size=30), st.lists(keys, min_size=1, max_size=30))
def test_lfu_orders_as_sums_of_fading_uses_do_also_after_rescaling(early, late):
    """With a half-life of one use the weights pass 1e200 in 665 uses, and are scaled down."""
    uses = [*early, *[A] * 650, *late]
    # An expert's uses, the last of all worth 1: what went below a float's reach is worth nothing.
    scores = dict.fromkeys(uses, 0.0)
    for age, key in enumerate(reversed(uses)):
        scores[key] += 0.5**age
    last = {key: time for time, key in enumerate(uses)}
    naive = sorted(scores, key=lambda key: (scores[key], last[key]))
    assert used(LFU(half_life=1), *uses) == naive


def test_a_prefill_costs_lfu_none_of_its_favourites():
    """Evicting the most used first would leave decode a cache of the least used."""
    favourites = [[[0, 1], [0, 1]]] * 50
    made = trace(*favourites, [[0, 1, 2, 3], [0, 1, 2, 3]], favourites[0])
    after = replay(made, 5, "lfu").decode
    assert after.misses - replay(trace(*favourites), 5, "lfu").decode.misses <= 1


@given(traces(forwards=25, layers=3, tokens=3), st.integers(1, 12))
def test_the_oracle_is_never_worse_than_a_policy(made, slots):
    def misses(policy):
        result = replay(made, slots, policy)
        return result.prefill.misses + result.decode.misses

    assert all(misses("belady") <= misses(policy) for policy in NAMES)


def fewest_misses(made: Trace, slots: int, *, hits_first: bool) -> int:
    """By trying everything: every order of the experts of a layer, and every victim."""
    states: dict[frozenset[ExpertKey], int] = {frozenset(): 0}
    for forward in made.forwards:
        for layer, selected in enumerate(forward):
            wanted = {ExpertKey(layer, expert) for expert in selected}
            after: dict[frozenset[ExpertKey], int] = {}
            for state, cost in states.items():
                for order in permutations(wanted):
                    if hits_first and [k in state for k in order] != sorted(
                        (k in state for k in order), reverse=True
                    ):
                        continue
                    for end, extra in ends(state, order, slots):
                        after[end] = min(after.get(end, 10**9), cost + extra)
            states = after
    return min(states.values())


def ends(
    state: frozenset[ExpertKey], order: tuple[ExpertKey, ...], slots: int
) -> set[tuple[frozenset[ExpertKey], int]]:
    """Return the states that a cache can have after these uses, each with its misses."""
    reached = {(state, 0)}
    for key in order:
        step = set()
        for cache, misses in reached:
            if key in cache:
                step.add((cache, misses))
            elif len(cache) < slots:
                step.add((cache | {key}, misses + 1))
            else:
                step |= {(cache - {victim} | {key}, misses + 1) for victim in cache}
        reached = step
    return reached


@settings(max_examples=60)
@given(traces(forwards=6, layers=2, tokens=2), st.integers(1, 5), st.booleans())
def test_the_oracle_is_as_good_as_trying_everything(made, slots, hits_first):
    result = replay(made, slots, "belady")
    best = fewest_misses(made, slots, hits_first=hits_first)
    assert result.prefill.misses + result.decode.misses == best


def test_of_two_that_are_used_next_together_the_oracle_keeps_the_right_one():
    """In one slot after the first pass: whichever of 1 and 2 is missed in the second one stays.

    1 is used alone after that, so that it has to be the one that is missed.
    """
    made = trace([[1, 2]], [[1, 2]], [[1, 1]], [[1, 1]])
    assert replay(made, 1, "belady").decode == Counts(3, 3)
    assert fewest_misses(made, 1, hits_first=True) == 3


def test_a_gpu_finds_the_favourites_and_keeps_them():
    made = trace(*[[[2, 3], [0, 3]]] * 100)
    counts, exchanges = replay_on_gpu(made, 4)
    assert exchanges == 3  # it begins with 0 and 1 of both layers
    assert counts.hits >= 4 * 80
    every, _ = replay_on_gpu(made, 8)
    assert (every.hits, every.misses) == (400, 0)


def test_a_prompts_favourites_are_on_a_gpu_before_the_first_token():
    """Their rows count as one token's uses."""
    prompt = [[2, 3] * 100, [2, 3] * 100]
    assert replay_on_gpu(trace(*[prompt] * 8, [[2, 3], [2, 3]]), 4)[1] == 1
    assert replay_on_gpu(trace(prompt, [[2, 3], [2, 3]]), 4)[1] == 0
