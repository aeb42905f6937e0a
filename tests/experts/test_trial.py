"""The choice among variants by trying them."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mixchat.experts.trial import Trial


def rounds(trial: Trial[str], count: int, **costs: float) -> str:
    """The variants of the next `count` rounds of one unit; `costs` has the cost of each."""
    variants = ""
    for _ in range(count):
        variants += trial.variant
        trial.add(costs[trial.variant], 1)
    return variants


def test_the_docstrings_example() -> None:
    """Each has a try; then the better one is used, and the tries of the other become rarer."""
    variants = rounds(Trial("AB", 1), 180, A=2, B=1)
    head = "A" + "B" * 7 + "A" + "B" * 15 + "A" + "B" * 31 + "A" + "B" * 63 + "A" + "B" * 63
    assert variants == head[:180]
    assert Trial.__doc__ is not None
    assert " ".join(variants[:10]) in Trial.__doc__


def test_the_first_way_is_used_where_it_costs_less() -> None:
    variants = rounds(Trial("AB", 1), 100, A=1, B=2)
    assert variants.startswith("AB" + "A" * 6 + "B")
    assert variants.count("B") <= 5


def test_of_many_ways_each_has_a_try_and_the_others_take_turns() -> None:
    variants = rounds(Trial("ABCD", 1), 400, A=4, B=3, C=1, D=2)
    assert variants.startswith("ABCD" + "C" * 4)
    assert variants[4:].replace("C", "") == "BDABDABD"


def test_a_way_that_has_become_cheaper_is_found() -> None:
    trial = Trial("AB", 1)
    rounds(trial, 500, A=4, B=2)
    assert trial.variant == "B"
    variants = rounds(trial, 200, A=1, B=2)  # a try in 64 rounds: 4 -> 2.5 -> 1.75
    assert variants.index("AA") <= 128
    assert variants[-64:].count("A") > 55
    assert trial._costs[0] == pytest.approx(1, abs=0.1)


def test_a_way_that_has_become_dearer_is_left_at_once_and_tries_are_frequent_again() -> None:
    trial = Trial("AB", 1)
    rounds(trial, 500, A=3, B=1)
    variants = rounds(trial, 40, A=3, B=30)
    assert "A" in variants[:3]
    assert variants.count("A") > 30
    assert variants.rstrip("A").count("B") > 2


def test_one_way_only_is_always_the_way() -> None:
    trial = Trial(["only"], 2)
    for _ in range(300):
        assert trial.variant == "only"
        trial.add(1, 1)
    assert trial._costs == [1]


def test_a_round_may_come_in_pieces_and_its_cost_is_by_the_unit() -> None:
    trial = Trial("AB", 10)
    for cost, units in ((1.0, 3), (2.0, 0), (0.5, 6)):
        trial.add(cost, units)
        assert trial.variant == "A"
        assert trial._costs == [None, None]
    trial.add(2.5, 3)
    assert trial._costs == [pytest.approx(6 / 12), None]
    assert trial.variant == "B"
    trial.add(100, 200)  # more than a round in one piece
    assert trial._costs[1] == pytest.approx(0.5)


def test_a_later_round_counts_half_and_the_ones_before_it_the_other_half() -> None:
    trial = Trial("A", 1)
    for cost in (8, 4, 2):
        trial.add(cost, 1)
    assert trial._costs == [4]  # 8 -> 6 -> 4


@given(st.lists(st.integers(1, 1000), min_size=1, max_size=5, unique=True))
def test_it_settles_on_the_cheapest(costs: list[int]) -> None:
    trial = Trial(range(len(costs)), 1)
    done = []
    for _ in range(200):
        done.append(trial.variant)
        trial.add(costs[trial.variant], 1)
    assert done.count(costs.index(min(costs))) >= 180
    assert trial._costs == costs
