"""A worker as the dispatcher sees it, which may be lost and come back.

D = hidden_size.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Collection, Sequence

import torch

from mixchat.base.errors import MixchatError, ResourceError
from mixchat.base.progress import Note
from mixchat.experts.cache import ExpertKey
from mixchat.experts.layer_rows import LayerRows
from mixchat.experts.workers.link import Link
from mixchat.experts.workers.sockets import BadMessageError, ConnectionLostError

# A failed attempt takes seconds if the worker hangs. The next one comes after 10 times as long, so
# that waiting for a lost worker takes a tenth of the time at most.
_REST_FACTOR = 10


class RemoteWorker:
    """The experts of a worker. The error of the first `connect` is raised."""

    def __init__(self, connect: Callable[[], Link], note: Note) -> None:
        self._connect = connect
        self._note = note
        self._link: Link | None = connect()
        self._planned: list[ExpertKey] = []
        self._held: frozenset[ExpertKey] = frozenset()
        self._unanswered: Sequence[ExpertKey] = ()
        self._rests_until = 0.0
        self._is_noted = False  # that it is lost
        self.slots = self._link.slots
        self.name = str(self._link.address)
        self.arithmetic = self._link.arithmetic

    @property
    def held(self) -> Collection[ExpertKey]:
        return self._held

    def hold(self, keys: Sequence[ExpertKey]) -> None:
        """Let the worker hold these experts from now on, also when it comes back."""
        self._planned = list(keys)
        self._hold_planned()

    def begin_turn(self) -> None:
        if self._link is not None and (self._unanswered or self._link.is_lost):
            self.close()  # after an answer that was stopped in a layer, or a lost link
        self._unanswered = ()
        if self._link is not None or time.monotonic() < self._rests_until:
            return
        started = time.monotonic()
        try:
            self._link = self._connect()
        except MixchatError as error:
            if not isinstance(error, ResourceError):  # a busy worker may soon be free
                now = time.monotonic()
                self._rests_until = now + _REST_FACTOR * (now - started)
            self._note_once(str(error).removeprefix(f"{self.name}: "))
        else:
            self._hold_planned()

    def begin(self, rows: LayerRows, keys: Sequence[ExpertKey]) -> None:
        x = rows.of(*keys)
        unanswered = self._unanswered
        self._unanswered = keys
        try:
            assert self._link is not None
            if unanswered:  # a layer begins again, since a GPU's memory ran out
                self._link.finish()
            experts = [(key.expert, rows.counts[key]) for key in keys]
            self._link.start(rows.layer, experts, x)
        except ConnectionLostError as error:
            self._lose(error)

    def finish(self, rows: LayerRows) -> Sequence[ExpertKey]:
        # Cleared first: a layer that begins again must not wait for an answer that nobody owes.
        keys = self._unanswered
        self._unanswered = ()
        if self._link is not None:
            try:
                outputs = torch.split(self._link.finish(), [rows.counts[key] for key in keys])
            except ConnectionLostError as error:
                self._lose(error)
            else:
                for key, output in zip(keys, outputs, strict=True):
                    rows.put(key, output)
                keys = ()
        return keys

    def close(self) -> None:
        if self._link is not None:
            self._link.close()
        self._link = None
        self._held = frozenset()

    def _hold_planned(self) -> None:
        assert self._link is not None
        keys = self._planned[: self._link.slots]
        try:
            self._link.hold(keys)
        except ConnectionLostError as error:
            self._lose(error)
        else:
            self._held = frozenset(keys)
            self._is_noted = False

    def _lose(self, error: ConnectionLostError) -> None:
        self.close()
        if isinstance(error, BadMessageError):
            self._rests_until = math.inf
        self._note_once(error.reason)

    def _note_once(self, reason: str) -> None:
        if not self._is_noted:
            until = "from now on" if self._rests_until == math.inf else "until it is back"
            self._note(
                f"worker {self.name} is lost ({reason}): this machine computes its experts {until}"
            )
        self._is_noted = True
