"""Counts of uses of experts."""

from collections import Counter

from mixchat.experts.cache import ExpertKey, ExpertStats

A, B = ExpertKey(0, 0), ExpertKey(1, 3)


def test_the_hit_rate_is_of_all_uses_and_none_before_the_first() -> None:
    assert ExpertStats().hit_rate == 0
    assert ExpertStats(Counter({A: 2, B: 1}), Counter({B: 1})).hit_rate == 0.75


def test_a_copy_stays_as_it_is() -> None:
    stats = ExpertStats(Counter({A: 1}))
    before = stats.copy()
    stats.hits[A] += 1
    stats.predictions += 1
    assert before == ExpertStats(Counter({A: 1}))


def test_since_is_what_came_between() -> None:
    before = ExpertStats(Counter({A: 5}), Counter({B: 2}), 100, 1.0, 4, 3)
    now = ExpertStats(Counter({A: 5, B: 1}), Counter({B: 4}), 250, 1.5, 6, 3)
    assert now.since(before) == ExpertStats(Counter({B: 1}), Counter({B: 2}), 150, 0.5, 2, 0)
