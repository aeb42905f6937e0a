"""Errors in OpenAI's format."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

from mixchat.base.errors import (
    MixchatError,
    PromptError,
    PromptTooLongError,
    ResourceError,
    UsageError,
)
from mixchat.face.request import QueueFullError, ShuttingDownError

_INVALID = "invalid_request_error"
# OpenAI's and Anthropic's packages read Retry-After, and ask again by themselves.
_RETRY_S = 2
_UNUSABLE = "the model cannot be used: the server's own messages say why"
_MAX_PATH = 80  # characters
_MAX_VALUE = 60  # characters
# Status, type and code. The first class that fits counts. Messages of all other classes are for the
# person who runs the server alone, since they name directories, files and workers.
_ERRORS = (
    (QueueFullError, 429, "rate_limit_error", "queue_full"),
    (ShuttingDownError, 503, "server_error", "shutting_down"),
    (PromptTooLongError, 400, _INVALID, "context_length_exceeded"),
    (PromptError, 400, _INVALID, None),
    (UsageError, 400, _INVALID, None),  # a form that no answer can keep
    (ResourceError, 503, "server_error", "no_room"),
)


class RequestError(Exception):
    """A request that cannot be answered. `param` is the wrong field."""

    def __init__(
        self,
        message: str,
        *,
        status: int = 400,
        param: str | None = None,
        code: str | None = None,
        error_type: str = _INVALID,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.headers = dict(headers or {})
        self._fields = {"type": error_type, "param": param, "code": code}

    @property
    def body(self) -> dict[str, Any]:
        return {"error": {"message": str(self), **self._fields}}


def as_request_error(error: Exception) -> RequestError:
    """Return an error with the status and code that clients know."""
    if isinstance(error, RequestError):
        return error
    for error_class, status, error_type, code in _ERRORS:
        if isinstance(error, error_class):
            message = f"{error}. {error.hint}" if error.hint else str(error)
            headers = {"Retry-After": str(_RETRY_S)} if status == 429 else None
            return RequestError(
                message, status=status, error_type=error_type, code=code, headers=headers
            )
    message = _UNUSABLE if isinstance(error, MixchatError) else "internal error"
    return RequestError(message, status=500, error_type="server_error")


def field_error(path: str, reason: str, code: str | None = None) -> RequestError:
    """Return the error about the field at `path`, such as `messages[0].role`."""
    return RequestError(f"{plain(path)} {reason}", param=plain(path), code=code)


def value_error(path: str, allowed: str, value: object) -> RequestError:
    """Return the error about a value that is not allowed."""
    return field_error(path, f"has to be {allowed}, not {shown(value)}", "invalid_value")


def path_text(parts: Iterable[str | int]) -> str:
    """Return the path of names and indices, such as `messages[0].role`."""
    path = ""
    for part in parts:
        path += f"[{part}]" if isinstance(part, int) else f".{part}" if path else part
    return path


def plain(path: str) -> str:
    """Return a field's path as short ASCII, because a client chose it."""
    return ascii(path[:_MAX_PATH])[1:-1]


def shown(value: object) -> str:
    """Return a value as short ASCII."""
    if isinstance(value, dict | list):
        return "an object" if isinstance(value, dict) else "a list"
    if isinstance(value, int) and abs(value) > 10**_MAX_VALUE:
        return "a number of many digits"
    return ascii(value[:_MAX_VALUE]) if isinstance(value, str) else json.dumps(value)
