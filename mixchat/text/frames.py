"""JSON over a socket: what the cage and its parent say to each other, bounded in size and time."""

from __future__ import annotations

import json
import socket
import struct
import time
from typing import Any

_MOST = 32_000_000  # bytes of one value; two million ids have 14
_SIZE = struct.Struct("<I")


def pack(value: object, most: int = _MOST) -> bytes:
    """A value as it goes over the socket. Raises `ValueError` above `most` bytes."""
    data = json.dumps(value, ensure_ascii=False).encode("utf-8", "surrogatepass")
    _check(len(data), most)
    return _SIZE.pack(len(data)) + data


def receive(channel: socket.socket, deadline: float | None = None) -> Any:
    """The next value.

    `deadline` is a time of `time.monotonic`. Raises `TimeoutError` when it has passed, `EOFError`
    where the other side is gone, `ValueError` or `RecursionError` where that is no value.
    """
    (size,) = _SIZE.unpack(_exactly(channel, _SIZE.size, deadline))
    _check(size, _MOST)
    return json.loads(_exactly(channel, size, deadline).decode("utf-8", "surrogatepass"))


def _check(size: int, most: int) -> None:
    if size > most:
        raise ValueError(f"{size / 1e6:.1f} MB, and at most {most / 1e6:.0f} MB are taken")


def _exactly(channel: socket.socket, size: int, deadline: float | None) -> bytes:
    data = bytearray()
    while len(data) < size:
        if deadline is not None:
            channel.settimeout(max(deadline - time.monotonic(), 1e-3))
        part = channel.recv(min(size - len(data), 1 << 20))
        if not part:
            raise EOFError
        data += part
    return bytes(data)
