"""The chat side of a worker: rows go out, results come back.

A fault after the beginning never waits: everything of that worker is closed, and
`ConnectionLostError` says why, so that the experts are computed elsewhere.

D = hidden_size, n = rows of a request.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch

from mixchat.base.errors import CheckpointError, MixchatError, ResourceError, ServerError
from mixchat.experts.cache import ExpertKey
from mixchat.experts.workers import messages
from mixchat.experts.workers.address import Address
from mixchat.experts.workers.connection import (
    SILENCE_S,
    BadMessageError,
    Connection,
    ConnectionLostError,
    receive_rows,
    send_rows,
)
from mixchat.experts.workers.messages import (
    Hello,
    Kind,
    Refusal,
    Request,
    Welcome,
    describe_model,
)

# Until the worker has said what it has: it may have to compute experts of another chat first.
_WELCOME_S = 10.0
# Until a worker that lives has answered: time to load experts from a slow disk, and for each row
# several times what a slow processor takes.
_REQUEST_S, _ROW_S = 60.0, 0.2


class Link:
    """A worker that has been greeted, for one request at a time: `start`, then `finish`."""

    def __init__(
        self, address: Address, connection: Connection, hello: Hello, welcome: Welcome
    ) -> None:
        self.address = address
        self.slots, self.arithmetic = welcome.slots, welcome.arithmetic
        self.seconds_computing = 0.0  # of all requests, by the worker's own clock
        self._connection = connection
        self._hidden_size, self._dtype = hello.hidden_size, getattr(torch, hello.dtype)
        self._asked: tuple[Request, torch.Tensor, float] | None = None  # its rows, and its deadline

    @classmethod
    def open(cls, address: Address, key: bytes, hello: Hello, silence: float = SILENCE_S) -> Link:
        """Connect to a worker, prove the key, and say which model it is.

        Raises `UsageError` for a wrong address or key, `CheckpointError` for another model or
        version, `ResourceError` if the worker is busy or has too little room, and `ServerError`
        if it cannot be reached, does not answer or is lost.
        """
        connection = Connection(address, key, silence)
        try:
            connection.send(messages.pack_fields(Kind.HELLO, hello))
            message = connection.receive(time.monotonic() + _WELCOME_S)
            if messages.kind_of(message) == Kind.REFUSAL:
                raise _refusal(address, messages.unpack_refusal(message[1:]), hello)
            welcome = messages.unpack_welcome(messages.expect(Kind.WELCOME, message))
        except ConnectionLostError as error:
            connection.close()
            raise ServerError(f"{address}: the worker is lost: {error.reason}") from None
        except BaseException:
            connection.close()
            raise
        return cls(address, connection, hello, welcome)

    @property
    def is_lost(self) -> bool:
        """Return whether it is closed, or known to be gone."""
        return self._connection.has_ended()

    def hold(self, keys: Sequence[ExpertKey]) -> None:
        """Let the worker load these experts, the first ones first, while no request waits.

        It holds no others, and at most `slots`. Raises `ConnectionLostError`.
        """
        assert len(keys) <= self.slots
        with self._closed_on_error():
            self._connection.send(messages.pack_keys(keys))

    def start(self, layer: int, experts: Sequence[tuple[int, int]], x: torch.Tensor) -> None:
        """Send rows to experts of a layer, each (expert, rows). Raises `ConnectionLostError`.

        x: [n, D], contiguous and on the CPU, expert by expert; or [1, D] if all experts take the
        same row.
        """
        request = Request(layer, tuple(experts), len(x) == 1)
        assert self._asked is None
        assert x.dtype == self._dtype
        assert x.shape == (request.rows_sent, self._hidden_size)
        with self._closed_on_error():
            send_rows(self._connection.send, messages.pack_request(request), x)
        self._asked = request, x, time.monotonic() + _REQUEST_S + _ROW_S * request.rows

    def finish(self) -> torch.Tensor:
        """Return the experts' outputs, [n, D] on the CPU, expert by expert.

        Raises `ConnectionLostError`, also if they do not come in time, or are not finite.
        """
        assert self._asked is not None
        (request, x, deadline), self._asked = self._asked, None
        with self._closed_on_error():
            message = self._connection.receive(deadline)
            if messages.kind_of(message) == Kind.FAILED:
                raise ConnectionLostError(messages.unpack_text(message[1:]))
            seconds, piece = messages.unpack_done(message)
            y = torch.empty(request.rows, self._hidden_size, dtype=self._dtype)
            receive_rows(y, piece, lambda: self._connection.receive(deadline))
            if not _is_finite(y) and _is_finite(x):
                raise BadMessageError("it sent numbers that are not finite")
        self.seconds_computing += seconds
        return y

    def close(self) -> None:
        """End the chat with this worker, also in the midst of a request. It may be called twice."""
        self._connection.close()
        self._asked = None

    @contextmanager
    def _closed_on_error(self) -> Iterator[None]:
        # Ctrl-C closes it, too: an answer that nobody waits for must not meet the next request.
        try:
            yield
        except BaseException:
            self.close()
            raise


def _is_finite(rows: torch.Tensor) -> bool:
    # A sum is the fastest look at all numbers. One that is not finite may be that of large ones.
    return math.isfinite(rows.sum(dtype=torch.float32)) or bool(rows.isfinite().all())


def _refusal(address: Address, refusal: Refusal, hello: Hello) -> MixchatError:
    if refusal.cause == "version":
        return CheckpointError(
            f"{address}: the worker runs mixchat {refusal.text}, and this is {hello.version}",
            hint="Install the same version on both machines.",
        )
    if refusal.cause == "model":
        mine = describe_model(hello.model_name, hello.model_identity)
        return CheckpointError(
            f"{address}: the worker has the model {refusal.text}, and this one is {mine}",
            hint="Copy the model's directory to that machine, and start the worker with it.",
        )
    if refusal.cause in ("busy", "room"):
        return ResourceError(f"{address}: the worker {refusal.text}")
    return ServerError(f"{address}: the worker refuses: {refusal.text}")
