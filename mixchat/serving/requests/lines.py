"""A file of prompts, a JSON object a line."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, BinaryIO, TypeAlias

from mixchat.base.context import UNKNOWN_CONTEXT, Context
from mixchat.base.errors import PromptError
from mixchat.base.progress import in_background
from mixchat.base.quantities import format_size
from mixchat.face.events import End, Event, Failed, Piece
from mixchat.serving.requests.errors import RequestError, field_error, value_error
from mixchat.serving.requests.fields import read_object
from mixchat.text.tool_call import CallDelta, joined_calls

if TYPE_CHECKING:
    from mixchat.face.model import Model
    from mixchat.serving.client.server_model import ServerAnswer, ServerModel

AHEAD = 2  # lines read for each answer at once
_BYTES_PER_BYTE = 6  # for each byte of a prompt, as in \u0041
_MAX_LINE_EXTRA = 1_000_000  # bytes of a line besides its prompt
_MAX_LINE = 100_000_000  # bytes, for a context of any size
_MAX_SKIPPED = 1_000_000_000  # bytes of a line that is too long
_READ_SIZE = 1 << 20  # bytes
_BUSY_TIMEOUT_S = 600.0
_NOT_IN_FILES = ("n", "stream", "stream_options", "logprobs", "top_logprobs")


@dataclass(frozen=True)
class LineDefaults:
    """The defaults of a line: values of a request by their names, and the system prompt."""

    fields: Mapping[str, Any] = field(default_factory=dict)
    system: str | None = None


class Line:
    """A line of the input, and its answer once `is_ready` is set.

    id: is copied into the output. end: of the answer, or the reason for having none.
    """

    def __init__(self, number: int) -> None:
        self.number = number
        self.id = None
        self.text = ""
        self.calls: tuple[CallDelta, ...] = ()
        self.seed: int | None = None
        self.end: End | Failed | None = None
        self.is_ready = threading.Event()

    def take(self, event: Event | Failed) -> None:
        if isinstance(event, Piece):
            self.text += event.text
            self.calls += event.calls
        elif isinstance(event, End | Failed):
            self.end = event
            self.is_ready.set()

    def as_dict(self) -> dict[str, Any]:
        answer = {"line": self.number} | ({} if self.id is None else {"id": self.id})
        if isinstance(self.end, Failed):
            return answer | {"error": str(self.end.error)}
        assert self.end is not None
        calls = [
            {"name": call.name, "arguments": call.arguments} for call in joined_calls(self.calls)
        ]
        stats = self.end.stats
        return answer | {
            "answer": self.text,
            **({"tool_calls": calls} if calls else {}),
            "stop_reason": self.end.reason,
            "seed": self.seed,
            "usage": {
                "prompt_tokens": stats.prompt_tokens,
                "cached_tokens": stats.reused_tokens,
                "generated_tokens": stats.generated_tokens,
            },
        }


# Starts the answer of a line. An error that it raises is the answer.
Begin: TypeAlias = "Callable[[Line, bytes], object]"


def longest_line(context: Context) -> int:
    """Return the most bytes that a line may have."""
    return min(context.longest_text * _BYTES_PER_BYTE + _MAX_LINE_EXTRA, _MAX_LINE)


def numbered_lines(file: BinaryIO, longest: int) -> Iterator[tuple[int, bytes]]:
    """Yield each line with its number from 1 on, cut to `longest` + 1 bytes.

    Raises `PromptError` if a line has no end within 1 GB, as in /dev/zero.
    """
    number = 0
    while line := file.readline(longest + 1):
        number += 1
        yield number, line
        skipped = len(line)
        while line and not line.endswith(b"\n"):
            line = file.readline(_READ_SIZE)
            skipped += len(line)
            if skipped > _MAX_SKIPPED:
                size = format_size(_MAX_SKIPPED)
                raise PromptError(
                    f"line {number} has no end within {size}: this is no file of prompts",
                    hint="Give a file with a JSON object on each line.",
                )


def answer_lines(lines: Iterable[tuple[int, bytes]], begin: Begin, at_once: int) -> Iterator[Line]:
    """Yield the numbered lines with their answers, in their order, without empty lines.

    A thread reads ahead, so that no answer waits for a slow pipe. Raises what reading raises, after
    all lines before it.
    """
    begun: queue.SimpleQueue[Line | BaseException | None] = queue.SimpleQueue()
    room = threading.Semaphore(AHEAD * at_once)

    def read() -> None:
        try:
            for number, text in lines:
                if text.strip():
                    room.acquire()
                    line = Line(number)
                    begun.put(line)
                    try:
                        begin(line, text)
                    except Exception as error:
                        line.take(Failed(error))
        except BaseException as error:
            begun.put(error)
        else:
            begun.put(None)

    in_background(read)
    while (line := begun.get()) is not None:
        if isinstance(line, BaseException):
            raise line
        line.is_ready.wait()
        yield line
        room.release()


def answered_here(model: Model, defaults: LineDefaults) -> Begin:
    """Return what lets a loaded model answer lines."""
    from mixchat.serving.requests.chat import read_chat

    def begin(line: Line, text: bytes) -> None:
        asked = read_chat(body_of(line, text, defaults, model.context), model, True, ExitStack())
        line.seed = asked.sampling.seed
        model.submit((asked.requests[0], asked.prompts[0], line.take))

    return begin


def answered_by(model: ServerModel, defaults: LineDefaults, at_once: int) -> Begin:
    """Return what lets a model of a server answer `at_once` lines at a time."""
    context = model.context or UNKNOWN_CONTEXT
    waiting: queue.SimpleQueue[tuple[Line, Mapping[str, Any]]] = queue.SimpleQueue()

    def begin(line: Line, text: bytes) -> None:
        body = body_of(line, text, defaults, context)
        line.seed = body.get("seed")
        waiting.put((line, body))

    def work() -> None:
        while True:
            line, body = waiting.get()
            try:
                with closing(_sent(model, body)) as events:
                    for event in events:
                        line.take(event)
            except Exception as error:
                line.take(Failed(error))

    for _ in range(at_once):
        in_background(work)
    return begin


def _sent(model: ServerModel, body: Mapping[str, Any]) -> ServerAnswer:
    """Send a body as soon as the server has room for it."""
    from mixchat.serving.client.server_json import BusyError, RefusedError

    deadline = time.monotonic() + _BUSY_TIMEOUT_S
    while True:
        try:
            return model.send(body)
        except RefusedError as error:
            raise RequestError(str(error)) from None
        except BusyError as error:
            if time.monotonic() + error.seconds > deadline:
                raise
            time.sleep(error.seconds)


def body_of(line: Line, text: bytes, defaults: LineDefaults, context: Context) -> dict[str, Any]:
    """Return a line as the body of a chat. Raises `RequestError` and `PromptError`."""
    if len(text) > longest_line(context):
        raise context.text_too_long("the line")
    body = read_object(text, "the line")
    line.id = body.pop("id", None)
    for name in _NOT_IN_FILES:
        if name in body:
            raise field_error(name, "is not for a file of prompts", "unsupported_parameter")
    body = {**defaults.fields, **body}
    if "prompt" in body:
        prompt = body.pop("prompt")
        if not isinstance(prompt, str):
            raise value_error("prompt", "a string", prompt)
        if "messages" in body:
            raise field_error("prompt", "and messages exclude each other")
        body["messages"] = [{"role": "user", "content": prompt}]
    messages = body.get("messages")
    if defaults.system is not None and isinstance(messages, list):
        roles = [message.get("role") for message in messages if isinstance(message, dict)]
        if "system" not in roles:
            body["messages"] = [{"role": "system", "content": defaults.system}, *messages]
    return body
