"""Errors in the form of OpenAI: which status an error has, and what its body says."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from mixchat.base.errors import (
    MixchatError,
    PromptError,
    PromptTooLongError,
    ResourceError,
    UsageError,
)
from mixchat.serving.service import QueueFullError, ShuttingDownError

RETRY_SECONDS = 2  # until a client that met a full queue should try again
_LONGEST_PATH = 80  # characters
_SERVER_FAULT = 500  # the first status that is none of the client's
_INVALID = "invalid_request_error"


class RequestError(Exception):
    """A request that cannot be answered.

    status: of HTTP; param: the path of the field that is wrong; kind and code: OpenAI's words.
    """

    def __init__(
        self,
        message: str,
        *,
        status: int = 400,
        param: str | None = None,
        code: str | None = None,
        kind: str = _INVALID,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.headers = status, dict(headers or {})
        self._about = {"type": kind, "param": param, "code": code}

    @property
    def body(self) -> dict[str, Any]:
        """Return what the client gets as JSON."""
        return {"error": {"message": str(self), **self._about}}


def as_request_error(error: Exception) -> RequestError:
    """Return an error with the status and the code that clients know it by."""
    if isinstance(error, RequestError):
        return error
    if isinstance(error, QueueFullError):
        again = {"Retry-After": str(RETRY_SECONDS)}
        return RequestError(
            str(error), status=429, kind="rate_limit_error", code="queue_full", headers=again
        )
    if isinstance(error, ShuttingDownError):
        return RequestError(str(error), status=503, kind="server_error", code="shutting_down")
    if isinstance(error, PromptTooLongError):
        return RequestError(_with_hint(error), code="context_length_exceeded")
    if isinstance(error, PromptError | UsageError):  # the latter: a form that no answer can keep
        return RequestError(_with_hint(error))
    if isinstance(error, ResourceError):
        return RequestError(_with_hint(error), status=503, kind="server_error", code="no_room")
    if isinstance(error, MixchatError):
        return RequestError(_with_hint(error), status=500, kind="server_error")
    # The exact fault is for the person who runs the server, not for those who ask.
    return RequestError("internal error", status=500, kind="server_error")


def is_fault_of_request(error: Exception) -> bool:
    """Return whether another request could do better, since the server itself is well."""
    return as_request_error(error).status < _SERVER_FAULT


def to_json(value: object) -> bytes:
    """Return JSON in ASCII on one line. Raises `ValueError` for NaN, which JSON cannot express."""
    return json.dumps(value, allow_nan=False, separators=(",", ":")).encode()


def plain(path: str) -> str:
    """Return a field's path for a message: a client chose its names."""
    return ascii(path[:_LONGEST_PATH])[1:-1]


def _with_hint(error: MixchatError) -> str:
    return f"{error}. {error.hint}" if error.hint else str(error)
