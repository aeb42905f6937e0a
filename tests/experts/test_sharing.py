"""The holders of experts, and those who compute them: what has to be true of any answer."""

from collections import Counter
from itertools import product

from hypothesis import given
from hypothesis import strategies as st

from mixchat.experts.cache import ExpertKey
from mixchat.experts.sharing import divide, in_proportion, share

SLOTS = st.lists(st.integers(0, 40), min_size=1, max_size=4).filter(lambda slots: slots[0] >= 2)


def keys_of(layers: int, experts: int) -> list[ExpertKey]:
    return [ExpertKey(*key) for key in product(range(layers), range(experts))]


@given(st.integers(1, 6), st.integers(1, 8), SLOTS, st.randoms(use_true_random=False))
def test_holders_together_hold_everything_and_nobody_more_than_fits(layers, experts, slots, random):
    uses = {key: random.randrange(9) for key in keys_of(layers, experts)}
    held = divide(layers, experts, slots, uses)
    everything = keys_of(layers, experts)
    assert {key for keys in held for key in keys} == set(everything)
    assert all(len(set(keys)) == len(keys) for keys in held)
    assert all(len(keys) <= count for keys, count in zip(held[1:], slots[1:], strict=True))
    if sum(slots) >= len(everything):
        assert len(held[0]) <= slots[0]
        assert [len(keys) for keys in held] == [min(count, len(everything)) for count in slots]
    else:  # too few: no copies, and all slots of workers are used
        assert sum(map(len, held)) == len(everything)
        assert [len(keys) for keys in held[1:]] == slots[1:]


@given(st.integers(1, 8), st.integers(2, 4))
def test_equal_holders_get_an_equal_part_of_every_layer(layers, holders):
    held = divide(layers, 4 * holders, [4 * layers] * holders)
    for keys in held:
        assert Counter(key.layer for key in keys) == dict.fromkeys(range(layers), 4)


def test_each_holder_gets_the_same_part_of_the_uses():
    uses = {ExpertKey(0, expert): 100 >> expert for expert in range(4)}  # 100, 50, 25, 12
    first, second = divide(1, 4, [2, 2], uses)
    assert first == [ExpertKey(0, 0), ExpertKey(0, 3)]
    assert second == [ExpertKey(0, 1), ExpertKey(0, 2)]


def test_slots_that_are_left_hold_copies_of_the_most_used():
    uses = {ExpertKey(0, 3): 7, ExpertKey(1, 2): 5}
    held = divide(2, 4, [5, 5], uses)
    assert [len(keys) for keys in held] == [5, 5]
    copied = set(held[0]) & set(held[1])
    assert ExpertKey(0, 3) in copied
    assert len(copied) == 2


def test_a_holder_gets_the_most_used_expert_first():
    uses = {ExpertKey(0, 0): 3}
    assert divide(2, 2, [2, 3], uses)[1][0] == ExpertKey(0, 0)


@given(st.integers(0, 300), st.lists(st.integers(0, 10**12), min_size=1, max_size=4).filter(any))
def test_whole_numbers_in_proportion_sum_to_the_total(total, weights):
    parts = in_proportion(total, weights)
    assert sum(parts) == total
    for part, weight in zip(parts, weights, strict=True):
        assert abs(part - total * weight / sum(weights)) < 1
        assert weight or not part


def test_of_equal_holders_the_first_gets_what_is_left_over():
    assert in_proportion(10, [1, 1, 1]) == [4, 3, 3]


def slowest(shares: dict[int, list[ExpertKey]], counts: dict[ExpertKey, int]) -> float:
    return max(sum(1 + counts[key] / 16 for key in keys) for keys in shares.values())


@given(st.lists(st.tuples(st.integers(1, 50), st.sets(st.integers(0, 2), min_size=1)), min_size=1))
def test_each_expert_is_computed_once_by_one_who_holds_it(choices):
    counts = {ExpertKey(0, number): rows for number, (rows, _) in enumerate(choices)}
    holders = {ExpertKey(0, number): sorted(who) for number, (_, who) in enumerate(choices)}
    shares = share(counts, holders)
    assert sorted(key for keys in shares.values() for key in keys) == sorted(counts)
    assert all(holder in holders[key] for holder, keys in shares.items() for key in keys)


@given(
    st.lists(
        st.tuples(st.integers(1, 50), st.sets(st.integers(0, 1), min_size=1)),
        min_size=1,
        max_size=8,
    )
)
def test_the_slowest_holder_does_at_most_half_more_than_it_has_to(choices):
    """Graham's bound for longest first is 4/3; those without a choice make it 3/2."""
    counts = {ExpertKey(0, number): rows for number, (rows, _) in enumerate(choices)}
    holders = {ExpertKey(0, number): sorted(who) for number, (_, who) in enumerate(choices)}
    best = min(
        slowest(shares, counts)
        for chosen in product(*(holders[key] for key in counts))
        if (
            shares := {
                h: [k for k, c in zip(counts, chosen, strict=True) if c == h] for h in chosen
            }
        )
    )
    assert slowest(share(counts, holders), counts) <= 1.5 * best + 1e-9


def test_of_two_experts_that_one_holds_alone_the_other_is_left_to_the_copy():
    a, b = ExpertKey(0, 0), ExpertKey(0, 1)
    assert share({a: 1, b: 1}, {a: [0], b: [0, 1]}) == {0: [a], 1: [b]}
