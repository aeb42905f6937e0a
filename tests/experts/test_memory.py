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


@pytest.mark.parametrize(
    "looks",
    {
        "a margin": [(1.0, 100, 100), (0.4, 100, 94), (1.0, 94, 94), (1.3, 94, 97)],
        "half of the reserve may be taken": [(0.5, 100, 100), (0.499, 100, 94)],  # six are missing
        "back with room for two": [(0.4, 100, 94), (1.19, 94, 94), (1.2, 94, 96), (9.9, 96, 100)],
        "the least and all": [(0.0, 5, 2), (0.0, 2, 2), (99.0, 2, 100)],
        "the room before they are held": [(20.0, 0, 100), (6.0, 0, 50), (3.0, 30, 50)],
    }.values(),
    ids=str,
)
def test_slots_follow_the_free_memory(look, looks):
    """Each look has the GB that are free, the experts that are held, and the limit."""
    for gigabytes, held, limit in looks:
        assert look(gigabytes, held) == limit


def test_it_looks_twice_a_second(clock):
    looks: list[float] = []

    def free():
        looks.append(clock.now)
        return GB

    watch = MemoryWatch(free, reserve=GB, expert=EXPERT, slots=100, least=2)
    for _ in range(101):
        assert watch.limit(100) == 100
        clock.later(INTERVAL / 10)
    assert 10 <= len(looks) <= 11  # a hundred steps of a tenth


def test_it_looks_at_once_also_just_after_the_machine_was_started(clock):
    clock.now = 0.0
    watch = MemoryWatch(lambda: 0, reserve=GB, expert=EXPERT, slots=100, least=2)
    assert watch.limit(50) == 40


def test_memory_is_short_for_fills_while_less_than_half_of_the_reserve_is_free(clock):
    free = {"bytes": GB // 2}
    watch = MemoryWatch(lambda: free["bytes"], reserve=GB, expert=EXPERT, slots=100, least=2)
    assert watch.is_ample()
    free["bytes"] -= 1
    assert watch.is_ample()  # it looks twenty times a second
    clock.later()
    assert not watch.is_ample()
    assert watch.limit(50) == 44


@given(st.lists(st.integers(0, 14 * GB), min_size=1, max_size=20))
def test_while_others_stay_as_they_are_it_does_not_swing(others):
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
