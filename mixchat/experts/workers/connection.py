"""Frames over a TCP connection: small messages, with deadlines and limits of length.

Waiting happens in slices, so that Ctrl-C works in each; a peer that vanishes without a word is
noticed by the kernel within about 7 s.
"""

from __future__ import annotations

import os
import select
import socket
import struct
import threading
import time
import weakref
from typing import NamedTuple

from mixchat import interrupts
from mixchat.experts.workers.address import Address

_HEADER = struct.Struct(">BI")  # kind, length of the payload
_LONGEST = 1 << 16  # bytes of a payload
_SLICE = 50  # milliseconds between two looks for Ctrl-C
SEND_DEADLINE = 3.0  # seconds until what the other end does not read is a fault

# Options by the names that systems have for them: a silent peer is gone after 3 + 4 * 1 s.
_KEEPALIVE = {
    "TCP_KEEPIDLE": 3,  # Linux
    "TCP_KEEPALIVE": 3,  # macOS
    "TCP_KEEPINTVL": 1,
    "TCP_KEEPCNT": 4,
    "TCP_USER_TIMEOUT": 7000,  # Linux, milliseconds; keepalive rests while bytes are on their way
}


class ConnectionLostError(Exception):
    """The other end is gone, or sends what it must not. `reason` completes a sentence on it."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class NoAnswerError(ConnectionLostError):
    """The other end does not answer in time."""


class Frame(NamedTuple):
    """A message: its kind, 0 to 255, and what it says."""

    kind: int
    payload: bytes


class Connection:
    """Sends and receives frames. One thread receives; several may send.

    One that is dropped is closed, as an engine's are when the engine is dropped.
    """

    def __init__(self, connected: socket.socket) -> None:
        connected.setblocking(False)
        _set_options(connected)
        self._socket = connected
        weakref.finalize(self, connected.close)
        self._received = bytearray()
        self._sending = threading.Lock()
        self._reading = select.poll()
        self._reading.register(connected, select.POLLIN)
        self.local_host = str(connected.getsockname()[0])

    def send(self, kind: int, payload: bytes = b"") -> None:
        """Send a frame. Raises `ConnectionLostError`."""
        self.send_bytes(_HEADER.pack(kind, len(payload)) + payload)

    def receive(self, deadline: float | None) -> Frame:
        """Return the next frame; wait for it until `deadline` (`time.monotonic`), if there is one.

        Raises `ConnectionLostError`; `NoAnswerError` after the deadline. A frame that has arrived
        is returned however late it is.
        """
        kind, length = _HEADER.unpack(self.receive_bytes(_HEADER.size, deadline))
        if length > _LONGEST:
            raise ConnectionLostError("it sent a message that is too long")
        return Frame(kind, self.receive_bytes(length, deadline))

    def send_bytes(self, data: bytes) -> None:
        """Send bytes as they are. Raises `ConnectionLostError`."""
        rest, deadline = memoryview(data), time.monotonic() + SEND_DEADLINE
        with self._sending:
            while rest:
                try:
                    rest = rest[self._socket.send(rest) :]
                except BlockingIOError:
                    writing = select.poll()
                    writing.register(self._socket, select.POLLOUT)
                    _wait(writing, deadline)
                except OSError as error:
                    raise _lost(error) from None

    def receive_bytes(self, count: int, deadline: float | None) -> bytes:
        """Return so many bytes. Raises as `receive` does."""
        while len(self._received) < count:
            self._receive_more(deadline)
        data = bytes(self._received[:count])
        del self._received[:count]
        return data

    def has_arrived(self, within: float = 0.0) -> bool:
        """Return whether `receive` has something to read, be it the end of the connection.

        Wait for it, at most `within` seconds.
        """
        return bool(self._received) or bool(self._reading.poll(1000 * within))

    def has_ended(self) -> bool:
        """Return whether the other end is known to be gone. Any thread may ask."""
        try:
            return not self._socket.recv(1, socket.MSG_PEEK)
        except BlockingIOError:
            return False
        except OSError:
            return True

    def close(self) -> None:
        """End the connection; no other thread may use it any more."""
        self._socket.close()

    def _receive_more(self, deadline: float | None) -> None:
        _wait(self._reading, deadline)
        try:
            data = self._socket.recv(_LONGEST)
        except BlockingIOError:  # a packet was damaged on its way
            return
        except OSError as error:
            raise _lost(error) from None
        if not data:
            raise ConnectionLostError("it closed the connection")
        self._received += data


def connect(address: Address, deadline: float) -> Connection:
    """Connect to an address. Raises `OSError`, also `TimeoutError` after the deadline."""
    opened = socket.socket(address.family, socket.SOCK_STREAM)
    try:
        opened.setblocking(False)
        try:
            opened.connect(address.target)
        except BlockingIOError:
            _wait_for_connect(opened, deadline)
        return Connection(opened)
    except BaseException:
        opened.close()
        raise


def _wait_for_connect(opened: socket.socket, deadline: float) -> None:
    connecting = select.poll()
    connecting.register(opened, select.POLLOUT)
    try:
        _wait(connecting, deadline)
    except NoAnswerError:
        raise TimeoutError from None
    if error := opened.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):
        raise OSError(error, os.strerror(error))


def _wait(ready: select.poll, deadline: float | None) -> None:
    while not ready.poll(_SLICE):
        interrupts.check()
        if deadline is not None and time.monotonic() >= deadline:
            raise NoAnswerError("it does not answer")


def _set_options(connected: socket.socket) -> None:
    connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    connected.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in _KEEPALIVE.items():
        if option := getattr(socket, name, None):
            connected.setsockopt(socket.IPPROTO_TCP, option, value)


def _lost(error: OSError) -> ConnectionLostError:
    reason = error.strerror or str(error)
    return ConnectionLostError(f"its connection has failed: {reason}")
