"""The port of a worker. libzmq lets in only peers that know the key."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable
from contextlib import suppress
from types import SimpleNamespace
from typing import NamedTuple

import zmq
from zmq.auth.thread import ThreadAuthenticator

from mixchat.base import machine, system
from mixchat.experts.workers import sockets
from mixchat.experts.workers.address import Address, listen_error

_BACKLOG = 1024  # each waits its turn when strangers take all descriptors
_DOMAIN = "mixchat"
_MAX_DESCRIPTORS = 1 << 14  # for strangers, if the system lets it
_HELD_BACK = 256  # descriptors of the worker itself, for the files of a model
_EVENTS_S = 1.0  # between two readings of the events while a chat is busy
_QUIET_S = 10.0  # between two lines on strangers
_EVENTS = zmq.EVENT_ACCEPTED | zmq.EVENT_DISCONNECTED | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL
_CANNOT_DECRYPT = zmq.PROTOCOL_ERROR_ZMTP_CRYPTOGRAPHIC


class Peer(NamedTuple):
    """A chat side that has proved the key."""

    name: str  # its address
    route: bytes  # libzmq's name for the connection
    descriptor: int  # of the connection


class PeerMessage(NamedTuple):
    """A message of a peer."""

    peer: Peer
    data: bytes


class Listener:
    """Listens at an address until `close`, for one thread."""

    def __init__(self, address: Address, key: bytes, note: Callable[[str], None]) -> None:
        """Listen. Raises `UsageError` if the address cannot be used."""
        # With 1,300 connections of strangers a worker ended with "Too many open files".
        system.allow_open_files(_MAX_DESCRIPTORS)  # each stranger takes one for a moment
        system.hold_back_open_files(_HELD_BACK)
        machine.survive_without_descriptors()
        self._note = note
        self._quiet_until = 0.0
        self._read_at = 0.0
        # By descriptor: the route of the connection, once it has spoken.
        self._open: dict[int, bytes | None] = {}
        self._speaker: Peer | None = None  # the last one
        self._kept: PeerMessage | None = None
        self._context = sockets.open_context()
        self._authenticator = ThreadAuthenticator(self._context)
        try:
            self._authenticator.start()
            public = sockets.curve_keys(key, b"chat").public
            # CURVE has checked the secret key that belongs to it.
            admission = SimpleNamespace(callback=lambda domain, peer_key: peer_key == public)
            self._authenticator.configure_curve_callback(_DOMAIN, admission)
            self._socket: zmq.Socket[bytes] = self._context.socket(zmq.ROUTER)
            sockets.prepare(self._socket, sockets.curve_keys(key, b"worker"))
            self._socket.curve_server = True
            self._socket.zap_domain = _DOMAIN.encode()
            self._socket.router_mandatory = True
            self._socket.backlog = _BACKLOG
            self._socket.ipv6 = address.family == socket.AF_INET6
            self._monitor = sockets.watch(self._socket, _EVENTS)
            self._socket.bind(sockets.endpoint(address))
        except zmq.ZMQError as error:
            self.close()
            fault = OSError(error.errno, error.strerror)
            flags = ("--listen HOST:PORT", "--listen")
            raise listen_error(address, fault, "worker", *flags) from None
        except BaseException:
            self.close()
            raise

    @property
    def address(self) -> str:
        """Return HOST:PORT, with the port that the system has chosen."""
        return self._socket.get_string(zmq.LAST_ENDPOINT).rstrip("\0").removeprefix("tcp://")

    def receive(self, within: float) -> PeerMessage | None:
        """Return the next message, or None if none comes within `within` seconds."""
        if (kept := self._kept) is not None:
            self._kept = None
            return kept
        self._socket.rcvtimeo = int(1000 * within)
        try:
            route, *frames = self._socket.recv_multipart(copy=False)
        except zmq.Again:
            self._read_events()
            return None
        if self._speaker is None or self._speaker.route != route.bytes:
            self._read_events()  # first, since another connection may have had the descriptor
            descriptor = int(frames[-1].get(zmq.SRCFD))
            self._speaker = Peer(str(frames[-1].get("Peer-Address")), route.bytes, descriptor)
            if descriptor in self._open:
                self._open[descriptor] = route.bytes
        elif time.monotonic() >= self._read_at:  # or the events of strangers would pile up
            self._read_events()
        return PeerMessage(self._speaker, frames[0].bytes if len(frames) == 1 else b"")

    def keep(self, message: PeerMessage) -> None:
        """Let a message be received again, as the next one."""
        self._kept = message

    def send(self, peer: Peer, data: bytes) -> None:
        """Send a message. Raises `ConnectionLostError`."""
        try:
            self._socket.send_multipart([peer.route, data], zmq.NOBLOCK)
        except zmq.ZMQError:
            raise sockets.ConnectionLostError("it closed the connection") from None

    def has(self, peer: Peer) -> bool:
        """Return whether the peer is still connected, as far as `receive` has seen."""
        return self._open.get(peer.descriptor) == peer.route

    def close(self) -> None:
        """Listen no more, and end all connections."""
        with suppress(zmq.ZMQError):
            self._authenticator.stop()
        self._context.destroy(linger=0)

    def _read_events(self) -> None:
        self._read_at = time.monotonic() + _EVENTS_S
        for event, value in sockets.read_events(self._monitor):
            if event == zmq.EVENT_ACCEPTED:
                self._open[value] = None
            elif event == zmq.EVENT_DISCONNECTED:
                self._open.pop(value, None)
            elif value == _CANNOT_DECRYPT and time.monotonic() >= self._quiet_until:
                self._quiet_until = time.monotonic() + _QUIET_S
                self._note("somebody was sent away who has another key")
