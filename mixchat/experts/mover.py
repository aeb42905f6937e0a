"""Loads experts in the background: requested ones first, then prefetches.

The thread is not a daemon, because Python ends daemons in the middle of torch's code, which then
aborts the process.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Generator
from contextlib import AbstractContextManager, nullcontext

from mixchat.base import interrupts
from mixchat.base.errors import ResourceError
from mixchat.experts.cache import ExpertKey

_IDLE_S = 0.1  # until the thread ends
_SIGNAL_CHECK_S = 0.05  # between two checks for a signal

# The steps of loading an expert, a few milliseconds each. It can be put off between two.
Steps = Generator[None, None, None]


class ExpertLoad:
    """One expert on its way into a slot.

    `cancelled` may be set at any time. A step that has started ends nevertheless. Another load can
    get the slot at once, because it is carried out afterwards.
    """

    def __init__(self, key: ExpertKey, *, is_prefetch: bool = False) -> None:
        self.key, self.is_prefetch = key, is_prefetch
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
    """Carries out loads. Its thread enters the context `inside` meanwhile."""

    def __init__(self, inside: Callable[[], AbstractContextManager[object]] = nullcontext) -> None:
        self._inside = inside
        self._requested: deque[ExpertLoad] = deque()
        self._prefetches: list[ExpertLoad] = []
        self._changed = threading.Condition()
        self._works = False

    def begin(self, load: ExpertLoad, steps: Steps) -> None:
        """Queue a load. Raises `ResourceError` if no thread can carry it out."""
        with self._changed:
            if not self._works:
                _start(self._work)
                self._works = True
            load.steps = steps
            (self._prefetches if load.is_prefetch else self._requested).append(load)
            self._changed.notify()

    def promote(self, load: ExpertLoad) -> None:
        """Carry out a prefetch as a request."""
        with self._changed:
            load.is_prefetch = False
            if load in self._prefetches:
                self._prefetches.remove(load)
                self._requested.append(load)

    def _work(self) -> None:
        try:
            with self._inside():
                while (load := self._next()) is not None:
                    self._carry_out(load)
        except BaseException as error:
            self._fail(error)

    def _fail(self, error: BaseException) -> None:
        """End all loads, so that nobody waits. A later one gets a new thread."""
        with self._changed:
            self._works = False
            for load in (*self._requested, *self._prefetches):
                load.end(error)
            self._requested.clear()
            self._prefetches.clear()

    def _carry_out(self, load: ExpertLoad) -> None:
        assert load.steps is not None
        try:
            if load.cancelled:  # in the queue, perhaps after some steps
                return load.steps.close()
            for _ in load.steps:
                if load.cancelled or _program_is_over():
                    return load.steps.close()
                if self._put_off(load):
                    return None
            load.end()
        except BaseException as error:
            load.end(error)
        return None

    def _put_off(self, load: ExpertLoad) -> bool:
        with self._changed:
            if not (load.is_prefetch and self._requested):
                return False
            self._prefetches.insert(0, load)  # before others of its layer
            return True

    def _next(self) -> ExpertLoad | None:
        with self._changed:
            if not (self._requested or self._prefetches or _program_is_over()):
                self._changed.wait(_IDLE_S)
            self._works = bool(self._requested or self._prefetches) and not _program_is_over()
            if not self._works:
                return None
            if self._requested:
                return self._requested.popleft()
            nearest = min(self._prefetches, key=lambda load: load.key.layer)
            self._prefetches.remove(nearest)
            return nearest


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
