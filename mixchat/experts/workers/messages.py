"""The messages of both ends. Each is checked for its shape before anything uses it.

A message is a line of JSON, and then the first of its rows. More rows follow without JSON.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Literal, TypeVar

import torch
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    TypeAdapter,
    ValidationError,
    model_validator,
)

from mixchat import __version__
from mixchat.base.sanitize import sanitize
from mixchat.experts.workers.sockets import PIECE, BadMessageError

MAX_ROWS = 1 << 16  # of a request, over all of its experts
MAX_EXPERTS = 1 << 12  # of a layer
MAX_SLOTS = 1 << 16  # experts that a worker is told to hold
_MAX_TEXT = 200  # characters

Cause = Literal["busy", "version", "model", "room", "other"]
DTYPES = ("bfloat16", "float16", "float32")


def _clean(value: object) -> object:
    if not isinstance(value, str):
        return value
    # A path that is not UTF-8 could not be sent, and that ended the worker.
    text = value[:_MAX_TEXT].encode(errors="replace").decode()
    return " ".join(sanitize(text).split())


_Text = Annotated[str, BeforeValidator(_clean)]
_Index = Annotated[int, Field(ge=0, lt=1 << 16)]
_Rows = Annotated[int, Field(gt=0, le=MAX_ROWS)]


class WorkerMessage(BaseModel):
    """A message. `type` names it on the wire."""

    model_config = ConfigDict(strict=True, frozen=True, extra="forbid")


class Hello(WorkerMessage):
    """The chat side's first message, with its version and its model."""

    type: Literal["hello"] = "hello"
    model_identity: _Text  # hexadecimal
    model_name: _Text
    dtype: str = Field(pattern=f"^({'|'.join(DTYPES)})$")  # of the rows
    hidden_size: int = Field(gt=0)
    exact_prompts: bool = False
    version: _Text = __version__


class Welcome(WorkerMessage):
    """The worker's answer, with its slots and its `LinearSpec.arithmetic`."""

    type: Literal["welcome"] = "welcome"
    slots: int = Field(ge=2, le=MAX_SLOTS)
    arithmetic: _Text


class Refusal(WorkerMessage):
    """The worker's answer if it does not serve the chat.

    text: the worker's version or model, if that is the cause, and otherwise a line for people.
    """

    type: Literal["refusal"] = "refusal"
    cause: Cause
    text: _Text


class Hold(WorkerMessage):
    """The chat side's list of experts to load, each (layer, expert)."""

    type: Literal["hold"] = "hold"
    keys: tuple[tuple[_Index, _Index], ...] = Field(max_length=MAX_SLOTS)

    @model_validator(mode="after")
    def _check(self) -> Hold:
        if len(set(self.keys)) < len(self.keys):
            raise ValueError("an expert is there twice")
        return self


class Compute(WorkerMessage):
    """A request for experts of a layer, each (expert, rows). With `shared_row` all get one row."""

    type: Literal["compute"] = "compute"
    layer: _Index
    experts: tuple[tuple[_Index, _Rows], ...] = Field(min_length=1, max_length=MAX_EXPERTS)
    shared_row: bool

    @property
    def rows(self) -> int:
        """Return the number of rows of the result."""
        return sum(rows for _, rows in self.experts)

    @property
    def rows_sent(self) -> int:
        """Return the number of rows that follow."""
        return 1 if self.shared_row else self.rows

    @model_validator(mode="after")
    def _check(self) -> Compute:
        count = len(self.experts)
        if len({expert for expert, _ in self.experts}) < count:
            raise ValueError("an expert is there twice")
        if self.rows > MAX_ROWS or (self.shared_row and self.rows != count):
            raise ValueError("it has too many rows")
        return self


class Computed(WorkerMessage):
    """The worker's answer, with the seconds that it computed. The result's rows follow."""

    type: Literal["computed"] = "computed"
    seconds: float = Field(ge=0, allow_inf_nan=False)


class Ended(WorkerMessage):
    """The worker's last message: why it ends the chat."""

    type: Literal["ended"] = "ended"
    reason: _Text


_Message = TypeVar("_Message", bound=WorkerMessage)
_ANY: TypeAdapter[WorkerMessage] = TypeAdapter(
    Annotated[
        Hello | Welcome | Refusal | Hold | Compute | Computed | Ended, Field(discriminator="type")
    ]
)


def pack(message: WorkerMessage, rows: bytes | memoryview = b"") -> bytes:
    """Return the bytes of a message, with its first rows."""
    return b"".join((message.model_dump_json().encode(), b"\n", rows))


def unpack(data: bytes) -> tuple[WorkerMessage, bytes]:
    """Return a message of any kind, and its first rows. Raises `BadMessageError`."""
    line, _, rows = data.partition(b"\n")
    try:
        message = _ANY.validate_json(line)
    except ValidationError:
        message = None
    if message is None or (rows and not isinstance(message, Compute | Computed)):
        raise BadMessageError("it sent a message that makes no sense")
    return message, rows


def expect(message_type: type[_Message], message: WorkerMessage) -> _Message:
    """Return the message. Raises `BadMessageError` if it is of another type."""
    if not isinstance(message, message_type):
        raise BadMessageError("it sent a message out of turn")
    return message


def send_rows(send: Callable[[bytes], None], message: WorkerMessage, rows: torch.Tensor) -> None:
    """Send a message and its rows, in pieces."""
    data = _bytes_of(rows.contiguous())
    send(pack(message, data[:PIECE]))
    for start in range(PIECE, len(data), PIECE):
        send(bytes(data[start : start + PIECE]))


def receive_rows(rows: torch.Tensor, piece: bytes, receive: Callable[[], bytes]) -> torch.Tensor:
    """Fill `rows` with a piece and those that follow. Raises `ConnectionLostError`."""
    data = _bytes_of(rows)
    filled = 0
    while True:
        # The size is known from the request, so a longer or shorter piece is a fault of the sender.
        if len(piece) != min(PIECE, len(data) - filled):
            raise BadMessageError("it sent rows of another size")
        data[filled : filled + len(piece)] = piece
        filled += len(piece)
        if filled == len(data):
            return rows
        piece = receive()


def _bytes_of(rows: torch.Tensor) -> memoryview:
    return rows.view(-1).view(torch.uint8).numpy().data


def describe_model(name: str, identity: str) -> str:
    """Return a text that tells people one model from another."""
    return f"{name} ({identity[:12]})"
