"""Asks a server with OpenAI's API over HTTP: for its models, and for answers as they are made."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.client import HTTPConnection, HTTPException, HTTPSConnection, IncompleteRead
from threading import Thread
from typing import Any

from mixchat.base.errors import MixchatError, ServerError, UsageError, short_message
from mixchat.serving.client.patient_reader import PatientReader
from mixchat.serving.client.server_json import (
    BusyError,
    ListedModel,
    error_of,
    parsed_error,
    read_models,
)
from mixchat.serving.client.server_url import SERVER_PORT, ServerURL

_CONNECTING = 10.0  # seconds
_ENDING = 2.0  # seconds, for what comes behind an answer
_GLANCE = 0.05  # seconds, for a look at this machine
_LONGEST_BODY = 2**24  # bytes: a list of models, an error
_PIECE = 2**16  # bytes
_START = "Start it with 'mixchat serve', or check the URL."


class ServerClient:
    """The client of one server; each request has a connection of its own.

    `key` is sent to this server alone: redirects are not followed. A server that is silent is
    waited for without a limit, since a long prompt may take it minutes; Ctrl-C ends that at once.
    All methods raise `MixchatError`, in one line, where the server does not do its part.
    """

    def __init__(self, url: ServerURL, key: str | None = None) -> None:
        self.url, self._key = url, key
        if key is not None and not (key.isascii() and key.isprintable()):
            raise UsageError("the key in MIXCHAT_API_KEY has characters that no key can have")

    def models(self) -> list[ListedModel]:
        """Return the models of the server; none where it has no list of them."""
        reply = self._request("GET", "/models")
        try:
            if reply.status in (404, 405, 501):
                return []
            self._check(reply)
            return read_models(reply.body())
        finally:
            reply.close()

    def chat(self, body: Mapping[str, Any]) -> HTTPReply:
        """Send a request for a streamed answer; return the stream, which has to be closed.

        Raises `PromptTooLongError` where the server says that the prompt does not fit the context,
        and `ModelNotFoundError` where it does not have the model.
        """
        reply = self._request("POST", "/chat/completions", json.dumps(body).encode())
        try:
            self._check(reply)
            if reply.kind not in ("text/event-stream", ""):
                raise self._no_stream(reply)
        except BaseException:
            reply.close()
            raise
        return reply

    def _request(self, method: str, path: str, body: bytes | None = None) -> HTTPReply:
        headers = {"Accept": "text/event-stream, application/json", "Connection": "close"}
        if body is not None:
            headers["Content-Type"] = "application/json"
        if self._key:
            headers["Authorization"] = f"Bearer {self._key}"
        connection = self._connect()
        try:
            with faults_of(self.url, "closed the connection without an answer"):
                connection.request(method, self.url.path + path, body, headers)
                return HTTPReply(self.url, connection.sock, method)
        except BaseException:
            connection.close()
            raise

    def _connect(self) -> HTTPConnection:
        kind = HTTPSConnection if self.url.scheme == "https" else HTTPConnection
        connection = kind(self.url.host, self.url.port, timeout=_CONNECTING)
        try:
            connection.connect()
        except (OSError, ValueError) as error:  # ValueError: the name of the host has no such form
            connection.close()
            said = f"no server answers at {self.url} ({_reason(error)})"
            raise ServerError(said, hint=_START) from None
        except BaseException:
            connection.close()
            raise
        # A machine that was switched off is noticed, although nobody limits the silence.
        connection.sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        connection.sock.settimeout(None)
        return connection

    def _check(self, reply: HTTPReply) -> None:
        """Raise what the status of a reply means, unless that is success."""
        status = reply.status
        if 200 <= status < 300:
            return
        if 300 <= status < 400:
            place = short_message(reply.header("Location") or "nowhere")
            place = place.removesuffix("/chat/completions").removesuffix("/models")
            hint = f"If that is the server that you mean: --server {place}"
            raise ServerError(f"{self.url} sends the request elsewhere, to {place}", hint=hint)
        error = error_of(status, parsed_error(reply.body()))
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

    def _no_stream(self, reply: HTTPReply) -> MixchatError:
        raw = parsed_error(reply.body()) if reply.kind == "application/json" else None
        if isinstance(raw, dict) and raw.get("error"):
            return error_of(reply.status, raw)
        kind = short_message(reply.kind)
        return ServerError(f"{self.url} answers with {kind}, not with a stream of events")


class HTTPReply:
    """The reply to a request, from its headers on."""

    def __init__(self, url: ServerURL, source: socket.socket, method: str) -> None:
        self._url, self._reader = url, PatientReader(source)
        self._response = self._reader.response(method)
        self.status = self._response.status
        self.kind = (self.header("Content-Type") or "").partition(";")[0].strip().lower()

    def header(self, name: str) -> str | None:
        """Return the value of a header."""
        return self._response.getheader(name)

    def body(self) -> bytes:
        """Return the body, at most 16 MiB of it."""
        with faults_of(self._url, "broke off"):
            return self._response.read(_LONGEST_BODY)

    def pieces(self) -> Iterator[bytes]:
        """Yield the body as it comes."""
        with faults_of(self._url, "broke off in the middle of the answer"):
            while piece := self._response.read1(_PIECE):
                yield piece

    def hurry(self) -> None:
        """Wait no longer than 2 s from here on: what is to come is not worth more."""
        self._reader.hurry(_ENDING)

    def close(self) -> None:
        """Close the connection, which ends an answer that is being made."""
        self._response.close()
        self._reader.close()


@contextmanager
def faults_of(url: ServerURL, what: str) -> Iterator[None]:
    """Turn what goes wrong on the network into a `ServerError`: the server at `url` did `what`."""
    try:
        yield
    except (OSError, HTTPException, ValueError) as error:
        raise ServerError(f"the server at {url} {what} ({_reason(error)})") from None


def is_served_here(model: str) -> bool:
    """Return whether a server on this machine, at the usual port, has a model of this name.

    It takes 50 ms at most. No key is sent, because any user's program may listen there.
    """
    found: list[ListedModel] = []

    def look() -> None:
        try:
            found.extend(ServerClient(ServerURL.parse(f"127.0.0.1:{SERVER_PORT}")).models())
        except MixchatError:
            return

    thread = Thread(target=look, daemon=True)
    thread.start()
    thread.join(_GLANCE)
    return any(served.name == model for served in found)


def _reason(error: Exception) -> str:
    if isinstance(error, TimeoutError):
        return "it takes too long"
    if isinstance(error, IncompleteRead):
        return "the connection was closed"
    return short_message(getattr(error, "strerror", None) or error) or type(error).__name__
