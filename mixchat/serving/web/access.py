"""The server's address, and the requests that it turns away.

A web page's origin has to be the server itself or one of `--cors`. DNS rebinding gives a page no
foreign origin, but a foreign Host header. A browser names no origin for some requests, such as
those for pictures. Sec-Fetch-Site then tells whether they come from another site.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import socket
from collections.abc import Callable
from dataclasses import dataclass
from ipaddress import ip_address

from starlette.datastructures import Headers
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from mixchat.base.errors import UsageError
from mixchat.base.options import NetworkAddress
from mixchat.experts.workers.address import Address, listen_error, resolve
from mixchat.serving.requests.errors import RequestError
from mixchat.serving.requests.fields import to_json
from mixchat.serving.web import anthropic, ollama
from mixchat.serving.web.page import PAGE_PATHS

_ANY = "*"
_OPEN_PATHS = {"/health"} | PAGE_PATHS  # need no key, because they tell nothing
IGNORED = "x-mixchat-ignored"  # names a request's fields without an effect
_HOST = re.compile(r"(\[[^\]]*\]|[^:]*)(?::[0-9]*)?")  # a name or an address, and a port
_OWN_SITES = ("same-origin", "none")  # none: a person typed the address


def find_address(host: str, port: int, key: str | None) -> Address:
    """Return the address to listen on. Port 0 lets the system choose one.

    Raises `UsageError` for an unknown host, or one that others can reach without a key.
    """
    host = host.removeprefix("[").removesuffix("]")  # as IPv6 is written in a URL
    address = resolve(str(NetworkAddress(host, port)), any_port=True)
    if key is None and not is_loopback(address):
        raise UsageError(
            f"--host {host}: whoever reaches this machine could use the server",
            hint="Set a key in MIXCHAT_API_KEY, or leave --host out to serve this machine alone.",
        )
    return address


def is_loopback(address: Address) -> bool:
    """Return whether only this machine can reach an address."""
    return ip_address(address.host).is_loopback


def bind(address: Address) -> socket.socket:
    """Return a socket that is bound to this address. Raises `UsageError`."""
    # asyncio sets TCP_NODELAY only if the protocol is named. Else a kept connection costs 40 ms
    # more for each answer.
    bound = socket.socket(address.family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address.target)
    except OSError as error:
        bound.close()
        raise listen_error(address, error, "server", "--port N", "--host") from None
    return bound


def url_of(bound: socket.socket) -> str:
    """Return the URL of a server."""
    host, port = bound.getsockname()[:2]
    return f"http://{NetworkAddress(host, port)}"


def page_url(bound: socket.socket) -> str:
    """Return the URL for a browser on this machine. Some open none of a wildcard address."""
    host, port = bound.getsockname()[:2]
    return f"http://localhost:{port}" if ip_address(host).is_unspecified else url_of(bound)


@dataclass(frozen=True)
class Access:
    """The clients that may use the server.

    `origins` are the web pages' own, or "*". No other machine can reach it if `local_only`.
    """

    key: str | None = None
    origins: tuple[str, ...] = ()
    local_only: bool = True


def guarded(app: ASGIApp, access: Access) -> ASGIApp:
    """Return `app` with all checks before it."""
    if access.key is not None:
        app = _guard(app, lambda scope: _key_fault(scope, _digest(access.key or "")))
    if access.origins:
        app = CORSMiddleware(
            app,
            allow_origins=access.origins,
            allow_methods=("GET", "POST"),
            allow_headers=(_ANY,),
            expose_headers=("x-request-id", "retry-after", IGNORED),
        )
    return _guard(app, lambda scope: _header_fault(scope, access))


def error_response(error: RequestError, path: str) -> Response:
    """Return the response for an error, in the form of the API at a path."""
    body = error.body
    if path.startswith("/api/"):
        body = ollama.error_body(error)
    elif path.startswith(anthropic.PATH):
        body = anthropic.error_body(error)
    return Response(
        to_json(body), error.status, headers=error.headers, media_type="application/json"
    )


def _guard(app: ASGIApp, fault: Callable[[Scope], RequestError | None]) -> ASGIApp:
    """Return `app`, which does not get the requests for which `fault` returns an error."""

    async def answer(scope: Scope, receive: Receive, send: Send) -> None:
        error = fault(scope)
        refusal = None if error is None else error_response(error, scope["path"])
        await (refusal or app)(scope, receive, send)

    return answer


def _header_fault(scope: Scope, access: Access) -> RequestError | None:
    headers = Headers(scope=scope)
    if "content-length" in headers and "transfer-encoding" in headers:
        # A proxy that reads the other one would see other requests.
        message = "Content-Length and Transfer-Encoding exclude each other: send one of them"
        return RequestError(message, headers={"Connection": "close"})
    origin = headers.get("origin")
    host = headers.get("host", "")
    message = ""
    allowed = {None, f"http://{host}", f"https://{host}", *access.origins}
    if origin not in allowed and _ANY not in allowed:
        message = f"web pages of {origin!a:.80} may not use this server: see --cors"
    elif origin is None and _ANY not in allowed and _is_of_foreign_page(headers, scope["method"]):
        message = "web pages of other sites may not use this server: see --cors"
    elif access.local_only and access.key is None and not _is_local(host):
        message = f"this server is not {host!a:.80}: use localhost or 127.0.0.1"
    return RequestError(message, status=403, code="forbidden") if message else None


def _key_fault(scope: Scope, digest: bytes) -> RequestError | None:
    headers = dict(scope["headers"])
    scheme, _, key = headers.get(b"authorization", b"").partition(b" ")
    if scheme.lower() != b"bearer":
        key = headers.get(b"x-api-key", b"")  # of Anthropic's clients
    # Digests have one length, so the time of comparing them tells nothing.
    if hmac.compare_digest(_digest(key.strip()), digest) or scope["path"] in _OPEN_PATHS:
        return None
    return RequestError(
        "the API key is missing or wrong: send it as 'Authorization: Bearer KEY'",
        status=401,
        code="invalid_api_key",
        headers={"WWW-Authenticate": "Bearer"},
    )


def _digest(key: bytes | str) -> bytes:
    return hashlib.sha256(key.encode() if isinstance(key, str) else key).digest()


def _is_of_foreign_page(headers: Headers, method: str) -> bool:
    """Return whether a page of another site makes a request, unless a person follows its link."""
    if headers.get("sec-fetch-site", "none") in _OWN_SITES:
        return False
    follows = headers.get("sec-fetch-mode"), headers.get("sec-fetch-dest")
    return method not in ("GET", "HEAD") or follows != ("navigate", "document")


def _is_local(host: str) -> bool:
    match = _HOST.fullmatch(host)
    name = "" if match is None else match[1]
    if name.lower() == "localhost":
        return True
    try:
        return ip_address(name.strip("[]")).is_loopback
    except ValueError:
        return False
