"""The messages between both ends: each is checked for its shape before anything uses it.

A message begins with its kind. Both ends say who they are in JSON. Then numbers travel in network
byte order. Ranges that depend on the model are checked by those who know it.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from enum import IntEnum
from typing import Any, TypeVar

from mixchat import __version__
from mixchat.base.sanitize import sanitize
from mixchat.experts.cache import ExpertKey
from mixchat.experts.workers.connection import BadMessageError

MAX_ROWS = 1 << 16  # rows of a request, over all of its experts
MAX_EXPERTS = 1 << 12  # of a layer
MAX_SLOTS = 1 << 12  # experts that a worker is told to hold
DTYPES = ("bfloat16", "float16", "float32")

_LONGEST = 200  # characters of a text
_REQUEST, _EXPERT = struct.Struct(">BHBH"), struct.Struct(">HI")
_KEY, _DONE = struct.Struct(">HH"), struct.Struct(">Bd")

_Fields = TypeVar("_Fields", "Hello", "Welcome", "Refusal")


class Kind(IntEnum):
    """The kinds of messages."""

    NOTHING = 0  # an empty message, which nobody sends
    HELLO = 1  # chat side: who it is
    WELCOME = 2  # worker: what it has
    REFUSAL = 3  # worker: why it will not serve
    HOLD = 4  # chat side: which experts to load
    COMPUTE = 5  # chat side: which experts compute; their rows follow
    DONE = 6  # worker: the seconds that it has computed; the result's rows follow
    FAILED = 7  # worker: why it cannot compute


@dataclass(frozen=True)
class Hello:
    """The chat side: its model, by identity (hexadecimal) and name, and what will travel."""

    model_identity: str
    model_name: str
    dtype: str  # of the rows: one of `DTYPES`
    hidden_size: int
    exact_prompts: bool = False
    version: str = __version__  # mixchat's


@dataclass(frozen=True)
class Welcome:
    """The worker: how many experts it can hold, and its `LinearSpec.arithmetic`."""

    slots: int
    arithmetic: str


@dataclass(frozen=True)
class Refusal:
    """The reason why a worker does not serve a chat: `cause` for programs, `text` for people.

    cause: busy, version, model, room, or other; text: the worker's own version or model, if that
    is the cause; else a line.
    """

    cause: str
    text: str


@dataclass(frozen=True)
class Request:
    """Experts of a layer, each with the number of its rows, expert by expert.

    shared_row: the one row that travels is for all of them; each has 1 row.
    """

    layer: int
    experts: tuple[tuple[int, int], ...]
    shared_row: bool = False

    @property
    def rows(self) -> int:
        """Return the number of rows of the result."""
        return sum(rows for _, rows in self.experts)

    @property
    def rows_sent(self) -> int:
        """Return the number of rows that the chat side sends."""
        return 1 if self.shared_row else self.rows


def describe_model(name: str, identity: str) -> str:
    """Return what tells people one model from another."""
    return f"{name} ({identity[:12]})"


def kind_of(message: bytes) -> int:
    """Return a message's kind, which may be none of `Kind`."""
    return message[0] if message else Kind.NOTHING


def expect(kind: Kind, message: bytes) -> bytes:
    """Return what a message of this kind says. Raises `BadMessageError` if it is of another."""
    if kind_of(message) != kind:
        raise BadMessageError("it sent a message out of turn")
    return message[1:]


def pack_fields(kind: Kind, value: Hello | Welcome | Refusal) -> bytes:
    """Return the message in which one end speaks of itself."""
    return bytes([kind]) + json.dumps(asdict(value)).encode()


def unpack_hello(payload: bytes) -> Hello:
    """Return the chat side's words. Raises `BadMessageError`."""
    hello = _unpack_fields(Hello, payload)
    _require(hello.dtype in DTYPES and hello.hidden_size > 0)
    return hello


def unpack_welcome(payload: bytes) -> Welcome:
    """Return the worker's words. Raises `BadMessageError`."""
    welcome = _unpack_fields(Welcome, payload)
    _require(2 <= welcome.slots <= MAX_SLOTS)
    return welcome


def unpack_refusal(payload: bytes) -> Refusal:
    """Return the worker's words. Raises `BadMessageError`."""
    return _unpack_fields(Refusal, payload)


def pack_keys(keys: Sequence[ExpertKey]) -> bytes:
    """Return the message that names the experts to hold."""
    return bytes([Kind.HOLD]) + b"".join(_KEY.pack(*key) for key in keys)


def unpack_keys(payload: bytes) -> list[ExpertKey]:
    """Return the experts to hold; none is there twice. Raises `BadMessageError`."""
    _require(len(payload) % _KEY.size == 0)
    keys = [ExpertKey(*numbers) for numbers in _KEY.iter_unpack(payload)]
    _require(len(set(keys)) == len(keys) <= MAX_SLOTS)
    return keys


def pack_request(request: Request) -> bytes:
    """Return the beginning of a request, before its rows."""
    head = _REQUEST.pack(Kind.COMPUTE, request.layer, request.shared_row, len(request.experts))
    return head + b"".join(_EXPERT.pack(*expert) for expert in request.experts)


def unpack_request(message: bytes) -> tuple[Request, bytes]:
    """Return a request, in which no expert is there twice, and its first rows.

    Raises `BadMessageError`.
    """
    _require(len(message) >= _REQUEST.size)
    _, layer, shared_row, count = _REQUEST.unpack_from(message)
    end = _REQUEST.size + count * _EXPERT.size
    _require(shared_row <= 1 and len(message) >= end)
    experts = tuple(_EXPERT.iter_unpack(message[_REQUEST.size : end]))
    request = Request(layer, experts, bool(shared_row))
    _require(0 < len({expert for expert, _ in experts}) == count <= MAX_EXPERTS)
    _require(all(rows > 0 for _, rows in experts) and request.rows <= MAX_ROWS)
    _require(not shared_row or request.rows == count)
    return request, message[end:]


def pack_done(seconds: float) -> bytes:
    """Return the beginning of a result, before its rows."""
    return _DONE.pack(Kind.DONE, seconds)


def unpack_done(message: bytes) -> tuple[float, bytes]:
    """Return the seconds that a request was computed, and the first rows of the result.

    Raises `BadMessageError`.
    """
    expect(Kind.DONE, message)
    _require(len(message) >= _DONE.size)
    _, seconds = _DONE.unpack_from(message)
    _require(math.isfinite(seconds) and seconds >= 0)
    return float(seconds), message[_DONE.size :]


def pack_fault(text: str) -> bytes:
    """Return the message of a fault in one line, which may name a path that is not UTF-8."""
    return bytes([Kind.FAILED]) + text.encode(errors="replace")


def unpack_text(payload: bytes) -> str:
    """Return the other end's line, safe to show."""
    return _clean(payload.decode(errors="replace"))


def _unpack_fields(kind: type[_Fields], payload: bytes) -> _Fields:
    try:
        values = json.loads(payload)
    except (ValueError, RecursionError):
        raise _odd() from None
    types = {field.name: str(field.type) for field in fields(kind)}
    _require(isinstance(values, dict) and values.keys() == types.keys())
    for name, value in values.items():
        _require(type(value).__name__.replace("NoneType", "None") in types[name].split(" | "))
        if isinstance(value, str):
            values[name] = _clean(value)
    result: Any = kind(**values)
    return result  # type: ignore[no-any-return]


def _clean(text: str) -> str:
    return " ".join(sanitize(text[:_LONGEST]).split())


def _require(condition: bool) -> None:
    if not condition:
        raise _odd()


def _odd() -> BadMessageError:
    return BadMessageError("it sent a message that makes no sense")
