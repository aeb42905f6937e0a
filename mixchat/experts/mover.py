"""Moves experts in the background: those that are wanted first, then those that may be.

One disk and one bus gain nothing from several transfers at once, so there is one thread, which goes
when it has had nothing to do for a while. It is no daemon: Python ends daemons in the midst of
torch's code, which then aborts the process.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Generator
from contextlib import AbstractContextManager, nullcontext

from mixchat import interrupts
from mixchat.errors import ResourceError
from mixchat.experts.keys import ExpertKey

_IDLE = 0.1  # seconds
_LOOK = 0.05  # seconds until whoever waits looks whether a signal has come

# Moving an expert, in steps of a few milliseconds; between two of them it can be put off or ended.
Steps = Generator[None, None, None]


class Transfer:
    """One expert on its way into a slot.

    A `guess` is put off, in the midst of its way, as soon as something wanted comes. `cancelled`
    may be set at any time. A step that has begun ends nevertheless; the slot can be given to
    another transfer at once, since that one is carried out afterwards.
    """

    def __init__(self, key: ExpertKey, *, guess: bool = False) -> None:
        self.key, self.guess = key, guess
        self.steps: Steps | None = None  # while it is queued or carried out
        self.cancelled = False
        self._ended = threading.Event()
        self._error: BaseException | None = None

    @property
    def ended(self) -> bool:
        """Whether it has arrived, or failed."""
        return self._ended.is_set()

    @property
    def failed(self) -> bool:
        """Whether it has ended without arriving."""
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
        """Say that it has arrived, or why it has not."""
        self._error = error
        self._ended.set()


class Mover:
    """Carries out transfers. `inside` is what its thread is to be in meanwhile."""

    def __init__(self, inside: Callable[[], AbstractContextManager[object]] = nullcontext) -> None:
        self._inside = inside
        self._wanted: deque[Transfer] = deque()
        self._guessed: list[Transfer] = []
        self._changed = threading.Condition()
        self._works = False

    def begin(self, transfer: Transfer, steps: Steps) -> None:
        """Queue a transfer. Raises `ResourceError` where there is no thread to carry it out."""
        with self._changed:
            if not self._works:
                _start(self._work)
                self._works = True
            transfer.steps = steps
            (self._guessed if transfer.guess else self._wanted).append(transfer)
            self._changed.notify()

    def want(self, transfer: Transfer) -> None:
        """A guess was right: its turn comes before that of all other guesses."""
        with self._changed:
            transfer.guess = False
            if transfer in self._guessed:
                self._guessed.remove(transfer)
                self._wanted.append(transfer)

    def _work(self) -> None:
        try:
            with self._inside():
                while (transfer := self._next()) is not None:
                    self._carry_out(transfer)
        except BaseException as error:
            self._fail(error)

    def _fail(self, error: BaseException) -> None:
        """Let nobody wait for what this thread cannot carry out; the next transfer gets another."""
        with self._changed:
            self._works = False
            for transfer in (*self._wanted, *self._guessed):
                transfer.end(error)
            self._wanted.clear()
            self._guessed.clear()

    def _carry_out(self, transfer: Transfer) -> None:
        assert transfer.steps is not None
        try:
            if transfer.cancelled:  # in the queue, perhaps in the midst of its way
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
            if not (transfer.guess and self._wanted):
                return False
            self._guessed.insert(0, transfer)  # it goes on before others of its layer begin
            return True

    def _next(self) -> Transfer | None:
        """What to carry out now; None where nothing came for a while."""
        with self._changed:
            if not (self._wanted or self._guessed or _ending()):
                self._changed.wait(_IDLE)
            self._works = bool(self._wanted or self._guessed) and not _ending()
            if not self._works:
                return None
            if self._wanted:
                return self._wanted.popleft()
            nearest = min(self._guessed, key=lambda transfer: transfer.key.layer)
            self._guessed.remove(nearest)
            return nearest


def _start(work: Callable[[], None]) -> None:
    try:
        threading.Thread(target=work).start()
    except RuntimeError:
        raise ResourceError(
            "cannot start a thread to read experts",
            hint="The limit of processes is reached: end some, or raise it (ulimit -u).",
        ) from None


def _ending() -> bool:
    """Whether the program is over: nobody waits for an expert any more."""
    return not threading.main_thread().is_alive()
