"""Loads in the background: their order, and what becomes of those nobody wants any more."""

import random
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from mixchat.base import interrupts
from mixchat.base.errors import ResourceError
from mixchat.experts.cache import ExpertKey
from mixchat.experts.mover import ExpertLoad, Mover, Steps

PATIENCE = 60  # seconds, after which a test fails instead of hanging


class Stop:
    """A point in the steps of a load where the mover's thread waits for the test."""

    def __init__(self) -> None:
        self._reached, self._passed = threading.Event(), threading.Event()

    def reach(self) -> None:
        self._reached.set()
        assert self._passed.wait(PATIENCE)

    def wait(self) -> None:
        assert self._reached.wait(PATIENCE)

    def go(self) -> None:
        self._passed.set()


class Work:
    """Begins loads on a mover, and notes each of their steps: `a0`, `a1`, `a there`."""

    def __init__(self) -> None:
        self.mover = Mover()
        self.others = set(threading.enumerate())
        self.log: list[str] = []
        self.stops: list[Stop] = []

    def begin(
        self,
        name: str,
        steps: int = 1,
        *,
        layer: int = 0,
        is_prefetch: bool = False,
        stop: int = -1,
    ) -> ExpertLoad:
        """Queue a load of so many steps; in step `stop` it waits for `self.stops[-1].go()`."""
        load = ExpertLoad(ExpertKey(layer, ord(name[0])), is_prefetch=is_prefetch)
        here = Stop()
        if stop >= 0:
            self.stops.append(here)
        self.mover.begin(load, self._steps(name, steps, here, stop))
        return load

    def prefetch(self, name: str, steps: int = 1, *, layer: int = 1, stop: int = -1) -> ExpertLoad:
        return self.begin(name, steps, layer=layer, is_prefetch=True, stop=stop)

    def hold(self) -> Stop:
        """Keep the mover busy until the stop that is returned is let go."""
        self.begin("-", stop=0)
        self.stops[-1].wait()
        return self.stops[-1]

    def finish(self) -> list[str]:
        """Let all go, and wait until there is nothing to do. The log, without the holds."""
        for stop in self.stops:
            stop.go()
        for thread in set(threading.enumerate()) - self.others:
            thread.join(PATIENCE)
        return [entry for entry in self.log if not entry.startswith("-")]

    def _steps(self, name: str, count: int, here: Stop, stop: int) -> Steps:
        try:
            for step in range(count):
                self.log.append(f"{name}{step}")
                if step == stop:
                    here.reach()
                yield
        except GeneratorExit:
            self.log.append(f"{name} closed")
            raise
        self.log.append(f"{name} there")


@pytest.fixture
def work(monkeypatch: pytest.MonkeyPatch) -> Iterator[Work]:
    monkeypatch.setattr("mixchat.experts.mover._IDLE_S", 0.02)
    work = Work()
    yield work
    work.finish()


def arrivals(log: list[str]) -> str:
    return "".join(entry[0] for entry in log if entry.endswith("there"))


def test_they_are_carried_out_in_order_and_in_the_background(work):
    held = work.hold()
    loads = [work.begin(name, 2) for name in "dab"]
    assert not any(load.ended for load in loads)
    held.go()
    for load in loads:
        load.wait()
        assert load.ended
        assert not load.failed
    assert work.finish() == ["d0", "d1", "d there", "a0", "a1", "a there", "b0", "b1", "b there"]


def test_what_is_requested_comes_before_prefetches_and_of_those_the_nearest_layer_first(work):
    held = work.hold()
    work.prefetch("c", layer=3)
    work.prefetch("a", layer=1)
    work.begin("x", layer=9)
    work.prefetch("b", layer=1)
    work.begin("y", layer=0)
    held.go()
    assert arrivals(work.finish()) == "xyabc"


def test_a_prefetch_is_put_off_when_something_requested_comes_and_continues_from_where_it_was(work):
    prefetch = work.prefetch("g", 4, stop=1)
    work.stops[0].wait()
    work.begin("w", 2)
    work.stops[0].go()
    prefetch.wait()
    assert work.finish() == ["g0", "g1", "w0", "w1", "w there", "g2", "g3", "g there"]


def test_a_prefetch_that_was_put_off_may_be_put_off_again(work):
    prefetch = work.prefetch("g", 3, stop=0)
    work.stops[0].wait()
    work.begin("w", stop=0)
    work.stops[0].go()
    work.stops[1].wait()
    work.begin("v")
    work.stops[1].go()
    prefetch.wait()
    assert work.finish() == ["g0", "w0", "w there", "v0", "v there", "g1", "g2", "g there"]


def test_a_prefetch_that_was_put_off_continues_before_others_of_its_layer_start(work):
    """Else each interruption would begin one more, and none would be there in time."""
    work.prefetch("a", 2, stop=0)
    work.stops[0].wait()
    work.prefetch("b")
    work.prefetch("c", layer=0)
    work.begin("w")
    work.stops[0].go()
    assert arrivals(work.finish()) == "wcab"


def test_what_is_requested_is_not_put_off(work):
    work.begin("a", 3, stop=0)
    work.stops[0].wait()
    work.begin("b")
    work.prefetch("g")
    work.stops[0].go()
    assert arrivals(work.finish()) == "abg"


def test_another_prefetch_of_a_nearer_layer_does_not_put_one_off(work):
    work.prefetch("a", 3, layer=5, stop=0)
    work.stops[0].wait()
    work.prefetch("b", layer=1)
    work.stops[0].go()
    assert arrivals(work.finish()) == "ab"


def test_a_prefetch_in_the_queue_that_is_requested_comes_before_all_prefetches(work):
    held = work.hold()
    work.prefetch("a", layer=1)
    right = work.prefetch("b", layer=4)
    work.begin("w")
    work.mover.promote(right)
    assert not right.is_prefetch
    held.go()
    assert arrivals(work.finish()) == "wba"


def test_a_prefetch_in_hand_that_is_requested_is_not_put_off(work):
    right = work.prefetch("g", 3, stop=0)
    work.stops[0].wait()
    work.mover.promote(right)
    work.begin("w")
    work.stops[0].go()
    assert arrivals(work.finish()) == "gw"


def test_a_prefetch_that_was_put_off_and_is_requested_continues_before_other_prefetches(work):
    right = work.prefetch("g", 2, layer=5, stop=0)
    work.stops[0].wait()
    work.begin("w", stop=0)
    work.stops[0].go()
    work.stops[1].wait()
    work.prefetch("a", layer=1)
    work.mover.promote(right)
    work.begin("v")
    work.stops[1].go()
    right.wait()
    log = work.finish()
    assert log[:5] == ["g0", "w0", "w there", "g1", "g there"]
    assert arrivals(log) == "wgva"


def test_to_want_what_is_there_changes_nothing(work):
    prefetch = work.prefetch("g")
    prefetch.wait()
    work.mover.promote(prefetch)
    assert work.finish() == ["g0", "g there"]


@pytest.mark.parametrize("is_prefetch", [False, True])
def test_one_that_is_cancelled_in_the_queue_is_not_started(work, is_prefetch):
    held = work.hold()
    gone = work.begin("a", is_prefetch=is_prefetch)
    work.begin("b", is_prefetch=is_prefetch)
    gone.cancelled = True
    held.go()
    assert work.finish() == ["b0", "b there"]
    assert not gone.ended


@pytest.mark.parametrize("is_prefetch", [False, True])
def test_one_that_is_cancelled_in_hand_ends_after_its_step(work, is_prefetch):
    gone = work.begin("a", 3, is_prefetch=is_prefetch, stop=1)
    work.stops[0].wait()
    work.begin("b", is_prefetch=is_prefetch)
    gone.cancelled = True
    work.stops[0].go()
    assert work.finish() == ["a0", "a1", "a closed", "b0", "b there"]
    assert not gone.ended


def test_one_that_was_put_off_and_is_cancelled_is_closed_by_the_mover(work):
    """Its resources have to be given back then, not when Python collects garbage."""
    gone = work.prefetch("a", 3, stop=0)
    work.stops[0].wait()
    work.begin("w", stop=0)
    work.stops[0].go()
    work.stops[1].wait()
    gone.cancelled = True
    work.prefetch("b")
    work.stops[1].go()
    assert work.finish() == ["a0", "w0", "w there", "a closed", "b0", "b there"]
    assert not gone.ended


def test_a_failure_is_raised_for_whoever_waits_and_the_next_is_carried_out(work):
    def steps():
        yield
        raise OSError("the disk says no")

    failing = ExpertLoad(ExpertKey(0, 0))
    work.mover.begin(failing, steps())
    after = work.begin("b")
    for _ in range(2):  # however often it is asked
        with pytest.raises(OSError, match="says no"):
            failing.wait()
    assert failing.ended
    assert failing.failed
    after.wait()
    assert not after.failed


def test_the_thread_goes_when_there_is_nothing_to_do_and_comes_back(work):
    others = set(threading.enumerate())
    for name in "abc":
        work.begin(name).wait()
        for thread in set(threading.enumerate()) - others:
            assert not thread.daemon
            thread.join(PATIENCE)
        assert set(threading.enumerate()) <= others
    assert arrivals(work.log) == "abc"


def test_its_thread_is_inside_the_context_while_it_moves(monkeypatch):
    monkeypatch.setattr("mixchat.experts.mover._IDLE_S", 0.02)
    log: list[tuple[str, int]] = []

    def note(what):
        log.append((what, threading.get_ident()))

    @contextmanager
    def inside():
        note("in")
        yield
        note("out")

    def steps():
        note("step")
        yield
        note("step")

    others = set(threading.enumerate())
    mover = Mover(inside)
    assert log == []
    load = ExpertLoad(ExpertKey(0, 0))
    mover.begin(load, steps())
    load.wait()
    for thread in set(threading.enumerate()) - others:
        thread.join(PATIENCE)
    assert [what for what, _ in log] == ["in", "step", "step", "out"]
    assert {thread for _, thread in log}.isdisjoint({threading.get_ident()})
    assert len({thread for _, thread in log}) == 1


def test_whatever_comes_each_arrives_whole_or_is_closed(work):
    luck = random.Random(0)
    loads: dict[str, ExpertLoad] = {}
    names = [chr(0x4E00 + number) for number in range(300)]
    for name in names:
        loads[name] = work.begin(
            name, luck.randint(1, 4), layer=luck.randint(0, 3), is_prefetch=luck.random() < 0.6
        )
        other = loads[luck.choice(list(loads))]
        if luck.random() < 0.2:
            other.cancelled = True
        elif luck.random() < 0.2:
            work.mover.promote(other)
    log = work.finish()
    for name, load in loads.items():
        mine = [entry for entry in log if entry[0] == name]
        steps = [entry for entry in mine if entry[1:].isdigit()]
        assert steps == [f"{name}{step}" for step in range(len(steps))]
        assert load.ended == (f"{name} there" in mine)
        assert load.ended or load.cancelled
        if steps and not load.ended:
            assert mine[-1] == f"{name} closed"


def test_a_thread_that_cannot_be_started_fails_one_transfer_and_not_all_later_ones(
    work, monkeypatch
):
    """The mover believed that its thread was at work: whoever waited for a load hung."""

    def refuse(thread):
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", refuse)
        with pytest.raises(ResourceError, match="cannot start a thread"):
            work.begin("a")
    work.begin("b").wait()
    assert work.finish() == ["b0", "b there"]


def test_a_thread_that_fails_lets_nobody_wait():
    def refuse():
        raise MemoryError("no stream")

    mover = Mover(refuse)
    for _ in range(2):
        load = ExpertLoad(ExpertKey(0, 0))
        mover.begin(load, (None for _ in range(1)))
        with pytest.raises(MemoryError):
            load.wait()


def test_ctrl_c_ends_the_wait_for_a_transfer_that_does_not_come(work):
    """As from a disk that hangs, where nothing between two layers is reached."""
    held = work.hold()
    load = work.begin("a")
    with interrupts.deferred():
        signal.raise_signal(signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            load.wait()
    held.go()
    load.wait()
    assert work.finish() == ["a0", "a there"]
