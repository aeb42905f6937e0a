"""HTTP connections whose answers are limited in bytes and seconds while they are read.

A server may send informational answers (1xx), empty compressed blocks, or a byte now and then,
without an end. The HTTP library waits for all of them, so each read is counted here.
"""

from __future__ import annotations

import time
import zlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from typing import Any
from urllib.parse import unquote, urlsplit
from urllib.request import getproxies, proxy_bypass

import httpcore2

from mixchat.base.errors import MixchatError

_READ_S = 0.2  # of each attempt to read, so that Ctrl-C is handled soon
_WRITE_BYTES = 2**16
_DECODED_BYTES = 1 << 20  # of a compressed answer that are decoded at once
REDIRECTS = (301, 302, 303, 307, 308)
# The errors of a connection, and of what comes over it.
FAULTS = (
    httpcore2.NetworkError,
    httpcore2.ProtocolError,
    httpcore2.ProxyError,
    httpcore2.TimeoutException,
    httpcore2.UnsupportedProtocol,
)
# Those of an answer that began. After others none has begun.
BROKEN = (
    httpcore2.ReadError,
    httpcore2.ReadTimeout,
    httpcore2.RemoteProtocolError,
    httpcore2.WriteError,
)


class ReadLimits(ABC):
    """The bytes and the seconds that an answer may still take."""

    def __init__(self, size: int, seconds: float) -> None:
        self.bytes_left = size
        self.deadline = time.monotonic() + seconds

    def seconds(self) -> float:
        """Return the seconds that are left. Raises `too_slow` if there are none."""
        if (remaining := self.deadline - time.monotonic()) <= 0:
            raise self.too_slow()
        return remaining

    def take(self, count: int, waited: float = 0.0) -> None:
        """Count bytes that came after a wait in seconds. Raises `too_much` beyond the limit."""
        self.bytes_left -= count
        if self.bytes_left < 0:
            raise self.too_much()

    @abstractmethod
    def too_much(self) -> MixchatError: ...

    @abstractmethod
    def too_slow(self) -> MixchatError: ...


def header(response: httpcore2.Response, name: str) -> str | None:
    """Return the first header of this name, None if there is none."""
    for key, value in response.headers:
        if key.lower() == name.lower().encode():
            return value.decode("latin-1")
    return None


def decoded(pieces: Iterable[bytes], encoding: str) -> Iterator[bytes]:
    """Yield the bytes of a body in the encoding of its header.

    Some proxies compress a body without being asked. Raises `ValueError` if it cannot be decoded.
    """
    if encoding == "identity":
        yield from pieces
        return
    if encoding not in ("gzip", "deflate"):
        raise ValueError(f"in an unknown encoding ({encoding})")
    decoder = zlib.decompressobj(zlib.MAX_WBITS | 32)
    try:
        for data in pieces:
            while data:
                yield decoder.decompress(data, _DECODED_BYTES)
                data = decoder.unconsumed_tail
    except zlib.error:
        raise ValueError("that cannot be decompressed") from None


def proxy_address(url: str) -> str:
    """Return the proxy that the environment names for an address, empty if there is none."""
    parts = urlsplit(url)
    proxies = getproxies()
    proxy = proxies.get(parts.scheme) or proxies.get("all") or ""
    return "" if proxy_bypass(parts.netloc.rpartition("@")[2]) else proxy


def to_proxy(address: str) -> httpcore2.Proxy:
    """Return the proxy at an address, with the name and password in it."""
    parts = urlsplit(address if "://" in address else f"http://{address}")
    auth = (unquote(parts.username), unquote(parts.password or "")) if parts.username else None
    return httpcore2.Proxy(f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}", auth=auth)


class LimitedNetwork(httpcore2.SyncBackend):
    """Connections whose reads are limited by what `limits` returns at each of them."""

    def __init__(self, limits: Callable[[], ReadLimits]) -> None:
        super().__init__()
        self._limits = limits

    def connect_tcp(self, *args: Any, **options: Any) -> LimitedStream:
        return LimitedStream(super().connect_tcp(*args, **options), self._limits)


class LimitedStream(httpcore2.NetworkStream):
    """A connection that reads in short attempts. A signal may have to wait for one to end."""

    def __init__(self, stream: httpcore2.NetworkStream, limits: Callable[[], ReadLimits]) -> None:
        self._stream = stream
        self._limits = limits

    def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        limits = self._limits()
        started = time.monotonic()
        while True:
            try:
                data = self._stream.read(max_bytes, min(limits.seconds(), _READ_S))
            except httpcore2.ReadTimeout:
                if timeout is not None and time.monotonic() - started >= timeout:
                    raise
            else:
                limits.take(len(data), time.monotonic() - started)
                return data

    def write(self, buffer: bytes, timeout: float | None = None) -> None:
        for start in range(0, len(buffer), _WRITE_BYTES):
            self._limits().seconds()
            self._stream.write(buffer[start : start + _WRITE_BYTES], timeout)

    def close(self) -> None:
        self._stream.close()

    def start_tls(self, *args: Any, **options: Any) -> LimitedStream:
        return LimitedStream(self._stream.start_tls(*args, **options), self._limits)

    def get_extra_info(self, info: str) -> Any:
        return self._stream.get_extra_info(info)
