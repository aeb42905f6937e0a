"""The worker's side of one chat: it loads experts, and computes what is asked for.

D = hidden_size, n = rows of a request.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Protocol

import torch

from mixchat.experts.keys import ExpertKey
from mixchat.experts.workers import messages
from mixchat.experts.workers.connection import Connection, ConnectionLostError, Frame
from mixchat.experts.workers.group import RESULT, ROW, ROWS, Group, Transfer
from mixchat.experts.workers.messages import BEAT, Hello, Kind, Request

_IDLE = 0.5  # seconds between two looks at the memory, where nothing is asked
_TICK = 0.25  # of a beat: how often the thread looks


class HostedExperts(Protocol):
    """The experts of a worker: what `Session` needs of them."""

    @property
    def num_layers(self) -> int:
        """Return how many layers the model has."""

    @property
    def num_experts(self) -> int:
        """Return how many experts a layer has."""

    @property
    def slots(self) -> int:
        """Return how many experts can be held."""

    def follow_memory(self) -> None:
        """Free experts where other programs need the memory. Often called while nothing is asked.

        Then there are fewer `slots`; when there is memory again, they become more.
        """

    def hold(self, keys: Sequence[ExpertKey]) -> None:
        """Let these experts be the ones to hold, as far as there are slots; load none yet."""

    def load_next(self) -> bool:
        """Load the first of the experts to hold that is missing; return False if none is."""

    def compute(
        self,
        layer: int,
        experts: Sequence[tuple[int, int]],
        x: torch.Tensor,
        shared_row: bool,
        check: Callable[[], None],
    ) -> torch.Tensor:
        """Return the outputs of experts, each (expert, rows), expert by expert: [n, D] on the CPU.

        x: [n, D] on the CPU, which is valid until the next request; [1, D] with `shared_row`, for
        all experts. An expert that is not held is loaded first. `check` is called between two
        experts, and raises where nobody waits for the result any more.
        """


class Session:
    """One chat, from its first request to the end of its connection."""

    def __init__(
        self,
        connection: Connection,
        group: Group,
        experts: HostedExperts,
        hello: Hello,
        beat: float = BEAT,
    ) -> None:
        self.requests = 0
        self._connection, self._group, self._experts = connection, group, experts
        self._hidden_size, self._dtype = hello.hidden_size, getattr(torch, hello.dtype)
        self._beats = _Beats(connection, beat)
        self._row = self._empty(1)
        self._room = experts.slots  # that the chat side knows of
        self._loading = False

    def run(self) -> None:
        """Serve until the chat side is gone: then `ConnectionLostError` is raised.

        An error of the experts is raised, too, after the chat side has been told.
        """
        with self._beats:
            row = self._group.receive(self._row, ROW)
            while True:
                frame = self._next()
                if frame.kind == Kind.HOLD:
                    self._hold(messages.unpack_keys(frame.payload))
                elif frame.kind == Kind.COMPUTE:
                    row = self._serve(messages.unpack_request(frame.payload), row)
                else:
                    raise ConnectionLostError("it sent a message out of turn")

    def _next(self) -> Frame:
        """Return the next frame. While none is there, experts are loaded, one by one, or freed."""
        while not self._connection.has_arrived(0.0 if self._loading else _IDLE):
            with self._beats.busy:  # a request may come meanwhile
                if self._loading:
                    self._loading = self._experts.load_next()
                else:
                    self._experts.follow_memory()
        return self._connection.receive(None)

    def _hold(self, keys: list[ExpertKey]) -> None:
        self._require(len(keys) <= self._room)
        for layer, expert in keys:
            self._require(layer < self._experts.num_layers)
            self._require(expert < self._experts.num_experts)
        self._experts.hold(keys)
        self._loading = True

    def _serve(self, request: Request, row: Transfer) -> Transfer:
        """Compute a request; return the transfer of the next row."""
        self._require(request.layer < self._experts.num_layers)
        self._require(all(expert < self._experts.num_experts for expert, _ in request.experts))
        with self._beats.busy:
            x = self._receive(request, row)
            begun = time.perf_counter()
            y = self._experts.compute(
                request.layer, request.experts, x, request.shared_row, self._beats.check
            )
            seconds = time.perf_counter() - begun
            assert y.shape == (request.rows, self._hidden_size)
            assert y.dtype == self._dtype
            sent = self._group.send(y, RESULT)
            if request.rows_sent > 1:  # a beat tells of each second that many rows travel
                sent.wait(self._beats.check)
        self._connection.send(Kind.DONE, messages.pack_seconds(seconds))
        sent.wait()
        self.requests += 1
        return row if request.rows_sent > 1 else self._group.receive(self._row, ROW)

    def _receive(self, request: Request, row: Transfer) -> torch.Tensor:
        if request.rows_sent == 1:
            return row.wait()
        x = self._empty(request.rows_sent)
        return self._group.receive(x, ROWS).wait(self._beats.check)

    def _empty(self, rows: int) -> torch.Tensor:
        return torch.empty(rows, self._hidden_size, dtype=self._dtype)

    def _require(self, condition: bool) -> None:
        if not condition:
            raise ConnectionLostError("it asked for what the model does not have")


class _Beats:
    """A thread that tells the chat side of each second of work, and notices when it is gone."""

    def __init__(self, connection: Connection, beat: float) -> None:
        self.busy = _Busy()
        self._connection, self._beat = connection, beat
        self._over, self._gone = threading.Event(), False
        self._thread = threading.Thread(target=self._run, daemon=True)

    def check(self) -> None:
        """Raise `ConnectionLostError` where the chat side is gone."""
        if self._gone:
            raise ConnectionLostError("it closed the connection")

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._over.set()
        self._thread.join()

    def _run(self) -> None:
        last = 0.0
        while not self._over.wait(self._beat * _TICK):
            since, now = self.busy.since, time.monotonic()
            if since is None:
                continue
            if now - max(since, last) >= self._beat * (1 - _TICK):
                last = now
                self._send()
            self._gone = self._gone or self._connection.has_ended()

    def _send(self) -> None:
        try:
            self._connection.send(Kind.BUSY)
        except ConnectionLostError:
            self._gone = True


class _Busy:
    """The time since when a request is served; a block that costs next to nothing."""

    since: float | None = None

    def __enter__(self) -> None:
        self.since = time.monotonic()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.since = None
