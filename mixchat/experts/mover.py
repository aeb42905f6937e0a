"""Moves experts in the background, one after the other, in the order in which they were asked for.

One disk and one bus gain nothing from several transfers at once, so there is one thread, which goes
when it has had nothing to do for a while. It is no daemon: Python ends daemons in the midst of
torch's code, which then aborts the process.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable

from mixchat.experts.cache import ExpertKey

_IDLE = 1.0  # seconds


class Transfer:
    """One expert on its way into a slot.

    `cancelled` may be set at any time. A transfer that has begun ends nevertheless; its slot can be
    given to another at once, since that one is carried out afterwards.
    """

    def __init__(self, key: ExpertKey) -> None:
        self.key = key
        self.slot = -1
        self.queued = self.cancelled = False
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
        """Return when the expert is in its slot. Raises what moving it raised."""
        self._ended.wait()
        if self._error is not None:
            raise self._error

    def end(self, error: BaseException | None = None) -> None:
        """Say that it has arrived, or why it has not."""
        self._error = error
        self._ended.set()


class Mover:
    """Carries out transfers with `load`, which fills a slot with an expert, taking its time."""

    def __init__(self, load: Callable[[ExpertKey, int], None]) -> None:
        self._load = load
        self._queue: deque[Transfer] = deque()
        self._changed = threading.Condition()
        self._works = False

    def begin(self, transfer: Transfer, slot: int) -> None:
        """Queue a transfer into `slot`."""
        transfer.slot = slot
        with self._changed:
            self._queue.append(transfer)
            transfer.queued = True
            if not self._works:
                self._works = True
                threading.Thread(target=self._work).start()
            self._changed.notify()

    def _work(self) -> None:
        while (transfer := self._next()) is not None:
            if transfer.cancelled:
                continue
            try:
                self._load(transfer.key, transfer.slot)
            except BaseException as error:
                transfer.end(error)
            else:
                transfer.end()

    def _next(self) -> Transfer | None:
        """What to carry out now; None where nothing came for a while."""
        with self._changed:
            if not self._queue:
                self._changed.wait(_IDLE)
            self._works = bool(self._queue)
            return self._queue.popleft() if self._queue else None
