"""Reads from a socket for as long as it takes, and lets Ctrl-C in meanwhile."""

from __future__ import annotations

import io
import socket
import time
from contextlib import suppress
from http.client import HTTPResponse
from typing import TYPE_CHECKING, cast

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

_SHORT = 0.2  # seconds


class PatientReader(io.RawIOBase):
    """The bytes of a socket, which is closed with it.

    A signal that comes just before a read begins to block is not handled before that read ends. So
    each is short, and the next one follows.
    """

    def __init__(self, source: socket.socket) -> None:
        self._source, self._deadline = source, float("inf")
        source.settimeout(_SHORT)

    def response(self, method: str) -> HTTPResponse:
        """Read the status and the headers of an HTTP response; return it, to read its body."""
        response = HTTPResponse(cast("socket.socket", self), method=method)
        response.begin()
        return response

    def makefile(self, mode: str) -> io.BufferedReader:
        """Return a buffer over this reader, as a socket does for a response."""
        return io.BufferedReader(self)

    def hurry(self, seconds: float) -> None:
        """Let a read raise `TimeoutError` so many seconds from now."""
        self._deadline = time.monotonic() + seconds

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: WriteableBuffer) -> int:
        while time.monotonic() <= self._deadline:
            with suppress(TimeoutError):
                return self._source.recv_into(buffer)
        raise TimeoutError

    def close(self) -> None:
        super().close()
        self._source.close()
