"""The JSON messages between a sandbox and its parent, and the memory limit."""

from __future__ import annotations

import json
import socket
import struct
import time
from typing import Any

MAX_MEMORY = 1_000_000_000  # bytes of address space; a vocabulary of 256,000 takes 650 MB
_MAX_VALUE = 32_000_000  # bytes of one value; two million ids have 14 million
_LENGTH = struct.Struct("<I")


def to_frame(value: object, max_bytes: int = _MAX_VALUE) -> bytes:
    """Return a value as it is sent. Raises `ValueError` above `max_bytes`."""
    data = json.dumps(value, ensure_ascii=False).encode("utf-8", "surrogatepass")
    _check_size(len(data), max_bytes)
    return _LENGTH.pack(len(data)) + data


def receive(channel: socket.socket, deadline: float | None = None) -> Any:
    """Return the next value.

    `deadline` is a time of `time.monotonic`. Raises `TimeoutError` when it has passed, `EOFError`
    if the other side is gone, `ValueError` or `RecursionError` if the bytes are not a value.
    """
    (size,) = _LENGTH.unpack(_receive_exactly(channel, _LENGTH.size, deadline))
    _check_size(size, _MAX_VALUE)
    return json.loads(_receive_exactly(channel, size, deadline).decode("utf-8", "surrogatepass"))


def _check_size(size: int, max_bytes: int) -> None:
    if size > max_bytes:
        raise ValueError(f"{size / 1e6:.1f} MB, at most {max_bytes / 1e6:.0f} MB")


def _receive_exactly(channel: socket.socket, size: int, deadline: float | None) -> bytes:
    data = bytearray()
    while len(data) < size:
        if deadline is not None:
            channel.settimeout(max(deadline - time.monotonic(), 1e-3))
        chunk = channel.recv(min(size - len(data), 1 << 20))
        if not chunk:
            raise EOFError
        data += chunk
    return bytes(data)
