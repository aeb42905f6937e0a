"""The worker's door: whoever connects proves the key here, or is sent away.

Each connection has a thread of its own and 2 s, so that nobody who is silent keeps another one
waiting.
"""

from __future__ import annotations

import errno
import socket
import threading
import time
from collections.abc import Callable
from typing import NamedTuple

from mixchat.errors import UsageError
from mixchat.experts.workers import messages
from mixchat.experts.workers.address import Address
from mixchat.experts.workers.connection import Connection, ConnectionLostError
from mixchat.experts.workers.handshake import Proofs, WrongKeyError, greet_chat
from mixchat.experts.workers.messages import Hello, Kind
from mixchat.network_address import NetworkAddress

_DEADLINE = 2.0  # seconds to prove the key and say hello
_MOST = 256  # connections that may be proving the key; the next ones wait
_BACKLOG = 128
_SLICE = 0.05  # seconds between two looks for the end
_QUIET = 10.0  # seconds without another line on strangers


class Guest(NamedTuple):
    """A chat side that has proved the key."""

    name: str  # its address
    connection: Connection
    proofs: Proofs
    hello: Hello


def listen(address: Address) -> socket.socket:
    """Return a socket that listens. Raises `UsageError` where the address cannot be used."""
    listener = socket.socket(address.family, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address.target)
        listener.listen(_BACKLOG)
    except OSError as error:
        listener.close()
        raise _listen_error(address, error) from None
    return listener


def address_of(listener: socket.socket) -> str:
    """Return HOST:PORT of a socket that listens."""
    host, port = listener.getsockname()[:2]
    return str(NetworkAddress(host, port))


class Door:
    """Accepts connections in the background, from `open` to `close`.

    `admit` gets each guest, in the guest's thread, and has to close its connection some day.
    """

    def __init__(
        self,
        listener: socket.socket,
        key: bytes,
        admit: Callable[[Guest], None],
        note: Callable[[str], None],
    ) -> None:
        self._listener, self._key, self._admit, self._note = listener, key, admit, note
        self._proving = threading.BoundedSemaphore(_MOST)
        self._over = False
        self._quiet_until = 0.0
        self._thread = threading.Thread(target=self._accept, daemon=True)

    def open(self) -> None:
        """Begin to accept connections."""
        self._listener.settimeout(_SLICE)
        self._thread.start()

    def close(self) -> None:
        """Accept no more connections."""
        self._over = True
        self._thread.join()
        self._listener.close()

    def _accept(self) -> None:
        while not self._over:
            if not self._proving.acquire(timeout=_SLICE):
                continue
            try:
                accepted, source = self._listener.accept()
            except OSError as error:
                self._proving.release()
                if not isinstance(error, TimeoutError):  # no more files: some will be closed
                    time.sleep(_SLICE)
            else:
                self._begin(accepted, str(source[0]))

    def _begin(self, accepted: socket.socket, name: str) -> None:
        greeting = threading.Thread(target=self._greet, args=(accepted, name), daemon=True)
        try:
            greeting.start()
        except RuntimeError:  # no more threads
            accepted.close()
            self._proving.release()

    def _greet(self, accepted: socket.socket, name: str) -> None:
        try:
            connection = Connection(accepted)
            guest = self._prove(connection, name)
        except (ConnectionLostError, OSError) as error:
            accepted.close()
            if isinstance(error, WrongKeyError):
                self._note_stranger(name)
            return
        finally:
            self._proving.release()
        self._admit(guest)

    def _prove(self, connection: Connection, name: str) -> Guest:
        deadline = time.monotonic() + _DEADLINE
        proofs = greet_chat(connection, self._key, deadline)
        kind, payload = connection.receive(deadline)
        if kind != Kind.HELLO:
            raise ConnectionLostError("it sent a message out of turn")
        return Guest(name, connection, proofs, messages.unpack_hello(payload))

    def _note_stranger(self, name: str) -> None:
        """Tell of somebody with another key: perhaps the owner, with an old file."""
        if time.monotonic() >= self._quiet_until:
            self._quiet_until = time.monotonic() + _QUIET
            self._note(f"{name}: sent away, since it has another key")


def _listen_error(address: Address, error: OSError) -> UsageError:
    if error.errno == errno.EADDRINUSE:
        hint = "Perhaps a worker runs already. --listen HOST:PORT takes another port."
        return UsageError(f"{address}: the port is in use", hint=hint)
    if error.errno == errno.EADDRNOTAVAIL:
        hint = "--listen takes an address of this machine; 0.0.0.0 means all of them."
        return UsageError(f"{address}: this machine has no such address", hint=hint)
    return UsageError(f"{address}: cannot listen there ({error.strerror})")
