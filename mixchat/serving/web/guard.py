"""Turns away strangers: foreign hosts, foreign origins, wrong keys.

A web page that a person has open can send requests to this machine. It names its own origin, which
has to be one of `--cors`. With a host name of its own that resolves to 127.0.0.1 (DNS rebinding) it
would have no foreign origin; then the Host header has the foreign name.
"""

from __future__ import annotations

import hashlib
import hmac
from dataclasses import dataclass
from ipaddress import ip_address

from starlette.datastructures import Headers
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from mixchat.serving.requests.failures import RequestError, to_json

_ANY = "*"
IGNORED = "x-mixchat-ignored"  # the header that names a request's fields without an effect
_FREE = "/health"  # needs no key: it tells nothing


@dataclass(frozen=True)
class Access:
    """The clients that may use the server.

    key: what a request has to carry, None for nothing; origins: of the web pages that may use it,
    "*" for all; local_only: whether it can be reached from this machine alone.
    """

    key: str | None = None
    origins: tuple[str, ...] = ()
    local_only: bool = True


def guarded(app: ASGIApp, access: Access) -> ASGIApp:
    """Return `app` behind all checks."""
    if access.key is not None:
        app = _KeyCheck(app, access.key)
    if access.origins:
        app = CORSMiddleware(
            app,
            allow_origins=access.origins,
            allow_methods=("GET", "POST"),
            allow_headers=(_ANY,),
            expose_headers=("x-request-id", "retry-after", IGNORED),
        )
    return _PlaceCheck(app, access)


def error_response(error: RequestError) -> Response:
    """Return the response to a request that cannot be answered."""
    return Response(
        to_json(error.body), error.status, headers=error.headers, media_type="application/json"
    )


class _PlaceCheck:
    """Checks where a request comes from, which host it wanted, and that its length is clear."""

    def __init__(self, app: ASGIApp, access: Access) -> None:
        self._app, self._access = app, access

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        error = self._fault(Headers(scope=scope))
        await (self._app if error is None else error_response(error))(scope, receive, send)

    def _fault(self, headers: Headers) -> RequestError | None:
        if "content-length" in headers and "transfer-encoding" in headers:
            # A proxy that goes by the other one would see other requests in the same bytes.
            message = "Content-Length and Transfer-Encoding exclude each other: send one of them"
            return RequestError(message, headers={"Connection": "close"})
        origin, origins = headers.get("origin"), self._access.origins
        if origin is not None and _ANY not in origins and origin not in origins:
            return _forbidden(f"web pages of {origin!a:.80} may not use this server: see --cors")
        open_to_all = self._access.local_only and self._access.key is None
        if open_to_all and not _is_local(host := headers.get("host", "")):
            return _forbidden(f"this server is not {host!a:.80}: use localhost or 127.0.0.1")
        return None


class _KeyCheck:
    """Checks the key, in a time that does not depend on how much of it is right."""

    def __init__(self, app: ASGIApp, key: str) -> None:
        self._app, self._digest = app, _digest(key.encode())

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        given = next((v for name, v in scope["headers"] if name == b"authorization"), b"")
        scheme, _, key = given.partition(b" ")
        right = hmac.compare_digest(_digest(key.strip()), self._digest)
        if (right and scheme.lower() == b"bearer") or scope["path"] == _FREE:
            await self._app(scope, receive, send)
            return
        error = RequestError(
            "the API key is missing or wrong: send it as 'Authorization: Bearer KEY'",
            status=401,
            code="invalid_api_key",
            headers={"WWW-Authenticate": "Bearer"},
        )
        await error_response(error)(scope, receive, send)


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()


def _forbidden(message: str) -> RequestError:
    return RequestError(message, status=403, code="forbidden")


def _is_local(host: str) -> bool:
    """Return whether the Host header names this machine: localhost, or a loopback address."""
    name = host.rpartition(":")[0] if not host.endswith("]") and ":" in host else host
    if name.lower() == "localhost":
        return True
    try:
        return ip_address(name.strip("[]")).is_loopback
    except ValueError:
        return False
