"""The speeds of a machine: between the counts of rows, their age, and those of cards."""

import dataclasses

import pytest
from planning_tools import SPEEDS

from mixchat.planning.cards import find_card
from mixchat.planning.machine_speeds import GPUSpeeds


@pytest.mark.parametrize(
    ("rows", "seconds"), [(1, 2.0), (8, 9.0), (36, 23.0), (64, 37.0), (164, 87.0)]
)
def test_time_is_linear_between_what_was_measured_and_beyond(rows, seconds):
    known = dataclasses.replace(SPEEDS, expert_seconds={1: 2.0, 8: 9.0, 64: 37.0})
    assert known.expert_time(rows) == pytest.approx(seconds)


def test_time_never_falls_beyond_what_was_measured():
    known = dataclasses.replace(SPEEDS, expert_seconds={64: 2.0, 512: 1.5})
    assert known.expert_time(100_000) == 1.5
    assert known.expert_time(1) == 2.0


DAY = 86400.0
BUSY = dataclasses.replace(SPEEDS, is_busy=True)


@pytest.mark.parametrize(
    ("made", "age", "why"),
    [
        (SPEEDS, 29 * DAY, None),
        (SPEEDS, 31 * DAY, "the last time was 31 days ago"),
        (BUSY, 599.0, None),
        (BUSY, 7200.0, "it was busy the last time, 2 hours ago"),
    ],
)
def test_what_is_old_or_was_measured_on_a_busy_machine_is_to_be_measured_again(made, age, why):
    assert made.outdated(made.measured_at + age) == why


def test_a_card_is_estimated_by_its_data_sheet_and_bf16_is_slow_before_ampere():
    turing, ampere = (find_card(name) for name in ("T4", "A10"))
    slow, fast = (GPUSpeeds.of_card(card) for card in (turing, ampere))
    assert fast.memory == pytest.approx(0.8 * ampere.bandwidth)
    assert slow.compute / turing.compute == pytest.approx(0.25 * fast.compute / ampere.compute)
    assert {slow.source, fast.source} == {"its data sheet"}
