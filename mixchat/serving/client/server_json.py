"""Reads what a server with OpenAI's API sends: its models, events, errors."""

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

_LONGEST = 2**20  # bytes of an event: a server could fill the memory


@dataclass(frozen=True)
class Data:
    """An event's data."""

    text: str


@dataclass(frozen=True)
class Comment:
    """A line that is no event: servers send them so that nobody cuts a silent connection."""

    text: str


def events(pieces: Iterable[bytes]) -> Iterator[Data | Comment]:
    """Yield the events of a stream, and comments; other fields are left out.

    Lines end with LF or CRLF. What is not UTF-8 becomes U+FFFD. Raises `ServerError` where an event
    is longer than 1 MiB.
    """
    data: list[str] = []
    size = 0
    for line in _lines(pieces):
        name, _, value = line.partition(":")
        if not line:
            if data:
                yield Data("\n".join(data))
            data, size = [], 0
        elif not name:
            yield Comment(value.strip())
        elif name == "data":
            data.append(value.removeprefix(" "))
            size += len(data[-1]) + 1
            if size > _LONGEST:
                raise _too_long()
    if data:  # the empty line behind it is missing
        yield Data("\n".join(data))


def _lines(pieces: Iterable[bytes]) -> Iterator[str]:
    rest = bytearray()
    for piece in pieces:
        start = len(rest)  # before it there is no newline
        rest += piece
        while (end := rest.find(b"\n", start)) >= 0:
            yield _text(rest[:end])
            del rest[: end + 1]
            start = 0
        if len(rest) > _LONGEST:
            raise _too_long()
    if rest:
        yield _text(rest)


def _text(line: bytearray) -> str:
    return line.decode("utf-8", "replace").removesuffix("\r")


def _too_long() -> ServerError:
    return ServerError("the server sends an event of more than 1 MiB")


_LONGEST_NAME = 200  # characters
# The codes, and words of a message, that servers have for a prompt that does not fit.
_TOO_LONG = ("context_length_exceeded", "exceed_context_size_error", "maximum context length")
_NO_MODEL = "model_not_found"


class BusyError(ServerError):
    """The server takes no more requests for now; another attempt may do better in `seconds`."""

    seconds = 2.0


class RefusedError(ServerError):
    """The server does not take just this request."""


_BY_STATUS: dict[int, type[ServerError]] = {
    **dict.fromkeys((400, 413, 422), RefusedError),
    **dict.fromkeys((429, 503), BusyError),
}


@dataclass(frozen=True)
class ListedModel:
    """A model of a server; `context_size` in tokens, None where the server does not tell it."""

    name: str
    context_size: int | None = None


@dataclass(frozen=True)
class Usage:
    """The counts of an answer's tokens."""

    prompt_tokens: int
    cached_tokens: int
    generated_tokens: int


@dataclass(frozen=True)
class Piece:
    """The next piece of an answer. `reason` is why it ended: stop or length, None before that."""

    text: str = ""
    reason: str | None = None
    usage: Usage | None = None


def read_models(body: bytes) -> list[ListedModel]:
    """Return the models of a list; those whose names cannot be shown are left out.

    mixchat's own server tells the size of the context as `context_size`. Raises `ServerError`.
    """
    listed = _object(_json(body)).get("data")
    if not isinstance(listed, list):
        raise ServerError("the server sends no list of models: is it one with OpenAI's API?")
    models = [_object(each) for each in listed]
    return [
        ListedModel(each["id"], _count(each, "context_size") or None)
        for each in models
        if _is_name(each.get("id"))
    ]


def read_piece(data: str) -> Piece:
    """Return a piece of an answer. Raises `ServerError`, also for one that the server sends."""
    raw = _object(_json(data))
    if raw.get("error"):
        raise ServerError(str(error_of(0, raw)))
    choices = raw.get("choices") or []
    if not isinstance(choices, list):
        raise ServerError("the server sends choices that are no list")
    own = [choice for choice in map(_object, choices) if not choice.get("index")]
    choice = own[0] if own else {}
    text = _object(choice.get("delta") or {}).get("content")
    if text is not None and not isinstance(text, str):
        raise ServerError("the server sends an answer that is no text")
    return Piece(_whole_characters(text or ""), _reason(choice), _usage(raw.get("usage")))


def error_of(status: int, raw: object) -> MixchatError:
    """Return the error that a server reports in JSON, with an HTTP status or, 0, in a stream."""
    code, said = _error(raw)
    if any(words in code or words in said for words in _TOO_LONG):
        return PromptTooLongError(f"the server says: {said or code}")
    if _NO_MODEL in code or (status == 404 and "model" in said.lower()):
        return ModelNotFoundError(f"the server says: {said or code}")
    kind = _BY_STATUS.get(status, ServerError)
    return kind(f"the server says: {said or code or f'{status}, without a reason'}")


def parsed_error(body: bytes) -> object:
    """Return the JSON of an error's body, or its text where it is none."""
    try:
        return _json(body)
    except ServerError:
        text = body.decode("utf-8", "replace")
        return "" if "<" in text else {"error": text}  # no page of a proxy


def _error(raw: object) -> tuple[str, str]:
    """Return the code and the message of an error, in one of the forms that servers have."""
    found = raw.get("error", raw) if isinstance(raw, dict) else raw
    if not isinstance(found, dict):
        return "", short_message(found or "")
    said = next((found[key] for key in ("message", "detail") if found.get(key)), "")
    return f"{found.get('code')} {found.get('type')}"[:_LONGEST_NAME], short_message(said)


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
    """Return whether a model's name can be shown, and typed."""
    if not isinstance(name, str) or not 0 < len(name) <= _LONGEST_NAME:
        return False
    return name.isprintable() and sanitize(name) == name


def _reason(choice: Mapping[str, Any]) -> str | None:
    reason = choice.get("finish_reason")
    return None if not reason else "length" if reason == "length" else "stop"


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


def _whole_characters(text: str) -> str:
    """Return the text with U+FFFD for each lone surrogate, which JSON can express."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
