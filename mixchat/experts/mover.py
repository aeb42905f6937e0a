"""Loads experts in the background, requested ones first, then prefetches, then fills.

The thread is not a daemon, because Python ends daemons in the middle of torch's code, which then
aborts the process.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator
from contextlib import AbstractContextManager, nullcontext
from heapq import heappop, heappush
from itertools import count

from mixchat.base import interrupts
from mixchat.base.errors import ResourceError
from mixchat.experts.cache import ExpertKey

# Priorities of loads. A fill brings an expert that nobody needs yet into a free slot.
REQUESTED, PREDICTED, FILL = range(3)
_IDLE_S = 0.1  # until the thread ends
_SIGNAL_CHECK_S = 0.05  # between two checks for a signal

# The steps of loading an expert, a few milliseconds each. It can be put off between two.
Steps = Generator[None, None, None]


class ExpertLoad:
    """One expert on its way into a slot.

    `cancelled` may be set at any time. A step that has started ends nevertheless. Another load can
    get the slot at once, because it is carried out afterwards.
    """

    def __init__(self, key: ExpertKey, priority: int = REQUESTED) -> None:
        self.key, self.priority = key, priority
        self.steps: Steps | None = None  # while it is queued or carried out
        self.cancelled = False
        self._ended = threading.Event()
        self._error: BaseException | None = None

    @property
    def ended(self) -> bool:
        return self._ended.is_set()

    @property
    def failed(self) -> bool:
        return self._error is not None

    def wait(self) -> None:
        """Wait for the expert. Raise the error of its steps. A signal leaves it on its way."""
        while not self._ended.wait(_SIGNAL_CHECK_S):
            interrupts.check()
        if self._error is not None:
            raise self._error

    def end(self, error: BaseException | None = None) -> None:
        """Mark it as arrived, or as failed with an error."""
        self._error = error
        self._ended.set()


class Mover:
    """Carries out loads. Its thread enters the context `inside` meanwhile.

    may_fill: returns whether fills may begin. If not, they fail.
    """

    def __init__(
        self,
        inside: Callable[[], AbstractContextManager[object]] = nullcontext,
        may_fill: Callable[[], bool] = lambda: True,
    ) -> None:
        self._inside, self._may_fill = inside, may_fill
        # A heap: priority, the layer of a prefetch, and the order of arrival. A load may be in the
        # heap several times, and counts with its present priority.
        self._queue: list[tuple[int, int, int, ExpertLoad]] = []
        self._arrivals = count(1)
        self._changed = threading.Condition()
        self._works = False

    def begin(self, load: ExpertLoad, steps: Steps) -> None:
        """Queue a load. Raises `ResourceError` if no thread can carry it out."""
        with self._changed:
            if not self._works:
                _start(self._work)
                self._works = True
            load.steps = steps
            self._put(load, next(self._arrivals))
            self._changed.notify()

    def reorder(self, load: ExpertLoad, priority: int) -> bool:
        """Carry out a load with another priority. Return False if it has ended."""
        with self._changed:
            load.priority = priority
            # The heap's other entry of this load no longer has its priority, and is skipped.
            self._put(load, next(self._arrivals))
            return not load.ended

    def _put(self, load: ExpertLoad, order: int) -> None:
        layer = load.key.layer if load.priority == PREDICTED else 0
        heappush(self._queue, (load.priority, layer, order, load))

    def _work(self) -> None:
        try:
            with self._inside():
                while (load := self._next()) is not None:
                    self._carry_out(load)
        except BaseException as error:
            # All loads end, so that nobody waits. A later one gets a new thread.
            with self._changed:
                self._works = False
                for *_, load in self._queue:
                    if not load.ended:
                        load.end(error)
                self._queue.clear()

    def _carry_out(self, load: ExpertLoad) -> None:
        """Load an expert, or put it off for a more urgent load that comes meanwhile."""
        assert load.steps is not None
        try:
            # Cancelled in the queue, perhaps after some steps.
            if load.cancelled:
                return load.steps.close()
            for _ in load.steps:
                if load.cancelled or _program_is_over():
                    return load.steps.close()
                with self._changed:
                    if self._queue and self._queue[0][0] < load.priority:
                        # Below zero, so that it comes before others of its layer.
                        self._put(load, -next(self._arrivals))
                        return None
            load.end()
        except BaseException as error:
            load.end(error)
        return None

    def _next(self) -> ExpertLoad | None:
        with self._changed:
            if not (self._queue or _program_is_over()):
                self._changed.wait(_IDLE_S)
            while self._queue and not _program_is_over():
                priority, *_, load = heappop(self._queue)
                if priority != load.priority or load.ended:
                    continue
                try:
                    if priority != FILL or self._may_fill():
                        return load
                except BaseException as error:
                    load.end(error)
                    raise
                assert load.steps is not None
                # It may have been put off, and then reads are in flight.
                load.steps.close()
                load.end(MemoryError())
            self._works = False
            return None


def _start(work: Callable[[], None]) -> None:
    try:
        threading.Thread(target=work).start()
    except RuntimeError:
        raise no_thread() from None


def no_thread() -> ResourceError:
    """Return the error if no thread can be started."""
    return ResourceError(
        "cannot start a thread to read experts",
        hint="The limit of processes is reached: end some, or raise it (ulimit -u).",
    )


def _program_is_over() -> bool:
    return not threading.main_thread().is_alive()
