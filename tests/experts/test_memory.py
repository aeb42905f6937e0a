"""The limit of experts that are held while the free memory changes."""

from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mixchat.experts import memory
from mixchat.experts.memory import INTERVAL, MemoryWatch

GB, EXPERT = 10**9, 10**8


class Clock:
    """Stands in for `time`; a look is due whenever `later` was called."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now

    def later(self, seconds: float = INTERVAL) -> None:
        self.now += seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(memory, "time", clock)
    return clock


@pytest.fixture
def look(clock: Clock) -> Callable[[float, int], int]:
    """Return the limit where so many GB are free, and so many experts are held."""
    free = [0.0]
    watch = MemoryWatch(lambda: round(free[0] * GB), reserve=GB, expert=EXPERT, slots=100, least=2)

    def look(gigabytes: float, held: int) -> int:
        free[0] = gigabytes
        clock.later()
        return watch.limit(held)

    return look


def test_slots_follow_the_free_memory_with_a_margin(look: Callable[[float, int], int]) -> None:
    assert look(1.0, 100) == 100
    assert look(0.4, 100) == 94
    assert look(1.0, 94) == 94
    assert look(1.3, 94) == 97


def test_half_of_the_reserve_may_be_taken_before_any_goes(
    look: Callable[[float, int], int],
) -> None:
    assert look(0.5, 100) == 100
    assert look(0.499, 100) == 94  # 0.501 GB are missing: six experts


def test_those_that_went_come_back_when_there_is_room_for_two(
    look: Callable[[float, int], int],
) -> None:
    assert look(0.4, 100) == 94
    assert look(1.19, 94) == 94
    assert look(1.2, 94) == 96
    assert look(9.9, 96) == 100


def test_it_never_says_less_than_the_least_or_more_than_all(
    look: Callable[[float, int], int],
) -> None:
    assert look(0.0, 5) == 2
    assert look(0.0, 2) == 2
    assert look(99.0, 2) == 100


def test_before_they_are_held_the_room_that_is_free_counts(
    look: Callable[[float, int], int],
) -> None:
    assert look(20.0, 0) == 100
    assert look(6.0, 0) == 50
    assert look(3.0, 30) == 50  # they have come to be held, which says nothing new


def test_it_looks_twice_a_second(clock: Clock) -> None:
    looks: list[float] = []

    def free() -> int:
        looks.append(clock.now)
        return GB

    watch = MemoryWatch(free, reserve=GB, expert=EXPERT, slots=100, least=2)
    for _ in range(101):
        assert watch.limit(100) == 100
        clock.later(INTERVAL / 10)
    assert 10 <= len(looks) <= 11  # a hundred steps of a tenth


def test_it_looks_at_once_also_just_after_the_machine_was_started(clock: Clock) -> None:
    clock.now = 0.0
    watch = MemoryWatch(lambda: 0, reserve=GB, expert=EXPERT, slots=100, least=2)
    assert watch.limit(50) == 40


@given(st.lists(st.integers(0, 14 * GB), min_size=1, max_size=20))
def test_while_others_stay_as_they_are_it_does_not_swing(others: list[int]) -> None:
    """Freed memory counts as free: each change goes one way, and then the limit stays."""
    clock, total, held = Clock(), 12 * GB, 0
    used = 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(memory, "time", clock)
        watch = MemoryWatch(
            lambda: max(total - used - held * EXPERT, 0),
            reserve=GB,
            expert=EXPERT,
            slots=100,
            least=2,
        )
        for used in others:
            limits = [held]
            for _ in range(14):
                clock.later()
                limits.append(watch.limit(held))
                assert 2 <= limits[-1] <= 100
                held = limits[-1]  # it is filled up, or gives back
            assert limits in (sorted(limits), sorted(limits, reverse=True))
            assert len(set(limits[-3:])) == 1
            free = total - used - held * EXPERT
            assert free >= GB // 2 or held == 2
            assert free < GB + 2 * EXPERT or held == 100
