"""The chat side of a worker: rows go out, results come back.

A fault after the beginning never waits: everything of that worker is closed, and
`WorkerLostError` says why, so that the experts are computed elsewhere.

D = hidden_size, n = rows of a request.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch

from mixchat.errors import CheckpointError, MixchatError, ResourceError, UsageError
from mixchat.experts.keys import ExpertKey
from mixchat.experts.workers import messages
from mixchat.experts.workers.address import Address
from mixchat.experts.workers.connection import (
    SEND_DEADLINE,
    Connection,
    ConnectionLostError,
    connect,
)
from mixchat.experts.workers.group import CHAT, RESULT, ROW, ROWS, Group, Transfer
from mixchat.experts.workers.handshake import (
    NotAWorkerError,
    Proofs,
    WrongKeyError,
    greet_worker,
)
from mixchat.experts.workers.messages import (
    BEAT,
    Hello,
    Kind,
    Refusal,
    Request,
    Welcome,
    describe_model,
)

# Seconds without a sign after which a worker that should answer is lost. A sign may take all the
# time that its sender has, behind a beat that came late: who waits is the more patient one.
SILENCE = SEND_DEADLINE + 2 * BEAT

_CONNECT = 2.0  # seconds to connect, and as many to prove the key
_WELCOME = 5.0  # seconds until the worker has said what it has; it may end another chat first


class WorkerLostError(Exception):
    """A worker is gone, hangs or cannot compute. `reason` completes a sentence on it."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class Link:
    """A worker that has been greeted, for one request at a time: `start`, then `finish`."""

    def __init__(
        self,
        address: Address,
        connection: Connection,
        group: Group,
        hello: Hello,
        welcome: Welcome,
        silence: float,
    ) -> None:
        self.address = address
        self.slots, self.arithmetic = welcome.slots, welcome.arithmetic
        self.seconds_computing = 0.0  # of all requests, by the worker's own clock
        self._connection = connection
        self._group: Group | None = group
        self._shape = (hello.hidden_size, getattr(torch, hello.dtype))
        self._silence = silence
        self._started = 0.0
        self._sent: Transfer | None = None
        self._result: Transfer | None = None

    @classmethod
    def open(cls, address: Address, key: bytes, hello: Hello, silence: float = SILENCE) -> Link:
        """Connect to a worker, prove the key, and say which model it is.

        Raises `UsageError` for a wrong address or key, `CheckpointError` for another model or
        version, `ResourceError` where the worker is busy or has too little room, and a plain
        `MixchatError` where it cannot be reached: that is a fault of the network, which is part of
        what the operating system gives, so no class of its own.
        """
        connection = _connect(address)
        try:
            proofs = _greet(address, connection, key)
            connection.send(Kind.HELLO, messages.pack_fields(hello))
            welcome = _welcome(address, connection, hello)
            group = Group(connection, CHAT, proofs)
            return cls(address, connection, group, hello, welcome, silence)
        except ConnectionLostError as error:
            connection.close()
            raise MixchatError(f"{address}: the worker is lost: {error.reason}") from None
        except BaseException:
            connection.close()
            raise

    @property
    def is_lost(self) -> bool:
        """Return whether it is closed, or known to be gone."""
        return self._group is None or self._connection.has_ended()

    def hold(self, keys: Sequence[ExpertKey]) -> None:
        """Let the worker load these experts, the first ones first, while no request waits.

        It holds no others, and at most `slots`. Raises `WorkerLostError`.
        """
        assert len(keys) <= self.slots
        with self._closed_on_error():
            self._connection.send(Kind.HOLD, messages.pack_keys(keys))

    def start(self, layer: int, experts: Sequence[tuple[int, int]], x: torch.Tensor) -> None:
        """Send rows to experts of a layer, each (expert, rows). Raises `WorkerLostError`.

        x: [n, D], contiguous and on the CPU, expert by expert; or [1, D] where all experts take the
        same row.
        """
        request = Request(layer, tuple(experts), len(x) == 1)
        group, (hidden_size, dtype) = self._group, self._shape
        assert group is not None
        assert self._result is None
        assert x.dtype == dtype
        assert x.shape == (request.rows_sent, hidden_size)
        with self._closed_on_error():
            self._sent = group.send(x, ROW if request.rows_sent == 1 else ROWS)
            self._connection.send(Kind.COMPUTE, messages.pack_request(request))
            self._started = time.monotonic()
            # Last, while the worker computes already: its result is not there before.
            y = torch.empty(request.rows, hidden_size, dtype=dtype)
            self._result = group.receive(y, RESULT)

    def finish(self) -> torch.Tensor:
        """Return the experts' outputs, [n, D] on the CPU, expert by expert.

        Raises `WorkerLostError`, at the latest `silence` seconds after the worker's last sign.
        """
        assert self._sent is not None
        assert self._result is not None
        with self._closed_on_error():
            self._await_result()
            self._sent.wait()
            y = self._result.wait()
        self._sent = self._result = None
        return y

    def close(self) -> None:
        """End the chat with this worker, also in the midst of a request. It may be called twice."""
        self._connection.close()
        self._group = self._sent = self._result = None

    def _await_result(self) -> None:
        heard = self._started
        while (frame := self._connection.receive(heard + self._silence)).kind == Kind.BUSY:
            heard = time.monotonic()
        if frame.kind == Kind.FAILED:
            raise ConnectionLostError(messages.unpack_text(frame.payload))
        if frame.kind != Kind.DONE:
            raise ConnectionLostError("it sent a message out of turn")
        self.seconds_computing += messages.unpack_seconds(frame.payload)

    @contextmanager
    def _closed_on_error(self) -> Iterator[None]:
        # Ctrl-C closes it, too: an answer that nobody waits for must not meet the next request.
        try:
            yield
        except ConnectionLostError as error:
            self.close()
            raise WorkerLostError(error.reason) from None
        except BaseException:
            self.close()
            raise


def _connect(address: Address) -> Connection:
    try:
        return connect(address, time.monotonic() + _CONNECT)
    except ConnectionRefusedError:
        hint = "Start `mixchat worker` on that machine, with --listen and the address it has here."
        raise MixchatError(f"{address}: no worker listens there", hint=hint) from None
    except TimeoutError:
        reason = "it does not answer"
    except OSError as error:
        reason = error.strerror or str(error)
    hint = "Is the machine switched on, and does its firewall let this port through?"
    raise MixchatError(f"{address}: the worker cannot be reached: {reason}", hint=hint)


def _greet(address: Address, connection: Connection, key: bytes) -> Proofs:
    try:
        return greet_worker(connection, key, time.monotonic() + _CONNECT)
    except WrongKeyError:
        hint = "Copy the key file of one machine to the other, and start the worker again."
        raise UsageError(f"{address}: the worker has another key", hint=hint) from None
    except NotAWorkerError:
        hint = "Look for the worker's port in what it printed when it started."
        raise UsageError(f"{address}: what listens there is no worker", hint=hint) from None


def _welcome(address: Address, connection: Connection, hello: Hello) -> Welcome:
    frame = connection.receive(time.monotonic() + _WELCOME)
    if frame.kind == Kind.REFUSAL:
        raise _refusal(address, messages.unpack_refusal(frame.payload), hello)
    if frame.kind != Kind.WELCOME:
        raise ConnectionLostError("it sent a message out of turn")
    return messages.unpack_welcome(frame.payload)


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
    return MixchatError(f"{address}: the worker refuses: {refusal.text}")
