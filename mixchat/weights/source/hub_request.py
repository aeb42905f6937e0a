"""Requests bytes of a file on the hub, and checks that the answer holds them.

A proxy may send other bytes than requested, and a network may send a page to log in. The HTTP
library waits 30 s for each read, so one byte now and then holds it for ever. It reads informational
answers (1xx) and empty compressed blocks without an end. So an answer has a slowest pace, and a
limit of the bytes around those that it is for.
"""

from __future__ import annotations

import json
import math
import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from typing import Any

from mixchat import __version__
from mixchat.base.errors import HubError

_TIMEOUT_S = 30.0  # without a byte
_JSON_BYTES_MAX, _JSON_S = 2**24, 300.0
_WAIT_S_MAX = 300.0  # the hub counts requests over five minutes
_CONTENT_RANGE = re.compile(r"bytes (\d+)-\d+/(\d+|\*)")
_RANGE_NOT_SATISFIABLE = 416
_BUSY = (429, 503)

_HEAD_BYTES = 1 << 20  # before the body, of all redirects together
_SPARE_BYTES = 1 << 20  # of a body in chunks
_SPARE_SHARE = 4  # a quarter more, for small chunks
_UNKNOWN_BYTES = 1 << 36  # of a body whose size nobody knows: 64 GiB
# A line that is slower is not refused, but asked again, where it stopped.
_PACE_BYTES, _PACE_S = 1 << 16, 60.0
_LATER = "Run the same command again later; it continues where it stopped."
_current = threading.local()
_watching = threading.Lock()


class WrongAnswer(HubError):
    """The answer holds other bytes than requested. Another attempt may succeed."""


@dataclass
class RemoteBytes:
    """A file on the hub. `size` is None if it is not known.

    `ranges` is False once the hub has sent another part than requested.
    """

    url: str
    size: int | None
    ranges: bool = True

    @contextmanager
    def stream(self, start: int, end: int | None) -> Iterator[tuple[Any, int]]:
        """Yield the answer and its first byte, which is `start`, or 0 for the whole file.

        Raises `WrongAnswer` for other bytes.
        """
        headers = {}
        if self.ranges and (start or end is not None):
            headers["Range"] = f"bytes={start}-{'' if end is None else end}"
        with _answer(self.url, headers) as (response, limits):
            if response.status_code == _RANGE_NOT_SATISFIABLE:
                raise self._wrong_range()
            _raise_for_status(response)
            first = self._first_byte(response, start)
            is_range = end is not None and response.status_code == 206
            limits.expect(end + 1 - first if is_range else self.size)  # type: ignore[operator]
            yield response, first

    def _first_byte(self, response: Any, start: int) -> int:
        first, whole = 0, response.headers.get("Content-Length", "")
        if response.status_code == 206:
            match = _CONTENT_RANGE.match(response.headers.get("Content-Range", ""))
            first, whole = (int(match[1]), match[2]) if match else (-1, "")
        elif response.headers.get("Content-Encoding", "identity") != "identity":
            whole = ""
        content_type = response.headers.get("Content-Type", "").lower()
        # Some mirrors call every file HTML, but its size shows that it is ours.
        if content_type.startswith("text/html") and whole != str(self.size):
            raise self._other_file("a page of HTML")
        if self.size is not None and whole.isdecimal() and int(whole) != self.size:
            raise self._other_file(f"{whole} bytes instead of the {self.size} that it lists")
        # A proxy that begins too early would give the file's bytes twice.
        if response.status_code == 206 and first != start:
            raise self._wrong_range()
        return first

    def _wrong_range(self) -> WrongAnswer:
        self.ranges = False
        return WrongAnswer(
            f"the hub sends another part of {self.name} than requested",
            hint="A proxy may be at fault. Try another network, or run the same command later; "
            "it continues where it stopped.",
        )

    def _other_file(self, content: str) -> WrongAnswer:
        return WrongAnswer(
            f"the hub sends something else in place of {self.name}: {content}",
            hint="Does the network ask for a login first? Then log in and run the same command "
            "again; it continues where it stopped.",
        )

    @property
    def name(self) -> str:
        """Return the file's name, for messages."""
        return self.url.rsplit("/", 1)[-1]


def read_json(url: str) -> Any:
    """Return the JSON that the hub answers with, of at most 16 MiB.

    Raises `ValueError` or `RecursionError`.
    """
    data = bytearray()
    with _answer(url, {}) as (response, limits):
        _raise_for_status(response)
        limits.expect(_JSON_BYTES_MAX, _JSON_S)
        for chunk in response.iter_bytes():
            data += chunk
            if len(data) > _JSON_BYTES_MAX:
                raise ValueError("the answer is too long")
    return json.loads(data)


@contextmanager
def _answer(url: str, headers: dict[str, str]) -> Iterator[tuple[Any, AnswerLimits]]:
    from huggingface_hub import get_session
    from huggingface_hub.utils import get_token_to_send  # type: ignore[attr-defined]

    # build_hf_headers() would ask the hub for a list of agents, without a limit.
    headers = {"User-Agent": f"mixchat/{__version__}", "Accept-Encoding": "identity", **headers}
    if token := get_token_to_send(None):
        # The client sends it to no other host after a redirect.
        headers["Authorization"] = f"Bearer {token}"
    session = get_session()
    with (
        _limited(session) as limits,
        session.stream(
            "GET", url, headers=headers, timeout=_TIMEOUT_S, follow_redirects=True
        ) as response,
    ):
        yield response, limits


def _raise_for_status(response: Any) -> None:
    """Raise the error of a status without reading the body, which may have no end."""
    from huggingface_hub.utils import hf_raise_for_status  # type: ignore[attr-defined]

    kept = [(name, text) for name, text in response.headers.items() if "content-" not in name]
    hf_raise_for_status(
        type(response)(response.status_code, headers=kept, request=response.request)
    )


def retry_after(failure: Exception | None) -> float:
    """Return the seconds that a busy server asks to wait, at most 300."""
    response = getattr(failure, "response", None)
    if response is None or response.status_code not in _BUSY:
        return 0.0
    text = response.headers.get("Retry-After", "").strip()
    seconds = 0.0
    with suppress(ValueError, TypeError, OverflowError):
        is_date = not text.isdecimal()
        seconds = parsedate_to_datetime(text).timestamp() - time.time() if is_date else float(text)
    return min(max(0.0, seconds), _WAIT_S_MAX)


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


@contextmanager
def _limited(session: Any) -> Iterator[AnswerLimits]:
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
