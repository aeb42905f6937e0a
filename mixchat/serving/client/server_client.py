"""The client of a server with OpenAI's API."""

from __future__ import annotations

import json
import socket
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, closing, suppress
from typing import Any

import httpcore2

from mixchat.base.errors import MixchatError, ServerError, UsageError, short_message
from mixchat.base.http import FAULTS, LimitedNetwork, header
from mixchat.serving.client.patience import Patience
from mixchat.serving.client.server_json import (
    BusyError,
    ListedModel,
    error_of,
    parsed_error,
    read_models,
)
from mixchat.serving.client.server_url import ServerURL

_CONNECT_TIMEOUT_S = 10.0
_WRITE_S = 300.0  # until the server takes some bytes
_MAX_REASON = 2**20  # bytes of an error
_START_HINT = "Start it with 'mixchat serve', or check the URL."
# A large prompt takes hours of silence. This notices a machine that was switched off meanwhile.
_KEEPALIVE: list[httpcore2.SOCKET_OPTION] = [(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)]
_FAULTS = (*FAULTS, ValueError)  # a host's name of a wrong form is a ValueError


class ServerClient:
    """The client of one server, with a connection for each request.

    Only this server gets the `key`, because redirects are not followed. `Patience` limits what the
    server may take. Methods raise `MixchatError`.
    """

    def __init__(self, url: ServerURL, key: str | None = None) -> None:
        self.url = url
        self._key = key
        if key is not None and not (key.isascii() and key.isprintable()):
            raise UsageError("the key in MIXCHAT_API_KEY has characters that no key can have")

    def models(self) -> list[ListedModel]:
        """Return the server's models, or nothing if it does not list them."""
        with closing(self._request("GET", "/models")) as reply:
            if reply.status in (404, 405, 501):
                return []
            self._check(reply)
            return read_models(reply.body())

    def chat(self, body: Mapping[str, Any]) -> HTTPReply:
        """Send a request for a streamed answer, and return the stream, which has to be closed.

        Raises `PromptTooLongError` or `ModelNotFoundError` if the server says so.
        """
        with ExitStack() as opened:
            reply = self._request("POST", "/chat/completions", json.dumps(body).encode())
            opened.callback(reply.close)
            self._check(reply)
            if reply.content_type in ("text/event-stream", ""):
                opened.pop_all()
                return reply
            if reply.content_type == "application/json":
                raw = parsed_error(reply.reason())
                if isinstance(raw, dict) and raw.get("error"):
                    raise error_of(reply.status, raw)
            content = short_message(reply.content_type)
            raise ServerError(f"{self.url} answers with {content}, not with a stream of events")

    def _request(self, method: str, path: str, body: bytes | None = None) -> HTTPReply:
        url = self.url
        target = httpcore2.URL(
            scheme=url.scheme, host=url.host, port=url.port, target=url.path + path
        )
        patience = Patience(None if body is None else len(body))
        connection = httpcore2.HTTPConnection(
            target.origin,
            network_backend=LimitedNetwork(lambda: patience),
            socket_options=_KEEPALIVE,
        )
        timeouts = {"timeout": {"connect": _CONNECT_TIMEOUT_S, "write": _WRITE_S}}
        request = connection.stream(
            method, target, headers=self._headers(body), content=body, extensions=timeouts
        )
        with ExitStack() as opened:
            opened.enter_context(connection)
            try:
                response = opened.enter_context(request)
            except (httpcore2.ConnectError, httpcore2.ConnectTimeout, ValueError) as error:
                said = f"no server answers at {url} ({_reason(error)})"
                raise ServerError(said, hint=_START_HINT) from None
            except _FAULTS as error:
                raise _fault(url, "closed the connection without an answer", error) from None
            patience.begin()
            return HTTPReply(url, response, patience, opened.pop_all().close)

    def _headers(self, body: bytes | None) -> dict[bytes | str, bytes | str]:
        headers: dict[bytes | str, bytes | str] = {
            "Host": self.url.authority,
            "Accept": "text/event-stream, application/json",
            "Accept-Encoding": "identity",
            "Connection": "close",
        }
        if body is not None:
            headers["Content-Type"] = "application/json"
        if self._key:
            headers["Authorization"] = f"Bearer {self._key}"
        return headers

    def _check(self, reply: HTTPReply) -> None:
        if 200 <= reply.status < 300:
            return
        if 300 <= reply.status < 400:
            target = short_message(reply.header("Location") or "nowhere")
            target = target.removesuffix("/chat/completions").removesuffix("/models")
            hint = f"If that is the server that you mean: --server {target}"
            raise ServerError(f"{self.url} sends the request elsewhere, to {target}", hint=hint)
        error = error_of(reply.status, parsed_error(reply.reason()))
        error.hint = self._hint(error, reply)
        raise error

    def _hint(self, error: MixchatError, reply: HTTPReply) -> str | None:
        if reply.status in (401, 403):
            wanted = "does not accept the key in" if self._key else "may want a key: set"
            return f"The server {wanted} MIXCHAT_API_KEY."
        if isinstance(error, BusyError):
            wait = reply.header("Retry-After") or ""
            if not (wait.isascii() and wait.isdigit() and len(wait) < 6):
                return "Try again later."
            error.seconds = int(wait)
            return f"Try again in {int(wait)} s."
        if reply.status == 404 and isinstance(error, ServerError):
            return f"Is {self.url} the address of its API? Many have it below /v1."
        return None


class HTTPReply:
    """The reply to a request. `close` also ends its answer."""

    def __init__(
        self,
        url: ServerURL,
        response: httpcore2.Response,
        patience: Patience,
        close: Callable[[], None],
    ) -> None:
        self.patience = patience
        self.close = close
        self._url = url
        self._response = response
        self.status = response.status
        content_type, _, _ = (self.header("Content-Type") or "").partition(";")
        self.content_type = content_type.strip().lower()

    def header(self, name: str) -> str | None:
        return header(self._response, name)

    def body(self) -> bytes:
        return b"".join(self.pieces("broke off"))

    def reason(self) -> bytes:
        """Return what comes of an error's body within 10 s, at most 1 MiB."""
        self.patience.give_reason()
        body = bytearray()
        with suppress(ServerError):
            for piece in self.pieces("broke off"):
                body += piece
                if len(body) > _MAX_REASON:
                    break
        return bytes(body[:_MAX_REASON])

    def pieces(self, fault: str = "broke off in the middle of the answer") -> Iterator[bytes]:
        """Yield the body as it comes. Raises `ServerError` with `fault` if the connection ends."""
        try:
            yield from self._response.iter_stream()
        except _FAULTS as error:
            raise _fault(self._url, fault, error) from None


def _fault(url: ServerURL, fault: str, error: Exception) -> ServerError:
    return ServerError(f"the server at {url} {fault} ({_reason(error)})")


def _reason(error: BaseException) -> str:
    if isinstance(error, httpcore2.RemoteProtocolError):
        closed = str(error).startswith(("peer closed", "Server disconnected"))
        return "the connection was closed" if closed else "that is not HTTP"
    while error.__cause__ is not None:
        error = error.__cause__
    if isinstance(error, TimeoutError | httpcore2.TimeoutException):
        return "it takes too long"
    return short_message(getattr(error, "strerror", None) or error) or type(error).__name__
