"""The chat side of a worker.

A fault closes the link at once, and `ConnectionLostError` says why.

D = hidden_size, n = rows of a request.
"""

from __future__ import annotations

import errno
import os
import socket
import time
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
import zmq

from mixchat.base import interrupts
from mixchat.base.errors import (
    CheckpointError,
    MixchatError,
    ResourceError,
    ServerError,
    UsageError,
)
from mixchat.experts.cache import ExpertKey
from mixchat.experts.workers import messages, sockets
from mixchat.experts.workers.address import Address

# For the greeting. The worker may have to compute experts of another chat first.
_WELCOME_S = 10.0
# For an answer: loading from a slow disk, and for each row several times a slow processor's time.
_REQUEST_S = 60.0
_ROW_S = 0.2
_POLL_S = 0.05  # between two checks for Ctrl-C and the connection's end

_FAILED = (
    zmq.EVENT_HANDSHAKE_FAILED_AUTH
    | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL
    | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL
)
_EVENTS = zmq.EVENT_HANDSHAKE_SUCCEEDED | _FAILED | zmq.EVENT_CLOSED | zmq.EVENT_DISCONNECTED


class Link:
    """A worker that has been greeted, for one request at a time: `start`, then `finish`."""

    def __init__(
        self,
        address: Address,
        key: bytes,
        hello: messages.Hello,
        silence: float = sockets.SILENCE_S,
    ) -> None:
        """Connect to a worker, prove the key, and name the model.

        Raises `UsageError` for a wrong address or key, `CheckpointError` for another model or
        version, `ResourceError` if the worker is busy or has too little room, and `ServerError`
        if it does not answer.
        """
        self.address = address
        self.seconds_computing = 0.0  # by the worker's clock
        self._socket = WorkerSocket(address, key, silence)
        self._hidden_size = hello.hidden_size
        self._dtype = getattr(torch, hello.dtype)
        # With its rows and deadline.
        self._request: tuple[messages.Compute, torch.Tensor, float] | None = None
        try:
            with self._closed_on_error():
                self._socket.send(messages.pack(hello))
                deadline = time.monotonic() + _WELCOME_S
                answer, _ = messages.unpack(self._socket.receive(deadline))
                if isinstance(answer, messages.Refusal):
                    raise _refusal(address, answer, hello)
                welcome = messages.expect(messages.Welcome, answer)
        except sockets.ConnectionLostError as error:
            raise ServerError(f"{address}: the worker is lost: {error.reason}") from None
        self.slots = welcome.slots
        self.arithmetic = welcome.arithmetic

    @property
    def is_lost(self) -> bool:
        return self._socket.has_ended()

    def hold(self, keys: Sequence[ExpertKey]) -> None:
        """Let the worker load these experts while it is idle, and hold no others.

        They are `slots` at most, the first ones first. Raises `ConnectionLostError`.
        """
        assert len(keys) <= self.slots
        with self._closed_on_error():
            self._socket.send(messages.pack(messages.Hold(keys=tuple(keys))))

    def start(self, layer: int, experts: Sequence[tuple[int, int]], x: torch.Tensor) -> None:
        """Send rows to experts of a layer, each (expert, rows). Raises `ConnectionLostError`.

        x: [n, D], contiguous and on the CPU, expert by expert, or [1, D] for all experts.
        """
        request = messages.Compute(layer=layer, experts=tuple(experts), shared_row=len(x) == 1)
        assert self._request is None
        assert x.dtype == self._dtype
        assert x.shape == (request.rows_sent, self._hidden_size)
        with self._closed_on_error():
            messages.send_rows(self._socket.send, request, x)
        self._request = request, x, time.monotonic() + _REQUEST_S + _ROW_S * request.rows

    def finish(self) -> torch.Tensor:
        """Return the outputs [n, D] on the CPU, expert by expert.

        Raises `ConnectionLostError`, also if they come too late or are not finite.
        """
        assert self._request is not None
        (request, x, deadline), self._request = self._request, None
        with self._closed_on_error():
            answer, piece = messages.unpack(self._socket.receive(deadline))
            if isinstance(answer, messages.Ended):
                raise sockets.ConnectionLostError(answer.reason)
            done = messages.expect(messages.Computed, answer)
            y = torch.empty(request.rows, self._hidden_size, dtype=self._dtype)
            messages.receive_rows(y, piece, lambda: self._socket.receive(deadline))
            # A sum is the fastest check. But it can overflow although all numbers are finite.
            is_finite = y.sum(dtype=torch.float32).isfinite() or y.isfinite().all()
            if not is_finite and x.isfinite().all():
                raise sockets.BadMessageError("it sent numbers that are not finite")
        self.seconds_computing += done.seconds
        return y

    def close(self) -> None:
        """End the chat, also in the midst of a request. It may be called twice."""
        self._socket.close()
        self._request = None

    @contextmanager
    def _closed_on_error(self) -> Iterator[None]:
        # Also after Ctrl-C, since its answer must not meet the next request.
        try:
            yield
        except BaseException:
            self.close()
            raise


def _refusal(address: Address, refusal: messages.Refusal, hello: messages.Hello) -> MixchatError:
    if refusal.cause == "version":
        return CheckpointError(
            f"{address}: the worker runs mixchat {refusal.text}, and this is {hello.version}",
            hint="Install the same version on both machines.",
        )
    if refusal.cause == "model":
        mine = messages.describe_model(hello.model_name, hello.model_identity)
        return CheckpointError(
            f"{address}: the worker has the model {refusal.text}, and this one is {mine}",
            hint="Copy the model's directory to that machine, and start the worker with it.",
        )
    if refusal.cause in ("busy", "room"):
        return ResourceError(f"{address}: the worker {refusal.text}")
    return ServerError(f"{address}: the worker refuses: {refusal.text}")


class WorkerSocket:
    """Exchanges messages with a worker, for one thread. It is closed when it is dropped."""

    def __init__(self, address: Address, key: bytes, silence: float = sockets.SILENCE_S) -> None:
        """Connect. Raises `UsageError` for a wrong address or key, `ServerError` without answer."""
        context = sockets.open_context()
        # Keeps the sockets until `_close`. The end of a context would wait for open ones for ever.
        opened: list[zmq.Socket[bytes]] = []
        self.close = weakref.finalize(self, _close, context, opened)
        self._ended = False
        try:
            self._socket: zmq.Socket[bytes] = context.socket(zmq.DEALER)
            opened.append(self._socket)
            sockets.prepare(self._socket, sockets.curve_keys(key, b"chat"), silence)
            self._socket.curve_serverkey = sockets.curve_keys(key, b"worker").public
            self._socket.reconnect_ivl = -1  # a worker that comes back has to be greeted
            self._socket.rcvtimeo = int(1000 * _POLL_S)
            self._socket.ipv6 = address.family == socket.AF_INET6
            self._monitor = sockets.watch(self._socket, _EVENTS)
            opened.append(self._monitor)
            self._socket.connect(sockets.endpoint(address))
            deadline = time.monotonic() + sockets.HANDSHAKE_S + _POLL_S
            events: list[tuple[int, int]] = []
            while not events and time.monotonic() < deadline:
                interrupts.check()
                self._monitor.poll(int(1000 * _POLL_S))
                events = list(sockets.read_events(self._monitor))
            # libzmq tells nothing if the other end accepts the connection and stays silent.
            event, value = events[0] if events else (_FAILED, errno.EAGAIN)
            if event != zmq.EVENT_HANDSHAKE_SUCCEEDED:
                raise _handshake_error(address, event, value)
        except BaseException:
            self.close()
            raise

    def send(self, message: bytes) -> None:
        """Send a message. Raises `ConnectionLostError`."""
        try:
            self._socket.send(message, zmq.NOBLOCK)
        except zmq.ZMQError:
            raise _lost() from None
        # If all cores compute, libzmq's thread would wait until this one's experts are computed.
        os.sched_yield()

    def receive(self, deadline: float) -> bytes:
        """Return the next message. Raises `ConnectionLostError`, also after the deadline."""
        ended = False
        while True:
            try:
                return self._socket.recv()
            except zmq.Again:
                interrupts.check()
            if ended:
                raise _lost()
            if time.monotonic() >= deadline:
                raise sockets.ConnectionLostError("it does not answer")
            ended = self.has_ended()  # a last message may still be there

    def has_ended(self) -> bool:
        if self._socket.closed:
            return True
        events = [event for event, _ in sockets.read_events(self._monitor)]
        self._ended = self._ended or zmq.EVENT_DISCONNECTED in events
        return self._ended


def _close(context: zmq.Context[zmq.Socket[bytes]], opened: list[zmq.Socket[bytes]]) -> None:
    for each in opened:
        each.close(linger=0)
    context.destroy(linger=0)


def _lost() -> sockets.ConnectionLostError:
    return sockets.ConnectionLostError("it has ended, or does not answer")


def _handshake_error(address: Address, event: int, value: int) -> MixchatError:
    if event == zmq.EVENT_CLOSED:
        hint = "Start 'mixchat worker' there, with --listen and its address. Look at its firewall."
        return ServerError(f"{address}: no worker can be reached there", hint=hint)
    if event == zmq.EVENT_DISCONNECTED:
        hint = "Look for the worker's port in what it printed when it started."
        return UsageError(f"{address}: what listens there is no worker", hint=hint)
    if value == errno.EAGAIN:
        hint = "Is the machine switched on, and does its firewall let this port through?"
        return ServerError(f"{address}: the worker does not answer", hint=hint)
    hint = "Copy the key file of one machine to the other, and start the worker again."
    return UsageError(f"{address}: the worker has another key", hint=hint)
