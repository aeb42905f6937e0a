"""Loads in the background: their order, and what becomes of those that nobody wants any more."""

import random
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
from patience import PATIENCE_S
from queue_doubles import Stop, Work, arrivals

from mixchat.base import interrupts
from mixchat.base.errors import ResourceError
from mixchat.base.progress import in_background
from mixchat.experts.cache import ExpertKey
from mixchat.experts.load_queue import (
    FILL,
    PREDICTED,
    REQUESTED,
    ExpertLoad,
    Job,
    LoadQueue,
    _QueueThread,
)


@pytest.fixture
def short_idle(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mixchat.experts.load_queue._IDLE_S", 0.02)


@pytest.fixture
def work(short_idle: None) -> Iterator[Work]:
    work = Work()
    yield work
    work.finish()


def test_prefetches_leave_threads_to_what_will_be_requested(short_idle):
    """Eight wrong predictions in flight kept the next layer waiting, as long as to read them."""
    work = Work(threads=8)
    work.queue.predicted_limit = 2
    for number in range(2):
        work.begin(str(number), stop=0)
        work.stops[-1].wait()
    prefetch = work.prefetch("g")
    for _ in range(3):
        work.begin("w").wait()
    assert not prefetch.ended
    work.stops[0].go()
    prefetch.wait()
    assert arrivals(work.finish())[:5] == "www0g"


def test_another_load_begins_while_one_is_finished_but_not_in_its_slot(short_idle):
    """A prompt waited half of a cold start, while threads built experts under the lock."""
    work, stop = Work(threads=2), Stop()
    finished = ExpertLoad(ExpertKey(0, 0))
    work.queue.begin(finished, Job("slot", lambda: [lambda: 0], stop.reach))
    stop.wait()
    after = work.begin("a", slot="slot")
    work.begin("b").wait()
    assert not finished.ended
    stop.go()
    after.wait()
    assert arrivals(work.finish()) == "ba"


def test_the_thread_goes_when_there_is_nothing_to_do_and_comes_back(work):
    others = set(threading.enumerate())
    for name in "abc":
        work.begin(name).wait()
        for thread in set(threading.enumerate()) - others:
            assert not thread.daemon
            thread.join(PATIENCE_S)
        assert set(threading.enumerate()) <= others
    assert arrivals(work.log) == "abc"


_AFTER_MAIN = """
import threading
from mixchat.experts.cache import ExpertKey
from mixchat.experts.load_queue import ExpertLoad, Job, LoadQueue

queue, begun = LoadQueue(2), threading.Event()

def bring():
    load = ExpertLoad(ExpertKey(0, 0))
    queue.begin(load, Job("slot", lambda: [lambda: 0]))
    load.wait()
    begun.set()

def use():
    bring()
    threading.main_thread().join()
    while {is_daemon}:
        bring()
    bring()
    print("there")

threading.Thread(target=use, daemon={is_daemon}).start()
begun.wait()
"""


@pytest.mark.parametrize("is_daemon", [False, True])
def test_after_the_main_thread_experts_come_while_another_thread_keeps_the_program(is_daemon):
    """A thread that generated text after the end of the main thread waited for ever."""
    code = _AFTER_MAIN.format(is_daemon=is_daemon)
    command = [sys.executable, "-c", code]
    ended = subprocess.run(command, stdout=subprocess.PIPE, timeout=PATIENCE_S, check=True)
    assert ended.stdout == (b"" if is_daemon else b"there\n")


def test_its_threads_are_no_daemons_if_a_daemon_begins_a_load(work):
    """A script that ended while a model was filled was aborted, in one of six runs."""
    in_background(work.hold).result()
    threads = [each for each in threading.enumerate() if isinstance(each, _QueueThread)]
    assert threads
    assert not any(thread.daemon for thread in threads)


def test_its_threads_go_at_once_when_it_is_closed(monkeypatch):
    """The end of a program waits for them."""
    monkeypatch.setattr("mixchat.experts.load_queue._IDLE_S", 10 * PATIENCE_S)
    work = Work(threads=2)
    held = work.begin("a", stop=0)
    work.stops[0].wait()
    work.begin("b").wait()
    work.queue.close()
    assert arrivals(work.finish()) == "ba"
    assert not held.failed


def test_its_thread_is_inside_the_context_while_it_moves(short_idle):
    log: list[tuple[str, int]] = []

    def note(what: str) -> int:
        log.append((what, threading.get_ident()))
        return 0

    @contextmanager
    def inside():
        note("in")
        yield
        note("out")

    others = set(threading.enumerate())
    queue = LoadQueue(1, inside)
    assert log == []
    load = ExpertLoad(ExpertKey(0, 0))
    queue.begin(load, Job("slot", lambda: [lambda: note("piece")] * 2))
    load.wait()
    for thread in set(threading.enumerate()) - others:
        thread.join(PATIENCE_S)
    assert [what for what, _ in log] == ["in", "piece", "piece", "out"]
    assert {thread for _, thread in log}.isdisjoint({threading.get_ident()})
    assert len({thread for _, thread in log}) == 1


def test_as_many_pieces_are_in_flight_as_there_are_threads_of_one_expert_or_of_several(short_idle):
    """A disk that got one small expert at a time gave half of its bandwidth."""
    for names, pieces in (("a", 3), ("abc", 1)):
        work = Work(threads=3)
        barrier = threading.Barrier(3, timeout=PATIENCE_S)

        def meet(barrier: threading.Barrier = barrier) -> int:
            barrier.wait()
            return 1

        loads = [ExpertLoad(ExpertKey(0, ord(name))) for name in names]
        for load in loads:
            work.queue.begin(load, Job(load.key, lambda: [meet] * pieces))  # noqa: B023
        for load in loads:
            load.wait()
        assert sum(size for _, size in work.counted) == 3


def test_a_slot_is_filled_by_one_load_at_a_time(short_idle):
    """A cancelled load left a read in flight, which came after those of the next expert."""
    work = Work(threads=2)
    gone = work.begin("a", stop=0, slot="slot")
    work.stops[0].wait()
    gone.cancelled = True
    following = work.begin("b", slot="slot")
    work.begin("c").wait()
    assert not following.ended
    work.stops[0].go()
    following.wait()
    assert work.finish() == ["a0", "c0", "c there", "b0", "b there"]


def test_time_counts_once_while_several_pieces_are_in_flight(short_idle, monkeypatch):
    work, clock = Work(threads=2), SimpleNamespace(now=10.0)
    monkeypatch.setattr("mixchat.experts.load_queue.time.perf_counter", lambda: clock.now)
    first = work.begin("a", stop=0)
    work.stops[0].wait()
    clock.now = 14.0
    work.begin("b").wait()
    clock.now = 16.0
    work.stops[0].go()
    first.wait()
    assert work.counted == [(4.0, 10), (2.0, 10)]


def test_fills_come_one_at_a_time_after_an_urgent_piece(short_idle, monkeypatch):
    """On a slow disk, the experts of a prompt's next layer waited for eight fills."""
    monkeypatch.setattr("mixchat.experts.load_queue._FILL_PAUSE_S", PATIENCE_S)
    work = Work(threads=2)
    work.begin("a").wait()
    work.begin("b", priority=FILL, stop=0)
    work.stops[0].wait()
    work.begin("c", priority=FILL)
    for name in "defg":
        work.begin(name).wait()
    assert "c0" not in work.log
    assert arrivals(work.finish()) == "adefgbc"


@pytest.mark.parametrize("threads", [1, 4])
def test_whatever_comes_each_arrives_whole_or_is_cancelled(short_idle, threads):
    work = Work(threads)
    luck = random.Random(0)
    loads: dict[str, ExpertLoad] = {}
    for name in [chr(0x4E00 + number) for number in range(300)]:
        loads[name] = work.begin(
            name,
            luck.randint(1, 4),
            layer=luck.randint(0, 3),
            priority=luck.choice([REQUESTED, PREDICTED, FILL]),
            slot=str(luck.randint(0, 30)),
        )
        other = loads[luck.choice(list(loads))]
        if luck.random() < 0.2:
            other.cancelled = True
        elif luck.random() < 0.2:
            work.queue.reorder(other, luck.choice([REQUESTED, PREDICTED, FILL]))
    log = work.finish()
    for name, load in loads.items():
        own = [entry for entry in log if entry[0] == name]
        pieces = sorted(entry for entry in own if entry[1:].isdigit())
        assert pieces == [f"{name}{number}" for number in range(len(pieces))]
        assert load.ended == (f"{name} there" in own)
        assert load.ended or load.cancelled
        if load.ended:
            assert own[-1] == f"{name} there"


def test_a_thread_that_cannot_be_started_fails_one_transfer_and_not_all_later_ones(
    work, monkeypatch
):
    """A thread counted as started, and whoever waited for a load hung."""

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

    queue = LoadQueue(2, refuse)
    for _ in range(2):
        load = ExpertLoad(ExpertKey(0, 0))
        queue.begin(load, Job("slot", lambda: [lambda: 0]))
        with pytest.raises(MemoryError):
            load.wait()


def test_a_thread_whose_context_fails_at_its_end_counts_once(short_idle):
    """It counted twice, and the queue started more threads than it may."""

    @contextmanager
    def inside():
        yield
        raise MemoryError("no stream")

    queue, others = LoadQueue(1, inside), set(threading.enumerate())
    for _ in range(2):
        load = ExpertLoad(ExpertKey(0, 0))
        queue.begin(load, Job("slot", lambda: [lambda: 0]))
        load.wait()
        for thread in set(threading.enumerate()) - others:
            thread.join(PATIENCE_S)
    in_flight = threading.Barrier(2)

    def meet() -> int:
        with pytest.raises(threading.BrokenBarrierError):
            in_flight.wait(0.1)
        return 0

    loads = [ExpertLoad(ExpertKey(0, number)) for number in range(3)]
    for load in loads:
        queue.begin(load, Job(load.key, lambda: [meet]))
    for load in loads:
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
