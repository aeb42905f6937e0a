"""Reads what mixchat's server sends."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from mixchat.base.errors import (
    MixchatError,
    ModelNotFoundError,
    PromptTooLongError,
    ServerError,
    short_message,
)
from mixchat.base.sanitize import sanitize
from mixchat.face.events import Reason
from mixchat.text.tool_call import CallDelta

_MAX_EVENT = 2**20  # bytes, because a server could fill the memory
_MAX_NAME = 200  # characters
_MAX_CALLS = 128  # of tools, in an answer
_TOO_LONG, _NO_MODEL = "context_length_exceeded", "model_not_found"  # codes of errors
_REASONS: dict[object, Reason] = {"length": "length", "tool_calls": "tool_calls"}


class BusyError(ServerError):
    """The server is busy. Another attempt may do better in `seconds`."""

    seconds = 2.0


class RefusedError(ServerError):
    """The server refuses this request."""


_BY_STATUS: dict[int, type[ServerError]] = {
    **dict.fromkeys((400, 413, 422), RefusedError),
    **dict.fromkeys((429, 503), BusyError),
}


@dataclass(frozen=True)
class ListedModel:
    """A model of a server. `context_size` is in tokens, or None if unknown."""

    name: str
    context_size: int | None = None


@dataclass(frozen=True)
class Comment:
    """A line between events, which keeps a silent connection open."""

    text: str


@dataclass(frozen=True)
class Usage:
    """The counts of an answer's tokens."""

    prompt_tokens: int
    cached_tokens: int
    generated_tokens: int


@dataclass(frozen=True)
class Chunk:
    """The next piece of an answer. `reason` is None before its end."""

    text: str = ""
    thinking: str = ""
    calls: tuple[CallDelta, ...] = ()
    reason: Reason | None = None
    usage: Usage | None = None


def read_models(body: bytes) -> list[ListedModel]:
    """Return the listed models whose names can be shown. Raises `ServerError`."""
    listed = _object(_json(body)).get("data")
    if not isinstance(listed, list):
        raise ServerError("the server sends no list of models: is it one with OpenAI's API?")
    return [
        ListedModel(model["id"], _count(model, "context_size") or None)
        for model in map(_object, listed)
        if _is_name(model.get("id"))
    ]


def events(pieces: Iterable[bytes]) -> Iterator[str | Comment]:
    """Yield the data of each server-sent event, and comments. Pieces may be cut anywhere.

    Lines end with LF or CRLF. Bad UTF-8 becomes U+FFFD. Raises `ServerError` beyond 1 MiB.
    """
    data: list[str] = []
    size = 0
    for line in _lines(pieces):
        if not line:
            if data:
                yield "\n".join(data)
            data = []
            size = 0
            continue
        name, _, value = line.partition(":")
        if not name:
            yield Comment(value.strip())
        elif name == "data":
            data.append(value.removeprefix(" "))
            size += len(data[-1]) + 1
            _check_size(size)
    if data:  # the empty line after it is missing
        yield "\n".join(data)


def _lines(pieces: Iterable[bytes]) -> Iterator[str]:
    unfinished = bytearray()
    for piece in pieces:
        *ends, beginning = piece.split(b"\n")
        for end in ends:
            yield _line(unfinished + end)
            unfinished = bytearray()
        unfinished += beginning
        _check_size(len(unfinished))
    if unfinished:
        yield _line(unfinished)


def _line(line: bytearray) -> str:
    return line.decode("utf-8", "replace").removesuffix("\r")


def _check_size(size: int) -> None:
    if size > _MAX_EVENT:
        raise ServerError("the server sends an event of more than 1 MiB")


def read_chunk(data: str) -> Chunk:
    """Return a piece of an answer, or raise the `ServerError` in it."""
    raw = _object(_json(data))
    if raw.get("error"):
        raise ServerError(str(error_of(0, raw)))
    choices = raw.get("choices") or []
    if not isinstance(choices, list):
        raise ServerError("the server sends choices that are no list")
    choice = _object(choices[0]) if choices else {}
    delta = _object(choice.get("delta") or {})
    calls = delta.get("tool_calls") or []
    if not isinstance(calls, list):
        raise ServerError("the server sends calls that are no list")
    reason = choice.get("finish_reason")
    return Chunk(
        _text(delta.get("content")),
        _text(delta.get("reasoning_content")),
        tuple(map(_call, calls)),
        None if reason is None else _REASONS.get(reason, "stop"),
        _usage(raw.get("usage")),
    )


def _call(raw: object) -> CallDelta:
    call = _object(raw)
    function = _object(call.get("function") or {})
    index = call.get("index")
    if type(index) is not int or not 0 <= index < _MAX_CALLS:
        raise ServerError("the server sends a call of a tool without its number")
    name = _text(function.get("name"))
    arguments = _text(function.get("arguments"))
    return CallDelta(index, arguments, _text(call.get("id")), name)


def _text(value: object) -> str:
    if value is None:
        return ""
    if not isinstance(value, str):
        raise ServerError("the server sends an answer that is no text")
    # JSON can express half of a surrogate pair.
    return value.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def error_of(status: int, raw: object) -> MixchatError:
    """Return the error that a server reports in JSON. `status` is 0 in a stream."""
    code, said = _error(raw)
    if _TOO_LONG in code:
        return PromptTooLongError(f"the server says: {said or code}")
    if _NO_MODEL in code:
        return ModelNotFoundError(f"the server says: {said or code}")
    error_type = _BY_STATUS.get(status, ServerError)
    return error_type(f"the server says: {said or code or f'{status}, without a reason'}")


def parsed_error(body: bytes) -> object:
    """Return the JSON of an error's body, else its text."""
    try:
        return _json(body)
    except ServerError:
        text = body.decode("utf-8", "replace")
        return "" if "<" in text else {"error": text}  # no page of a proxy


def _error(raw: object) -> tuple[str, str]:
    """Return the code of an error and its message."""
    error = raw.get("error", raw) if isinstance(raw, dict) else raw
    if not isinstance(error, dict):
        return "", short_message(error or "")
    message = next((error[key] for key in ("message", "detail") if error.get(key)), "")
    return f"{error.get('code')} {error.get('type')}"[:_MAX_NAME], short_message(message)


def _json(data: bytes | str) -> object:
    try:
        return json.loads(data)
    except (ValueError, RecursionError):
        raise ServerError("the server sends something that is not JSON") from None


def _object(raw: object) -> Mapping[str, Any]:
    if not isinstance(raw, dict):
        raise ServerError("the server sends JSON of another form than OpenAI's API has")
    return raw


def _is_name(name: object) -> bool:
    if not isinstance(name, str) or not 0 < len(name) <= _MAX_NAME:
        return False
    return name.isprintable() and sanitize(name) == name


def _usage(raw: object) -> Usage | None:
    if not isinstance(raw, dict):
        return None
    details = raw.get("prompt_tokens_details")
    cached = _count(details, "cached_tokens") if isinstance(details, dict) else 0
    prompt = _count(raw, "prompt_tokens")
    return Usage(prompt, min(cached, prompt), _count(raw, "completion_tokens"))


def _count(raw: Mapping[str, Any], key: str) -> int:
    count = raw.get(key)
    return count if type(count) is int and 0 < count < 2**53 else 0
