"""The contents of frames: each is checked for its shape before anything uses it.

First both ends say who they are, in JSON; then numbers travel, in network byte order. Ranges that
depend on the model are checked by those who know it.
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
from mixchat.experts.keys import ExpertKey
from mixchat.experts.workers.connection import ConnectionLostError
from mixchat.sanitize import sanitize

MAX_ROWS = 1 << 16  # rows of a request, over all of its experts
MAX_SLOTS = 1 << 12  # experts that a worker is told to hold
BEAT = 1.0  # seconds between two signs of a worker that computes
DTYPES = ("bfloat16", "float16", "float32")

_LONGEST = 200  # characters of a text
_REQUEST, _EXPERT, _KEY = struct.Struct(">HBH"), struct.Struct(">HI"), struct.Struct(">HH")
_SECONDS = struct.Struct(">d")

_Fields = TypeVar("_Fields", "Hello", "Welcome", "Refusal")


class Kind(IntEnum):
    """The kinds of frames."""

    HELLO = 1  # chat side: who it is
    WELCOME = 2  # worker: what it has
    REFUSAL = 3  # worker: why it will not serve
    STORE = 4  # both: what the group's members tell each other to meet
    HOLD = 5  # chat side: which experts to load
    COMPUTE = 6  # chat side: which experts compute, with rows that travel over the group
    BUSY = 7  # worker: it still computes
    DONE = 8  # worker: the result is in the group
    FAILED = 9  # worker: why it cannot compute


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


def pack_fields(value: Hello | Welcome | Refusal) -> bytes:
    """Return what a frame says of one end."""
    return json.dumps(asdict(value)).encode()


def unpack_hello(payload: bytes) -> Hello:
    """Return the chat side's words. Raises `ConnectionLostError`."""
    hello = _unpack_fields(Hello, payload)
    _require(hello.dtype in DTYPES and hello.hidden_size > 0)
    return hello


def unpack_welcome(payload: bytes) -> Welcome:
    """Return the worker's words. Raises `ConnectionLostError`."""
    welcome = _unpack_fields(Welcome, payload)
    _require(2 <= welcome.slots <= MAX_SLOTS)
    return welcome


def unpack_refusal(payload: bytes) -> Refusal:
    """Return the worker's words. Raises `ConnectionLostError`."""
    return _unpack_fields(Refusal, payload)


def pack_keys(keys: Sequence[ExpertKey]) -> bytes:
    """Return the frame of the experts to hold."""
    return b"".join(_KEY.pack(*key) for key in keys)


def unpack_keys(payload: bytes) -> list[ExpertKey]:
    """Return the experts to hold; none is there twice. Raises `ConnectionLostError`."""
    _require(len(payload) % _KEY.size == 0)
    keys = [ExpertKey(*numbers) for numbers in _KEY.iter_unpack(payload)]
    _require(len(set(keys)) == len(keys) <= MAX_SLOTS)
    return keys


def pack_request(request: Request) -> bytes:
    """Return the frame of a request."""
    head = _REQUEST.pack(request.layer, request.shared_row, len(request.experts))
    return head + b"".join(_EXPERT.pack(*expert) for expert in request.experts)


def unpack_request(payload: bytes) -> Request:
    """Return a request; no expert is there twice. Raises `ConnectionLostError`."""
    _require(len(payload) >= _REQUEST.size)
    layer, shared_row, count = _REQUEST.unpack_from(payload)
    _require(shared_row <= 1 and len(payload) == _REQUEST.size + count * _EXPERT.size)
    experts = tuple(_EXPERT.iter_unpack(payload[_REQUEST.size :]))
    request = Request(layer, experts, bool(shared_row))
    _require(len({expert for expert, _ in experts}) == count > 0)
    _require(all(rows > 0 for _, rows in experts) and request.rows <= MAX_ROWS)
    _require(not shared_row or request.rows == count)
    return request


def pack_seconds(seconds: float) -> bytes:
    """Return the frame that says how long a request was computed."""
    return _SECONDS.pack(seconds)


def unpack_seconds(payload: bytes) -> float:
    """Return the seconds that a request was computed. Raises `ConnectionLostError`."""
    _require(len(payload) == _SECONDS.size)
    (seconds,) = _SECONDS.unpack(payload)
    _require(math.isfinite(seconds) and seconds >= 0)
    return float(seconds)


def pack_text(text: str) -> bytes:
    """Return the frame of a line, which may name a path that is not UTF-8."""
    return text.encode(errors="replace")


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


def _odd() -> ConnectionLostError:
    return ConnectionLostError("it sent a message that makes no sense")
