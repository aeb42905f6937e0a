"""The sockets of both ends of a connection, made by libzmq, with their keys and limits.

A thread of libzmq encrypts, proves the key (CURVE), and checks that the other end lives. torch has
gloo, which neither encrypts nor authenticates, and which 1,000 foreign connections abort.
"""

from __future__ import annotations

import hmac
import os
import socket
from collections.abc import Iterator
from typing import NamedTuple

import zmq
from zmq.utils import z85
from zmq.utils.monitor import recv_monitor_message

from mixchat.base.errors import ResourceError
from mixchat.experts.workers.address import Address

SILENCE_S = 5.0  # without a sign of life
HANDSHAKE_S = 2.0  # to connect, and to prove the key
PIECE = 1 << 20  # bytes of rows in a message, few enough for the heartbeats

_MAX_HEAD = 1 << 16  # bytes before the rows
_HEARTBEATS = 5  # in the time of the silence
_MAX_QUEUED = 1024  # unread messages
_DESCRIPTORS = 32  # more than one end takes


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


def curve_keys(key: bytes, end: bytes) -> CurveKeys:
    """Return the keys of an `end`, `worker` or `chat`. Whoever knows `key` derives both.

    Nobody else knows even the public keys.
    """
    secret = z85.encode(hmac.digest(key, b"mixchat worker 2 " + end, "sha256"))
    return CurveKeys(zmq.curve_public(secret), secret)


def open_context() -> zmq.Context[zmq.Socket[bytes]]:
    """Return a context. Raises `ResourceError` if few descriptors are left.

    Otherwise libzmq would abort this process.
    """
    spare: list[int] = []
    try:
        for _ in range(_DESCRIPTORS):
            spare.append(os.open(os.devnull, os.O_RDONLY))
    except OSError as error:
        reason = error.strerror or str(error)
        raise ResourceError(f"cannot connect: {reason}", hint="Raise 'ulimit -n'.") from None
    finally:
        for descriptor in spare:
            os.close(descriptor)
    return zmq.Context()


def prepare(prepared: zmq.Socket[bytes], keys: CurveKeys, silence: float = SILENCE_S) -> None:
    """Give a socket its keys, deadlines and limits."""
    prepared.curve_publickey, prepared.curve_secretkey = keys
    # Nothing is worth waiting for at the end: the other end sees the closed connection.
    prepared.linger = 0
    prepared.handshake_ivl = int(1000 * HANDSHAKE_S)
    prepared.heartbeat_ivl = int(1000 * silence / _HEARTBEATS)
    prepared.heartbeat_timeout = int(1000 * silence)
    prepared.maxmsgsize = _MAX_HEAD + PIECE
    # One request at a time bounds what is sent. Only a limit bounds what is received.
    prepared.sndhwm = 0
    prepared.rcvhwm = _MAX_QUEUED


def watch(watched: zmq.Socket[bytes], events: int) -> zmq.Socket[bytes]:
    """Return the socket that tells of connections."""
    name = f"inproc://monitor-{id(watched)}"
    watched.monitor(name, events)
    monitor: zmq.Socket[bytes] = watched.context.socket(zmq.PAIR)
    monitor.linger, monitor.rcvhwm = 0, 0  # or libzmq would wait for the reader
    monitor.connect(name)
    return monitor


def read_events(monitor: zmq.Socket[bytes]) -> Iterator[tuple[int, int]]:
    """Return the events since the last call, each as (kind, number)."""
    while True:
        try:
            event = recv_monitor_message(monitor, zmq.NOBLOCK)
        except zmq.Again:
            return
        yield int(event["event"]), int(event["value"])


def endpoint(address: Address) -> str:
    """Return an address in libzmq's form."""
    if address.family == socket.AF_INET6:
        scope = f"%{address.target[3]}" if address.target[3] else ""
        return f"tcp://[{address.host}{scope}]:{address.port}"
    return f"tcp://{address.host}:{address.port}"
