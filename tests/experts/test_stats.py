"""Counts of uses, and the report that is kept of them."""

import json
from collections import Counter

import pytest

from mixchat.experts.keys import ExpertKey
from mixchat.experts.stats import ExpertReport, ExpertStats

A, B = ExpertKey(0, 0), ExpertKey(1, 3)
REPORT = ExpertReport(
    model="demo",
    hits=[[3, 0], [1, 1]],
    misses=[[1, 0], [2, 0]],
    tiers=[["device", "disk"], ["host", "device"]],
    slots={"device": 2, "host": 1},
    bytes_moved=300,
    stalled_seconds=0.5,
    guesses=4,
    right_guesses=3,
    tokens=2,
    seconds=1.5,
)


def test_the_hit_rate_is_of_all_uses_and_none_before_the_first() -> None:
    assert ExpertStats().hit_rate == 0
    assert ExpertStats(Counter({A: 2, B: 1}), Counter({B: 1})).hit_rate == 0.75


def test_a_copy_stays_as_it_is() -> None:
    stats = ExpertStats(Counter({A: 1}))
    before = stats.copy()
    stats.hits[A] += 1
    stats.guesses += 1
    assert before == ExpertStats(Counter({A: 1}))


def test_since_is_what_came_between() -> None:
    before = ExpertStats(Counter({A: 5}), Counter({B: 2}), 100, 1.0, 4, 3)
    now = ExpertStats(Counter({A: 5, B: 1}), Counter({B: 4}), 250, 1.5, 6, 3)
    assert now.since(before) == ExpertStats(Counter({B: 1}), Counter({B: 2}), 150, 0.5, 2, 0)


def test_a_report_comes_back_from_json() -> None:
    assert ExpertReport.from_dict(json.loads(json.dumps(REPORT.to_dict()))) == REPORT


def test_what_a_later_version_adds_to_a_report_is_no_fault() -> None:
    assert ExpertReport.from_dict(REPORT.to_dict() | {"more": 1}) == REPORT


@pytest.mark.parametrize("name", ["hits", "misses", "tiers"])
def test_matrices_of_different_shapes_are_no_report(name: str) -> None:
    raw = REPORT.to_dict()
    raw[name] = [layer[:1] for layer in raw[name]]
    with pytest.raises(ValueError, match="differ in shape"):
        ExpertReport.from_dict(raw)


@pytest.mark.parametrize("name", list(REPORT.to_dict()))
def test_nothing_may_be_missing_of_a_report(name: str) -> None:
    raw = REPORT.to_dict()
    del raw[name]
    with pytest.raises(KeyError, match=name):
        ExpertReport.from_dict(raw)
