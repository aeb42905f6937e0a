"""The chat side's connection to a worker, and what both ends of one have in common.

libzmq encrypts what travels, lets both ends prove the key (CURVE), and looks by heartbeats whether
the other end lives. Its own thread does that, also while this process computes.
"""

from __future__ import annotations

import errno
import hmac
import os
import socket
import time
import weakref
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
import zmq
from zmq.utils import z85
from zmq.utils.monitor import recv_monitor_message

from mixchat.base import interrupts
from mixchat.base.errors import MixchatError, ResourceError, ServerError, UsageError
from mixchat.experts.workers.address import Address

SILENCE_S = 5.0  # without a sign of life the other end counts as lost
HANDSHAKE_S = 2.0  # to connect, and to prove the key
PIECE = 1 << 20  # bytes of rows in a message, so that many rows do not hold up the heartbeats

_HEAD = 1 << 16  # bytes of a message beside its rows
_BEATS = 5  # heartbeats in the time of the silence
_QUEUED = 1024  # messages that may wait until this process reads them
_DESCRIPTORS = 32  # more than the sockets, threads and monitors of one end take
_SLICE_S = 0.05  # between two looks for Ctrl-C and the connection's end

_FAILED = (
    zmq.EVENT_HANDSHAKE_FAILED_AUTH
    | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL
    | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL
)
_EVENTS = zmq.EVENT_HANDSHAKE_SUCCEEDED | _FAILED | zmq.EVENT_CLOSED | zmq.EVENT_DISCONNECTED


class ConnectionLostError(Exception):
    """The other end is gone, or does not answer. `reason` completes a sentence on it."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class BadMessageError(ConnectionLostError):
    """The other end sends what it must not."""


class CurveKeys(NamedTuple):
    """A pair of keys for CURVE, in libzmq's encoding."""

    public: bytes
    secret: bytes

    @classmethod
    def derive(cls, key: bytes, label: bytes) -> CurveKeys:
        """Return the pair that everybody derives who knows the key: one for each label."""
        secret = z85.encode(hmac.digest(key, b"mixchat worker 2 " + label, "sha256"))
        return cls(zmq.curve_public(secret), secret)


def worker_keys(key: bytes) -> CurveKeys:
    """Return the keys of a worker. Its public key, too, is known only to those who know `key`."""
    return CurveKeys.derive(key, b"worker")


def chat_keys(key: bytes) -> CurveKeys:
    """Return the keys of a chat side."""
    return CurveKeys.derive(key, b"chat")


def open_context() -> zmq.Context[zmq.Socket[bytes]]:
    """Return a context for sockets.

    Raises `ResourceError` if few descriptors are left: libzmq would abort this process.
    """
    spare: list[int] = []
    try:
        for _ in range(_DESCRIPTORS):
            spare.append(os.open(os.devnull, os.O_RDONLY))
    except OSError as error:
        reason = error.strerror or str(error)
        raise ResourceError(f"cannot connect: {reason}", hint="Raise `ulimit -n`.") from None
    finally:
        for descriptor in spare:
            os.close(descriptor)
    return zmq.Context()


def prepare(prepared: zmq.Socket[bytes], keys: CurveKeys, silence: float = SILENCE_S) -> None:
    """Give a socket its keys, deadlines and limits."""
    prepared.curve_publickey, prepared.curve_secretkey = keys
    prepared.linger = 0
    prepared.handshake_ivl = int(1000 * HANDSHAKE_S)
    prepared.heartbeat_ivl = int(1000 * silence / _BEATS)
    prepared.heartbeat_timeout = int(1000 * silence)
    prepared.maxmsgsize = _HEAD + PIECE
    prepared.sndhwm, prepared.rcvhwm = 0, _QUEUED


def watch(watched: zmq.Socket[bytes], events: int) -> zmq.Socket[bytes]:
    """Return the socket that tells of a socket's connections."""
    where = f"inproc://monitor-{id(watched)}"
    watched.monitor(where, events)
    monitor: zmq.Socket[bytes] = watched.context.socket(zmq.PAIR)
    monitor.linger, monitor.rcvhwm = 0, 0  # or libzmq's thread would wait for who reads it
    monitor.connect(where)
    return monitor


def read_events(monitor: zmq.Socket[bytes]) -> Iterator[tuple[int, int]]:
    """Return what has happened since: the kinds of events, each with its number."""
    while True:
        try:
            told = recv_monitor_message(monitor, zmq.NOBLOCK)
        except zmq.Again:
            return
        yield int(told["event"]), int(told["value"])


def endpoint(address: Address) -> str:
    """Return an address in libzmq's form."""
    if address.family == socket.AF_INET6:
        scope = f"%{address.target[3]}" if address.target[3] else ""
        return f"tcp://[{address.host}{scope}]:{address.port}"
    return f"tcp://{address.host}:{address.port}"


class Connection:
    """Sends messages to a worker and receives them, for one thread.

    One that is dropped is closed, as an engine's are when the engine is dropped.
    """

    def __init__(self, address: Address, key: bytes, silence: float = SILENCE_S) -> None:
        """Connect, and prove the key.

        Raises `UsageError` for a wrong address or key, and `ServerError` if nobody answers.
        """
        context = open_context()
        # Its reference keeps the socket from the garbage collector, which closes no socket before
        # it calls this. The end of a context waits for its sockets for ever.
        opened: list[zmq.Socket[bytes]] = []
        self.close = weakref.finalize(self, _close, context, opened)
        self._ended = False
        try:
            self._socket: zmq.Socket[bytes] = context.socket(zmq.DEALER)
            opened.append(self._socket)
            prepare(self._socket, chat_keys(key), silence)
            self._socket.curve_serverkey = worker_keys(key).public
            self._socket.reconnect_ivl = -1  # a worker that comes back is greeted anew
            self._socket.rcvtimeo = int(1000 * _SLICE_S)
            self._socket.ipv6 = address.family == socket.AF_INET6
            self._monitor = watch(self._socket, _EVENTS)
            opened.append(self._monitor)
            self._socket.connect(endpoint(address))
            self._shake_hands(address, time.monotonic() + HANDSHAKE_S + _SLICE_S)
        except BaseException:
            self.close()
            raise

    def send(self, message: bytes) -> None:
        """Send a message. Raises `ConnectionLostError`."""
        try:
            self._socket.send(message, zmq.NOBLOCK)
        except zmq.ZMQError:
            raise _lost() from None

    def receive(self, deadline: float) -> bytes:
        """Return the next message. Raises `ConnectionLostError`, also after the deadline."""
        ended = False
        while (message := self._receive()) is None:
            interrupts.check()
            if ended:
                raise _lost()
            if time.monotonic() >= deadline:
                raise ConnectionLostError("it does not answer")
            ended = self.has_ended()  # then a last message may still be there
        return message

    def has_ended(self) -> bool:
        """Return whether the other end is known to be gone."""
        if self._socket.closed:
            return True
        ends = [event for event, _ in read_events(self._monitor) if event == zmq.EVENT_DISCONNECTED]
        self._ended = self._ended or bool(ends)
        return self._ended

    def _receive(self) -> bytes | None:
        try:
            return self._socket.recv()
        except zmq.Again:
            return None

    def _shake_hands(self, address: Address, deadline: float) -> None:
        while time.monotonic() < deadline:
            interrupts.check()
            self._monitor.poll(int(1000 * _SLICE_S))
            for event, value in read_events(self._monitor):
                if event == zmq.EVENT_HANDSHAKE_SUCCEEDED:
                    return
                raise _refused(address, event, value)
        raise _refused(address, _FAILED, errno.EAGAIN)


def _refused(address: Address, event: int, value: int) -> MixchatError:
    """Return what is wrong if this is the first event of a connection."""
    if event == zmq.EVENT_CLOSED:
        hint = "Start `mixchat worker` there, with --listen and its address. Look at its firewall."
        return ServerError(f"{address}: no worker can be reached there", hint=hint)
    if event == zmq.EVENT_DISCONNECTED:
        hint = "Look for the worker's port in what it printed when it started."
        return UsageError(f"{address}: what listens there is no worker", hint=hint)
    if value == errno.EAGAIN:
        hint = "Is the machine switched on, and does its firewall let this port through?"
        return ServerError(f"{address}: the worker does not answer", hint=hint)
    hint = "Copy the key file of one machine to the other, and start the worker again."
    return UsageError(f"{address}: the worker has another key", hint=hint)


def _close(context: zmq.Context[zmq.Socket[bytes]], opened: list[zmq.Socket[bytes]]) -> None:
    for each in opened:
        each.close(linger=0)
    context.destroy(linger=0)


def _lost() -> ConnectionLostError:
    return ConnectionLostError("it has ended, or does not answer")


def send_rows(send: Callable[[bytes], None], head: bytes, rows: torch.Tensor) -> None:
    """Send rows in as many messages as they need; the first one begins with `head`."""
    data = _bytes_of(rows.contiguous())
    send(b"".join((head, data[:PIECE])))
    for start in range(PIECE, len(data), PIECE):
        send(bytes(data[start : start + PIECE]))


def receive_rows(rows: torch.Tensor, piece: bytes, receive: Callable[[], bytes]) -> torch.Tensor:
    """Fill `rows` with a piece and those that follow it. Raises `ConnectionLostError`."""
    data, filled = _bytes_of(rows), 0
    while True:
        if len(piece) != min(PIECE, len(data) - filled):
            raise BadMessageError("it sent rows of another size")
        data[filled : filled + len(piece)] = piece
        filled += len(piece)
        if filled == len(data):
            return rows
        piece = receive()


def _bytes_of(rows: torch.Tensor) -> memoryview:
    return rows.view(-1).view(torch.uint8).numpy().data
