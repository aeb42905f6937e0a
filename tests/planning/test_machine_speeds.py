"""The figures that are measured: read between the counts of rows, and the medians of samples."""

import dataclasses

import pytest
from planning_tools import SPEEDS, without_disk

from mixchat.planning.machine_speeds import IN_USE, Measurement


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


def test_the_typical_figures_are_the_medians_of_all_samples():
    samples = (
        SPEEDS,
        dataclasses.replace(SPEEDS, disk_bandwidth=1e9, layer_seconds=0.1),
        dataclasses.replace(
            SPEEDS, disk_bandwidth=3e9, expert_seconds={1: 0.004, 8: 0.007, 64: 0.05}
        ),
    )
    typical = Measurement(0.0, samples).typical
    assert typical == SPEEDS
    shorter = dataclasses.replace(SPEEDS, expert_seconds={1: 0.001, 8: 0.001})
    two = Measurement(0.0, (samples[2], shorter)).typical
    assert two.expert_seconds == {1: 0.0025, 8: 0.004}


def test_in_use_the_disk_is_slower_but_for_a_cold_start_which_is_measured_as_it_is():
    used = SPEEDS.in_use
    assert used.disk_bandwidth == IN_USE * 2e9
    assert used.disk_bandwidth_idle == IN_USE * 3e9
    assert used.cold == SPEEDS.cold


DAY = 86400.0


@pytest.mark.parametrize(
    ("made", "age", "why"),
    [
        (Measurement(0.0, (SPEEDS,)), 29 * DAY, None),
        (Measurement(0.0, (SPEEDS,)), 31 * DAY, "the last time was 31 days ago"),
        (Measurement(0.0, (SPEEDS,), other_programs=0.3), 599.0, None),
        (
            Measurement(0.0, (SPEEDS,), other_programs=0.3),
            7200.0,
            "it was busy the last time, 2 hours ago",
        ),
        (Measurement(0.0, (SPEEDS,), other_programs=0.1), 7200.0, None),
    ],
)
def test_what_is_old_or_was_measured_on_a_busy_machine_is_to_be_measured_again(made, age, why):
    assert made.outdated(age) == why


@pytest.mark.parametrize(("times", "busy"), [(0.7, False), (0.6, True)])
def test_a_machine_whose_samples_differ_much_was_busy(times, busy):
    slower = dataclasses.replace(SPEEDS, memory_bandwidth=times * SPEEDS.memory_bandwidth)
    assert Measurement(0.0, (SPEEDS, slower, SPEEDS)).busy == busy


def test_typical_figures_of_a_disk_are_of_those_samples_that_have_some():
    blind = without_disk(SPEEDS)
    assert Measurement(0.0, (blind, SPEEDS)).typical.disk_bandwidth == SPEEDS.disk_bandwidth
    assert Measurement(0.0, (blind, blind)).typical.disk_bandwidth is None
