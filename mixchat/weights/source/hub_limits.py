"""Limits of an answer of the hub: its slowest pace, and the bytes around those that it is for.

The HTTP library waits 30 s for each read, so one byte now and then holds it for ever. It reads
informational answers (1xx) and empty compressed blocks without an end.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from mixchat.base.errors import HubError

_HEAD_BYTES = 1 << 20  # before the body, of all redirects together
_SPARE_BYTES = 1 << 20  # of a body in chunks
_SPARE_SHARE = 4  # a quarter more, for small chunks
_UNKNOWN_BYTES = 1 << 36  # of a body whose size nobody knows: 64 GiB
# A line that is slower is not refused, but asked again, where it stopped.
_PACE_BYTES, _PACE_S = 1 << 16, 60.0


class WrongAnswer(HubError):
    """The answer holds other bytes than requested. Another attempt may succeed."""


class AnswerLimits:
    """The limits of one request, with all its redirects."""

    def __init__(self) -> None:
        self._left = _HEAD_BYTES
        self._came, self._waited = 0, 0.0  # in this period of `_PACE_S` seconds
        self._seconds = math.inf

    def expect(self, size: int | None, seconds: float = math.inf) -> None:
        """Allow a body of `size` bytes, None for any size, within `seconds`."""
        size = _UNKNOWN_BYTES if size is None else size
        self._left = size + size // _SPARE_SHARE + _SPARE_BYTES
        self._seconds = seconds

    def read(self, stream: Any, most: int, timeout: float | None) -> bytes:
        """Read from a connection. Raises `WrongAnswer` beyond the limits."""
        # Only the time of reading counts. A slow disk or a suspended process is no slow hub.
        started = time.monotonic()
        data: bytes = stream.read(most, timeout)
        seconds = time.monotonic() - started
        self._waited += seconds
        self._seconds -= seconds
        self._came += len(data)
        self._left -= len(data)
        if self._left < 0:
            raise WrongAnswer("the hub sends an answer without an end", hint=_LATER)
        if self._seconds < 0 or (self._waited >= _PACE_S and self._came < _PACE_BYTES):
            raise WrongAnswer("the hub sends its answer too slowly", hint=_LATER)
        if self._waited >= _PACE_S:
            self._came, self._waited = 0, 0.0
        return data


_LATER = "Run the same command again later; it continues where it stopped."
_current = threading.local()
_watching = threading.Lock()


@contextmanager
def limited(session: Any) -> Iterator[AnswerLimits]:
    """Limit what this thread reads from a session of huggingface_hub in this block."""
    with _watching:
        _watch(session)
    outer = getattr(_current, "limits", None)
    _current.limits = limits = AnswerLimits()
    try:
        yield limits
    finally:
        _current.limits = outer


def _watch(session: Any) -> None:
    """Let the connections of a session ask for the limits.

    No public option does this. httpx and httpx2, which huggingface_hub uses, have the same names.
    """
    mounts = getattr(session, "_mounts", {})
    for transport in (getattr(session, "_transport", None), *mounts.values()):
        pool = getattr(transport, "_pool", None)
        if pool is not None and not isinstance(pool._network_backend, _WatchedNetwork):
            pool._network_backend = _WatchedNetwork(pool._network_backend)


class _WatchedNetwork:
    def __init__(self, network: Any) -> None:
        self._network = network

    def connect_tcp(self, *args: Any, **options: Any) -> _WatchedStream:
        return _WatchedStream(self._network.connect_tcp(*args, **options))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._network, name)


class _WatchedStream:
    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        limits: AnswerLimits | None = getattr(_current, "limits", None)
        if limits is None:
            data: bytes = self._stream.read(max_bytes, timeout)
            return data
        return limits.read(self._stream, max_bytes, timeout)

    def start_tls(self, *args: Any, **options: Any) -> _WatchedStream:
        return _WatchedStream(self._stream.start_tls(*args, **options))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)
