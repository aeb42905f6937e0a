"""The port of a worker: libzmq lets in who knows the key, and all others wait in vain.

A stranger costs a descriptor for the two seconds of a handshake, and reaches none of our code.
"""

from __future__ import annotations

import resource
import socket
import time
from collections.abc import Callable
from contextlib import suppress
from typing import NamedTuple

import zmq
from zmq.auth.thread import ThreadAuthenticator

from mixchat.experts.workers.address import Address, listen_error
from mixchat.experts.workers.connection import (
    SILENCE_S,
    ConnectionLostError,
    chat_keys,
    endpoint,
    open_context,
    prepare,
    read_events,
    watch,
    worker_keys,
)

_BACKLOG = 128
_DOMAIN = "mixchat"
_DESCRIPTORS = 1 << 14  # that this process may use for strangers, if the system lets it
_LOOK_S = 1.0  # between two looks at who has come and gone, while a chat is busy
_QUIET_S = 10.0  # without another line on strangers
_EVENTS = zmq.EVENT_ACCEPTED | zmq.EVENT_DISCONNECTED | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL
_CANNOT_DECRYPT = zmq.PROTOCOL_ERROR_ZMTP_CRYPTOGRAPHIC


class Peer(NamedTuple):
    """A chat side that has proved the key."""

    name: str  # its address
    route: bytes  # libzmq's name for the connection
    descriptor: int  # of the connection


class Message(NamedTuple):
    """A message of a peer."""

    peer: Peer
    data: bytes


class Listener:
    """Listens at an address, from now on until `close`, for one thread at a time.

    `note` gets a line now and then on somebody with another key.
    """

    def __init__(self, address: Address, key: bytes, note: Callable[[str], None]) -> None:
        """Raises `UsageError` if the address cannot be used."""
        _raise_limit()
        self._note, self._quiet_until, self._look_at = note, 0.0, 0.0
        # The route of each connection, once it has spoken, by its descriptor.
        self._open: dict[int, bytes | None] = {}
        self._speaker: Peer | None = None  # the last one
        self._kept: Message | None = None
        self._context = open_context()
        self._doorkeeper = ThreadAuthenticator(self._context)
        try:
            self._doorkeeper.start()
            self._doorkeeper.configure_curve_callback(_DOMAIN, _Admission(chat_keys(key).public))
            self._socket: zmq.Socket[bytes] = self._context.socket(zmq.ROUTER)
            prepare(self._socket, worker_keys(key), SILENCE_S)
            self._socket.curve_server, self._socket.zap_domain = True, _DOMAIN.encode()
            self._socket.router_mandatory, self._socket.backlog = True, _BACKLOG
            self._socket.ipv6 = address.family == socket.AF_INET6
            self._monitor = watch(self._socket, _EVENTS)
            self._socket.bind(endpoint(address))
        except zmq.ZMQError as error:
            self.close()
            flags = "--listen HOST:PORT", "--listen"
            raise listen_error(
                address, OSError(error.errno, error.strerror), "worker", *flags
            ) from None
        except BaseException:
            self.close()
            raise

    @property
    def address(self) -> str:
        """Return HOST:PORT, with the port that the system has chosen."""
        return self._socket.get_string(zmq.LAST_ENDPOINT).rstrip("\0").removeprefix("tcp://")

    def receive(self, within: float) -> Message | None:
        """Return the next message; None if none comes within so many seconds."""
        if (kept := self._kept) is not None:
            self._kept = None
            return kept
        self._socket.rcvtimeo = int(1000 * within)
        try:
            route, *frames = self._socket.recv_multipart(copy=False)
        except zmq.Again:
            self._look_around()
            return None
        if self._speaker is None or self._speaker.route != route.bytes:
            self._speaker = self._identified(route.bytes, frames[-1])
        elif time.monotonic() >= self._look_at:  # or what strangers do would pile up
            self._look_around()
        return Message(self._speaker, frames[0].bytes if len(frames) == 1 else b"")

    def keep(self, message: Message) -> None:
        """Let a message be received again, as the next one."""
        self._kept = message

    def send(self, peer: Peer, data: bytes) -> None:
        """Send a message. Raises `ConnectionLostError`."""
        try:
            self._socket.send_multipart([peer.route, data], zmq.NOBLOCK)
        except zmq.ZMQError:
            raise ConnectionLostError("it closed the connection") from None

    def has(self, peer: Peer) -> bool:
        """Return whether the peer is still connected, as far as `receive` has seen."""
        return self._open.get(peer.descriptor) == peer.route

    def close(self) -> None:
        """Listen no more, and end all connections."""
        with suppress(zmq.ZMQError):
            self._doorkeeper.stop()
        self._context.destroy(linger=0)

    def _identified(self, route: bytes, frame: zmq.Frame) -> Peer:
        """Return who has sent a frame, the first one of a connection."""
        self._look_around()  # first: the descriptor may be one that another connection had
        peer = Peer(str(frame.get("Peer-Address")), route, int(frame.get(zmq.SRCFD)))
        if peer.descriptor in self._open:
            self._open[peer.descriptor] = route
        return peer

    def _look_around(self) -> None:
        """Note who has come and gone."""
        self._look_at = time.monotonic() + _LOOK_S
        for event, value in read_events(self._monitor):
            if event == zmq.EVENT_ACCEPTED:
                self._open[value] = None
            elif event == zmq.EVENT_DISCONNECTED:
                self._open.pop(value, None)
            elif value == _CANNOT_DECRYPT and time.monotonic() >= self._quiet_until:
                self._quiet_until = time.monotonic() + _QUIET_S
                self._note("somebody was sent away who has another key")


class _Admission:
    """Lets in those who have a public key, and with it the secret one."""

    def __init__(self, public: bytes) -> None:
        self._public = public

    def callback(self, domain: str, key: bytes) -> bool:
        return key == self._public


def _raise_limit() -> None:
    """Let this process have more descriptors: each stranger takes one for a moment."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = _DESCRIPTORS if hard == resource.RLIM_INFINITY else min(_DESCRIPTORS, hard)
    if soft != resource.RLIM_INFINITY and soft < most:
        with suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
