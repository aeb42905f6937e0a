"""Reads server-sent events, which a server may cut into pieces anywhere."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from mixchat.base.errors import ServerError

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
