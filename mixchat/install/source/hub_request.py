"""Requests bytes of a file on the hub, and checks that the answer holds them.

A proxy may send other bytes than requested, and a network may send a page to log in. An answer has
to keep a slowest pace, and its bytes besides the content are limited.
"""

from __future__ import annotations

import atexit
import base64
import functools
import json
import math
import re
import string
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from typing import Any
from urllib.parse import quote, unquote, urljoin, urlsplit

import httpcore2

from mixchat import __version__
from mixchat.base.errors import HubError
from mixchat.base.http import (
    REDIRECTS,
    LimitedNetwork,
    ReadLimits,
    decoded,
    header,
    proxy_address,
    to_proxy,
)
from mixchat.install.source.hub_errors import HubRefusal

_TIMEOUT_S = 30.0  # after the last byte
_TIMEOUTS = dict.fromkeys(("connect", "read", "write", "pool"), _TIMEOUT_S)
_KEEPALIVE_S = 5.0  # for which an unused connection stays open
_REDIRECTS_MAX = 20
_JSON_BYTES_MAX = 2**24
_JSON_S = 300.0
_WAIT_S_MAX = 300.0  # the hub counts requests over five minutes
_CONTENT_RANGE = re.compile(r"bytes (\d+)-\d+/(\d+|\*)")
_RANGE_NOT_SATISFIABLE = 416
_BUSY = (429, 503)

_HEAD_BYTES = 1 << 20  # of the headers of all redirects together
_SPARE_BYTES = 1 << 20  # besides the content, of a body in chunks
_SPARE_SHARE = 4  # a quarter more, for small chunks
_UNKNOWN_BYTES = 1 << 36  # of a body of unknown size: 64 GiB
# A slower answer is given up. Another request continues after the bytes that came.
_PACE_BYTES = 1 << 16
_PACE_S = 60.0
Headers = dict[bytes | str, bytes | str]
_LATER = "Run the same command again later; it continues where it stopped."
_current = threading.local()  # `limits` are those of the request that the thread waits for


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
    def stream(self, start: int, end: int | None) -> Iterator[tuple[HubReply, int]]:
        """Yield the answer and its first byte, which is `start`, or 0 for the whole file.

        Raises `WrongAnswer` for other bytes.
        """
        headers: Headers = {}
        if self.ranges and (start or end is not None):
            headers["Range"] = f"bytes={start}-{'' if end is None else end}"
        with _answer(self.url, headers) as (reply, limits):
            if reply.status == _RANGE_NOT_SATISFIABLE:
                raise self._wrong_range()
            reply.raise_for_status()
            first = self._first_byte(reply, start)
            if end is not None and reply.status == 206:
                limits.expect(end + 1 - first)
            else:
                limits.expect(self.size)
            yield reply, first

    def _first_byte(self, reply: HubReply, start: int) -> int:
        first = 0
        whole = reply.header("Content-Length")
        if reply.status == 206:
            match = _CONTENT_RANGE.match(reply.header("Content-Range"))
            first, whole = (int(match[1]), match[2]) if match else (-1, "")
        elif reply.is_compressed:
            whole = ""
        content_type = reply.header("Content-Type").lower()
        # Some mirrors call every file HTML, but its size shows that it is ours.
        if content_type.startswith("text/html") and whole != str(self.size):
            raise self._other_file("a page of HTML")
        if self.size is not None and whole.isdecimal() and int(whole) != self.size:
            raise self._other_file(f"{whole} bytes instead of the {self.size} that it lists")
        # If a proxy began too early, some bytes of the file would be taken twice.
        if reply.status == 206 and first != start:
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
    with _answer(url, {}) as (reply, limits):
        reply.raise_for_status()
        limits.expect(_JSON_BYTES_MAX, _JSON_S)
        for chunk in reply.pieces():
            data += chunk
            if len(data) > _JSON_BYTES_MAX:
                raise ValueError("the answer is too long")
    return json.loads(data)


class HubReply:
    """The hub's reply to a request."""

    def __init__(self, response: httpcore2.Response) -> None:
        self._response = response
        self.status = response.status
        self._encoding = self.header("Content-Encoding").lower() or "identity"

    def header(self, name: str) -> str:
        """Return a header, empty if there is none."""
        return header(self._response, name) or ""

    @property
    def is_compressed(self) -> bool:
        return self._encoding != "identity"

    def raise_for_status(self) -> None:
        """Raise `HubRefusal` without reading the body, which may be endless."""
        if not 200 <= self.status < 300:
            raise HubRefusal(
                self.status,
                code=self.header("X-Error-Code"),
                reason=self.header("X-Error-Message"),
                retry_after=self.header("Retry-After"),
            )

    def pieces(self) -> Iterator[bytes]:
        """Yield the body as it comes. Some proxies compress it without being asked."""
        try:
            yield from decoded(self._response.iter_stream(), self._encoding)
        except ValueError as error:
            raise WrongAnswer(f"the hub sends an answer {error}") from None


@contextmanager
def _answer(url: str, headers: Headers) -> Iterator[tuple[HubReply, HubLimits]]:
    """Yield the reply after all redirects, and its limits. The token goes to the hub alone."""
    _current.limits = limits = HubLimits()
    sent: Headers = {
        "User-Agent": f"mixchat/{__version__}",
        "Accept-Encoding": "identity",
        **headers,
        **_authorization(url),
    }
    with ExitStack() as opened:
        for _ in range(_REDIRECTS_MAX):
            sent["Host"] = urlsplit(url).netloc.rpartition("@")[2]
            request = _connections(url).stream(
                "GET", url, headers=sent, extensions={"timeout": _TIMEOUTS}
            )
            reply = HubReply(opened.enter_context(request))
            if reply.status not in REDIRECTS or not reply.header("Location"):
                yield reply, limits
                return
            for _ in reply.pieces():  # the rest is read, so that the connection can be used again
                pass
            opened.close()
            target = urljoin(url, quote(reply.header("Location"), safe=string.punctuation))
            if urlsplit(target)[:2] != urlsplit(url)[:2]:
                sent.pop("Authorization", None)
            url = target
    raise WrongAnswer("the hub sends the request elsewhere without an end", hint=_LATER)


def _authorization(url: str) -> Headers:
    """Return the header with the person's token, or with the name and password in the address.

    Raises `HubError` if the hub is switched off.
    """
    from huggingface_hub import constants, get_token

    if constants.HF_HUB_OFFLINE:
        raise HubError(
            "the hub is switched off by HF_HUB_OFFLINE",
            hint="Unset it, or name a directory that holds the checkpoint.",
        )
    parts = urlsplit(url)
    if parts.username:
        user = f"{unquote(parts.username)}:{unquote(parts.password or '')}"
        return {"Authorization": f"Basic {base64.b64encode(user.encode()).decode()}"}
    token = None if constants.HF_HUB_DISABLE_IMPLICIT_TOKEN else get_token()
    return {"Authorization": f"Bearer {token}"} if token else {}


def _connections(url: str) -> httpcore2.ConnectionPool:
    """Return the connections for an address, by the proxy that the environment names for it."""
    return _pool(proxy_address(url))


@functools.cache
def _pool(proxy: str) -> httpcore2.ConnectionPool:
    pool = httpcore2.ConnectionPool(
        proxy=to_proxy(proxy) if proxy else None,
        network_backend=LimitedNetwork(lambda: _current.limits),
        max_connections=None,
        keepalive_expiry=_KEEPALIVE_S,
    )
    atexit.register(pool.close)
    return pool


def retry_after(failure: Exception | None) -> float:
    """Return the seconds that a busy server asks to wait, at most 300."""
    if not isinstance(failure, HubRefusal) or failure.status not in _BUSY:
        return 0.0
    text = failure.retry_after.strip()
    seconds = 0.0
    with suppress(ValueError, TypeError, OverflowError):
        is_date = not text.isdecimal()
        seconds = parsedate_to_datetime(text).timestamp() - time.time() if is_date else float(text)
    return min(max(0.0, seconds), _WAIT_S_MAX)


class HubLimits(ReadLimits):
    """The limits of one request, with all its redirects."""

    def __init__(self) -> None:
        super().__init__(_HEAD_BYTES, math.inf)
        self._came, self._waited = 0, 0.0  # bytes and seconds of this period of `_PACE_S` seconds

    def expect(self, size: int | None, seconds: float = math.inf) -> None:
        """Allow a body of `size` bytes, None for any size, within `seconds`."""
        size = _UNKNOWN_BYTES if size is None else size
        self.bytes_left = size + size // _SPARE_SHARE + _SPARE_BYTES
        self.deadline = time.monotonic() + seconds

    def take(self, count: int, waited: float = 0.0) -> None:
        super().take(count)
        # Only the time of reading counts, not the time of a slow disk or a suspended process.
        self._waited += waited
        self._came += count
        if self._waited >= _PACE_S:
            if self._came < _PACE_BYTES:
                raise self.too_slow()
            self._came = 0
            self._waited = 0.0

    def too_much(self) -> WrongAnswer:
        return WrongAnswer("the hub sends an answer without an end", hint=_LATER)

    def too_slow(self) -> WrongAnswer:
        return WrongAnswer("the hub sends its answer too slowly", hint=_LATER)
