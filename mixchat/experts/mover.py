"""Moves experts in the background: requested ones first, then prefetches.

One thread is enough: each transfer has several reads in flight itself. The thread ends when it has
had nothing to do for a while. It is no daemon: Python ends daemons in the middle of torch's code,
which then aborts the process.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Generator
from contextlib import AbstractContextManager, nullcontext

from mixchat.base import interrupts
from mixchat.base.errors import ResourceError
from mixchat.experts.keys import ExpertKey

_IDLE = 0.1  # seconds
_LOOK = 0.05  # seconds between two checks for a signal, for whoever waits

# The steps of moving an expert, a few milliseconds each; between two of them it can be put off.
Steps = Generator[None, None, None]


class Transfer:
    """One expert on its way into a slot.

    A prefetch is put off, also after some of its steps, as soon as an expert is requested.
    `cancelled` may be set at any time. A step that has started ends nevertheless; the slot can be
    given to another transfer at once, since that one is carried out afterwards.
    """

    def __init__(self, key: ExpertKey, *, is_prefetch: bool = False) -> None:
        self.key, self.is_prefetch = key, is_prefetch
        self.steps: Steps | None = None  # while it is queued or carried out
        self.cancelled = False
        self._ended = threading.Event()
        self._error: BaseException | None = None

    @property
    def ended(self) -> bool:
        """Return whether it has arrived, or failed."""
        return self._ended.is_set()

    @property
    def failed(self) -> bool:
        """Return whether it has ended without arriving."""
        return self._error is not None

    def wait(self) -> None:
        """Return when the expert is in its slot. Raises what moving it raised.

        A signal that ends the wait leaves the transfer on its way.
        """
        while not self._ended.wait(_LOOK):
            interrupts.check()
        if self._error is not None:
            raise self._error

    def end(self, error: BaseException | None = None) -> None:
        """Mark it as arrived, or as failed with an error."""
        self._error = error
        self._ended.set()


class Mover:
    """Carries out transfers. Its thread enters the context `inside` meanwhile."""

    def __init__(self, inside: Callable[[], AbstractContextManager[object]] = nullcontext) -> None:
        self._inside = inside
        self._requested: deque[Transfer] = deque()
        self._prefetches: list[Transfer] = []
        self._changed = threading.Condition()
        self._works = False

    def begin(self, transfer: Transfer, steps: Steps) -> None:
        """Queue a transfer. Raises `ResourceError` where there is no thread to carry it out."""
        with self._changed:
            if not self._works:
                _start(self._work)
                self._works = True
            transfer.steps = steps
            (self._prefetches if transfer.is_prefetch else self._requested).append(transfer)
            self._changed.notify()

    def promote(self, transfer: Transfer) -> None:
        """Carry out a prefetch as a request, because its prediction was right."""
        with self._changed:
            transfer.is_prefetch = False
            if transfer in self._prefetches:
                self._prefetches.remove(transfer)
                self._requested.append(transfer)

    def _work(self) -> None:
        try:
            with self._inside():
                while (transfer := self._next()) is not None:
                    self._carry_out(transfer)
        except BaseException as error:
            self._fail(error)

    def _fail(self, error: BaseException) -> None:
        """End all transfers with the error, so that nobody waits; a later one gets a new thread."""
        with self._changed:
            self._works = False
            for transfer in (*self._requested, *self._prefetches):
                transfer.end(error)
            self._requested.clear()
            self._prefetches.clear()

    def _carry_out(self, transfer: Transfer) -> None:
        assert transfer.steps is not None
        try:
            if transfer.cancelled:  # in the queue, perhaps after some steps
                return transfer.steps.close()
            for _ in transfer.steps:
                if transfer.cancelled or _ending():
                    return transfer.steps.close()
                if self._put_off(transfer):
                    return None
            transfer.end()
        except BaseException as error:
            transfer.end(error)
        return None

    def _put_off(self, transfer: Transfer) -> bool:
        with self._changed:
            if not (transfer.is_prefetch and self._requested):
                return False
            self._prefetches.insert(0, transfer)  # it continues before others of its layer start
            return True

    def _next(self) -> Transfer | None:
        """Return the transfer to carry out now; None where none came for a while."""
        with self._changed:
            if not (self._requested or self._prefetches or _ending()):
                self._changed.wait(_IDLE)
            self._works = bool(self._requested or self._prefetches) and not _ending()
            if not self._works:
                return None
            if self._requested:
                return self._requested.popleft()
            nearest = min(self._prefetches, key=lambda transfer: transfer.key.layer)
            self._prefetches.remove(nearest)
            return nearest


def _start(work: Callable[[], None]) -> None:
    try:
        threading.Thread(target=work).start()
    except RuntimeError:
        raise no_thread() from None


def no_thread() -> ResourceError:
    """Return the error where the system gives no thread to read experts."""
    return ResourceError(
        "cannot start a thread to read experts",
        hint="The limit of processes is reached: end some, or raise it (ulimit -u).",
    )


def _ending() -> bool:
    """Return whether the program is over: nobody waits for an expert any more."""
    return not threading.main_thread().is_alive()
