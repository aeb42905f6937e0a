"""Fetches the file at an address that a person names, bounded in bytes, seconds and redirects."""

from __future__ import annotations

import ipaddress
import string
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote, urljoin, urlsplit

import httpcore2

from mixchat import __version__
from mixchat.base.errors import PromptError, ServerError, UsageError, short_message
from mixchat.base.http import (
    FAULTS,
    REDIRECTS,
    LimitedNetwork,
    LimitedStream,
    ReadLimits,
    decoded,
    header,
    proxy_address,
    to_proxy,
)
from mixchat.base.quantities import format_size
from mixchat.base.sanitize import sanitize

_MAX_REDIRECTS = 5
FETCH_S = 60.0  # with all redirects
_CONNECT_S = 10.0
_HEAD_BYTES = 2**20  # of the headers of all answers
_PORTS = {"http": 80, "https": 443}
_HTML = ("text/html", "application/xhtml+xml")
_TYPES = (*_HTML, "application/json", "application/pdf", "application/octet-stream")
_BEGINNING = 1024  # bytes that tell text from other files
_HINT = "mixchat reads pages of HTML, plain text, Markdown, JSON and PDF."


@dataclass(frozen=True)
class WebFile:
    """A file as it came. `url` is the address that sent it, after all redirects."""

    url: str
    data: bytes
    media_type: str
    charset: str | None

    @property
    def is_html(self) -> bool:
        return self.media_type in _HTML

    def text(self) -> str:
        """Return the text of a file that is neither HTML nor a PDF.

        Bytes that do not fit its charset become U+FFFD. Raises `PromptError` if it is not text.
        """
        if b"\0" in self.data[:_BEGINNING]:
            raise PromptError(f"{self.url} is neither text nor a PDF", hint=_HINT)
        try:
            text = self.data.decode(self.charset or "utf-8", "replace")
        except LookupError:
            text = self.data.decode("utf-8", "replace")
        return sanitize(text.removeprefix("\ufeff"))


def fetch(url: str, max_bytes: int) -> WebFile:
    """Return the file at an address.

    A redirect leads neither into a private network nor from https to http. Raises `UsageError` for
    an address that cannot be one, `ServerError` if the file does not come, and `PromptError` if it
    has no text or is too large.
    """
    limits = _FetchLimits(url, max_bytes)
    network = _FetchNetwork(limits)
    asked = _checked(url)
    for _ in range(_MAX_REDIRECTS + 1):
        answer = _answer(asked, network, limits, max_bytes)
        if isinstance(answer, WebFile):
            return answer
        _check_redirect(asked, answer)
        asked = _checked(answer)
        network.allows_private = network.allows_private and network.was_private
    raise ServerError(f"{url} leads on more than {_MAX_REDIRECTS} times")


def is_private(address: str) -> bool:
    """Return whether an address of IPv4 or IPv6 is of this machine or of its own network."""
    parsed = ipaddress.ip_address(address.partition("%")[0])
    return not (getattr(parsed, "ipv4_mapped", None) or parsed).is_global


def _answer(
    url: str, network: _FetchNetwork, limits: _FetchLimits, max_bytes: int
) -> WebFile | str:
    """Return the file, or the address that the server names instead."""
    proxy = proxy_address(url)
    with ExitStack() as opened:
        pool = opened.enter_context(
            httpcore2.ConnectionPool(
                proxy=to_proxy(proxy) if proxy else None, network_backend=network
            )
        )
        headers: Any = {
            "Host": urlsplit(url).netloc,
            "User-Agent": f"mixchat/{__version__}",
            "Accept": "text/html, text/plain, text/*, application/json, application/pdf",
            "Accept-Encoding": "identity",
        }
        timeouts = {"timeout": {"connect": _CONNECT_S}}
        try:
            response = opened.enter_context(
                pool.stream("GET", url, headers=headers, extensions=timeouts)
            )
            location = header(response, "Location")
            if response.status in REDIRECTS and location:
                return urljoin(url, quote(location, safe=string.punctuation))
            if not 200 <= response.status < 300:
                raise ServerError(f"{url} cannot be had: the server answers {response.status}")
            media_type, charset = _content_type(response)
            if not (
                media_type.startswith("text/") or media_type in _TYPES or "+json" in media_type
            ):
                raise PromptError(f"{url} is {short_message(media_type)}", hint=_HINT)
            return WebFile(url, _body(response, limits, max_bytes), media_type, charset)
        except (*FAULTS, OSError, UnicodeError) as error:
            reason = short_message(error) or type(error).__name__
            raise ServerError(f"{url} cannot be had ({reason})") from None


def _body(response: httpcore2.Response, limits: _FetchLimits, max_bytes: int) -> bytes:
    limits.bytes_left += max_bytes
    data = bytearray()
    encoding = (header(response, "Content-Encoding") or "identity").lower()
    try:
        for piece in decoded(response.iter_stream(), encoding):
            data += piece
            if len(data) > max_bytes:
                raise limits.too_much()
    except ValueError as error:
        raise ServerError(f"{limits.url} sends an answer {error}") from None
    return bytes(data)


def _content_type(response: httpcore2.Response) -> tuple[str, str | None]:
    """Return the media type, in which a missing one is bytes, and the charset."""
    media_type, *parameters = (header(response, "Content-Type") or "").lower().split(";")
    charset = None
    for each in parameters:
        name, _, value = each.strip().partition("=")
        if name == "charset":
            charset = value.strip("'\" ") or None
    return media_type.strip() or "application/octet-stream", charset


def _checked(url: str) -> str:
    """Return an address in ASCII without its #. Raises `UsageError`."""
    url = quote(url.partition("#")[0], safe=string.punctuation)
    try:
        parts = urlsplit(url)
        host = parts.hostname or ""
        is_usable = parts.scheme in _PORTS and bool(host) and parts.port != 0
    except ValueError:
        is_usable = False
    if not is_usable:
        raise UsageError(f"cannot read {short_message(url)!r} as the address of a page")
    if parts.username is not None:
        raise UsageError("the address of a page cannot have a name or a password")
    return url if parts.path else url.replace(parts.netloc, f"{parts.netloc}/", 1)


def _check_redirect(url: str, target: str) -> None:
    if urlsplit(url).scheme == "https" and urlsplit(target).scheme != "https":
        raise ServerError(
            f"{url} leads to {short_message(target)}, which is not encrypted",
            hint="If that is the page that you mean, name it.",
        )


class _FetchNetwork(LimitedNetwork):
    """Connections that end if a public server leads into a private network.

    A page could otherwise reach a router or a service of this machine. The peer's address counts,
    because a name may have another one at each look-up.
    """

    def __init__(self, limits: _FetchLimits) -> None:
        super().__init__(lambda: limits)
        self._url = limits.url
        self.allows_private = True  # what a person names is what they want
        self.was_private = False

    def connect_tcp(self, *args: Any, **options: Any) -> LimitedStream:
        stream = super().connect_tcp(*args, **options)
        self.was_private = is_private(stream.get_extra_info("server_addr")[0])
        if self.was_private and not self.allows_private:
            stream.close()
            raise ServerError(
                f"{self._url} leads into a private network, to {options['host']}",
                hint="If that is the page that you mean, name its address.",
            )
        return stream


class _FetchLimits(ReadLimits):
    def __init__(self, url: str, max_bytes: int) -> None:
        super().__init__(_HEAD_BYTES, FETCH_S)
        self.url = url
        self._max_bytes = max_bytes

    def too_much(self) -> PromptError:
        return PromptError(f"{self.url} is larger than {format_size(self._max_bytes)}")

    def too_slow(self) -> ServerError:
        return ServerError(f"{self.url} does not come within {FETCH_S:.0f} s")
