"""The choice among variants by trying them."""

from itertools import count
from statistics import mean

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mixchat.experts.tuner import Tuner


def rounds(tuner: Tuner[str], number: int, **costs: float) -> str:
    """The variants of the next rounds of one unit; `costs` has the cost of each."""
    variants = ""
    for _ in range(number):
        variants += tuner.variant
        tuner.add(costs[tuner.variant], 1)
    return variants


def test_the_better_of_two_is_used_and_comparisons_become_rarer():
    tuner, variants = Tuner("AB", 1), ""
    for _ in range(400):
        # Every second round of A is cheaper than those of B.
        cost = 1.0 if tuner.variant == "B" else (0.9, 3.0)[variants.count("A") % 2]
        variants += tuner.variant
        tuner.add(cost, 1)
    compared = "AB" * 4
    head = compared + "B" * 24 + compared + "B" * 56 + compared + "B" * 120 + compared
    assert variants.startswith(head)


def test_a_way_that_costs_more_in_its_first_two_rounds_gets_no_third_one():
    variants = rounds(Tuner("AB", 1), 200, A=2, B=1)
    assert variants.startswith("ABAB" + "B" * 28 + "ABAB" + "B" * 60 + "ABAB")
    variants = rounds(Tuner("AB", 1), 200, A=1, B=2)
    assert variants.startswith("ABAB" + "A" * 28 + "BABA" + "A" * 60 + "BABA")


def test_of_many_ways_each_is_tried_and_the_others_take_turns():
    variants = rounds(Tuner("ABCD", 1), 1200, A=4, B=3, C=1, D=2)
    assert variants.startswith("ABCD" * 2 + "C" * 16)
    others = variants[8:].replace("C", "")
    assert others.startswith("BBDDAABB")


def test_a_way_that_has_become_cheaper_is_found():
    tuner = Tuner("AB", 1)
    rounds(tuner, 1000, A=4, B=2)
    variants = rounds(tuner, 600, A=1, B=2)
    assert variants[-300:].count("A") > 260


def test_a_way_that_has_become_dearer_is_left_at_once_and_comparisons_are_frequent_again():
    tuner = Tuner("AB", 1)
    rounds(tuner, 1000, A=3, B=1)
    while tuner._turns:
        rounds(tuner, 1, A=3, B=1)
    variants = rounds(tuner, 40, A=3, B=30)
    assert variants.startswith("BA")
    assert variants.count("B") <= 5


def test_what_makes_all_dearer_for_a_while_does_not_change_the_choice():
    """A disk was half as fast in one minute as in the next. The variant of the fast minute won,
    whichever it was."""
    tuner, time, best = Tuner("ABCD", 1), count(), 0
    for _ in range(4000):
        slow = 1 + (next(time) // 40) % 2
        best += tuner.variant == "C"
        tuner.add(slow * {"A": 1.2, "B": 1.25, "C": 1.0, "D": 1.3}[tuner.variant], 1)
    assert best > 3600


def test_a_round_may_come_in_pieces_and_its_cost_is_by_the_unit():
    tuner = Tuner("AB", 10)
    for cost, units in ((1.0, 3), (2.0, 0), (0.5, 6)):
        tuner.add(cost, units)
        assert tuner.variant == "A"
        assert not any(tuner._costs)
    tuner.add(2.5, 3)
    assert list(tuner._costs[0]) == [pytest.approx(6 / 12)]
    assert tuner.variant == "B"
    tuner.add(100, 200)  # more than a round in one piece
    assert list(tuner._costs[1]) == [pytest.approx(0.5)]


def test_the_cost_is_that_of_the_last_four_rounds():
    tuner = Tuner("A", 1)
    for cost in (100, 8, 4, 2, 2):
        tuner.add(cost, 1)
    assert mean(tuner._costs[0]) == 4


@settings(max_examples=20)
@given(st.lists(st.integers(1, 1000), min_size=1, max_size=5, unique=True))
def test_it_settles_on_the_cheapest(costs):
    tuner = Tuner(range(len(costs)), 1)
    done = []
    for _ in range(1000):
        done.append(tuner.variant)
        tuner.add(costs[tuner.variant], 1)
    assert done.count(costs.index(min(costs))) >= 950
    assert [mean(some) for some in tuner._costs] == costs
