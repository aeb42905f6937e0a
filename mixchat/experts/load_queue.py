"""The queue of loads: brings experts into slots, the most urgent ones first.

A load is carried out in pieces of a few milliseconds, by several threads. So several pieces are in
flight at once, of one expert or of several. A disk that got one small expert at a time gave half of
its bandwidth. Requested experts come first, then predicted ones, then fills. A more urgent load
waits for pieces in flight alone.

The threads are not daemons, because Python ends daemons in the middle of torch's code, which then
aborts the process.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Hashable, Sequence
from contextlib import AbstractContextManager, nullcontext
from heapq import heappop, heappush
from itertools import count
from typing import NamedTuple

from mixchat.base import interrupts
from mixchat.base.errors import ResourceError
from mixchat.experts.cache import ExpertKey

# Priorities of loads. A fill brings an expert that nobody needs yet into a free slot.
REQUESTED, PREDICTED, FILL = range(3)
_IDLE_S = 0.1  # until a thread ends
# After an urgent piece, in which fills come one at a time. More urgent pieces follow in a prompt,
# and would wait for fills: at 500 MB/s, eight of them took a layer's time.
_FILL_PAUSE_S = 0.2
_SIGNAL_CHECK_S = 0.05  # between two checks for a signal

Piece = Callable[[], int]  # moves bytes, and returns how many


class Job(NamedTuple):
    """The work of a load: to fill a slot.

    target: the slot's memory. Pieces of jobs with one target are never in flight together.
    pieces: called when the job's turn comes, under the queue's lock. finish: called after the last
    piece.
    """

    target: Hashable
    pieces: Callable[[], Sequence[Piece]]
    finish: Callable[[], None] = lambda: None


class ExpertLoad:
    """One expert on its way into a slot.

    `cancelled` may be set at any time. Pieces in flight end nevertheless. Another load can get the
    slot at once, because it begins after them.
    """

    def __init__(self, key: ExpertKey, priority: int = REQUESTED) -> None:
        self.key = key
        self.priority = priority
        self.cancelled = False
        self._ended = threading.Event()
        self._error: BaseException | None = None
        # Of the queue, under its lock: the pieces to come, None before the load's turn.
        self.job: Job | None = None
        self.pieces: deque[Piece] | None = None
        self.in_flight = 0

    @property
    def ended(self) -> bool:
        return self._ended.is_set()

    @property
    def failed(self) -> bool:
        return self._error is not None

    def wait(self) -> None:
        """Wait for the expert. Raise the error of its pieces. A signal leaves it on its way."""
        while not self._ended.wait(_SIGNAL_CHECK_S):
            interrupts.check()
        if self._error is not None:
            raise self._error

    def end(self, error: BaseException | None = None) -> None:
        """Mark it as arrived, or as failed with an error."""
        self._error = error
        self._ended.set()


class LoadQueue:
    """Carries out loads in up to `threads` threads, which enter the context `inside` meanwhile.

    may_fill: returns whether fills may begin. If not, they fail. count: gets the seconds in which
    pieces were in flight, and the bytes that they moved.
    """

    def __init__(
        self,
        threads: int,
        inside: Callable[[], AbstractContextManager[object]] = nullcontext,
        may_fill: Callable[[], bool] = lambda: True,
        count_moved: Callable[[float, int], None] = lambda seconds, size: None,
    ) -> None:
        self._limit = threads
        self._inside = inside
        self._may_fill = may_fill
        self._count_moved = count_moved
        self.predicted_limit = threads  # pieces in flight from which on no predicted one begins
        # A heap: priority, the layer of a prefetch, and the order of arrival. A load may be in the
        # heap several times, and counts with its present priority. It stays until all of its pieces
        # have begun.
        self._waiting: list[tuple[int, int, int, ExpertLoad]] = []
        self._arrivals = count(1)
        self._changed = threading.Condition()
        self._threads: set[threading.Thread] = set()
        self._idle = self._pieces_in_flight = 0
        self._pause_until = 0.0  # of all fills but one
        self._filling: dict[Hashable, ExpertLoad] = {}  # by slot: the load with pieces in flight
        self._counted_until = 0.0

    def begin(self, load: ExpertLoad, job: Job) -> None:
        """Queue a load. Raises `ResourceError` if no thread can carry it out."""
        with self._changed:
            assert self._limit, "it is closed"
            if _program_is_over():
                raise _end_of_program()
            self._call_thread()
            load.job = job
            self._put(load)

    def reorder(self, load: ExpertLoad, priority: int) -> bool:
        """Carry out a load with another priority. Return False if it has ended."""
        with self._changed:
            load.priority = priority
            # The heap's other entry of this load no longer has its priority, and is skipped.
            self._put(load)
            return not load.ended

    def close(self) -> None:
        """End threads as soon as nothing is in flight. No load begins after that."""
        with self._changed:
            self._limit = 0
            # These functions may refer to the queue's owner. Such a circle would wait for the
            # collector.
            self._inside = nullcontext
            self._count_moved = lambda seconds, size: None
            self._changed.notify_all()

    def _put(self, load: ExpertLoad) -> None:
        layer = load.key.layer if load.priority == PREDICTED else 0
        # One that has begun comes before others of its priority and layer. Otherwise each
        # interruption would begin one more, and none would arrive in time.
        order = next(self._arrivals)
        heappush(self._waiting, (load.priority, layer, -order if load.pieces else order, load))

    def _call_thread(self) -> None:
        """Wake up a thread, or start one if all are busy and there may be more."""
        self._changed.notify()
        if self._idle or len(self._threads) >= self._limit:
            return
        try:
            # Otherwise a thread is a daemon if the caller is, as a model's own thread.
            thread = _QueueThread(target=self._work, daemon=False)
            thread.start()
            self._threads.add(thread)
        except RuntimeError:
            if not self._threads:
                raise ResourceError(
                    "cannot start a thread to read experts",
                    hint="The limit of processes is reached: end some, or raise it (ulimit -u).",
                ) from None

    def _work(self) -> None:
        try:
            with self._inside():
                while (taken := self._take()) is not None:
                    self._carry_out(*taken)
        except BaseException as error:
            # A later load gets a new thread.
            with self._changed:
                self._threads.discard(threading.current_thread())
                self._end_waiting(error)

    def _end_waiting(self, error: BaseException) -> None:
        """End all loads that are not in flight, so that nobody waits for them."""
        for *_, load in self._waiting:
            if not load.ended:
                load.end(error)
        self._waiting.clear()

    def _take(self) -> tuple[ExpertLoad, Job, Piece] | None:
        """Return the most urgent piece, and its load. Return None if the thread is to end."""
        with self._changed:
            while not _program_is_over():
                now = time.perf_counter()
                if (taken := self._next_piece(now)) is not None:
                    if not self._pieces_in_flight:
                        self._counted_until = now
                    self._pieces_in_flight += 1
                    if self._waiting:
                        self._call_thread()
                    return taken
                if not self._waiting and not self._limit:
                    break
                self._idle += 1
                was_called = self._changed.wait(_IDLE_S)
                self._idle -= 1
                if not was_called and not self._waiting:
                    break
            else:
                self._end_waiting(_end_of_program())
            self._threads.discard(threading.current_thread())
            return None

    def _next_piece(self, now: float) -> tuple[ExpertLoad, Job, Piece] | None:
        passed_over = []
        try:
            while self._waiting:
                priority, *_, load = self._waiting[0]
                job = load.job
                assert job is not None
                if (
                    load.ended
                    or load.cancelled
                    or priority != load.priority
                    or (load.pieces is not None and not load.pieces)
                ):
                    heappop(self._waiting)
                elif self._filling.get(job.target, load) is not load:
                    # Pieces of the slot's former expert are in flight.
                    passed_over.append(heappop(self._waiting))
                elif self._is_held_back(priority, now):
                    break
                elif self._has_begun(load, job):
                    assert load.pieces
                    if priority != FILL:
                        self._pause_until = now + _FILL_PAUSE_S
                    load.in_flight += 1
                    self._filling[job.target] = load
                    return load, job, load.pieces.popleft()
            return None
        finally:
            for entry in passed_over:
                heappush(self._waiting, entry)

    def _is_held_back(self, priority: int, now: float) -> bool:
        """Return whether the most urgent piece waits for pieces in flight, as all others do."""
        if priority == PREDICTED:
            return self._pieces_in_flight >= self.predicted_limit
        is_filling = any(load.priority == FILL for load in self._filling.values())
        return priority == FILL and now < self._pause_until and is_filling

    def _has_begun(self, load: ExpertLoad, job: Job) -> bool:
        """Return whether a load has pieces to carry out, and begin it if its turn has come."""
        if load.pieces is None:
            try:
                if load.priority == FILL and not self._may_fill():
                    raise MemoryError
                load.pieces = deque(job.pieces())
            except BaseException as error:
                load.end(error)
        return bool(load.pieces)

    def _carry_out(self, load: ExpertLoad, job: Job, piece: Piece) -> None:
        size = 0
        error = None
        try:
            size = piece()
        except BaseException as failure:
            error = failure
        with self._changed:
            now = time.perf_counter()
            self._count_moved(now - self._counted_until, size)
            self._counted_until = now
            self._pieces_in_flight -= 1
            load.in_flight -= 1
            assert load.pieces is not None
            if error is not None or load.cancelled:
                load.pieces.clear()
            if error is not None and not load.failed:
                load.end(error)
            is_whole = not (load.in_flight or load.pieces or load.ended or load.cancelled)
            if not load.in_flight and not is_whole:
                del self._filling[job.target]
        if is_whole:
            self._finish(load, job)

    def _finish(self, load: ExpertLoad, job: Job) -> None:
        """End a load outside the lock, while its slot is still taken.

        Under the lock, a prompt's thread waited half of a cold start for others to build experts.
        """
        try:
            job.finish()
            load.end()
        except BaseException as error:
            load.end(error)
        with self._changed:
            del self._filling[job.target]


class _QueueThread(threading.Thread):
    """A thread of a queue, for which alone a program does not go on."""


def _end_of_program() -> ResourceError:
    return ResourceError("cannot read experts, because the program is at its end")


def _program_is_over() -> bool:
    """Return whether Python waits for threads of queues alone."""
    if threading.main_thread().is_alive():
        return False
    threads = (thread for thread in threading.enumerate() if not isinstance(thread, _QueueThread))
    return all(thread.daemon or not thread.is_alive() for thread in threads)
